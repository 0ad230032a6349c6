"""The Llama forward against `transformers`.

Tolerances are the reference's own rounding: what `transformers` errs in the working type against
itself in float64. Two right programs round in different places, so the errors' root mean squares
over all logits, some ten thousand, may differ by a quarter.
"""

import pytest
import torch
from llama_reference import SHAPES, ToyAttention, logits, random_llama, rms
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

from cptool.checkpoint import open_checkpoint
from cptool.engine.weights import load_model
from cptool.model import rows
from cptool.model.rope import inverse_frequencies, rotary_tables

ROUNDING = 1.25
TOKENS = 96


@pytest.fixture(autouse=True)
def _inference():
    with torch.inference_mode():
        yield


def tokens_of(model, count=TOKENS):
    return torch.randint(model.config.vocab_size, (count,), generator=torch.manual_seed(1))


def run(model, tokens, splits=()):
    """Logits of all tokens, computed in consecutive pieces that share a cache."""
    attention, positions = ToyAttention(), torch.arange(len(tokens), dtype=torch.int32)
    hidden = [
        model(tokens[start:stop], positions[start:stop], attention.at(positions[start:stop]))
        for start, stop in zip((0, *splits), (*splits, len(tokens)), strict=True)
    ]
    return model.logits(torch.cat(hidden))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_equal_transformers_to_rounding(shape, dtype, tmp_path):
    reference = random_llama(SHAPES[shape], tmp_path, dtype)
    tokens = tokens_of(reference)
    exact = logits(reference, tokens, torch.float64)
    allowed = ROUNDING * rms(logits(reference, tokens, dtype) - exact)
    model = load_model(open_checkpoint(str(tmp_path)), dtype, "cpu")

    ours = run(model, tokens)
    assert ours.dtype == torch.float32
    assert rms(ours - exact) <= allowed
    assert rms(run(model, tokens, splits=(1, 40, 41)) - exact) <= allowed


def test_long_prompts_are_computed_in_slices(tmp_path, monkeypatch):
    reference = random_llama(SHAPES["gqa-9-3"], tmp_path)
    tokens = tokens_of(reference)
    exact = logits(reference, tokens, torch.float64)
    monkeypatch.setattr(rows, "ROWS_AT_ONCE_CPU", 7)
    ours = run(load_model(open_checkpoint(str(tmp_path)), torch.float32, "cpu"), tokens)
    assert rms(ours - exact) <= ROUNDING * rms(logits(reference, tokens, torch.float32) - exact)


def test_a_rank_without_tokens_attends_in_every_layer(tmp_path):
    random_llama(SHAPES["gqa-9-3"], tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), torch.float32, "cpu")
    seen = []

    def attend(layer, q, k, v):
        seen.append((layer, tuple(q.shape), tuple(k.shape), tuple(v.shape)))
        return torch.empty_like(q)

    none = torch.empty(0, dtype=torch.int32)
    hidden = model(none.long(), none, attend)
    assert hidden.shape == (0, 144)
    assert model.logits(hidden).shape == (0, 97)
    assert seen == [(layer, (0, 9, 16), (0, 3, 16), (0, 3, 16)) for layer in range(3)]


def test_logits_of_some_rows_are_those_of_all(tmp_path):
    reference = random_llama({}, tmp_path)
    model = load_model(open_checkpoint(str(tmp_path)), torch.float32, "cpu")
    tokens = tokens_of(reference, 9)
    positions = torch.arange(9, dtype=torch.int32)
    hidden = model(tokens, positions, ToyAttention().at(positions))
    last = model.logits(hidden[-1:])
    assert last.shape == (1, 97)
    torch.testing.assert_close(last, model.logits(hidden)[-1:])


@pytest.mark.parametrize("shape", ["mha", "head-dim-80", "linear", "llama3"])
def test_rotary_tables_equal_transformers_bit_by_bit(shape, tmp_path):
    reference = random_llama(SHAPES[shape], tmp_path)
    config = open_checkpoint(str(tmp_path)).config
    frequencies = inverse_frequencies(config)
    theirs = LlamaRotaryEmbedding(reference.config)
    assert torch.equal(frequencies, theirs.inv_freq)

    positions = torch.tensor([0, 1, 511, 8191, 131_071, 1_048_575, 16_777_215], dtype=torch.int32)
    cos, sin = rotary_tables(positions, frequencies)
    expected_cos, expected_sin = theirs(torch.empty(0), positions[None])
    assert torch.equal(cos[:, 0], expected_cos[0].chunk(2, dim=-1)[0])
    assert torch.equal(sin[:, 0], expected_sin[0].chunk(2, dim=-1)[0])


def test_the_llama3_case_has_all_three_bands(tmp_path):
    random_llama(SHAPES["llama3"], tmp_path)
    config = open_checkpoint(str(tmp_path)).config
    plain = config.rope_theta ** (-torch.arange(0, 64, 2) / 64)
    kept = inverse_frequencies(config) / plain
    assert (kept > 0.999).sum() > 3
    assert (kept < 1.001 / config.rope_scaling.factor).sum() > 3
    assert ((kept < 0.99) & (kept > 1.01 / config.rope_scaling.factor)).sum() > 1
