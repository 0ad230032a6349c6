"""Every command on a GPU.

`CPTOOL_GPU_TESTS_ON=cpu` runs the same tests on the CPU, so that they are known to be sound before
they meet a GPU.
"""

import json
import os

import pytest
import torch
from click.testing import CliRunner
from test_gpu_machine import SHAPE

from cptool.cli.main import main
from cptool.ops.kernels import build_info

DEVICE = os.environ.get("CPTOOL_GPU_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(ON_GPU and not torch.cuda.device_count(), reason="no CUDA device"),
    pytest.mark.skipif(
        ON_GPU and not build_info()["cuda_archs"], reason="built without CUDA kernels"
    ),
]

HERE = ("--device", DEVICE)
SWEEP = ("--repeats", 1, "--cp", 1, "--layers", 1, "--dtype", "float32", *HERE)


def cptool(*arguments, text: str | None = None):
    done = CliRunner().invoke(main, [str(a) for a in arguments], input=text)
    assert done.exit_code == 0, (done.output, done.stderr, done.exception)
    return done


def as_json(*arguments) -> dict:
    return json.loads(cptool(*arguments, "--json").stdout)


@pytest.fixture(scope="module")
def shape(tmp_path_factory):
    path = tmp_path_factory.mktemp("shape") / "config.json"
    path.write_text(json.dumps(SHAPE))
    return path


def test_prefill_and_decode(tiny_model, tmp_path):
    """`prefill` takes the GPU by default."""
    asked = ("prefill", tiny_model, "--synthetic", 40, "--session", tmp_path / "s")
    first = as_json(*asked, *([] if ON_GPU else HERE))
    assert first["device"].startswith(DEVICE)
    answer = as_json("decode", tmp_path / "s", "-n", 4, "--temperature", 0, *HERE)
    assert answer["device"].startswith(DEVICE)
    assert answer["token_ids"][0][0] == first["first_token"][0]


def test_chat(smollm2_path, tmp_path):
    text = f"What is the capital of France?\n/save {tmp_path / 's'}\n"
    done = cptool("chat", smollm2_path, "-n", 8, *HERE, text=text)
    assert "Paris" in done.stdout and "saved" in done.stderr
    cptool("chat", tmp_path / "s", "-n", 2, *HERE, text="And of Spain?\n")


def test_verify(tiny_model):
    said = as_json("verify", tiny_model, "--max-cp", 2, "--synthetic", 40, *HERE)
    assert said["passed"], said


def test_demo():
    assert "check: tokens of 2 ranks = tokens of 1 rank" in cptool("demo", *HERE).stdout


def test_doctor():
    said = cptool("doctor").stdout
    assert "WRONG" not in said and f"on {DEVICE}: error" in said


def test_plan_for_this_machine(monkeypatch, tmp_path, shape):
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path))
    as_json("bench", "calibrate", "--cp", 1, "--dtype", "float32", *HERE)
    asked = ("plan", shape, "--context", 512, "--dtype", "float32", "--hardware", "measured")
    assert as_json(*asked)["ttft_s"] > 0


@pytest.mark.parametrize(
    "asked",
    [
        ("attention", "-t", 65, "--heads", "4/2", "-d", 64, "--dtype", "float32"),
        ("merge", "-n", 2, "-t", 33, "--heads", 2, "-d", 64, "--dtype", "float32"),
        ("link", "--size", "1K"),
    ],
)
def test_bench_of_kernels_and_links(asked):
    assert as_json("bench", *asked, "--repeats", 1, *HERE)["results"]


def test_bench_of_models(shape):
    said = as_json("bench", "prefill", shape, "--context", 64, *SWEEP)
    assert said["device"] == DEVICE and said["results"]
    said = as_json("bench", "decode", shape, "--cached", 64, "--steps", 2, *SWEEP)
    assert said["device"] == DEVICE and said["results"]
    emulated = ("--cp", 2, "--context", 128, "--dtype", "float32", "--repeats", 1)
    said = as_json("bench", "emulate", "--shape", shape, *emulated, *HERE)
    assert said["device"].startswith(DEVICE) and said["ttft_s"] > 0
