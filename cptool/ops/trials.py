"""Which CUDA kernels are used on a device: those that pass their self-test there.

The first time that a build meets a kind of device, each attention kernel runs its self-test in a
process of its own, because a wrong kernel can hang or leave its process without a device. One that
fails is not used there, nor is a faster one, whose remaining calls it would take; the next slower
kernel is. The result is kept in the cache, and `cptool doctor` tests again.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cptool.errors import RunError, UserError
from cptool.files import cache_dir, make_private, replace_whole
from cptool.ops import kernels

PATIENCE_S = 45.0
"""For a self-test that starts Python, torch and CUDA, and computes for a second."""

FAILED = 4
"""Exit code of a self-test that found a wrong result."""

_DRIVER = Path("/proc/driver/nvidia/version")


@dataclass(frozen=True)
class Trial:
    """What the self-tests of the attention kernels said on a kind of device.

    faults: why each kernel failed, None for one that is right; slowest kernel first.
    """

    device: str
    faults: dict[str, str | None]

    @property
    def best(self) -> str | None:
        """The fastest kernel to use: it and all slower ones, which take what it leaves, are
        right.
        """
        best = None
        for kernel, fault in self.faults.items():
            if fault is not None:
                break
            best = kernel
        return best

    @property
    def complaint(self) -> str | None:
        """The line for the user; None if all kernels are right."""
        wrong = [f"{name}: {fault}" for name, fault in self.faults.items() if fault is not None]
        if not wrong:
            return None
        if self.best is None:
            used = "no kernel can be used there; use --device cpu"
        else:
            used = f"{self.best}, which is slower, is used instead"
        return (
            f"on {self.device} a kernel failed its self-test ({'; '.join(wrong)}); {used}. Please "
            "report this line with what `cptool doctor --json` prints"
        )


def settle(index: int) -> str | None:
    """Limit this process to the kernels that are right on GPU `index`, and return the line for the
    user if some are not.

    The self-tests run here if their results are not kept. CPTOOL_CUDA_KERNEL overrides them.
    Raises UserError if no kernel can be used.
    """
    if os.environ.get("CPTOOL_CUDA_KERNEL"):
        return None
    with _alone(index):
        trial = kept(index) or remember(index, _run(index))
    if trial.best is None:
        raise UserError(str(trial.complaint))
    if trial.best != list(trial.faults)[-1]:
        kernels.limit_cuda_kernels(trial.best)
    return trial.complaint


def kept(index: int) -> Trial | None:
    """Return what is kept of this build on GPU `index`, None if it was not tested."""
    path = _path(index)
    try:
        fields = json.loads(path.read_text()) if path else None
        return None if fields is None else Trial(fields["device"], dict(fields["faults"]))
    except (OSError, ValueError, TypeError, KeyError):  # not there, or damaged: it is made again
        return None


def remember(index: int, faults: dict[str, str | None]) -> Trial:
    """Keep and return what the self-tests said on GPU `index`."""
    trial, path = Trial(torch.cuda.get_device_name(index), faults), _path(index)
    if path is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written
            make_private(path.parent)
            fields = {"device": trial.device, "faults": faults}
            replace_whole(path, (json.dumps(fields) + "\n").encode())
    return trial


def fault_of(checks: Sequence[dict[str, Any]]) -> str | None:
    """Return what is wrong according to the checks of a kernel, None if nothing is."""
    for check in checks:
        if not check["error"] <= check["allowed"]:
            return f"{check['name']}: error {check['error']:.2e}, allowed {check['allowed']:.2e}"
    return None


def command(device: str, kernel: str) -> list[str]:
    """Return the command of a kernel's self-test."""
    return [sys.executable, "-m", "cptool.exactness.selftest", device, kernel]


def answer(process: subprocess.Popen, patience_s: float) -> list[dict[str, Any]]:
    """Return the checks that a process of `command` prints. Raise RunError, one line, if it does
    not end well or not in time; then it is killed.
    """
    try:
        out, err = process.communicate(timeout=patience_s)
    except subprocess.TimeoutExpired:
        process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):  # stuck in the driver
            process.communicate(timeout=5)
        raise RunError(f"no answer within {patience_s:g} s") from None
    if process.returncode not in (0, FAILED):
        raise RunError((err.strip().splitlines() or [f"exit code {process.returncode}"])[-1])
    return [json.loads(line) for line in out.splitlines()]


def start(device: str, kernel: str, index: int | None = None) -> subprocess.Popen:
    """Start a kernel's self-test, on GPU `index` if given."""
    environment = dict(os.environ)
    if index is not None:
        visible = environment.get("CUDA_VISIBLE_DEVICES", "").split(",")
        visible = visible if len(visible) > index and visible[0] else []
        environment["CUDA_VISIBLE_DEVICES"] = visible[index] if visible else str(index)
    return subprocess.Popen(
        command(device, kernel),
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def _run(index: int) -> dict[str, str | None]:
    """Run all self-tests at the same time: most of each is the start of a process."""
    running = {kernel: start("cuda", kernel, index) for kernel in kernels.cuda_kernels()}
    faults: dict[str, str | None] = {}
    for kernel, process in running.items():
        try:
            faults[kernel] = fault_of(answer(process, PATIENCE_S))
        except RunError as error:
            faults[kernel] = str(error)[:300]
    return faults


def _path(index: int) -> Path | None:
    """Return the file of this build on this kind of device; None for a user without a cache."""
    try:
        folder = cache_dir()
    except UserError:
        return None
    driver = _DRIVER.read_text() if _DRIVER.exists() else ""
    build = kernels.EXTENSION.source_hash, kernels.EXTENSION.cuda_archs, torch.__version__
    device = torch.cuda.get_device_name(index), torch.version.cuda, driver
    digest = hashlib.sha256(repr((build, device)).encode()).hexdigest()[:16]
    return folder / "kernels" / f"{digest}.json"


@contextlib.contextmanager
def _alone(index: int) -> Iterator[None]:
    """Let one process of this user at a time test this kind of device; the others find its
    results.
    """
    path = _path(index)
    try:
        if path is None:
            raise OSError
        make_private(path.parent)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # without a cache each process tests by itself
        yield
        return
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield
    finally:
        os.close(lock)
