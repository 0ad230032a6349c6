"""Self-tests of CUDA kernels that end badly, and what is kept of them."""

import fcntl
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from cptool.errors import RunError, UserError
from cptool.ops import kernels, trials

GPU = "A GPU"
READY = """print('{"ready": true}', flush=True)\n"""
RIGHT = READY + """print('{"name": "all", "error": 0, "allowed": 1}')"""
# As torch reports it, with hints at its end.
FAULT = (
    READY
    + '''
exit("""Traceback (most recent call last):
torch.AcceleratorError: CUDA error: an illegal memory access was encountered
CUDA kernel errors might be asynchronously reported at some other API call.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions.""")
'''
)
BUSY = "exit('RuntimeError: CUDA error: CUDA-capable device(s) is/are busy or unavailable')"


@pytest.fixture
def device(monkeypatch, tmp_path):
    """A GPU whose self-tests are `programs` of Python."""
    fake = SimpleNamespace(programs={}, started=[], limited_to=[])

    def command(device, kernel):
        fake.started.append(kernel)
        return [sys.executable, "-S", "-c", "import sys; exit = sys.exit\n" + program(kernel)]

    def program(kernel):
        return fake.programs.get(kernel, RIGHT)

    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CPTOOL_CUDA_KERNEL", raising=False)
    monkeypatch.setattr(trials, "command", command)
    monkeypatch.setattr(kernels, "cuda_kernels", lambda: ["simt", "sm80", "sm90"])
    monkeypatch.setattr(kernels, "limit_cuda_kernels", fake.limited_to.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: GPU)
    return fake


@pytest.mark.parametrize(
    "program, why",
    [
        (BUSY, "device(s) is/are busy"),
        ("import time; time.sleep(100)", "no answer within 0.5 s"),
        (READY + "exit('torch.OutOfMemoryError: CUDA out of memory.')", "CUDA out of memory"),
    ],
)
def test_what_is_no_fault_of_the_kernel_is_not_kept(device, monkeypatch, program, why):
    """The device is taken or full, or the machine is slow: the kernels are used."""
    device.programs["simt"] = program
    monkeypatch.setattr(trials, "START_PATIENCE_S", 0.5 if "sleep" in program else 60)
    line = trials.settle(0)
    assert line.startswith("the CUDA kernels are used untested") and why in line
    assert "`cptool doctor`" in line and "\n" not in line
    assert device.started == ["simt"] and device.limited_to == [] and trials.kept(0) is None
    monkeypatch.setattr(trials, "START_PATIENCE_S", 60)
    device.programs.clear()
    assert trials.settle(0) is None and trials.kept(0).best == "sm90"


def test_a_fault_is_told_by_the_line_that_names_it(device):
    device.programs["sm80"] = FAULT
    line = trials.settle(0)
    assert "(sm80: torch.AcceleratorError: CUDA error: an illegal memory access" in line
    assert "simt, which is slower, is used instead. `cptool doctor` tests again" in line
    assert device.started == ["simt", "sm80"] and device.limited_to == ["simt"]
    assert trials.settle(0) == line and len(device.started) == 2


def test_that_no_kernel_is_right_is_not_kept(device):
    device.programs["simt"] = READY + "exit('lost')"
    trials.remember(0, {"simt": None, "sm80": None, "sm90": None})
    trials.remember(0, {"simt": "off", "sm80": None, "sm90": None})  # doctor's
    for number in (1, 2):
        with pytest.raises(UserError, match="no kernel can be used there; use --device cpu"):
            trials.settle(0)
        assert len(device.started) == number and trials.kept(0) is None


def test_other_lines_are_passed_over(device):
    device.programs["simt"] = "print('a library says'); print('[1]'); print('null')\n" + RIGHT
    assert trials.settle(0) is None and trials.kept(0).faults["simt"] is None


def test_a_file_system_without_locks(device, monkeypatch):
    def flock(*_):
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(fcntl, "flock", flock)
    assert trials.settle(0) is None and trials.kept(0).best == "sm90"


def test_who_waited_for_tests_that_came_to_nothing_does_not_repeat_them(device, monkeypatch):
    monkeypatch.setattr(trials, "_locked", lambda lock: True)
    assert "another process's self-tests did not end" in trials.settle(0)
    assert device.started == [] and trials.kept(0) is None


def test_results_are_of_these_bytes(device, monkeypatch, tmp_path):
    """Another compiler or option changes no source, but the extension."""
    paths = []
    for number in range(2):
        file = tmp_path / f"{number}.so"
        file.write_bytes(bytes([number]))
        monkeypatch.setattr(kernels, "EXTENSION", SimpleNamespace(__file__=str(file)))
        trials._build.cache_clear()
        paths.append(trials._path(0))
    trials._build.cache_clear()
    assert paths[0] != paths[1]


def test_a_kernel_that_hangs_is_ended(device):
    device.programs["sm90"] = READY + "import time; time.sleep(1000)"
    process = trials.start("cuda", "sm90")
    with pytest.raises(RunError, match=r"no answer within 0\.2 s") as error:
        trials.answer(process, 0.2)
    assert not isinstance(error.value, trials.NotStarted)
    assert process.returncode == -signal.SIGKILL


HANGS = """
import sys, time
from cptool.exactness import selftest
selftest.LIFETIME_S = int(sys.argv[1])
selftest.run = lambda *arguments: iter(lambda: time.sleep(1000), 0)
selftest.main(["cpu", "portable", "apart"])
"""
PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-c", sys.argv[1], "120"], stdout=subprocess.PIPE)
child.stdout.readline()
print(child.pid, flush=True)
os._exit(0)
"""


def test_a_self_test_ends_with_its_parent():
    done = subprocess.run([sys.executable, "-c", PARENT, HANGS], stdout=subprocess.PIPE, text=True)
    state, until = Path("/proc") / done.stdout.strip() / "stat", time.monotonic() + 30
    while state.exists() and state.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < until
        time.sleep(0.05)


def test_a_self_test_ends_by_itself():
    command = [sys.executable, "-c", HANGS, "1"]
    assert subprocess.run(command, env=os.environ, timeout=100).returncode == -signal.SIGALRM
