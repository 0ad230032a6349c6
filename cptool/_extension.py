"""Finds and loads the compiled extension, cptool._C, and says what to do when it is missing or stale."""

from __future__ import annotations

import hashlib
import importlib.machinery
import importlib.metadata
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

_SOURCES = (".h", ".cpp", ".cuh", ".cu")
_REMEDY = "build it with `pip install .` (or `pip install -e .`) in the checkout of cptool"


def source_hash(csrc: Path) -> str:
    """Hex digest of the names and contents of the sources under `csrc`; setup.py bakes it into the extension."""
    digest = hashlib.sha256()
    for path in sorted(path for path in csrc.rglob("*") if path.suffix in _SOURCES):
        digest.update(f"{path.relative_to(csrc).as_posix()}\0".encode())
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


def _beside_package(package: Path) -> Path | None:
    for suffix in importlib.machinery.EXTENSION_SUFFIXES:
        path = package / f"_C{suffix}"
        if path.is_file():
            return path
    return None


def _installed() -> Path | None:
    # `python -m cptool` and `torchrun -m cptool` in a checkout import the checkout's package, which has no extension unless
    # the install was editable: the one that `pip install .` put elsewhere serves it.
    for distribution in importlib.metadata.distributions(name="cptool"):
        for file in distribution.files or ():
            if file.parent.as_posix() == "cptool" and file.name.startswith("_C."):
                path = Path(distribution.locate_file(file))
                if path.is_file():
                    return path
    return None


def load() -> ModuleType:
    """The extension module.

    Raises ImportError, one line, if it is missing, or if it was built from other sources or for another version than the
    package that loads it. Sources are compared in a checkout only.
    """
    from cptool import __version__

    package = Path(__file__).resolve().parent
    path = _beside_package(package) or _installed()
    if path is None:
        raise ImportError(f"cptool's compiled extension is missing beside {package}; {_REMEDY}")
    spec = importlib.util.spec_from_file_location("cptool._C", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    if module.version != __version__:
        raise ImportError(f"cptool is version {__version__}, its compiled extension {path} is {module.version}; {_REMEDY}")
    csrc = package.parent / "csrc"  # absent from an installed package
    if csrc.is_dir() and module.source_hash and module.source_hash != source_hash(csrc):
        raise ImportError(f"cptool's compiled extension {path} was not built from the sources in {csrc}; {_REMEDY}")
    sys.modules["cptool._C"] = module
    return module
