"""The CUDA side as far as a machine without a GPU can tell: the build, and logic of the host."""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from cptool.ops.attention import _C
from cptool.ops.checks import check_kernels
from cptool.ops.kernels import build_info, force_cuda_kernel

ROOT = Path(__file__).resolve().parents[2]
EXTENSION = Path(_C.__file__)
ARCHS = build_info()["cuda_archs"]


def test_every_architecture_is_in_the_extension():
    if not ARCHS:
        pytest.skip("built without CUDA kernels")
    code = EXTENSION.read_bytes()
    for arch in ARCHS:
        assert f"sm_{arch}".encode() in code


def test_the_cuda_runtime_stays_inside():
    """torch brings a CUDA runtime of its own, often of another version: neither may find the
    other's functions."""
    if not ARCHS:
        pytest.skip("built without CUDA kernels")
    symbols = subprocess.run(
        ["nm", "-D", EXTENSION], capture_output=True, text=True, check=True
    ).stdout
    assert "PyInit__C" in symbols
    assert re.findall(r"\b_?_?cu(?:da)?[A-Z]\w+", symbols) == []


def test_no_attention_kernel_spills():
    """What ptxas said in the build of this checkout, for every architecture."""
    reports = list(ROOT.glob("build/temp*/cmake/CMakeFiles/*.dir/csrc/cuda/**/*.ptxas"))
    if not ARCHS or not reports:
        pytest.skip("no reports of ptxas: CUDA kernels were not built in this checkout")
    kernels = [json.loads(line) for path in reports for line in path.read_text().splitlines()]
    attention = [kernel for kernel in kernels if "attention" in kernel["kernel"]]
    assert {kernel["arch"] for kernel in attention} >= {f"sm_{arch}" for arch in ARCHS}
    assert [kernel for kernel in attention if kernel["spill_stores"] or kernel["spill_loads"]] == []


def test_what_ptxas_says_is_kept(tmp_path):
    """And the rest is passed on."""
    log = """
ptxas info    : 12 bytes gmem
ptxas info    : Compiling entry function '_Z6kernelv' for 'sm_80'
ptxas info    : Function properties for _Z6kernelv
    152 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers
a.cu(3): warning: something else"""
    command = [sys.executable, ROOT / "csrc" / "cuda" / "ptxas_report.py", sys.executable, "-c"]
    done = subprocess.run(
        [*command, f"import sys; sys.stderr.write({log!r})", "-o", tmp_path / "a.cu.o"],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0
    assert done.stdout == "a.cu: 1 kernels, at most 255 registers, 1 spills\n"
    assert done.stderr.split("\n")[-2:] == ["a.cu(3): warning: something else", ""]
    assert json.loads((tmp_path / "a.cu.o.ptxas").read_text()) == {
        "kernel": "_Z6kernelv",
        "arch": "sm_80",
        "spill_stores": 8,
        "spill_loads": 16,
        "registers": 255,
    }


@pytest.mark.parametrize("name", ["attention_partial", "attention_partial_", "merge_partials"])
@pytest.mark.parametrize("key", ["CPU", "CUDA"])
def test_the_ops_answer_on(name, key):
    assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(f"cptool::{name}", key)


def test_tensors_without_kernels_are_refused():
    check_kernels("q", torch.device("cpu"), "")
    check_kernels("q", torch.device("cuda", 1), "80 90a")
    with pytest.raises(
        ValueError,
        match=r"^q is on cuda:1, but cptool was built without CUDA kernels; "
        r"reinstall where nvcc is found$",
    ):
        check_kernels("q", torch.device("cuda", 1), "")
    with pytest.raises(ValueError, match=r"^q is on mps; it must be on cpu or cuda$"):
        check_kernels("q", torch.device("mps"), "80 90a")


def test_forcing_a_kernel_that_is_not_there():
    with pytest.raises(ValueError, match=r"^CUDA kernel is 'tensor'; it must be one of "):
        with force_cuda_kernel("tensor"):
            pass
    done = subprocess.run(
        [sys.executable, "-c", "import cptool.ops.attention"],
        env=os.environ | {"CPTOOL_CUDA_KERNEL": "tensor"},
        capture_output=True,
        text=True,
    )
    assert "CPTOOL_CUDA_KERNEL is 'tensor'; it must be one of " in done.stderr


@pytest.mark.parametrize("program", ["query_blocks", "splits", "walk"])
def test_index_logic(tmp_path, program):
    """Each query row is one block's and each key one piece's; see *_check.cpp."""
    compiler = os.environ.get("CXX") or shutil.which("c++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    tests = Path(__file__).parent
    include = [f"-I{ROOT / 'tests' / 'cuda_emulation'}", f"-I{ROOT / 'csrc'}"]
    source = tests / f"{program}_check.cpp"
    subprocess.run(
        [compiler, "-std=c++17", "-O1", *include, source, "-o", tmp_path / program], check=True
    )
    done = subprocess.run([tmp_path / program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize(
    "environment, strict",
    [({}, "OFF"), ({"CI": "true"}, "OFF"), ({"CPTOOL_WERROR": "1"}, "ON")],
    ids=str,
)
def test_warnings_are_errors_only_when_asked(tmp_path, environment, strict):
    """A user's CI has compilers that we have never seen."""
    pytest.importorskip("pybind11", reason="no pybind11 outside the isolated build")
    pytest.importorskip("setuptools", reason="no setuptools outside the isolated build")
    cmake = tmp_path / "cmake"
    cmake.write_text(f'#!/bin/sh\necho "$@" > {tmp_path}/arguments\nexit 1\n')
    cmake.chmod(0o755)
    env = {k: v for k, v in os.environ.items() if k not in ("CI", "CPTOOL_WERROR")}
    env |= environment | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
    command = [sys.executable, "setup.py", "-q", "build_ext", "--build-temp", tmp_path / "temp"]
    subprocess.run(
        [*command, "--build-lib", tmp_path / "lib"], cwd=ROOT, env=env, capture_output=True
    )
    assert f"-DCPTOOL_WERROR={strict}" in (tmp_path / "arguments").read_text().split()
