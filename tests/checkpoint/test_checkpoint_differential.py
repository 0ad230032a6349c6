"""Configurations out of the fields that real checkpoints have, against transformers.

Each either gives the logits of transformers, or is refused in one line. There is no third outcome:
a field that is neither computed nor known to change nothing must not be ignored.
"""

import json
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_reference import ToyAttention, random_llama
from transformers import AutoModelForCausalLM

from cptool.checkpoint import open_checkpoint
from cptool.engine.weights import load_model
from cptool.errors import UserError

HEAD_DIM = 8
ABSENT = ...

LLAMA3 = {"factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}

TOKENS = torch.tensor([(7 * i * i + 3 * i) % 64 for i in range(40)])


def some(**fields):
    """A dictionary of these fields, each of which may be absent."""
    return st.fixed_dictionaries(
        {name: st.sampled_from([ABSENT, *values]) for name, values in fields.items()}
    ).map(lambda chosen: {name: value for name, value in chosen.items() if value is not ABSENT})


ROPES = st.one_of(
    st.none(),
    st.just({}),
    st.just(ABSENT),
    some(
        rope_type=["default", "linear", "llama3", "dynamic", "yarn"],
        type=["default", "linear", "llama3"],
        factor=[1, 2.0, 4, 8.0],
        rope_theta=[1e4, 5e5],
        original_max_position_embeddings=[16, 64],
        partial_rotary_factor=[1.0, 0.5],
        attention_factor=[1.0, 1.3],
    ),
    some(original_max_position_embeddings=[16, 64], rope_theta=[1e4, 5e5]).map(
        lambda fields: {"rope_type": "llama3", **LLAMA3, **fields}
    ),
    st.sampled_from([1, 2.0, 4]).map(lambda factor: {"type": "linear", "factor": factor}),
)

FIELDS = some(
    rope_theta=[1e4, 10000, 5e5],
    original_max_position_embeddings=[16, 64],
    head_dim=[None, HEAD_DIM, 16],
    num_key_value_heads=[None, 2, 4],
    tie_word_embeddings=[True, False, None],
    hidden_act=["silu", "swish", "gelu"],
    attention_bias=[False, True, None],
    mlp_bias=[False, True],
    rms_norm_eps=[1e-5, 1e-6, 0.1],
    partial_rotary_factor=[1.0, 0.5],
    attention_dropout=[0.0, 0.1],
    pretraining_tp=[1, 2],
    sliding_window=[None, 4],
    layer_types=[None, ["full_attention"]],
    residual_multiplier=[1.0, 0.5],
    attention_multiplier=[None, HEAD_DIM**-0.5],
    query_pre_attn_scalar=[None, HEAD_DIM, 16],
    is_causal=[True, None],
    final_logit_softcapping=[None],
    torch_dtype=["float32", "bfloat16"],
    dtype=["float32"],
    max_position_embeddings=[64, 128],
    use_sliding_window=[False],
    num_local_experts=[0],
    eos_token_id=[None, 2, [2, 3]],
    strange=[1, 7, "x"],
)


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A checkpoint of one layer, and the fields of its configuration."""
    path = tmp_path_factory.mktemp("differential")
    shape = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        tie_word_embeddings=False,
    )
    random_llama(shape, path)
    return path, json.loads((path / "config.json").read_text())


def reference_logits(path, tokens):
    """Logits of transformers; None where it takes no such configuration, or fails with it."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
        return model(tokens[None]).logits[0]
    except Exception:  # Whatever it is: there is nothing to compare with.
        return None


def our_logits(checkpoint, tokens):
    model, positions = load_model(checkpoint, torch.float32, "cpu"), torch.arange(len(tokens))
    positions = positions.to(torch.int32)
    return model.logits(model(tokens, positions, ToyAttention().at(positions)))


@torch.inference_mode()
def check(written, rope_scaling, rope_parameters, fields):
    path, whole = written
    changed = {**whole, "rope_scaling": rope_scaling, "rope_parameters": rope_parameters, **fields}
    kept = {name: value for name, value in changed.items() if value is not ABSENT}
    (path / "config.json").write_text(json.dumps(kept))
    try:
        checkpoint = open_checkpoint(str(path))
    except UserError as error:
        assert "\n" not in str(error)
        return
    expected = reference_logits(path, TOKENS)
    if expected is not None:
        found = our_logits(checkpoint, TOKENS)
        assert torch.allclose(found, expected, atol=1e-3, rtol=1e-3), kept


def example(test):
    return given(rope_scaling=ROPES, rope_parameters=ROPES, fields=FIELDS)(test)


def quick(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@quick(60)
@example
def test_configurations_are_computed_as_transformers_does_or_refused(written, **fields):
    check(written, **fields)


@pytest.mark.slow
@quick(1500)
@example
def test_many_configurations_are_computed_as_transformers_does_or_refused(written, **fields):
    check(written, **fields)
