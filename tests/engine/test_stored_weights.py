"""Models whose weights stay as the file stores them compute what the widened weights compute."""

import os

import numpy as np
import pytest
import torch
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf_checkpoint import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, SHAPES, interleave, write
from llama_reference import random_llama
from meta_checkpoint import save_meta
from test_weights import assert_same, mapping_of, matrices, without_the_others

from cptool.checkpoint import open_checkpoint
from cptool.distributed.failure import RankFailed
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.weights import load_model
from cptool.model.linear import BiasedLinear
from cptool.ops.stored import StoredWeight

MIXED = {
    **{"token_embd": "Q8_0", "output": "Q6_K", "blk.0.attn_q": "Q4_K", "blk.0.attn_k": "Q4_K"},
    **{"blk.0.attn_v": "Q6_K", "blk.0.attn_output": "Q5_K", "blk.0.ffn_gate": "Q4_0"},
    **{"blk.0.ffn_up": "IQ4_NL", "blk.0.ffn_down": "Q5_1"},
}
"""Types as a mixture of k-quants has them: query and value rows in different ones."""

SCALES = {"Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,), "IQ4_NL": (0,)}


def mixed(path, types=MIXED):
    """Write a model of these types; what the gguf package cannot encode has random blocks."""
    rng, tensors = np.random.default_rng(3), {}
    for name, kind in types.items():
        if kind in SCALES:
            weights, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
            rows, depth = SHAPES[name]
            raw = rng.integers(0, 256, (rows, depth // weights, size), np.uint8)
            for at in SCALES[kind]:
                scales = rng.standard_normal((rows, depth // weights, 1)) * 1e-3
                raw[..., at : at + 2] = scales.astype(np.float16).view(np.uint8)
            tensors[name] = raw.reshape(rows, -1)
    write(path, tensors, types)
    return open_checkpoint(str(path))


def kept_in(model):
    """The matrices of a model that stay as the file stores them, by name."""
    return {
        f"{name}.weight": module.weight
        for name, module in model.named_modules()
        if isinstance(getattr(module, "weight", None), StoredWeight)
    }


def widened(checkpoint, world=None):
    """The model with every weight in float32."""
    model = load_model(checkpoint, torch.float32, "cpu", world)
    for name, weight in kept_in(model).items():
        module = model.get_submodule(name.rpartition(".")[0])
        del module.weight
        module.weight = torch.nn.Parameter(weight.widened(), requires_grad=False)
    return model


def test_quantised_matrices_stay_in_the_file(tmp_path):
    checkpoint = mixed(tmp_path / "m.gguf")
    model = load_model(checkpoint, torch.float32, "cpu")
    found, kept = matrices(model), kept_in(model)
    assert {name for name, tensor in found.items() if tensor.dim() == 2} == kept.keys()
    for weight in kept.values():
        for part in weight.parts:
            assert mapping_of(part.data)[1].endswith("m.gguf")
    for name, read in (("mlp.down_proj", ["mlp.down"]), ("self_attn.qkv_proj", "qkv")):
        parts = [p if len(p) > 1 else f"self_attn.{p}" for p in read]
        values = [checkpoint.read(f"model.layers.0.{part}_proj.weight") for part in parts]
        assert torch.equal(found[f"layers.0.{name}.weight"], torch.cat(values))


@pytest.mark.parametrize("tp", [1, 2])
def test_tensor_parallel_shares_make_up_the_whole(tp, tmp_path):
    checkpoint = mixed(tmp_path / "m.gguf", {**MIXED, "blk.0.attn_output": "Q4_1"})
    whole = matrices(load_model(checkpoint, torch.float32, "cpu"))
    shares = []
    for rank in range(tp):
        model = load_model(checkpoint, torch.float32, "cpu", without_the_others(rank, tp))
        assert len(kept_in(model)) == 6
        shares.append(matrices(model))
    for name, dim in (("self_attn.o_proj", 1), ("mlp.down_proj", 1)):
        key = f"layers.0.{name}.weight"
        assert torch.equal(torch.cat([share[key] for share in shares], dim), whole[key])


def test_a_share_that_would_cut_a_block_is_widened(tmp_path):
    """Half of 256 columns, and a block of Q5_K has 256 weights."""
    checkpoint = mixed(tmp_path / "m.gguf")
    whole = checkpoint.read("model.layers.0.self_attn.o_proj.weight")
    for rank in range(2):
        model = load_model(checkpoint, torch.float32, "cpu", without_the_others(rank, 2))
        o_proj = model.layers[0].self_attn.o_proj.weight
        assert torch.equal(o_proj, whole[:, 128 * rank : 128 * rank + 128])


def answers(world, path):
    checkpoint = open_checkpoint(path)
    engine = Engine(load_model(checkpoint, torch.float32, "cpu", world), world)
    engine.extend([list(range(30))])
    logits = {b: row.clone() for b, row in engine.logits.items()}
    (answer,) = decode(engine, AnswerOptions(limit=8)).token_ids
    return world.gather(answer)[0], logits.get(0)


@pytest.mark.parametrize(("cp", "tp"), [(1, 1), (2, 1), (1, 2)])
def test_tokens_are_those_of_the_widened_model(cp, tp, tmp_path):
    checkpoint = mixed(tmp_path / "m.gguf")
    found, logits = run(
        answers,
        str(tmp_path / "m.gguf"),
        ranks=RankOptions(cp=cp, tp=tp, device="cpu", threads=1),
    )
    world = without_the_others(0, 1)
    engine = Engine(widened(checkpoint, world), world)
    engine.extend([list(range(30))])
    if logits is not None:
        torch.testing.assert_close(logits, engine.logits[0], rtol=1e-4, atol=1e-4)
    assert found == decode(engine, AnswerOptions(limit=8)).token_ids[0]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_quantised_matrices_stay_in_the_file_under_16_bits(dtype, tmp_path):
    """Also the part of a matrix that has 16 bits beside quantised ones; logits are those of float32
    to the rounding of activations.
    """
    checkpoint = mixed(tmp_path / "m.gguf", {**MIXED, "blk.0.attn_k": "BF16", "output": "F16"})
    model = load_model(checkpoint, dtype, "cpu")
    kept = kept_in(model)
    assert {
        name for name, tensor in matrices(model).items() if tensor.dim() == 2
    } - kept.keys() == {"lm_head.weight"}
    assert {part.encoding for part in kept["layers.0.self_attn.qkv_proj.weight"].parts} == {
        *("Q4_K", "BF16", "Q6_K")
    }
    world, logits = without_the_others(0, 1), {}
    for of in (torch.float32, dtype):
        engine = Engine(load_model(checkpoint, of, "cpu", world), world)
        engine.extend([list(range(30))])
        logits[of] = engine.logits[0].float()
    exact, found = logits[torch.float32], logits[dtype]
    assert (found - exact).norm() <= 8 * torch.finfo(dtype).eps * exact.norm()


@pytest.mark.parametrize("stored", [torch.bfloat16, torch.float16])
def test_short_floats_stay_in_the_file_under_float32(stored, tmp_path):
    random_llama(dict(hidden_size=64, intermediate_size=128), tmp_path, stored)
    checkpoint = open_checkpoint(str(tmp_path))
    model = load_model(checkpoint, torch.float32, "cpu")
    found, kept = matrices(model), kept_in(model)
    assert {name for name, tensor in found.items() if tensor.dim() == 2} == kept.keys()
    for weight in kept.values():
        assert all(mapping_of(part.data)[1].endswith(".safetensors") for part in weight.parts)
    assert torch.equal(found["lm_head.weight"], checkpoint.read("lm_head.weight").float())


def test_interleaved_rows_are_those_of_a_half_split_file(tmp_path):
    rng = np.random.default_rng(5)
    q = rng.standard_normal(SHAPES["blk.0.attn_q"], np.float32)
    k = rng.standard_normal(SHAPES["blk.0.attn_k"], np.float32)
    stored = {"blk.0.attn_q": interleave(q, HEADS), "blk.0.attn_k": interleave(k, KV_HEADS)}
    write(tmp_path / "i.gguf", stored, {name: "Q8_0" for name in SHAPES if "norm" not in name})
    checkpoint = open_checkpoint(str(tmp_path / "i.gguf"))
    model = load_model(checkpoint, torch.float32, "cpu")
    weight = model.layers[0].self_attn.qkv_proj.weight
    values = [checkpoint.read(f"model.layers.0.self_attn.{p}_proj.weight") for p in "qkv"]
    assert torch.equal(weight.widened(), torch.cat(values))


@pytest.mark.parametrize("tp", [2, 4, 8])
def test_shares_of_interleaved_heads(tp, tmp_path):
    """Whole heads of queries, and the key-value head of each of several ranks that it is for."""
    matrices_of = {name: "Q8_0" for name in SHAPES if "norm" not in name}
    write(tmp_path / "h.gguf", None, {**matrices_of, "blk.0.attn_k": "F16"})
    checkpoint = open_checkpoint(str(tmp_path / "h.gguf"))
    whole = [checkpoint.read(f"model.layers.0.self_attn.{part}_proj.weight") for part in "qkv"]
    queries, keys = HIDDEN // tp, HEAD_DIM * max(1, KV_HEADS // tp)
    for rank in range(tp):
        model = load_model(checkpoint, torch.float32, "cpu", without_the_others(rank, tp))
        assert len(kept_in(model)) == 6
        first = HEAD_DIM * (rank * KV_HEADS // tp)
        kv = [rows[first : first + keys].float() for rows in whole[1:]]
        wanted = torch.cat([whole[0][queries * rank : queries * (rank + 1)], *kv])
        assert torch.equal(model.layers[0].self_attn.qkv_proj.weight.widened(), wanted)


@pytest.mark.parametrize(("files", "kept"), [(1, 14), (2, 0)])
def test_metas_files_are_read_where_they_lie_unless_they_are_several(files, kept, tmp_path):
    """Rows of queries and keys are interleaved, and several files each have a part of a matrix."""
    shape = dict(vocab_size=96, hidden_size=64, intermediate_size=128)
    reference = random_llama(shape, tmp_path / "hf", torch.bfloat16)
    checkpoint = open_checkpoint(str(save_meta(reference, tmp_path / "meta", files)))
    model = load_model(checkpoint, torch.float32, "cpu")
    assert len(kept_in(model)) == kept
    assert_same(matrices(model), reference, torch.float32)


def test_a_bias_is_added(tmp_path):
    """What a family adds stays a parameter beside the matrix."""
    types = {name: "Q8_0" for name in SHAPES if "norm" not in name}
    write(tmp_path / "b.gguf", None, types)
    model = load_model(open_checkpoint(str(tmp_path / "b.gguf")), torch.float32, "cpu")
    weight = model.layers[0].self_attn.qkv_proj.weight
    with torch.inference_mode():
        biased = BiasedLinear(HIDDEN, weight.shape[0], "cpu")
        bias = torch.randn(weight.shape[0])
        biased.bias.copy_(bias)
        del biased.weight
        vars(biased)["weight"] = weight
        for rows in (1, 3, 40):
            x = torch.randn(rows, HIDDEN)
            assert torch.equal(biased(x), weight.linear(x) + bias)


def truncated_under(world, path):
    """Rank 1 computes with the weights of a file that has been emptied."""
    model = load_model(open_checkpoint(path), torch.float32, "cpu", world)
    world.barrier()
    if world.rank == 1:
        os.truncate(path, 0)
        model.logits(torch.ones(1, HIDDEN))
    world.barrier()


def test_a_file_that_is_truncated_under_a_run_ends_it_in_one_line(tmp_path):
    mixed(tmp_path / "m.gguf")
    ranks = RankOptions(cp=2, device="cpu", threads=1)
    with pytest.raises(RankFailed, match=r"^rank 1 .* SIGBUS during .* was truncated while it was"):
        run(truncated_under, str(tmp_path / "m.gguf"), ranks=ranks)
