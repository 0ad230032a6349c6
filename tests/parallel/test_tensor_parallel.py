"""Tensor parallelism: what divides, and that two ranks compute what one does."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_reference import ToyAttention, logits, random_llama, rms

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.weights import load_model
from cptool.errors import UserError
from cptool.model.architectures.family import Size
from cptool.model.shapes import llama_config
from cptool.model.shares import check, share

ROUNDING = 1.25  # as in test_model

REPLICATED_KV = dict(hidden_size=96, num_attention_heads=6, num_key_value_heads=1)


def config(heads, kv_heads, ffn=1536, head_dim=64):
    width = heads * head_dim
    return llama_config(
        hidden=width,
        layers=1,
        heads=heads,
        kv_heads=kv_heads,
        ffn=ffn,
        vocab_size=97,
        head_dim=head_dim,
        max_position_embeddings=512,
    )


@pytest.mark.parametrize(
    ("heads", "kv_heads", "ffn", "tp", "remedy"),
    [
        (9, 3, 1536, 2, "`tp` 1 or 3"),
        (5, 1, 1536, 2, "`tp` 1"),
        (5, 1, 1280, 4, "`tp` 1 or 5"),
        (12, 6, 1536, 4, "`tp` 1 or 2 or 3 or 6 or 12"),  # 4 ranks would cut a group of queries
        (4, 4, 1538, 4, "`tp` 1 or 2"),
    ],
)
def test_what_does_not_divide_is_refused_in_one_line(heads, kv_heads, ffn, tp, remedy):
    with pytest.raises(UserError) as error:
        check(config(heads, kv_heads, ffn), tp)
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"`tp` {tp}: ")
    assert message.endswith(f"use {remedy}")


@settings(deadline=None)
@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 12), st.integers(0, 11))
def test_every_query_head_finds_its_key_value_head(kv_heads, group, tp, tp_rank):
    model = config(kv_heads * group, kv_heads, ffn=27720)
    try:
        check(model, tp)
    except UserError:
        return
    own = share(model, tp_rank % tp, tp)
    q_heads = range(own[Size.QUERIES][0] // 64, own[Size.QUERIES][1] // 64)
    held = range(own[Size.KEYS][0] // 64, own[Size.KEYS][1] // 64)
    assert len(q_heads) == kv_heads * group // tp
    assert len(q_heads) % len(held) == 0
    for local, head in enumerate(q_heads):
        assert held[local // (len(q_heads) // len(held))] == head // group


def forward(world, path, dtype, tokens):
    """Every rank's logits."""
    model = load_model(open_checkpoint(path), dtype, "cpu", world)
    tokens = torch.tensor(tokens)
    positions = torch.arange(len(tokens), dtype=torch.int32)
    with torch.inference_mode():
        attention = ToyAttention()
        model(tokens[:0], positions[:0], attention.at(positions[:0]))
        hidden = model(tokens, positions, attention.at(positions))
        return world.gather(model.logits(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", [{}, REPLICATED_KV], ids=["kv-split", "kv-replicated"])
def test_two_ranks_compute_what_one_does(shape, dtype, tmp_path):
    reference = random_llama(shape, tmp_path, dtype)
    tokens = torch.randint(97, (40,), generator=torch.manual_seed(1))
    exact = logits(reference, tokens, torch.float64)
    allowed = ROUNDING * rms(logits(reference, tokens, dtype) - exact)
    first, second = run(
        forward,
        str(tmp_path),
        dtype,
        tokens.tolist(),
        ranks=RankOptions(tp=2, device="cpu", threads=1),
    )
    assert torch.equal(first, second)
    assert rms(first - exact) <= allowed
