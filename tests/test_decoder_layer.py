"""A layer of few rows in two calls gives the bits of the layer step by step."""

import pytest
import torch

from cptool import decoder_layer
from cptool.model import llama
from cptool.model.config import LlamaConfig
from cptool.model.rope import rotary_tables

CONFIG = LlamaConfig(
    vocab_size=32, hidden_size=72, intermediate_size=104, num_hidden_layers=1,
    num_attention_heads=6, num_key_value_heads=2, head_dim=24, rms_norm_eps=1e-5, rope_theta=1e4,
    max_position_embeddings=512, tie_word_embeddings=False,
)  # fmt: skip


def layer(dtype):
    torch.manual_seed(1)
    made = llama.DecoderLayer(CONFIG, 0, 1, "cpu").to(dtype)
    for parameter in made.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return made.requires_grad_(False)


def attend(_, q, k, v):
    return (q * 0.5 + k.repeat_interleave(3, 1) - v.repeat_interleave(3, 1)).contiguous()


def run(made, hidden, positions):
    cos, sin = rotary_tables(positions, llama.inverse_frequencies(CONFIG))
    hidden = hidden.clone()
    made(hidden, cos, sin, attend)
    return hidden


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 2, 7, 8])
def test_the_same_bits(dtype, rows, monkeypatch):
    made = layer(dtype)
    hidden = torch.randn(rows, CONFIG.hidden_size).to(dtype)
    positions = torch.arange(100, 100 + rows, dtype=torch.int32)
    if rows > decoder_layer.FEW_ROWS[dtype]:
        pytest.skip("not few rows here")
    assert decoder_layer.takes(hidden)
    together = run(made, hidden, positions)
    monkeypatch.setattr(decoder_layer, "takes", lambda hidden: False)
    assert torch.equal(together, run(made, hidden, positions))
    assert not torch.equal(together, hidden)


def test_hooks_see_every_product():
    made = layer(torch.float32)
    seen = []
    for name in ("qkv_proj", "o_proj"):
        getattr(made.self_attn, name).register_forward_hook(lambda *_, name=name: seen.append(name))
    for name in ("gate_up_proj", "down_proj"):
        module = getattr(made.mlp, name)
        module.register_forward_pre_hook(lambda *_, name=name: seen.append(name))
    run(made, torch.randn(1, CONFIG.hidden_size), torch.tensor([3], dtype=torch.int32))
    assert seen == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]


@pytest.mark.parametrize("name", ["qkv", "o", "gate_up", "down", "norm"])
def test_tensors_that_do_not_fit_are_refused(name):
    made = layer(torch.float32)
    attention, mlp = made.self_attn, made.mlp
    modules = {
        "qkv": attention.qkv_proj, "o": attention.o_proj, "gate_up": mlp.gate_up_proj,
        "down": mlp.down_proj, "norm": made.input_layernorm,
    }  # fmt: skip
    module = modules[name]
    module.weight = torch.nn.Parameter(module.weight[..., 1:], requires_grad=False)
    with pytest.raises(ValueError, match="it must be"):
        run(made, torch.randn(1, CONFIG.hidden_size), torch.tensor([3], dtype=torch.int32))
