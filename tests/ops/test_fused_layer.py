"""A layer of few rows in two calls gives the bits of the layer step by step."""

from contextlib import nullcontext

import pytest
import torch

from cptool.model import llama
from cptool.model.config import LlamaConfig
from cptool.model.rope import rotary_tables
from cptool.ops import fused_layer
from cptool.ops.kernels import cpu_isas, force_cpu_isa

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
    made = llama.DecoderLayer(CONFIG, 0, 1, "cpu").to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def attend(_, q, k, v):
    return (q * 0.5 + k.repeat_interleave(3, 1) - v.repeat_interleave(3, 1)).contiguous()


def run(made, hidden, positions):
    tables = rotary_tables(positions, llama.inverse_frequencies(CONFIG))
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


def test_more_than_few_rows_go_step_by_step():
    most = max(64, fused_layer.FEW_ROWS[torch.float32])
    assert not fused_layer.takes(torch.zeros(most + 1, 8))
    assert not fused_layer.takes(torch.zeros(1, 8, dtype=torch.float64))


def check_bits(made, hidden, positions, monkeypatch):
    together = run(made, hidden, positions)
    monkeypatch.setattr(fused_layer, "takes", lambda hidden: False)
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
