"""`cptool doctor` where there is a GPU: each kernel on its own, and which one to keep to."""

import dataclasses
import datetime
import json

import pytest
import torch
from click.testing import CliRunner
from json_document import PAGE, Document
from test_json_fields import EVERY

from cptool.cli.doctor import facts
from cptool.cli.main import main
from cptool.exactness import selftest
from cptool.ops import kernels
from cptool.ops.kernels import build_info
from cptool.planning.hardware import Measurement
from cptool.planning.profiles import default_profile, save_profile

KERNELS = ["simt", "sm80", "sm90"]
RIGHT = selftest.Check("attention", error=1e-6, allowed=1e-5)
OFF = selftest.Check("attention", error=1e-2, allowed=1e-5)


def test_a_kernel_in_a_process_of_its_own():
    checks = selftest.run_apart("cpu", "portable")
    assert len(checks) == 28 and all(check.passed for check in checks)
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


def test_a_screen_says_what_figures_taken_now_are_worth(tmp_path, monkeypatch):
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path))
    monkeypatch.setattr(selftest, "run", lambda device: iter([RIGHT, OFF]))
    monkeypatch.setattr(facts, "load_per_processor", lambda: 0.7)
    monkeypatch.setattr(facts, "cpu_model", lambda: "this CPU")
    today, measured = datetime.date.today(), {}
    for case, changes in {
        "good": {},
        "measured on another": {"machine": "another"},
        "100 days old": {"date": (today - datetime.timedelta(100)).isoformat()},
        "rough: the machine was busy": {"spread": 0.5},
    }.items():
        how = {"date": today.isoformat(), "machine": "this CPU", "load": 0.01, "spread": 0.02}
        found = Measurement(**{**how, "dtypes": ("bfloat16",), **changes})
        save_profile(dataclasses.replace(default_profile("cpu"), measurement=found))
        shown = CliRunner().invoke(main, ["doctor"])
        assert shown.exit_code == 1  # a check is off
        assert "0.7 per processor; busy: figures measured now would be rough" in shown.stdout
        assert f"calibrated  {found.date} on cpu in bfloat16" in shown.stdout
        assert (case in shown.stdout) == (case != "good")
        assert len(shown.stdout.splitlines()) <= 24
        said = json.loads(CliRunner().invoke(main, ["doctor", "--json"]).stdout)
        assert Document(PAGE.read_text()).check(said, EVERY, "cptool doctor") == []
        measured[case] = said["calibrations"][0]["stale"]
        assert [check["passed"] for check in said["checks"]] == [True, False]
    assert measured == {case: None if case == "good" else case for case in measured}
    listed = CliRunner().invoke(main, ["doctor", "-v"]).stdout
    assert "ok     attention on cpu: error 1.00e-06, allowed 1.00e-05" in listed
