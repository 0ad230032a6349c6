"""`--dtype auto`: the checkpoint's own type where the device is fast in it."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from cptool.checkpoint import open_checkpoint
from cptool.engine.setup import types
from cptool.engine.setup.types import resolve_dtype
from cptool.ops import processor
from cptool.ops.kernels import (
    build_info,
    cpu_isa,
    cpu_isas,
    cpu_linear_isa,
    cpu_slow_isas,
    force_cpu_isa,
)
from cptool.planning.profiles import INSTRUCTION_SETS, default_profile

CAPS = ("CPTOOL_ISA", "ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA")
ISAS = list(INSTRUCTION_SETS)


@pytest.fixture(autouse=True)
def uncapped(monkeypatch):
    for name in CAPS:
        monkeypatch.delenv(name, raising=False)


def isas_of_machine(monkeypatch, names, slow=()):
    extension = SimpleNamespace(cpu_isas=lambda: list(names), cpu_slow_isas=lambda: list(slow))
    monkeypatch.setattr(processor.extension, "load", lambda: extension)


def test_agrees_with_the_kernel_in_use():
    fast = "amx" in cpu_isas() or cpu_linear_isa(torch.bfloat16) == "avx512bf16"
    assert processor.has_bfloat16_products() == fast


def test_kernels_that_are_slow_here_run_where_they_are_named():
    """Dot products of bfloat16 on processors of Intel."""
    assert set(cpu_slow_isas()) <= {"avx512bf16"}
    for isa in cpu_slow_isas():
        with force_cpu_isa(isa):
            assert cpu_linear_isa(torch.bfloat16) == cpu_isa(torch.bfloat16) == isa
        assert isa not in (cpu_linear_isa(torch.bfloat16), cpu_isa(torch.bfloat16))


def test_checkpoint_on_every_device(tiny_model):
    checkpoint = open_checkpoint(str(tiny_model))
    assert [resolve_dtype("auto", checkpoint, device) for device in ("cpu", "cuda")] == [
        "float32",
        "float32",
    ]


@pytest.mark.parametrize("isas, fast", [(ISAS[:1], 0), (ISAS[:3], 0), (ISAS[:4], 1), (ISAS, 1)])
def test_bfloat16_products_are_those_of_avx512_bf16(monkeypatch, isas, fast):
    isas_of_machine(monkeypatch, isas)
    assert processor.has_bfloat16_products() == bool(fast)


@pytest.mark.parametrize(
    ("isas", "named", "best"),
    [(4, None, "avx512"), (4, "avx512bf16", "avx512bf16"), (5, None, "amx"), (4, "avx2", "avx2")],
)
def test_slow_dot_products_are_passed_over_unless_they_are_named(monkeypatch, isas, named, best):
    isas_of_machine(monkeypatch, ISAS[:isas], slow=["avx512bf16"])
    if named is not None:
        monkeypatch.setenv("CPTOOL_ISA", named)
    assert processor.instruction_set() == best
    assert processor.has_bfloat16_products() == (best in ("avx512bf16", "amx"))


@pytest.mark.parametrize("best", range(len(ISAS)), ids=ISAS)
def test_the_choice_on_each_instruction_set(monkeypatch, best):
    """float32 loses nothing; bfloat16 is taken where it is the file's own type and fast."""
    isas_of_machine(monkeypatch, ISAS[: best + 1])
    fast = ISAS[best] in ("avx512bf16", "amx")
    for own in ("float32", "bfloat16", "float16", None):  # None: quantised, or several
        found = resolve_dtype("auto", SimpleNamespace(matrix_dtype=own), "cpu")
        assert found == ("bfloat16" if fast and own == "bfloat16" else "float32")
        for asked in ("float32", "bfloat16", "float16"):
            assert resolve_dtype(asked, SimpleNamespace(matrix_dtype=own), "cpu") == asked


@pytest.mark.parametrize(
    "name, value, fast",
    [
        ("CPTOOL_ISA", "avx2", False),
        ("CPTOOL_ISA", "avx512", False),
        ("CPTOOL_ISA", "avx512bf16", True),
        ("ATEN_CPU_CAPABILITY", "avx2", False),
        ("ATEN_CPU_CAPABILITY", "default", False),
        ("ATEN_CPU_CAPABILITY", "avx512", True),
        ("ONEDNN_MAX_CPU_ISA", "AVX2", False),
        ("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_AMX", True),
    ],
)
def test_a_cap_in_the_environment_counts(monkeypatch, name, value, fast):
    isas_of_machine(monkeypatch, ISAS)
    monkeypatch.setenv(name, value)
    assert processor.has_bfloat16_products() == fast


@pytest.mark.parametrize(
    "stored, with_products, without, cuda",
    [
        ("bfloat16", "bfloat16", "float32", "bfloat16"),
        ("float16", "float32", "float32", "float16"),
        ("float32", "float32", "float32", "float32"),
        (None, "float32", "float32", "float32"),
    ],
)
def test_auto(monkeypatch, stored, with_products, without, cuda):
    checkpoint = SimpleNamespace(matrix_dtype=stored)
    for fast, expected in ((True, with_products), (False, without)):
        monkeypatch.setattr(types, "has_bfloat16_products", lambda fast=fast: fast)
        assert resolve_dtype("auto", checkpoint, "cpu") == expected
        assert resolve_dtype("auto", checkpoint, "cuda") == cuda
        assert resolve_dtype("bfloat16", checkpoint, "cpu") == "bfloat16"


def test_torch_is_not_imported():
    code = (
        "import sys; from cptool.ops.processor import has_bfloat16_products; "
        "print(has_bfloat16_products(), 'torch' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=os.environ | {"CPTOOL_ISA": "portable"},
        capture_output=True,
        text=True,
    )
    assert done.stdout.split() == ["False", "False"], done.stderr


@pytest.mark.parametrize(
    ("isas", "caps", "expected"),
    [
        (5, {}, "amx"),
        (5, {"CPTOOL_ISA": "avx512"}, "avx512"),
        (5, {"ONEDNN_MAX_CPU_ISA": "AVX512_CORE_VNNI"}, "avx512"),
        (5, {"ATEN_CPU_CAPABILITY": "avx2", "CPTOOL_ISA": "avx512bf16"}, "avx2"),
        (4, {"ONEDNN_MAX_CPU_ISA": "avx2", "CPTOOL_ISA": "portable"}, "portable"),
        (2, {"ONEDNN_MAX_CPU_ISA": "avx512_core"}, "avx2"),
        (1, {}, "portable"),
    ],
)
def test_default_figures_follow_the_instruction_set_in_use(monkeypatch, isas, caps, expected):
    isas_of_machine(monkeypatch, ISAS[:isas])
    for name, value in caps.items():
        monkeypatch.setenv(name, value)
    assert processor.instruction_set() == expected
    assert default_profile("cpu", expected).name == f"cpu-{expected}"


def test_every_instruction_set_that_is_built_has_default_figures():
    assert set(build_info()["isas"]) <= set(INSTRUCTION_SETS)
