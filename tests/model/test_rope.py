"""Rotary embeddings of all types equal those of `transformers` bit by bit."""

import pytest
import torch
from transformers import LlamaConfig, Phi3Config
from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding
from transformers.models.phi3.modeling_phi3 import Phi3RotaryEmbedding

from cptool.checkpoint.huggingface.config import read_shape
from cptool.errors import OptionError
from cptool.model.context import with_context
from cptool.model.rope import inverse_frequencies, rotary_tables

WIDTHS = dict(hidden_size=256, num_attention_heads=4, num_key_value_heads=2)
FACTORS = dict(
    short_factor=[1 + j / 7 for j in range(24)], long_factor=[1 + j / 3 for j in range(24)]
)


def yarn(**changes):
    return dict(rope_type="yarn", rope_theta=1e6, factor=4.0, **changes)


LLAMA = {
    "yarn": yarn(),
    "yarn-original": yarn(original_max_position_embeddings=4096),
    "yarn-mscale": yarn(mscale=1.0, mscale_all_dim=0.7),
    "yarn-attention": yarn(attention_factor=1.25),
    "yarn-bands": yarn(beta_fast=20.0, beta_slow=2.0),
    "yarn-untruncated": yarn(truncate=False),
    "yarn-short": dict(yarn(), rope_theta=100.0, original_max_position_embeddings=64),
    "dynamic": dict(rope_type="dynamic", rope_theta=1e4, factor=8.0),
}


def compare(folder, theirs, positions):
    """Frequencies and tables of the saved configuration are those of `theirs`."""
    config = read_shape(folder / "config.json", [])
    frequencies = inverse_frequencies(config)
    at = torch.tensor(positions, dtype=torch.int32)
    expected = theirs(torch.empty(0), at[None])
    assert torch.equal(frequencies, theirs.inv_freq)
    found = rotary_tables(at, frequencies, config.rope_scaling.attention_factor)
    for table, wanted in zip(found, expected, strict=True):
        assert torch.equal(table[:, 0], wanted[0].chunk(2, dim=-1)[0])


@pytest.mark.parametrize("case", LLAMA)
def test_scaling_of_a_llama(case, tmp_path):
    config = LlamaConfig(**WIDTHS, max_position_embeddings=8192, rope_parameters=LLAMA[case])
    config.save_pretrained(tmp_path)
    compare(tmp_path, LlamaRotaryEmbedding(config), [0, 1, 511, 8191])


@pytest.mark.parametrize(("last", "context"), [(4095, 4096), (4096, 65536)], ids=["short", "long"])
def test_longrope_of_a_part_of_a_head(last, context, tmp_path):
    """transformers looks at the longest position, cptool at the context."""
    config = Phi3Config(
        **WIDTHS,
        max_position_embeddings=65536,
        original_max_position_embeddings=4096,
        rope_parameters=dict(
            rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, **FACTORS
        ),
    )
    config.save_pretrained(tmp_path)
    theirs = Phi3RotaryEmbedding(config)
    read = read_shape(tmp_path / "config.json", [])
    assert read.rotary_dim == 48 and read.max_position_embeddings == 65536
    ours, at = with_context(read, context), torch.tensor([0, 1, 511, last], dtype=torch.int32)
    frequencies = inverse_frequencies(ours)
    expected = theirs(torch.empty(0), at[None])
    found = rotary_tables(at, frequencies, ours.rope_scaling.attention_factor)
    for table, wanted in zip(found, expected, strict=True):
        assert torch.equal(table[:, 0], wanted[0].chunk(2, dim=-1)[0])


def test_dynamic_scaling_ends_at_the_context_before(tmp_path):
    config = LlamaConfig(**WIDTHS, max_position_embeddings=8192, rope_parameters=LLAMA["dynamic"])
    config.save_pretrained(tmp_path)
    read = read_shape(tmp_path / "config.json", [])
    assert with_context(read, 100).max_position_embeddings == 100
    with pytest.raises(OptionError, match="use at most 8192"):
        with_context(read, 8193)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(long_factor=[1.0]), "1 long factors of the rope scaling for 24 rotated pairs"),
        (dict(short_factor=[1.0] * 23 + ["x"]), "short_factor is"),
        (dict(partial_rotary_factor=1.5), "partial_rotary_factor is 1.5"),
    ],
)
def test_damaged_factors_are_refused(changes, message, tmp_path):
    import json

    from cptool.errors import UserError

    rope = dict(rope_type="longrope", rope_theta=1e4, partial_rotary_factor=0.75, **FACTORS)
    fields = dict(WIDTHS, **{**Phi3Config(**WIDTHS).to_dict(), "rope_parameters": rope | changes})
    fields |= {"architectures": ["Phi3ForCausalLM"]}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(UserError, match=message.replace(".", "[.]")):
        read_shape(tmp_path / "config.json", [])
