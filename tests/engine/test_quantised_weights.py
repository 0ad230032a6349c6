"""Float weights that are quantised while they are loaded."""

from types import SimpleNamespace

import gguf
import numpy as np
import pytest
import torch
from click.testing import CliRunner
from ranks import run_ranks
from test_stored_weights import kept_in
from test_weights import without_the_others

from cptool.checkpoint import open_checkpoint
from cptool.cli.plan.command import plan
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import mean_weight_size, resolve_types, widened
from cptool.engine.weights import load_model, original
from cptool.errors import OptionError
from cptool.exactness.weights import weight_errors
from cptool.ops.quantise import quantised
from cptool.ops.stored import Blocks, StoredWeight


def values_of(blocks):
    return StoredWeight([Blocks(blocks, "Q8_0")]).widened()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_blocks_are_those_of_the_gguf_package(dtype):
    matrix = torch.randn(48, 96, generator=torch.Generator().manual_seed(1))
    matrix[0, :32], matrix[1] = 0, torch.tensor([127.0, 0.5, -0.5, 1.5, -1.5, 63.5]).repeat(16)
    matrix[2:9] *= torch.logspace(-30, 3, 7)[:, None]
    matrix = matrix.to(dtype)
    theirs = gguf.quants.quantize(matrix.float().numpy(), gguf.GGMLQuantizationType.Q8_0)
    assert np.array_equal(quantised(matrix).numpy(), theirs)


def test_whole_rows_have_one_scale():
    matrix = torch.randn(5, 128, generator=torch.Generator().manual_seed(1))
    scale = matrix.abs().amax(1, keepdim=True) / 127
    found = values_of(quantised(matrix, whole_rows=True))
    assert torch.equal(found, (matrix / scale).round() * scale.half().float())
    assert (found - matrix).abs().max() > (values_of(quantised(matrix)) - matrix).abs().max()


@pytest.mark.parametrize("kind", ["q8_0", "int8"])
def test_all_matrices_are_quantised(kind, tiny_model):
    checkpoint = open_checkpoint(str(tiny_model))
    model = load_model(checkpoint, torch.float32, "cpu", weights=kind)
    kept = kept_in(model)
    assert len(kept) == 2 + 4 * model.config.num_hidden_layers
    for name, weight in kept.items():
        whole = original(checkpoint, name)
        assert torch.equal(weight.widened(), values_of(quantised(whole, whole_rows=kind == "int8")))
    sizes = sum(weight.nbytes for weight in kept.values())
    count = sum(weight.shape.numel() for weight in kept.values())
    assert mean_weight_size(checkpoint, "float32", "cpu", kind) == sizes / count == 34 / 32


def test_shares_of_tensor_parallel_ranks_are_those_of_the_whole(tiny_model):
    """Half of 64 columns is a whole block, half of 96 is not: that matrix stays as it is."""
    checkpoint = open_checkpoint(str(tiny_model))
    whole = kept_in(load_model(checkpoint, torch.float32, "cpu", weights="q8_0"))
    shares = [
        load_model(checkpoint, torch.float32, "cpu", without_the_others(rank, 2), weights="q8_0")
        for rank in range(2)
    ]
    name = "layers.1.self_attn.o_proj.weight"
    parts = [kept_in(share)[name].widened() for share in shares]
    assert torch.equal(torch.cat(parts, 1), whole[name].widened())
    for share in shares:
        assert "layers.1.mlp.down_proj.weight" not in kept_in(share)


def answer(world, path):
    model = load_model(open_checkpoint(str(path)), torch.float32, "cpu", world, weights="q8_0")
    engine = Engine(model, world, options=EngineOptions(weights="q8_0"))
    engine.extend([list(range(40))])
    return decode(engine, AnswerOptions(limit=8)).token_ids


def test_tokens_are_the_same_on_any_ranks(tiny_model):
    found = [tokens for n in (1, 2) for tokens in run_ranks(n, answer, tiny_model)]
    assert found[0][0] and all(tokens == found[0] for tokens in found)


def test_errors_are_those_of_the_original_and_of_the_quantised_weights(tiny_model):
    checkpoint = open_checkpoint(str(tiny_model))
    blocks, rows = (weight_errors(checkpoint, kind) for kind in ("q8_0", "int8"))
    assert 1e-3 < blocks.of_original < rows.of_original < 0.02
    assert 0 < blocks.of_quantised < 1e-6


def test_what_does_not_stay_as_stored_is_said():
    def tensor(encoding, size):
        return SimpleNamespace(shape=(64, 64), encoding=encoding, nbytes=size)

    stored = {"a": tensor("MXFP4", 2176), "b": tensor("Q4_0", 2304), "c": tensor("F32", 16384)}
    checkpoint = SimpleNamespace(stored=stored)
    said = widened(checkpoint, "float32", "cpu")
    assert said.startswith("1 tensor in MXFP4 widened to float32, without loss: ")
    assert said.endswith("2.18 kB in the file, 16.4 kB in memory")
    assert "1 tensor in MXFP4 rounded to bfloat16" in widened(checkpoint, "bfloat16", "cpu")
    assert "2 tensors in MXFP4, Q4_0 rounded to bfloat16" in widened(checkpoint, "bfloat16", "cuda")
    assert widened(SimpleNamespace(stored={"c": stored["c"]}), "float32", "cuda") is None


def test_a_plan_for_quantised_weights_names_them(tiny_model):
    options = ("--context", "256", "--hardware", "cpu-avx2", "--weights", "q8_0")
    shown = CliRunner().invoke(plan, [str(tiny_model), *options])
    assert shown.exit_code == 0, shown.output
    assert "weights quantised to q8_0" in shown.output and "--weights q8_0" in shown.output


def test_what_cannot_be_quantised_is_refused(tiny_model):
    checkpoint = open_checkpoint(str(tiny_model))
    options = EngineOptions(weights="q8_0")
    assert resolve_types("auto", options, checkpoint, "cpu")[0] == "float32"
    assert resolve_types("bfloat16", options, checkpoint, "cpu")[0] == "bfloat16"
    with pytest.raises(OptionError, match=r"`weights` q8_0: .* on a CPU, not on cuda"):
        resolve_types("float32", options, checkpoint, "cuda")
