"""The kernel for compute capability 9.0 as far as a compiler can tell: arithmetic of the host, and
what the assembler says of registers."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import sass

ROOT = Path(__file__).resolve().parents[2]
THREE_CONSUMERS = "Li64ELb1E"  # in the name of a kernel of head dimension 64 for plain calls
# As CMake names it. With -arch=sm_90a some compilers also compile for a plain sm_90, without wgmma.
ARCH = ["-gencode", "arch=compute_90a,code=sm_90a"]


def test_schedule_and_descriptors(tmp_path):
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    program = tmp_path / "sm90_check"
    source = Path(__file__).with_name("sm90_check.cpp")
    subprocess.run(
        [compiler, "-std=c++17", "-O1", "-I", ROOT / "csrc", source, "-o", program], check=True
    )
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.fixture(scope="module")
def assembled(tmp_path_factory):
    """The kernels as a cubin, and what the assembler says of them."""
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    source = ROOT / "csrc" / "cuda" / "sm90" / "attention.cu"
    cubin = tmp_path_factory.mktemp("sm90") / "attention.cubin"
    command = [nvcc, "-std=c++17", "-O3", *ARCH, "-Xptxas=-v", "-I", ROOT / "csrc"]
    done = subprocess.run([*command, "-cubin", source, "-o", cubin], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return cubin, done.stdout + done.stderr


def test_registers(assembled):
    """Nothing in local memory; no wgmma waits for another because of registers (C7510 and the
    like); and a launch allots what the warpgroups share out (csrc/cuda/sm90/shared.h).
    """
    _, report = assembled
    assert "C75" not in report, report
    kernels = re.findall(r"Compiling entry function '(\w+)'", report)
    stacks = re.findall(
        r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", report
    )
    registers = re.findall(r"Used (\d+) registers", report)
    assert len(kernels) == len(stacks) == len(registers) == 12
    assert set(stacks) == {("0", "0", "0")}
    for kernel, used in zip(kernels, registers, strict=True):
        threads = 512 if THREE_CONSUMERS in kernel else 384
        assert int(used) == 65536 // threads // 8 * 8, kernel


@pytest.fixture(scope="module")
def code(assembled):
    """The instructions of the kernels."""
    nvdisasm = shutil.which("nvdisasm")
    if nvdisasm is None:
        pytest.skip("no nvdisasm")
    return subprocess.run(
        [nvdisasm, "-c", assembled[0]], capture_output=True, text=True, check=True
    ).stdout


def test_no_warpgroup_names_a_register_that_it_has_not(code):
    """Consumers have 232, and 160 where there are three of them, the producer 40 or 32
    (csrc/cuda/sm90/shared.h): what ptxas reports is the launch's number, not theirs.
    """
    kernels = sass.kernels(code)
    assert len(kernels) == 12
    for name, lines in kernels.items():
        consumers, producer = (160, 32) if THREE_CONSUMERS in name else (232, 40)
        assert _highest_register(lines) < consumers, name
        begin = next(i for i, line in enumerate(lines) if "USETMAXREG.DEALLOC" in line)
        own = _reached(lines, begin)
        assert 500 < len(own) < len(lines) / 2 and not any("GMMA" in line for line in own), name
        assert _highest_register(own) < producer, name


def _highest_register(lines):
    return max(int(number) for number in re.findall(r"\bR(\d+)\b", "\n".join(lines)))


def _reached(lines, begin):
    """The instructions that can follow the one at `begin`, which the assembler does not keep
    together.
    """
    labels = {line.strip()[:-1]: i for i, line in enumerate(lines) if line.startswith(".L")}
    ends = re.compile(r"\*/\s+(BRA|EXIT|BSYNC\S*|RET\S*)\b(?! !?U?P\d)")
    seen, ahead = set(), [begin]
    while ahead:
        i = ahead.pop()
        while i < len(lines) and i not in seen:
            seen.add(i)
            targets = re.findall(r"\((\.L\w+)\)", lines[i])
            ahead += [labels[target] for target in targets if target in labels]
            if ends.search(lines[i]):
                break
            i += 1
    return [lines[i] for i in seen]


def test_nothing_but_products_names_registers_in_flight(code):
    """And a line that the assembler did not write is seen among its own."""
    kernels = sass.kernels(code)
    assert len(kernels) == 12
    for name, lines in kernels.items():
        assert sass.in_flight_names(lines) == [], name
    last = max(i for i, line in enumerate(lines) if "HGMMA" in line and "gsb0" in line)
    accumulator = re.search(r"HGMMA\S* R(\d+),", lines[last])[1]
    bad = f"        /*fff0*/                   FADD R{accumulator}, R{accumulator}, R0 ;"
    told = sass.in_flight_names([*lines[: last + 1], bad, *lines[last + 1 :]])
    assert any(complaint.startswith("fff0: FADD") for complaint in told)


def test_softmax_comes_before_the_wait_for_the_values(code):
    """The assembler may move it behind, where it overlaps with no product of its warpgroup."""
    loops = re.findall(r"DEPBAR\.LE gsb0, 0x1 ;(.*?)DEPBAR\.LE gsb0, 0x0 ;", code, re.DOTALL)
    assert [loop.count("MUFU.EX2") >= 64 for loop in loops] == [True] * 12


WAITS = """
#include "cuda/sm90/ptx.h"
__global__ void wait() { cptool::cuda::ptx::mbarrier_wait(0, 0); }
"""


@pytest.mark.parametrize("watched", [False, True])
def test_a_build_with_the_watchdog_traps_where_a_barrier_is_lost(tmp_path, watched):
    nvcc = os.environ.get("CUDACXX") or shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc")
    (tmp_path / "wait.cu").write_text(WAITS)
    macro = ["-DCPTOOL_WATCHDOG"] if watched else []
    command = [nvcc, "-std=c++17", "-arch=compute_90a", *macro, "-I", ROOT / "csrc", "-ptx"]
    subprocess.run([*command, "wait.cu"], check=True, cwd=tmp_path)
    assert ("trap;" in (tmp_path / "wait.ptx").read_text()) == watched
