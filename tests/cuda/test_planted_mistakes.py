"""Mistakes planted in the emulated kernel for compute capability 9.0: the emulation sees each, and
cptool does not use the kernel on a device where its self-test fails.
"""

import os
import sys
from dataclasses import replace

import cuda_emulator
import planted
import pytest
import torch
from cuda_emulator import Emulator
from reference import check, make_case, tolerance

from cptool.ops import kernels, trials

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")

HELPER = cuda_emulator.ROOT / "tests" / "helpers" / "emulated_selftest.py"


class Planted(Emulator):
    entries = ("emulated_attention",)

    def run(self, mistake: int, case, multiprocessors: int, seed: int) -> str:
        """What is wrong with a call's result, "" if it is right."""
        self._library.emulated_device(multiprocessors, 1 << 20)
        self._library.emulated_mistake(mistake)
        self.counters()
        try:
            result = self.attention(*case.arguments, **case.options, seed=seed)
            check(case, result, tolerance(case, torch.bfloat16, merged=True))
        except (RuntimeError, AssertionError) as error:
            return str(error) or "wrong result"
        return ""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return planted.build_planted(tmp_path_factory.mktemp("planted"))


CASES = {
    # Shards, lengths that end in a tile, more jobs than are placed.
    "shards": (
        [
            ([*range(5), *range(231, 250)], [*range(33), *range(198, 231)]),
            (range(300), range(300)),
        ],
        (4, 2),
        2,
        None,
    ),
    "pieces": ([(range(1990, 2010), range(2010))], (2, 1), 16, None),
    "a narrow window": ([(range(150), range(150))], (2, 1), 2, 2),
    "gaps, pieces": ([([*range(250, 270), *range(2900, 2910)], range(2910))], (4, 2), 16, 2000),
    "a window": ([(range(100, 500), range(500))], (2, 1), 2, 140),
}


@pytest.mark.parametrize("name", ["", *planted.MISTAKES])
def test_each_is_seen(library, name):
    """In some order of the threads; without one, every order gives the right result."""
    kernel = Planted(library)
    said = []
    for seed in range(2 if not name else 6):
        for sequences, heads, multiprocessors, window in CASES.values():
            case = make_case(
                sequences, heads=heads, head_dim=128, dtype=torch.bfloat16, slack=7, spread=3.0
            )
            case = replace(case, window=window, cap=window and 4.0)
            said.append(kernel.run(planted.NUMBERS.get(name, 0), case, multiprocessors, seed))
        if name and any(said):
            return
    assert not name and not any(said), said


@pytest.mark.parametrize("name", planted.RACES)
def test_races_are_named(library, name):
    """In the first order that is tried."""
    kernel = Planted(library)
    said = []
    for sequences, heads, multiprocessors, window in CASES.values():
        case = make_case(sequences, heads=heads, head_dim=128, dtype=torch.bfloat16, slack=7)
        case = replace(case, window=window)
        said.append(kernel.run(planted.NUMBERS[name], case, multiprocessors, 0))
    assert any("race at shared offset" in message for message in said), said


GPU = "Emulated GPU"


@pytest.fixture
def device(monkeypatch, tmp_path, library):
    """A GPU on which the kernel for 9.0 makes a mistake; what is set: `mistake`."""
    limits = []

    class Fake:
        mistake = ""
        limited_to = limits
        started = 0

        def command(self, device, kernel):
            self.started += 1
            number = planted.NUMBERS.get(self.mistake, 0)
            return [sys.executable, HELPER, library, str(number), device, kernel, trials.APART]

    fake = Fake()
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(cuda_emulator.ROOT)]))
    monkeypatch.setenv("PYTHONPATH", path)
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("CPTOOL_CUDA_KERNEL", raising=False)
    monkeypatch.setattr(trials, "command", fake.command)
    monkeypatch.setattr(kernels, "cuda_kernels", lambda: ["simt", "sm80", "sm90"])
    monkeypatch.setattr(kernels, "limit_cuda_kernels", limits.append)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=0: GPU)
    return fake


def test_right_kernels_are_tested_once(device):
    assert trials.settle(0) is None and device.limited_to == []
    assert trials.settle(0) is None and device.started == 3


@pytest.mark.parametrize(
    "mistake, patience, fault",
    [
        ("a key too many", 60, "attention sm90, bfloat16, D 64"),
        ("pieces begin at the first key", 60, "D 112, pieces of keys"),
        ("a product without its fence", 60, "wgmma.mma_async: no wgmma.fence since"),
        ("a buffer is never released", 12, "no answer within 12 s"),
    ],
)
def test_a_wrong_kernel_gives_way_to_the_next_slower_one(
    device, monkeypatch, mistake, patience, fault
):
    """One line says so; the next run goes by what is kept, and doctor shows it."""
    monkeypatch.setattr(trials, "PATIENCE_S", patience)
    device.mistake = mistake
    complaint = trials.settle(0)
    assert complaint.startswith(f"on {GPU} a kernel failed its self-test (sm90: ")
    assert fault in complaint and "\n" not in complaint
    assert "sm80, which is slower, is used instead" in complaint
    assert device.limited_to == ["sm80"]
    assert trials.settle(0) == complaint and device.started == 3
    assert fault in trials.kept(0).faults["sm90"]
    monkeypatch.setenv("CPTOOL_CUDA_KERNEL", "sm90")
    assert trials.settle(0) is None


def test_a_new_test_counts(device):
    """As doctor's: what is kept of a device that was repaired is replaced."""
    trials.remember(0, {"simt": None, "sm80": "off", "sm90": None})
    assert trials.kept(0).best == "simt"
    trials.remember(0, {"simt": None, "sm80": None, "sm90": None})
    assert trials.kept(0).complaint is None
