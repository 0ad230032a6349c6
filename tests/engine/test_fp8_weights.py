"""Feed-forward layers in FP8: `--weights fp8-ffn` from loading to the report."""

import json

import pytest
import torch
from click.testing import CliRunner
from fake_gpu import pretend
from ranks import run_ranks
from test_weights import without_the_others

from cptool.checkpoint import open_checkpoint
from cptool.cli.main import main
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import mean_weight_size, resolve_types
from cptool.engine.weights import load_model, original
from cptool.exactness.weights import weight_errors
from cptool.ops.fp8 import Fp8Weight, packed

WEIGHTS = "fp8-ffn"


def fp8_in(model):
    """The FP8 weights of a model, by the names of its parameters."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), Fp8Weight)
    }


def same(a, b):
    return torch.equal(a.values.view(torch.uint8), b.values.view(torch.uint8)) and torch.equal(
        a.scale, b.scale
    )


def test_the_matrices_of_feed_forward_layers_alone(tiny_model):
    checkpoint = open_checkpoint(str(tiny_model))
    model = load_model(checkpoint, torch.float32, "cpu", weights=WEIGHTS)
    found = fp8_in(model)
    assert set(found) == {
        f"layers.{n}.mlp.{name}.weight" for n in (0, 1) for name in ("gate_up_proj", "down_proj")
    }
    for name, weight in found.items():
        assert same(weight, Fp8Weight(packed(original(checkpoint, name)), torch.float32))
    assert model.feed_forward == "float8"
    assert load_model(checkpoint, torch.float32, "cpu").feed_forward is None
    matrices = [p for p in checkpoint.stored.values() if len(p.shape) == 2]
    held = 2 * 4 * 301 * 64 + 2 * 4 * (64 * 128 + 64 * 64) + 2 * (192 * 68 + 64 * 100)
    count = sum(p.shape[0] * p.shape[1] for p in matrices)
    assert mean_weight_size(checkpoint, "float32", "cpu", WEIGHTS) == held / count
    assert mean_weight_size(checkpoint, "bfloat16", "cuda", WEIGHTS) < 2


def test_a_share_of_a_tensor_parallel_rank(tiny_model):
    checkpoint = open_checkpoint(str(tiny_model))
    whole = original(checkpoint, "layers.0.mlp.down_proj.weight")
    for rank in range(2):
        share = load_model(
            checkpoint, torch.float32, "cpu", without_the_others(rank, 2), weights=WEIGHTS
        )
        part = packed(whole[:, 48 * rank : 48 * (rank + 1)])
        found = fp8_in(share)["layers.0.mlp.down_proj.weight"]
        assert same(found, Fp8Weight(part, torch.float32))


def answer(world, path, dtype, draft):
    model = load_model(open_checkpoint(str(path)), dtype, "cpu", world, weights=WEIGHTS)
    engine = Engine(model, world, options=EngineOptions(weights=WEIGHTS))
    engine.extend([[n % 7 for n in range(40)]])
    answers = decode(engine, AnswerOptions(limit=24, draft=draft))
    return answers.token_ids, answers.drafts.off


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tokens_are_the_same_on_any_ranks_and_with_drafts(tiny_model, dtype):
    (alone, _), *_ = run_ranks(1, answer, tiny_model, dtype, "off")
    assert len(alone[0]) == 24
    drafted, off = run_ranks(1, answer, tiny_model, dtype, "lookup")[0]
    assert drafted == alone and off is None
    if dtype == torch.float32:
        assert run_ranks(2, answer, tiny_model, dtype, "off")[0][0] == alone


def test_errors_are_those_of_rounding_weights_and_rows(tiny_model):
    errors = weight_errors(open_checkpoint(str(tiny_model)), WEIGHTS)
    # Rounding to 3 bits of mantissa errs by 2^-4 at most, and by about 0.026 in the mean square:
    # once for rows, and for rows and weights together the root of 2 times as much.
    assert 0.02 < errors.of_quantised < 0.035
    assert 1.2 * errors.of_quantised < errors.of_original < 1.6 * errors.of_quantised


def test_types_on_each_device(tiny_model, monkeypatch):
    checkpoint = open_checkpoint(str(tiny_model))
    options = EngineOptions(weights=WEIGHTS)
    assert resolve_types("auto", options, checkpoint, "cpu")[0] == "float32"
    pretend(monkeypatch)
    dtype, found = resolve_types("bfloat16", options, checkpoint, "cuda")
    assert (dtype, found.weights) == ("bfloat16", WEIGHTS)


def cptool(*arguments):
    result = CliRunner().invoke(main, [str(argument) for argument in arguments])
    assert result.exit_code == 0, (result.output, result.stderr, result.exception)
    return result.stdout


def test_reports_never_call_it_exact(tiny_model, tmp_path):
    one = ("--threads", 1, "--device", "cpu", "--weights", WEIGHTS)
    session = ("--session", tmp_path / "s")
    shown = cptool("prefill", tiny_model, "--synthetic", 9, *session, *one)
    assert "weights quantised to fp8-ffn" in shown
    assert "widened for each product, which is slow: cpu has no FP8 products" in shown
    went_on = json.loads(cptool("decode", tmp_path / "s", "-n", 2, "--json", "--threads", 1))
    assert went_on["weights"] == WEIGHTS and went_on["predicted_ttft_s"] is None
    checked = cptool("verify", tiny_model, "--synthetic", 6, "--max-cp", 2, *one)
    assert "exact" not in checked and "attention within the bound, same tokens" in checked
    assert "products with the quantised weights differ from float64 products" in checked


def test_a_plan_counts_its_bytes(tiny_model):
    asked = ("plan", tiny_model, "--context", 256, "--hardware", "cpu-avx2", "--cp", 1, "--json")
    plain, fp8 = (json.loads(cptool(*asked, "--weights", weights)) for weights in ("file", WEIGHTS))
    matrices = 2 * (192 * 64 + 64 * 96)
    saved = 3 * matrices - 4 * 2 * (192 + 64)
    weights = [each["memory_parts_bytes"]["weights"] for each in (plain, fp8)]
    assert weights[0] - weights[1] == pytest.approx(saved, rel=0.01)
    assert (
        "cpu-avx2 has no FP8 products"
        in CliRunner().invoke(main, [*map(str, asked), "--weights", WEIGHTS]).stderr
    )
