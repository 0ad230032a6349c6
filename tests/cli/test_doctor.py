"""`cptool doctor` where there is a GPU: each kernel on its own, and which one to keep to."""

import pytest
import torch
from click.testing import CliRunner

from cptool.cli.main import main
from cptool.exactness import selftest
from cptool.ops import kernels
from cptool.ops.kernels import build_info

KERNELS = ["simt", "sm80", "sm90"]
RIGHT = selftest.Check("attention", error=1e-6, allowed=1e-5)
OFF = selftest.Check("attention", error=1e-2, allowed=1e-5)


def test_a_kernel_in_a_process_of_its_own():
    checks = selftest.run_apart("cpu", "portable")
    assert len(checks) == 16 and all(check.passed for check in checks)
    assert checks[1].name == "attention portable, float32, D 64, decode"


def test_a_process_that_does_not_end_well_is_told_in_a_line():
    with pytest.raises(RuntimeError, match=r"must be one of.*portable") as error:
        selftest.run_apart("cpu", "nonsense")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("wrong", "told"),
    [
        ([], None),
        (["sm90"], "CPTOOL_CUDA_KERNEL=sm80"),
        (["sm80"], "CPTOOL_CUDA_KERNEL=simt"),
        (["simt"], "no kernel is right on the GPU: use --device cpu"),
    ],
)
@pytest.mark.parametrize("how", ["result", "crash"])
def test_the_kernel_to_keep_to(monkeypatch, wrong, told, how):
    def run_apart(device, kernel):
        if kernel in wrong and how == "crash":
            raise RuntimeError("CUDA error: an illegal memory access was encountered")
        return [OFF if kernel in wrong else RIGHT]

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setattr(kernels, "cuda_kernels", lambda: KERNELS)
    info = {**build_info(), "cuda_archs": ["80", "90a"]}
    monkeypatch.setattr(kernels, "build_info", lambda: info)
    monkeypatch.setattr(selftest, "run", lambda device: iter([RIGHT]))
    monkeypatch.setattr(selftest, "run_apart", run_apart)
    result = CliRunner().invoke(main, ["doctor"])
    assert result.exit_code == bool(wrong)
    if told is None:
        assert not result.stderr
    else:
        assert told in result.stderr and result.stderr.count("\n") == 1
        assert "WRONG" in result.stdout
