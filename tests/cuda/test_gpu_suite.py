"""The scripts for a GPU run through on a machine without one, so that they meet it without
surprises.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SUITE = ROOT / "benchmarks" / "gpu_suite.sh"


def test_every_benchmark_runs_at_tiny_sizes(tmp_path):
    result = tmp_path / "result.json"
    script = ROOT / "benchmarks" / "gpu_attention.py"
    parts = ("attention", "decode", "merge", "ring")
    command = [sys.executable, script, *parts, "--device", "cpu", "--json", result]
    subprocess.run(command, check=True, capture_output=True, cwd=tmp_path)
    told = json.loads(result.read_text())
    assert told["device"] == "cpu" and told["torch"]
    assert {entry["case"] for entry in told["results"]} == set(parts)
    for entry in told["results"]:
        reached = entry["candidates"]["pass-kv" if entry["case"] == "ring" else "ours"]
        assert reached["rate"] > 0 and reached["of_ceiling"] > 0
        assert entry.get("error", 0) < 0.02


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
