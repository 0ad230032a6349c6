"""What a file that is not the expected one is, so that the refusal names the right remedy.

Fetching again helps if a file is damaged. It does not help if the file is a pointer, an error page
or a sound file of another kind.
"""

from pathlib import Path

# How a file begins, and what it then is with what to do about it.
_BEGINNINGS: tuple[tuple[bytes, str], ...] = (
    (
        b"version https://git-lfs",
        "a Git LFS pointer in place of the file; fetch the file itself with: git lfs pull",
    ),
    (b"GGUF", "a GGUF file; give its own path, with the name ending in .gguf"),
    (b"FUGG", "a big-endian GGUF file, which is not supported; convert the model anew"),
    (
        b"\x80\x02\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19.",
        "a file of torch.save before version 1.6; load it with torch and save it anew",
    ),
    (b"PK\3\4", "a ZIP archive, as torch.save writes or to be unpacked; see what is in it"),
    (b"\x1f\x8b", "a gzip archive; unpack it first"),
    (b"BZh", "a bzip2 archive; unpack it first"),
    (b"\xfd7zXZ\0", "an xz archive; unpack it first"),
    (b"\x28\xb5\x2f\xfd", "a Zstandard archive; unpack it first"),
    (b"7z\xbc\xaf'\x1c", "a 7-Zip archive; unpack it first"),
    (b"\x89HDF\r\n\x1a\n", "an HDF5 file; use a safetensors checkpoint of the model"),
    (b"\x93NUMPY", "a NumPy array; use a safetensors checkpoint of the model"),
    *(
        (magic, "a GGML file from before GGUF; convert the model anew with llama.cpp")
        for magic in (b"lmgg", b"tjgg", b"fmgg", b"algg", b"ggml", b"ggjt", b"ggmf", b"ggla")
    ),
)
_PAGES = (b"<!doctype", b"<html", b"<?xml", b"<head")


def describe(beginning: bytes) -> str | None:
    """Return what a file with this beginning is, and the remedy; None if that is not known."""
    for magic, what in _BEGINNINGS:
        if beginning.startswith(magic):
            return what
    text = beginning[:512].lstrip(b"\xef\xbb\xbf \t\r\n").lower()
    if text.startswith(_PAGES):
        return "a web page saved in place of the file; fetch the file itself"
    if beginning.startswith((b"\xff\xfe", b"\xfe\xff", b"\xef\xbb\xbf")):
        return "text in UTF-16, or in UTF-8 after a byte-order mark; save it in plain UTF-8"
    if beginning[257:262] == b"ustar":
        return "a tar archive; unpack it first"
    if not beginning:
        return "an empty file; fetch the file again"
    if not beginning.strip(b"\0"):
        return "a file of zero bytes, as an interrupted download leaves it; fetch the file again"
    return None


def dangling(path: Path) -> str | None:
    """Return what is wrong with a path that is a link to nothing; None if it is not one."""
    if path.is_symlink() and not path.exists():
        return (
            f"a link to {path.readlink()}, which does not exist; the download is incomplete, so "
            f"download the model again or restore the link"
        )
    return None


def absent(path: Path) -> str:
    """Return why a needed file cannot be read: a link to nothing, a directory, or missing."""
    if (why := dangling(path)) is not None:
        return why
    return "not a regular file" if path.exists() else "missing"
