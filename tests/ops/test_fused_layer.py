"""A layer of few rows in two calls gives the bits of the layer step by step."""

from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from cptool.model.config import LlamaConfig
from cptool.model.layer import DecoderLayer
from cptool.model.rope import inverse_frequencies, rotary_tables
from cptool.ops import fused_layer
from cptool.ops.kernels import cpu_isas, force_cpu_isa
from cptool.ops.stored import Blocks, StoredWeight

CONFIG = LlamaConfig(
    vocab_size=32,
    hidden_size=72,
    intermediate_size=104,
    num_hidden_layers=1,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=24,
    rms_norm_eps=1e-5,
    rope_theta=1e4,
    max_position_embeddings=512,
    tie_word_embeddings=False,
)


def layer(dtype):
    torch.manual_seed(1)
    made = DecoderLayer(CONFIG, 0, 1, "cpu").to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def stored_layer(dtype=torch.float32):
    """A layer of width 64, the weights of whose products are Q8_0 and Q4_1."""
    config = replace(CONFIG, hidden_size=64, intermediate_size=96, head_dim=16)
    config = replace(config, num_attention_heads=4, num_key_value_heads=4)
    torch.manual_seed(1)
    made = DecoderLayer(config, 0, 1, "cpu").requires_grad_(False)
    q_and_k = Blocks(blocks(128, 2 * 34), "Q8_0", 16)
    weights = {
        made.self_attn.qkv_proj: [q_and_k, Blocks(blocks(64, 2 * 20), "Q4_1")],
        made.self_attn.o_proj: [Blocks(blocks(64, 2 * 34), "Q8_0")],
        made.mlp.gate_up_proj: [Blocks(blocks(96, 2 * 20), "Q4_1")] * 2,
        made.mlp.down_proj: [Blocks(blocks(64, 3 * 20), "Q4_1")],
    }
    for module, parts in weights.items():
        del module.weight
        vars(module)["weight"] = StoredWeight(parts, dtype)
    for norm in (made.input_layernorm, made.post_attention_layernorm):
        torch.nn.init.normal_(norm.weight)
    return made.to(dtype)


def blocks(rows, size):
    """Any bytes, of which pairs are float16 below 2 in size."""
    return torch.randint(256, (rows, size), dtype=torch.uint8) & 0xBB


def attend(_, q, k, v):
    shared = q.shape[1] // k.shape[1]
    return (q * 0.5 + (k - v).repeat_interleave(shared, 1)).contiguous()


def run(made, hidden, positions):
    config = replace(CONFIG, head_dim=made.self_attn.head_dim)
    tables = rotary_tables(positions, inverse_frequencies(config))
    cos, sin = torch.cat(tables, dim=-1).chunk(2, dim=-1)
    # Rows further apart than they are wide.
    hidden = torch.nn.functional.pad(hidden, (0, 8))[:, : hidden.shape[1]]
    made(hidden, cos, sin, attend)
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 3, 8, "most"])
@pytest.mark.parametrize("isa", cpu_isas())
def test_the_same_bits(dtype, rows, isa, monkeypatch):
    """Weights, tables and hidden rows are parts of larger tensors; two threads."""
    made = layer(dtype)
    most = min(64, fused_layer.FEW_ROWS[dtype])
    rows = most if rows == "most" else min(rows, most)
    for module in (
        made.self_attn.qkv_proj,
        made.self_attn.o_proj,
        made.mlp.gate_up_proj,
        made.mlp.down_proj,
    ):
        wide = torch.nn.functional.pad(module.weight, (3, 5), value=7)
        module.weight = torch.nn.Parameter(wide[:, 3:-5], requires_grad=False)
    hidden = torch.randn(rows, CONFIG.hidden_size + 8).to(dtype)[:, 8:]
    positions = torch.arange(100, 100 + rows, dtype=torch.int32)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    with force_cpu_isa(isa):
        assert fused_layer.takes(hidden)
        check_bits(made, hidden, positions, monkeypatch)


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_same_bits_with_stored_weights(dtype, rows, isa, monkeypatch):
    """The heads of q and k in interleaved order, parts of several types."""
    made = stored_layer(dtype)
    hidden = torch.randn(rows, 64).to(dtype)
    positions = torch.arange(7, 7 + rows, dtype=torch.int32)
    with force_cpu_isa(isa):
        assert fused_layer.takes(hidden[:1], *made._weights())
        check_bits(made, hidden, positions, monkeypatch)


def test_stored_weights_that_do_not_fit_are_refused():
    made = stored_layer()
    vars(made.self_attn.o_proj)["weight"] = made.mlp.gate_up_proj.weight
    with pytest.raises(ValueError, match=r"o is stored, for .*, and has shape \[192, 64\];"):
        run(made, torch.randn(1, 64), torch.tensor([3], dtype=torch.int32))


def test_more_than_few_rows_go_step_by_step():
    most = max(64, fused_layer.FEW_ROWS[torch.float32])
    assert not fused_layer.takes(torch.zeros(most + 1, 8))
    assert not fused_layer.takes(torch.zeros(1, 8, dtype=torch.float64))


def check_bits(made, hidden, positions, monkeypatch):
    together = run(made, hidden, positions)
    monkeypatch.setattr(fused_layer, "takes", lambda *_: False)
    assert torch.equal(together, run(made, hidden, positions))
    assert not torch.equal(together, hidden)


def test_spans_and_sums_see_every_product():
    made = layer(torch.float32)
    seen = []
    for name in ("qkv_proj", "o_proj"):
        getattr(made.self_attn, name).reduce = lambda out, name=name: seen.append(name)
    for name in ("gate_up_proj", "down_proj"):
        getattr(made.mlp, name).span = lambda name=name: nullcontext(seen.append(name))
    run(made, torch.randn(1, CONFIG.hidden_size), torch.tensor([3], dtype=torch.int32))
    assert seen == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("rotated", [-1, 11])
def test_heads_that_are_not_there_are_refused(rotated):
    made, tables = layer(torch.float32), torch.ones(1, 1, 12)
    weight = made.self_attn.qkv_proj.weight
    with pytest.raises(ValueError, match="it must be whole heads"):
        fused_layer.before_attention(
            torch.randn(1, CONFIG.hidden_size),
            made.input_layernorm.weight,
            1e-5,
            weight,
            tables,
            tables,
            rotated,
        )


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down", "norm"])
def test_tensors_that_do_not_fit_are_refused(name):
    made = layer(torch.float32)
    attention, mlp = made.self_attn, made.mlp
    modules = {
        "qkv": attention.qkv_proj,
        "o": attention.o_proj,
        "gate_up": mlp.gate_up_proj,
        "down": mlp.down_proj,
        "norm": made.input_layernorm,
    }
    module = modules[name]
    module.weight = torch.nn.Parameter(module.weight[..., 1:], requires_grad=False)
    with pytest.raises(ValueError, match="it must be"):
        run(made, torch.randn(1, CONFIG.hidden_size), torch.tensor([3], dtype=torch.int32))
