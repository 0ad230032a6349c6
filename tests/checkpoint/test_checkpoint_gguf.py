"""GGUF checkpoints: written by the gguf package, read by cptool and by transformers."""

import math
import os
import struct

import numpy as np
import pytest
import torch
import transformers
from conftest import refusal, refused_or_harmless
from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
from gguf.quants import dequantize, quantize
from gguf_checkpoint import FFN, HEAD_DIM, HEADS, HIDDEN, KV_HEADS, SHAPES, VOCAB, interleave, write
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.gguf.metadata import Metadata
from cptool.checkpoint.gguf.reader import QUANTISED
from cptool.checkpoint.gguf.rope import stated_scaling
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.sampling import SamplingDefaults
from cptool.errors import UserError
from cptool.model.architectures.registry import find_family
from cptool.model.config import RopeScaling

DOWN = "model.layers.0.mlp.down_proj.weight"


@pytest.fixture
def path(tmp_path):
    return tmp_path / "tiny.gguf"


@pytest.mark.parametrize("kind", ["F32", "F16", "BF16", *QUANTISED])
def test_every_encoding_reads_as_the_gguf_package_reads_it(path, kind):
    rng = np.random.default_rng(1)
    block, block_bytes = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    raw = rng.integers(0, 256, (HIDDEN, FFN // block * block_bytes), np.uint8)
    write(path, {"blk.0.ffn_down": raw}, {"blk.0.ffn_down": kind})
    checkpoint = open_checkpoint(str(path))
    with np.errstate(all="ignore"):
        found = checkpoint.read(DOWN)
        expected = dequantize(raw, GGMLQuantizationType[kind])
    stored = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    assert found.dtype == stored.get(kind, torch.float32)
    assert found.shape == checkpoint.shape(DOWN) == (HIDDEN, FFN)
    assert checkpoint.is_mapped(DOWN) == (kind in stored)
    # Random bytes make some scales NaN, which must come through too.
    assert np.array_equal(found.float().numpy(), expected, equal_nan=True)


@pytest.mark.parametrize("kind", ["F32", "F16", "Q8_0"])
def test_query_and_key_rows_come_back_half_split(path, kind):
    rng = np.random.default_rng(2)
    q = rng.standard_normal(SHAPES["blk.0.attn_q"], np.float32)
    k = rng.standard_normal(SHAPES["blk.0.attn_k"], np.float32)
    stored = {"blk.0.attn_q": interleave(q, HEADS), "blk.0.attn_k": interleave(k, KV_HEADS)}
    write(path, stored, dict.fromkeys(stored, kind))
    checkpoint = open_checkpoint(str(path))
    for part, original in (("q", q), ("k", k)):
        name = f"model.layers.0.self_attn.{part}_proj.weight"
        encoding = GGMLQuantizationType[kind]
        expected = dequantize(quantize(original, encoding), encoding)
        assert not checkpoint.is_mapped(name)
        assert np.array_equal(checkpoint.read(name).float().numpy(), expected)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("kind", ["F32", "Q8_0"])
def test_a_model_is_the_one_that_transformers_reads(path, kind, tied):
    types = {name: kind for name, shape in SHAPES.items() if len(shape) == 2}
    write(path, types=types, without=["output"] if tied else [])
    checkpoint = open_checkpoint(str(path))
    oracle = transformers.AutoConfig.from_pretrained(path.parent, gguf_file=path.name)
    with torch.device("meta"):
        model = transformers.LlamaForCausalLM(oracle)
    tensors = load_gguf_checkpoint(path, return_tensors=True, model_to_load=model)["tensors"]
    assert set(checkpoint.names()) == set(tensors)
    for name, expected in tensors.items():
        assert torch.equal(checkpoint.read(name), torch.as_tensor(expected)), name
    config = checkpoint.config
    for field in ("hidden_size", "intermediate_size", "num_attention_heads"):
        assert getattr(config, field) == getattr(oracle, field)
    for field in ("num_hidden_layers", "num_key_value_heads", "max_position_embeddings"):
        assert getattr(config, field) == getattr(oracle, field)
    assert config.head_dim == HEAD_DIM
    assert config.tie_word_embeddings == tied
    assert config.vocab_size == VOCAB
    assert config.rms_norm_eps == 1e-5  # Not the float32 nearest to it.


def test_dtype_of_all_matrices(path):
    matrices = [name for name, shape in SHAPES.items() if len(shape) == 2]
    for kind, dtype in (("BF16", "bfloat16"), ("F16", "float16"), ("Q8_0", None)):
        write(path, types={name: kind for name in matrices})
        assert open_checkpoint(str(path)).matrix_dtype == dtype
    write(path, types={matrices[0]: "F16"} | {name: "BF16" for name in matrices[1:]})
    assert open_checkpoint(str(path)).matrix_dtype is None


def test_ids_and_sampling_come_from_the_metadata(path):
    ends = {"tokenizer.ggml.eos_token_id": 2, "tokenizer.ggml.eot_token_id": 9}
    ends |= {"tokenizer.ggml.eom_token_id": 2, "tokenizer.ggml.bos_token_id": 1}
    write(path, **ends, **{"general.sampling.temp": 0.5})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.eos_ids == (2, 9) and checkpoint.bos_id == 1
    assert checkpoint.sampling == SamplingDefaults(temperature=0.5, top_p=None)
    assert checkpoint.notes == ()
    write(path, **{"general.sampling.top_p": 0.9, "general.sampling.top_k": 40})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.sampling == SamplingDefaults(top_p=checkpoint.sampling.top_p, top_k=40)
    assert checkpoint.notes == ()
    write(path, **{"general.sampling.top_p": 0.9, "general.sampling.mirostat": 2})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.sampling.top_p == pytest.approx(0.9)
    assert checkpoint.notes[0].endswith("not apply were ignored: general.sampling.mirostat")
    write(path, **ends)
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.name == "tiny"
    assert checkpoint.tokenizer() is None


def test_a_head_size_of_its_own(path):
    shapes = {"attn_q": (512, HIDDEN), "attn_k": (128, HIDDEN), "attn_v": (128, HIDDEN)}
    shapes["attn_output"] = (HIDDEN, 512)
    tensors = {f"blk.0.{name}": np.ones(shape, np.float32) for name, shape in shapes.items()}
    lengths = ("attention.key_length", "attention.value_length", "rope.dimension_count")
    sizes = {f"llama.{key}": 64 for key in lengths}
    write(path, tensors, **sizes)
    assert open_checkpoint(str(path)).config.head_dim == 64
    write(path, tensors, **{**sizes, "llama.rope.dimension_count": 32})
    assert "rope.dimension_count is 32" in refusal(path)


@pytest.mark.parametrize("factor", [8.0, 32.0])
@pytest.mark.parametrize("theta", [10000.0, 500000.0])
def test_llama3_scaling_is_recognised_from_its_divisors(path, factor, theta):
    rope = {"rope_type": "llama3", "rope_theta": theta, "factor": factor}
    rope |= {"low_freq_factor": 1.0, "high_freq_factor": 4.0}
    config = transformers.LlamaConfig(
        head_dim=HEAD_DIM,
        max_position_embeddings=131072,
        rope_parameters={**rope, "original_max_position_embeddings": 8192},
    )
    scaled, _ = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu")
    plain = 1.0 / theta ** (torch.arange(0, HEAD_DIM, 2, dtype=torch.float32) / HEAD_DIM)
    divisors = (plain / scaled).numpy()
    write(path, {"rope_freqs": divisors}, **{"llama.rope.freq_base": theta})
    found = open_checkpoint(str(path)).config
    assert found.rope_theta == theta
    assert found.rope_scaling == RopeScaling(kind="llama3", factor=factor)
    write(path, {"rope_freqs": divisors**1.01}, **{"llama.rope.freq_base": theta})
    assert "not those of llama3 scaling" in refusal(path)
    write(path, {"rope_freqs": divisors[1:]}, **{"llama.rope.freq_base": theta})
    assert "must hold 16 float32 divisors" in refusal(path)


def test_other_rotary_scaling(path):
    write(path, {"rope_freqs": np.ones(HEAD_DIM // 2, np.float32)})
    assert open_checkpoint(str(path)).config.rope_scaling is None
    scaling = {"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 4.0}
    write(path, **scaling)
    assert open_checkpoint(str(path)).config.rope_scaling == RopeScaling(kind="linear", factor=4.0)
    assert open_checkpoint(str(path)).config.max_position_embeddings == 512
    for keys, factor in (
        ({"llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0}, 4.0),
        ({"llama.rope.scale_linear": 4.0, "llama.rope.scaling.factor": 4.0}, 4.0),
        ({"llama.rope.scaling.type": "linear"}, None),
        ({"llama.rope.scaling.factor": 0.0}, None),
        ({"llama.rope.scaling.factor": 1.0}, None),
    ):
        write(path, **keys)
        found = open_checkpoint(str(path)).config.rope_scaling
        assert found == (factor and RopeScaling(kind="linear", factor=factor))
    write(path, **{**scaling, "llama.rope.scaling.type": "none"})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.config.rope_scaling is None
    assert "the factor 4.0 beside it does not count" in checkpoint.notes[0]
    write(path, **{**scaling, "llama.rope.scaling.original_context_length": 64})
    assert open_checkpoint(str(path)).config.max_position_embeddings == 256
    write(path, **{**scaling, "llama.rope.scale_linear": 2.0})
    assert "factor is 4.0 and llama.rope.scale_linear 2.0" in refusal(path)
    for keys, message in (
        ({"llama.rope.scaling.factor": float("nan")}, "range of float32"),
        ({"llama.rope.scaling.factor": -2.0}, "range of float32"),
    ):
        write(path, **keys)
        assert message in refusal(path)
    write(path, {"rope_freqs": np.ones(HEAD_DIM // 2, np.float32)}, **scaling)
    assert "without other rope scaling" in refusal(path)
    for divisor in (0.0, float("inf")):
        write(path, {"rope_freqs": np.full(HEAD_DIM // 2, divisor, np.float32)})
        assert "not positive and finite" in refusal(path)
    write(path, **{**scaling, "llama.rope.scaling.type": "yarn"})
    yarn = open_checkpoint(str(path)).config.rope_scaling
    assert (yarn.kind, yarn.factor, yarn.original_context) == ("yarn", 4.0, 128)
    write(
        path,
        **{**scaling, "llama.rope.scaling.type": "yarn"},
        **{"llama.rope.scaling.yarn_log_multiplier": 0.7},
    )
    parameters = dict(rope_type="yarn", factor=4.0, rope_theta=1e4, mscale=1.0, mscale_all_dim=0.7)
    theirs = transformers.LlamaConfig(rope_parameters=parameters, max_position_embeddings=512)
    _, expected = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
    found = open_checkpoint(str(path)).config.rope_scaling.attention_factor
    assert math.isclose(found, expected, rel_tol=1e-6) and found != yarn.attention_factor
    whole = {"llama.rope.scaling.attn_factor": 0.1 * math.log(4.0) + 1}  # as OLMo 3's files have it
    write(path, **{**scaling, "llama.rope.scaling.type": "yarn"}, **whole)
    assert open_checkpoint(str(path)).config.rope_scaling == yarn
    write(path, **{**scaling, "llama.rope.scaling.type": "linear"}, **whole)
    assert "attn_factor is 1.1386294, and cptool computes with 1.0" in refusal(path)
    write(path, **{**scaling, "llama.rope.scaling.type": "ntk"})
    assert "rope scaling 'ntk'" in refusal(path)


def test_queries_that_grow_need_yarn(path):
    family = find_family("ministral3")
    fields = {"attention.temperature_scale": 0.5, "context_length": 128}
    for more, grows in (
        ({"type": "yarn", "factor": 4.0}, True),
        ({"type": "yarn"}, False),
        ({"type": "linear", "factor": 4.0}, False),
        ({"type": "none"}, False),
        ({}, False),
    ):
        values = fields | {f"rope.scaling.{key}": value for key, value in more.items()}
        named = {f"{family.gguf}.{key}": value for key, value in values.items()}
        metadata = Metadata(path, named, family.gguf)
        if grows:
            assert stated_scaling(metadata, family, Notes()).query_beta == 0.5
            continue
        with pytest.raises(UserError, match=r"temperature_scale is 0\.5, and cptool computes that"):
            stated_scaling(metadata, family, Notes())
        named[f"{family.gguf}.attention.temperature_scale"] = 0.0
        assert getattr(stated_scaling(metadata, family, Notes()), "query_beta", None) is None


def test_fingerprint_depends_on_the_bytes_and_not_on_the_place(tmp_path):
    one, two, other = (tmp_path / f"{name}.gguf" for name in ("one", "two", "other"))
    write(one)
    two.write_bytes(one.read_bytes())
    write(other, {"output_norm": np.ones(HIDDEN, np.float32)})
    prints = [open_checkpoint(str(path)).fingerprint for path in (one, two, other)]
    assert prints[0] == prints[1] != prints[2]


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"llama.expert_count": 8}, "llama.expert_count is 8"),
        ({"llama.attention.sliding_window": 4096}, "sliding_window is 4096"),
        ({"split.count": 3}, "one of 3 parts, and its name does not tell where the others are"),
        ({"llama.expert_used_count": 2}, "expert_used_count is 2"),
        ({"llama.rope.scaling.attn_factor": 1.5}, "attn_factor is 1.5"),
        ({"llama.rope.scaling.yarn_attn_factor": 1.5}, "yarn_attn_factor is 1.5"),
        ({"llama.attention.clamp_kqv": 8.0}, "clamp_kqv is 8.0"),
        ({"llama.attention.scale": 0.5}, "attention.scale is 0.5"),
        ({"llama.attention.causal": False}, "attention.causal is False"),
        ({"llama.attention.new_norm": 1.0}, "does not know this field"),
        ({"llama.pooling_type": 1}, "embedding models"),
        ({"llama.vocab_size": 40}, "llama.vocab_size is 40, and token_embd.weight has 32 rows"),
        ({"general.type": "adapter"}, "an adapter"),
        ({"adapter.type": "lora"}, "an adapter"),
        ({"general.type": "mmproj"}, "a projector"),
        ({"general.type": "imatrix"}, "an importance matrix"),
        ({"general.sampling.temp": float("inf")}, "general.sampling.temp is inf"),
        ({"general.sampling.temp": "warm"}, "general.sampling.temp is 'warm'"),
        ({"llama.embedding_length": None}, "llama.embedding_length is missing"),
        ({"llama.attention.head_count": [8, 4]}, "is [8, 4], cptool only computes layers"),
        ({"llama.attention.head_count": 0}, "num_attention_heads is 0"),
        ({"llama.attention.head_count_kv": 3}, "multiple"),
        ({"llama.attention.layer_norm_rms_epsilon": "x"}, "it must be a number"),
        ({"llama.attention.layer_norm_rms_epsilon": float("nan")}, "rms_norm_eps is nan"),
        ({"tokenizer.ggml.eos_token_id": VOCAB}, "eos_token_id is 32"),
        ({"tokenizer.ggml.bos_token_id": "1"}, "bos_token_id is '1'"),
        ({"llama.block_count": 2**31}, "num_hidden_layers is 2147483648"),
        ({"llama.block_count": 900}, "not of one model"),
        ({"llama.block_count": 2}, "model.layers.1.input_layernorm.weight is missing"),
        ({"llama.feed_forward_length": 511}, "has shape [512, 256]"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(path, metadata, message):
    write(path, **metadata)
    assert message in refusal(path)


def test_other_models_and_formats_are_refused(path):
    write(path, architecture="gemma9")
    assert "architecture is 'gemma9'" in refusal(path)
    write(path, {"blk.0.attn_q_norm": np.ones(HEAD_DIM, np.float32)})
    assert "attn_q_norm.weight" in refusal(path)
    write(path, without=["token_embd"])
    assert "token_embd.weight is missing" in refusal(path)
    write(path, architecture="clip")
    assert "'clip', which is not supported" in refusal(path)
    lora = {"blk.0.attn_q.weight.lora_a": np.ones((HIDDEN, 8), np.float32)}
    write(path, lora)
    assert "an adapter" in refusal(path)
    write(path, {"output_norm": np.ones(HIDDEN, np.float64).view(np.uint8)}, {"output_norm": "F64"})
    assert "stored as F64" in refusal(path)
    path.write_bytes(b"PK\3\4 and so on")
    assert "not a GGUF file" in refusal(path)
    path.write_bytes(b"")
    assert "not a GGUF file" in refusal(path)


def test_a_file_cut_anywhere_is_refused(path):
    write(path, **{"tokenizer.ggml.tokens": ["a", "b", "c"]})
    whole = path.read_bytes()
    data_at = open_checkpoint(str(path)).stored["model.embed_tokens.weight"].offset
    for kept in [*range(4, data_at, 7), data_at, len(whole) // 2, len(whole) - 1]:
        path.write_bytes(whole[:kept])
        message = refusal(path)
        assert "truncated" in message and f"{kept} found" in message
    assert f"at least {len(whole)} bytes expected" in message


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (struct.pack("<IQQ", 1, 0, 0), "GGUF version 1"),
        (struct.pack(">IQQ", 3, 0, 0), "a big-endian GGUF file"),
        (struct.pack("<IQQ", 3, 2**60, 0), "truncated or damaged"),
        (struct.pack("<IQQ", 3, 0, 2**60), "truncated or damaged"),
        (struct.pack("<IQQQ", 3, 0, 1, 2**63), "truncated or damaged"),
        (struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"k", 99), "header is damaged"),
        (struct.pack("<IQQQ1sI", 3, 0, 1, 1, b"\xff", 4), "header is damaged"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 2**61), "truncated or damaged"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 8, 3) + bytes(16), "truncated or damaged"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 6, 2**62), "truncated or damaged"),
        (struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, 9, 1) + bytes(64), "header is damaged"),
        (struct.pack("<IQQQ1sI", 3, 1, 0, 1, b"t", 99) + bytes(24), "header is damaged"),
        (struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2, 99, 0), "is of type 99, which is not"),
        (struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2, 31, 0), "31 (Q4_0_4_4, removed)"),
        (struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 33, 8, 0), "header is damaged"),
        (struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2**63, 0, 2**63), "header is damaged"),
        (struct.pack("<IQQQ1sIQIQ", 3, 1, 0, 1, b"t", 1, 2**62, 0, 2**63), "truncated or damaged"),
        (struct.pack("<IQQ", 3, 0, 2) + 2 * struct.pack("<Q1sIB", 1, b"k", 0, 1), "in it twice"),
    ],
)
def test_hostile_headers_are_refused(path, body, message):
    path.write_bytes(b"GGUF" + body)
    assert message in refusal(path)


def test_arrays_are_bounded_before_they_are_made(path):
    """The file is sparse: it has the room that the array claims, and no bytes on the disk."""
    for kind, count in ((0, 2**32), (8, 2**28)):
        path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQ", 3, 0, 1, 1, b"k", 9, kind, count))
        os.truncate(path, 6 * 2**30)
        assert f"an array of {count} elements" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIQ", 3, 0, 1, 1, b"k", 8, 2**31))
    os.truncate(path, 6 * 2**30)
    assert "a string of 2147483648 bytes" in refusal(path)
    path.write_bytes(b"GGUF" + struct.pack("<IQQQ1sIIQQ", 3, 0, 1, 1, b"k", 9, 8, 1, 2**31))
    os.truncate(path, 6 * 2**30)
    assert "strings of more than" in refusal(path)


def test_what_sentencepiece_files_leave_out_has_its_defaults(path):
    write(path, **{"tokenizer.ggml.model": "llama"})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.eos_ids == (2,) and checkpoint.bos_id == 1
    write(path, **{"tokenizer.ggml.model": "llama", "tokenizer.ggml.eos_token_id": 7})
    assert open_checkpoint(str(path)).eos_ids == (7,)
    write(path, **{"tokenizer.ggml.model": "gpt2"})
    assert open_checkpoint(str(path)).eos_ids == ()


def test_several_ends_of_an_answer_and_ids_of_no_token(path):
    ids = {"tokenizer.ggml.eos_token_id": 7, "tokenizer.ggml.eos_token_ids": [7, 9]}
    write(path, **ids, **{"tokenizer.ggml.bos_token_id": 2**32 - 1})
    checkpoint = open_checkpoint(str(path))
    assert checkpoint.eos_ids == (7, 9) and checkpoint.bos_id is None and checkpoint.notes == ()


def test_one_number_for_every_layer_is_one_number(path):
    write(path, **{"llama.attention.head_count_kv": [KV_HEADS] * 3})
    assert open_checkpoint(str(path)).config.num_key_value_heads == KV_HEADS


def test_unknown_keys_that_are_set_are_named_once(path):
    write(path, **{"general.mood": "good", "llama.colour": 3, "general.base_model.0.name": "x"})
    assert open_checkpoint(str(path)).notes == (
        "fields that cptool does not know were ignored: general.mood, llama.colour",
    )


@pytest.fixture(scope="module")
def small_header(tmp_path_factory):
    """A file and the offset of its data; the header before it is short enough to be searched."""
    path = tmp_path_factory.mktemp("gguf") / "tiny.gguf"
    write(path, **{"tokenizer.ggml.tokens": ["a", "b"]})
    return path.read_bytes(), open_checkpoint(str(path)).stored["model.embed_tokens.weight"].offset


@settings(deadline=None, max_examples=300)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(tmp_path_factory, small_header, data):
    whole, data_at = small_header
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(4, data_at - 1))
        damaged[at] = data.draw(st.sampled_from([0, 1, 8, 9, 0x7F, 0xFF, damaged[at] ^ 1]))
    path = tmp_path_factory.getbasetemp() / "damaged.gguf"
    path.write_bytes(damaged)
    refused_or_harmless(path, len(damaged))


def test_alignment_of_nothing_is_refused(path):
    write(path, **{"general.alignment": 32})
    assert len(open_checkpoint(str(path)).names()) == len(SHAPES)
    key = b"general.alignment" + struct.pack("<I", 4)
    whole = path.read_bytes()
    at = whole.index(key) + len(key)
    path.write_bytes(whole[:at] + struct.pack("<I", 0) + whole[at + 4 :])
    assert "alignment 0" in refusal(path)
