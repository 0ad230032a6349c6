"""Load the compiled extension, cptool._C, or report how to build it if it is missing or stale."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

_SOURCES = (".h", ".in", ".cpp", ".cuh", ".cu")
_REMEDY = "build it with `pip install .` (or `pip install -e .`) in the checkout of cptool"


def source_hash(csrc: Path) -> str:
    """Return the hex digest of the names and contents of the sources under `csrc`.

    setup.py compiles it into the extension.
    """
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in _SOURCES):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _candidates(package: Path) -> Iterator[Path]:
    """Yield the paths of extensions beside the package, then of installed ones.

    `python -m cptool` and `torchrun -m cptool` in a checkout import the checkout's package, which
    has no extension unless the install was editable: the one that `pip install .` put elsewhere
    serves it.
    """
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        yield package / f"_C{suffix}"
    for distribution in importlib.metadata.distributions(name="cptool"):
        for file in distribution.files or ():
            if file.parent.as_posix() == "cptool" and file.name.startswith("_C."):
                yield Path(str(distribution.locate_file(file)))


def _import(path: Path, attempt: int) -> ModuleType:
    # pybind11 creates one module per name in a process, so every attempt needs its own name.
    spec = importlib.util.spec_from_file_location(f"cptool.{attempt}._C", path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is not a module that Python can load; {_REMEDY}")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _mismatch(module: ModuleType, package: Path) -> str | None:
    from cptool import __version__

    if module.version != __version__:
        return (
            f"cptool is version {__version__}, its compiled extension {module.__file__} is "
            f"{module.version}; {_REMEDY}"
        )
    csrc = package.parent / "csrc"  # absent from an installed package
    if csrc.is_dir() and module.source_hash and module.source_hash != source_hash(csrc):
        return (
            f"cptool's compiled extension {module.__file__} was not built from the sources in "
            f"{csrc}; {_REMEDY}"
        )
    return None


def load() -> ModuleType:
    """Import and return the extension module.

    Raises:
        ImportError: There is none, or each was built for another version than the package's or from
            other sources than the checkout's. The message is one line.
    """
    package = Path(__file__).resolve().parent.parent
    mismatches: list[str] = []
    for path in _candidates(package):
        if not path.is_file():
            continue
        module = _import(path, attempt=len(mismatches))
        mismatch = _mismatch(module, package)
        if mismatch is None:
            sys.modules["cptool._C"] = module
            return module
        mismatches.append(mismatch)
    if mismatches:
        raise ImportError(mismatches[0])
    raise ImportError(f"cptool's compiled extension is missing beside {package}; {_REMEDY}")
