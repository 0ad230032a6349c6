"""The scripts for a GPU run through on a machine without one, so that they meet it without
surprises.
"""

import json
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"


PARTS = "build smoke tests attention decode merge ring model emulate sanitizer".split()


def test_the_whole_suite_runs_without_a_gpu(tmp_path):
    """Every part at tiny sizes, within the time of the calls, and one archive with all results."""
    out = tmp_path / "results"
    command = ["bash", SUITE, "--device", "cpu", "--out", out]
    environment = os.environ | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.findall(r"^== (\w+) \(at most", done.stdout, re.MULTILINE) == PARTS
    limits = [int(n) for n in re.findall(r"at most (\d+) s", done.stdout)]
    assert all(limit <= 570 for limit in limits) and limits[2] > 300
    took = [int(n) for n in re.findall(r"^== \w+: (\d+) s$", done.stdout, re.MULTILINE)]
    assert all(t <= limit for t, limit in zip(took, limits, strict=True)), (took, limits)
    with tarfile.open(f"{out}.tgz") as archive:
        names = {Path(name).name.partition("-cpu-")[0] for name in archive.getnames()}
    assert names >= {
        *(f"gpu_{name}" for name in ("attention", "decode", "merge", "ring", "model", "sanitizer")),
        *("gpu_tests-others", "gpu_emulate-1b-256", "gpu_suite.log"),
    }
    for part in ("attention", "decode", "merge", "ring"):
        told = json.loads(next(out.glob(f"gpu_{part}-cpu-*.json")).read_text())
        assert told["device"] == "cpu" and told["torch"]
        for entry in told["results"]:
            assert entry["case"] == part
            reached = entry["candidates"]["pass-kv" if part == "ring" else "ours"]
            assert reached["rate"] > 0 and reached["of_ceiling"] > 0
            assert entry.get("error", 0) < 0.02
    told = json.loads(next(out.glob("gpu_tests-others-cpu-*.json")).read_text())["results"]
    assert told["passed"] >= 3 and told["failed"] == 0


DEADLY = """
import os, time
import pytest

pytestmark = pytest.mark.gpu

def test_first(): pass
def test_an_error_that_stays(): raise RuntimeError("CUDA error: an illegal memory access")
def test_after_it(): pass
def test_a_hang(): time.sleep(1000)
def test_after_the_hang(): pass
def test_a_crash(): os._exit(7)
def test_plainly_wrong(): assert 1 == 2
@pytest.mark.skip
def test_left_out(): pass
def test_last(): pass
"""


def test_tests_that_lose_their_process_cost_no_other_result(tmp_path):
    (tmp_path / "test_deadly.py").write_text(DEADLY)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers = gpu: here\n")
    result, runner = tmp_path / "result.json", ROOT / "benchmarks" / "gpu_tests.py"
    options = ["--device", "cpu", "--patience", "3", "--json", result]
    done = subprocess.run(
        [sys.executable, runner, *options, "test_deadly.py"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    told = json.loads(result.read_text())["results"]
    assert done.returncode == 1, done.stderr
    assert told["passed"] == 4 and told["skipped"] == 1 and told["processes"] == 4, told
    assert told["ended_by"] is None
    assert {w["test"].partition("::")[2]: w["why"] for w in told["not_passed"]} == {
        "test_an_error_that_stays": "RuntimeError: CUDA error: an illegal memory access",
        "test_a_hang": "no end within 3 s",
        "test_a_crash": "its process died with exit code 7",
        "test_plainly_wrong": "assert 1 == 2",
    }


def test_a_part_that_is_none_is_refused():
    done = subprocess.run(["bash", SUITE, "nope"], capture_output=True, text=True)
    assert done.returncode == 2 and "nope is not a part; parts: build" in done.stderr


def test_the_engine_needs_torch_and_numpy_alone():
    script = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {"click", "rich", "safetensors", "tokenizers", "gguf",
                                      "huggingface_hub", "jinja2", "transformers"}:
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Missing())
import cptool.engine.engine, cptool.emulation.projection, cptool.exactness.selftest
import cptool.calibration, cptool.engine.weights
"""
    subprocess.run([sys.executable, "-c", script], check=True, cwd=ROOT)
