"""Which CUDA kernels are used on a device: those that pass their self-test there.

The first time that a build meets a kind of device, each attention kernel runs its self-test in a
process of its own, because a wrong kernel can hang or leave its process without a device. One that
fails is not used there, nor is a faster one, whose remaining calls it would take; the next slower
kernel is. The result is kept in the cache, and `cptool doctor` tests again.

A process that ends before it has the device says nothing of the kernel: the device may be full or
taken. Then nothing is kept, and the kernels are used untested.
"""

from __future__ import annotations

import contextlib
import fcntl
import functools
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cptool.errors import RunError, UserError
from cptool.files import cache_dir, make_private, replace_whole
from cptool.ops import kernels

PATIENCE_S = 45.0
"""For a self-test that has the device; it computes for a second."""

START_PATIENCE_S = 120.0
"""For a process that starts Python, torch and CUDA."""

APART = "apart"
"""Third argument of a self-test in a process of its own, which then prints `READY`."""

READY = {"ready": True}
"""Printed by a self-test that has the device: later errors are the kernel's."""

FAILED = 4
"""Exit code of a self-test that found a wrong result."""

_DRIVER = Path("/proc/driver/nvidia/version")
_SELFTEST = Path(__file__).parents[1] / "exactness" / "selftest.py"
_RAISED = re.compile(r"[\w.]*(Error|Exception)\b")


class NotStarted(RunError):
    """A self-test ended before it had the device, or the device's memory was not enough."""


@dataclass(frozen=True)
class Trial:
    """What the self-tests of the attention kernels said on a kind of device.

    faults: why each kernel failed, None for one that is right; slowest kernel first. Kernels that
        are faster than a failed one may be left out.
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
            f"on {self.device} a kernel failed its self-test ({'; '.join(wrong)}); {used}. "
            "`cptool doctor` tests again. Please report this line with what `cptool doctor --json` "
            "prints"
        )


def settle(index: int) -> str | None:
    """Limit this process to the kernels that are right on GPU `index`, and return the line for the
    user if some are not.

    The self-tests run here if their results are not kept. CPTOOL_CUDA_KERNEL overrides them.
    Raises UserError if no kernel can be used.
    """
    if os.environ.get("CPTOOL_CUDA_KERNEL"):
        return None
    with _alone(index) as waited:
        trial = kept(index)
        if trial is None:
            try:
                if waited:
                    raise NotStarted("another process's self-tests did not end")
                trial = remember(index, _run(index))
            except NotStarted as error:
                return (
                    f"the CUDA kernels are used untested, because a self-test on "
                    f"{torch.cuda.get_device_name(index)} did not start ({error}); `cptool doctor` "
                    "tests them"
                )
    if trial.best is None:
        raise UserError(str(trial.complaint))
    if trial.best != kernels.cuda_kernels()[-1]:
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
    """Return what the self-tests said on GPU `index`, and keep it unless no kernel can be used:
    then the next run tests again.
    """
    trial, path = Trial(torch.cuda.get_device_name(index), faults), _path(index)
    if path is not None:
        with contextlib.suppress(OSError):  # a cache that cannot be written
            if trial.best is None:
                path.unlink(missing_ok=True)
            else:
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
    return [sys.executable, "-m", "cptool.exactness.selftest", device, kernel, APART]


def answer(process: subprocess.Popen, patience_s: float) -> list[dict[str, Any]]:
    """Return the checks that a process of `command` prints within `patience_s` of having the
    device. The process has ended then.

    Raises NotStarted if it does not come to have it, and RunError if it does not end well or not in
    time; one line each.
    """
    printed = _Printed(process)
    try:
        printed.ready.wait(START_PATIENCE_S)
        if printed.has_device:
            printed.ended.wait(patience_s)
        late = not printed.ended.is_set()
    finally:
        process.kill()
        printed.join(5)  # it may be stuck in the driver
    kind = RunError if printed.has_device else NotStarted
    if late:
        raise kind(f"no answer within {patience_s if printed.has_device else START_PATIENCE_S:g} s")
    if process.returncode not in (0, FAILED) or not printed.has_device:
        said = reason(printed.err) or f"exit code {process.returncode}"
        raise (NotStarted if "out of memory" in said else kind)(said)
    return printed.checks


def reason(err: str) -> str:
    """Return the line that says why a process failed: the last that names an exception, because
    torch adds hints to those of CUDA; else the last line.
    """
    lines = [line.strip() for line in err.splitlines() if line.strip()]
    raised = [line for line in lines if _RAISED.match(line)]
    return (raised or lines or [""])[-1][:300]


class _Printed(threading.Thread):
    """Reads what a self-test prints until it ends.

    ready: set once the process has the device or has ended. ended: set once it has ended.
    """

    def __init__(self, process: subprocess.Popen) -> None:
        super().__init__(daemon=True)
        self.process, self.has_device = process, False
        self.ready, self.ended = threading.Event(), threading.Event()
        self.checks: list[dict[str, Any]] = []
        self.err = ""
        self.start()

    def run(self) -> None:
        errors = threading.Thread(target=self._read_errors, daemon=True)
        errors.start()
        for line in self.process.stdout or ():
            try:
                fields = json.loads(line)
            except ValueError:  # a library's own
                continue
            if fields == READY:
                self.has_device = True
                self.ready.set()
            elif isinstance(fields, dict) and fields.keys() >= {"name", "error", "allowed"}:
                self.checks.append(fields)
        errors.join()
        self.process.wait()
        self.ended.set()
        self.ready.set()

    def _read_errors(self) -> None:
        self.err = self.process.stderr.read() if self.process.stderr else ""


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
    """Run the self-tests one after another, as a full device may have no room for two, up to the
    first that fails: faster kernels are not used then. Raises NotStarted.
    """
    faults: dict[str, str | None] = {}
    for kernel in kernels.cuda_kernels():
        try:
            faults[kernel] = fault_of(answer(start("cuda", kernel, index), PATIENCE_S))
        except NotStarted:
            raise
        except RunError as error:
            faults[kernel] = str(error)
        if faults[kernel] is not None:
            break
    return faults


def _path(index: int) -> Path | None:
    """Return the file of this build on this kind of device; None for a user without a cache."""
    try:
        folder = cache_dir()
    except UserError:
        return None
    driver = _DRIVER.read_text() if _DRIVER.exists() else ""
    device = torch.cuda.get_device_name(index), torch.version.cuda, driver
    digest = hashlib.sha256(repr((_build(), torch.__version__, device)).encode())
    return folder / "kernels" / f"{digest.hexdigest()[:16]}.json"


@functools.cache
def _build() -> str:
    """Return a digest of the kernels and of their self-test. Not of the sources, because compilers
    and their options differ.
    """
    digest = hashlib.sha256()
    for path in (Path(str(kernels.EXTENSION.__file__)), _SELFTEST):
        digest.update(hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()


@contextlib.contextmanager
def _alone(index: int) -> Iterator[bool]:
    """Let one process of this user at a time test this kind of device; the others find its results.

    Yields whether another one was at it.
    """
    path = _path(index)
    try:
        if path is None:
            raise OSError
        make_private(path.parent)
        lock = os.open(path.with_suffix(".lock"), os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError:  # without a cache each process tests by itself
        yield False
        return
    try:
        yield _locked(lock)
    finally:
        os.close(lock)


def _locked(lock: int) -> bool:
    """Lock a file, and return whether another process had locked it. Some file systems have no
    locks: then nobody has.
    """
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        fcntl.flock(lock, fcntl.LOCK_EX)
        return True
    except OSError:
        pass
    return False
