"""The weight files of Meta's layout, and the tensors that they divide among them.

Each file is what one rank of a tensor-parallel group held. checklist.chk, if there is one, names
the files with their MD5.
"""

from collections.abc import Sequence
from pathlib import Path

from cptool.checkpoint.lookalikes import dangling
from cptool.checkpoint.meta.torch_file import read_header
from cptool.checkpoint.tensors import AnyTensor, JoinedTensor
from cptool.errors import UserError
from cptool.model.architectures.family import Family, Size, Weight


def find_files(path: Path) -> list[Path]:
    """Return the weight files in the order of their ranks; UserError if one is missing."""
    files = sorted(path.glob("consolidated*.pth"))
    for file in files:
        if (why := dangling(file)) is not None:
            raise UserError(f"{file}: {why}")
    expected = {f"consolidated.{i:02}.pth" for i in range(len(files))}
    if len(files) == 1:
        expected = {files[0].name} & {"consolidated.pth", *expected}
    listed = {name for name in checksums(path) if name.startswith("consolidated")}
    if missing := sorted((listed | expected) - {file.name for file in files}):
        raise UserError(
            f"{path}: {missing[0]} is missing beside {len(files)} other files of weights; fetch it"
        )
    if not expected and any(path.glob("consolidated*.safetensors")):
        raise UserError(
            f"{path}: its weights are in Mistral's own layout, which is not supported; use a "
            f"checkpoint of the model in the Hugging Face layout, or a GGUF of it"
        )
    if not expected:
        raise UserError(f"{path}: no consolidated.00.pth in it; fetch the weights")
    return files


def checksums(directory: Path) -> dict[str, str]:
    """Return the MD5 sums by file name, out of the lists that may be beside the files."""
    lines = [
        line.split()
        for file in sorted(directory.glob("*checklist.chk"))
        for line in file.read_text("utf-8", errors="replace").splitlines()
    ]
    return {Path(words[1]).name: words[0] for words in lines if len(words) == 2}


def join_files(
    files: Sequence[Path], family: Family, hidden: int, *, heads: int, kv_heads: int
) -> dict[str, AnyTensor]:
    """Return all tensors by their Hugging Face names, each with its parts in all files.

    `hidden`, `heads` and `kv_heads` are the width of the model and its numbers of heads.
    """
    headers = [read_header(file) for file in files]
    first = headers[0]
    for file, header in zip(files[1:], headers[1:], strict=True):
        for name in sorted(first.keys() | header.keys()):
            a, b = first.get(name), header.get(name)
            if a is None or b is None or (a.shape, a.encoding) != (b.shape, b.encoding):
                raise UserError(
                    f"{file}: tensor {name!r} is not as in {files[0].name}; the files are not of "
                    f"one model, fetch them again"
                )
    found: dict[str, AnyTensor] = {}
    for name in first.keys() - {"rope.freqs"}:  # Older files store what rope_theta says.
        parts = tuple(header[name] for header in headers)
        known = family.find(name, "meta")
        weight, theirs = known or (None, name)
        dim = None if weight is None else _divided_dim(weight, parts[0].shape, hidden)
        if weight and weight.shape[0] is Size.KEYS and len(parts) % kv_heads == 0:
            # More files than heads: each head is in several, one after the other.
            parts = parts[:: len(parts) // kv_heads]
        if weight and weight.by_head:
            count = heads if weight.shape[0] is Size.QUERIES else kv_heads
            parts = tuple(part for part in parts for _ in range(max(1, count // len(parts))))
        whole = dim is None or len(parts) == 1
        found[theirs] = parts[0] if dim is None or whole else JoinedTensor(parts, dim)
    return found


def _divided_dim(weight: Weight, part: tuple[int, ...], hidden: int) -> int | None:
    """Return the dimension along which files divide a weight; None if each has it whole.

    It is that of tensor parallelism, and of the embedding and the output matrix the vocabulary, or
    the width (the embedding of Llama 1 and 2). `part` is the shape in one file.
    """
    if len(part) != len(weight.shape):  # A misshapen tensor, which is refused later.
        return None
    for dim, size in enumerate(weight.shape):
        if size in (Size.QUERIES, Size.KEYS, Size.FFN):
            return dim
    if Size.VOCABULARY not in weight.shape:
        return None
    return 0 if part[-1:] == (hidden,) else 1
