"""Hugging Face checkpoints: written by transformers or by hand, read by cptool."""

import dataclasses
import json
import re
import struct
import subprocess
import sys
import time

import pytest
import torch
from conftest import edit_json, refusal, refused_or_harmless
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig, LlamaForCausalLM

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.sampling import SamplingDefaults
from cptool.model.config import RopeScaling

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}
LLAMA3_SCALING = RopeScaling(kind="llama3", factor=8.0, original_context=64)


def tiny(**changes):
    fields = dict(
        vocab_size=96,
        hidden_size=48,
        intermediate_size=80,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**fields, **changes}))


@pytest.fixture
def saved(tmp_path):
    """A tiny checkpoint directory with separate embeddings, as transformers writes it."""
    tiny().save_pretrained(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def saved_once(tmp_path_factory):
    """A checkpoint directory, the bytes of its weights, and where the data in them begins."""
    path = tmp_path_factory.mktemp("damaged")
    tiny().save_pretrained(path)
    whole = (path / "model.safetensors").read_bytes()
    return path, whole, 8 + struct.unpack_from("<Q", whole)[0]


def stored_tensors(path):
    """Copies of the tensors of the model, by their names in cptool."""
    checkpoint = open_checkpoint(str(path))
    return {name: checkpoint.read(name).clone() for name in checkpoint.names()}


def write_safetensors(path, tensors, shift=0):
    """A safetensors file by hand; `shift` bytes of its header misalign the data."""
    data, header = b"", {}
    for name, tensor in tensors.items():
        raw = tensor.contiguous().view(torch.uint8).numpy().tobytes()
        dtype = {torch.float32: "F32", torch.bfloat16: "BF16", torch.int64: "I64"}[tensor.dtype]
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8 + shift)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shard_size", ["1GB", "20KB"])
@pytest.mark.parametrize("tied", [False, True])
def test_tensors_are_those_that_transformers_wrote(tmp_path, dtype, shard_size, tied):
    model = tiny(tie_word_embeddings=tied).to(dtype)
    model.save_pretrained(tmp_path, max_shard_size=shard_size)
    assert (tmp_path / "model.safetensors.index.json").exists() == (shard_size == "20KB")
    checkpoint = open_checkpoint(str(tmp_path))
    state = model.state_dict()
    if tied:
        del state["lm_head.weight"]
    assert set(checkpoint.names()) == set(state)
    for name, expected in state.items():
        found = checkpoint.read(name)
        assert found.dtype == dtype
        assert tuple(found.shape) == checkpoint.shape(name)
        assert torch.equal(found, expected)
        assert checkpoint.is_mapped(name)
    assert checkpoint.config.tie_word_embeddings == tied
    assert checkpoint.matrix_dtype == str(dtype).removeprefix("torch.")


def test_configuration_as_transformers_understands_it(tmp_path):
    model = tiny(head_dim=24, rms_norm_eps=3e-5, rope_parameters=LLAMA3, eos_token_id=[2, 7, 2])
    model.generation_config.eos_token_id = [2, 7, 2]
    model.save_pretrained(tmp_path)
    checkpoint = open_checkpoint(str(tmp_path))
    config = checkpoint.config
    for name in (
        *("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim"),
        *("num_attention_heads", "num_key_value_heads", "rms_norm_eps", "max_position_embeddings"),
    ):
        assert getattr(config, name) == getattr(model.config, name)
    assert config.rope_theta == 500000.0
    assert config.rope_scaling == LLAMA3_SCALING
    assert checkpoint.eos_ids == (2, 7)
    assert checkpoint.name == tmp_path.name


@pytest.mark.parametrize(
    ("fields", "theta", "scaling"),
    [
        ({}, 10000.0, None),
        ({"rope_theta": 5e5, "rope_scaling": None}, 5e5, None),
        (
            {"rope_scaling": {"type": "linear", "factor": 4}},
            10000.0,
            RopeScaling(kind="linear", factor=4.0),
        ),
        (
            {"rope_theta": 5e5, "rope_scaling": {**LLAMA3, "rope_theta": ..., "factor": 32.0}},
            5e5,
            dataclasses.replace(LLAMA3_SCALING, factor=32.0),
        ),
        ({"rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}, 1e5, None),
        (
            {"rope_parameters": {"rope_type": "linear", "factor": 2.0}},
            10000.0,
            RopeScaling(kind="linear", factor=2.0),
        ),
    ],
)
def test_rotary_settings_of_every_age(saved, fields, theta, scaling):
    scaled = fields.get("rope_scaling")
    if scaled:
        fields["rope_scaling"] = {k: v for k, v in scaled.items() if v is not ...}
    edit_json(saved / "config.json", rope_parameters=..., rope_theta=...)
    edit_json(saved / "config.json", **fields)
    config = open_checkpoint(str(saved)).config
    assert config.rope_theta == theta
    assert config.rope_scaling == scaling


def test_absent_fields_take_the_defaults_of_the_format(saved):
    edit_json(saved / "config.json", head_dim=..., architectures=..., tie_word_embeddings=...)
    config = open_checkpoint(str(saved)).config
    assert config.head_dim == 8
    assert not config.tie_word_embeddings
    tiny(num_key_value_heads=6).save_pretrained(saved)
    edit_json(saved / "config.json", num_key_value_heads=...)
    assert open_checkpoint(str(saved)).config.num_key_value_heads == 6


def test_every_file_that_names_the_end_of_an_answer_counts(saved):
    edit_json(saved / "config.json", eos_token_id=5, bos_token_id=4)
    (saved / "generation_config.json").write_text("{}")
    checkpoint = open_checkpoint(str(saved))
    assert checkpoint.eos_ids == (5,) and checkpoint.bos_id == 4
    assert checkpoint.sampling.temperature is None
    sampling = {"eos_token_id": [8, 9], "do_sample": True, "temperature": 0.6, "top_p": 0.9}
    (saved / "generation_config.json").write_text(json.dumps(sampling))
    checkpoint = open_checkpoint(str(saved))
    assert checkpoint.eos_ids == (8, 9, 5)
    assert (checkpoint.sampling.temperature, checkpoint.sampling.top_p) == (0.6, 0.9)
    edit_json(saved / "generation_config.json", do_sample=False)
    assert open_checkpoint(str(saved)).sampling == SamplingDefaults()
    # No file names one: transformers' default of a Llama.
    edit_json(saved / "generation_config.json", eos_token_id=...)
    edit_json(saved / "config.json", eos_token_id=...)
    assert open_checkpoint(str(saved)).eos_ids == (2,)
    edit_json(saved / "config.json", eos_token_id=None)
    assert open_checkpoint(str(saved)).eos_ids == ()


def test_stored_rotary_frequencies_are_ignored(saved):
    tensors = dict(tiny().state_dict())
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    write_safetensors(saved / "model.safetensors", tensors)
    assert set(open_checkpoint(str(saved)).names()) == set(tiny().state_dict())


def test_misaligned_tensors_are_copied(saved):
    state = tiny().state_dict()
    for shift in range(5):
        write_safetensors(saved / "model.safetensors", state, shift)
        checkpoint = open_checkpoint(str(saved))
        for name in ("model.norm.weight", "lm_head.weight"):
            assert torch.equal(checkpoint.read(name), state[name])
            assert checkpoint.is_mapped(name) == (shift % 4 == 0)


def test_a_mapped_tensor_outlives_its_checkpoint_and_never_changes_the_file(saved):
    checkpoint = open_checkpoint(str(saved))
    before = (saved / "model.safetensors").read_bytes()
    tensor = checkpoint.read("model.norm.weight")
    del checkpoint
    tensor += 1
    assert torch.equal(tensor, torch.full((48,), 2.0))
    assert (saved / "model.safetensors").read_bytes() == before


def test_fingerprint_knows_the_model_and_not_its_place(tmp_path):
    model = tiny()
    model.save_pretrained(tmp_path / "one")
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    one, many = (open_checkpoint(str(tmp_path / name)).fingerprint for name in ("one", "many"))
    assert one == many
    edit_json(tmp_path / "one" / "config.json", rms_norm_eps=2e-6)
    assert open_checkpoint(str(tmp_path / "one")).fingerprint != one
    model.lm_head.weight.data[-1, -1] += 1
    model.save_pretrained(tmp_path / "many", max_shard_size="20KB")
    assert open_checkpoint(str(tmp_path / "many")).fingerprint != one


def test_opening_imports_no_torch(saved):
    code = (
        "import sys; from cptool.checkpoint import open_checkpoint; "
        "c = open_checkpoint(sys.argv[1]); c.fingerprint; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"architectures": ["MistralForCausalLM"]}, "MistralForCausalLM"),
        ({"model_type": "qwen3"}, "qwen3"),
        ({"attention_bias": True}, "self_attn.q_proj.bias is missing"),
        ({"mlp_bias": True}, "mlp.gate_proj.bias is missing"),
        ({"model_type": "mixtral"}, "a mixture of experts, of which cptool computes none"),
        ({"model_type": "qwen3_moe"}, "use one of those that `cptool models` lists"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"use_qk_norm": True}, "use_qk_norm"),
        ({"layer_types": ["full_attention", "sliding_attention"]}, "layer_types is"),
        ({"attention_multiplier": 0.5}, "attention_multiplier is 0.5"),
        ({"query_pre_attn_scalar": 256}, "query_pre_attn_scalar is 256"),
        ({"residual_multiplier": 0.22}, "residual_multiplier is 0.22"),
        ({"is_causal": False}, "is_causal is False"),
        ({"attn_sink_bias": 0}, "attn_sink_bias is 0"),
        ({"ropeBaseScale": False}, "ropeBaseScale is False"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        ({"rope_scaling": {"type": "su", "factor": 2.0}, "rope_parameters": ...}, "'su'"),
        ({"rope_parameters": {"rope_type": "proportional", "factor": 2.0}}, "'proportional'"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor is None"),
        ({"rope_parameters": {"rope_type": "linear", "factor": -1}}, "rope scaling is -1.0"),
        ({"rope_parameters": {**LLAMA3, "low_freq_factor": 4.0}}, "makes no sense"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"rope_parameters": [1]}, "rope_parameters is [1]"),
        ({"hidden_size": "48"}, "hidden_size is '48'"),
        ({"hidden_size": 48.0}, "hidden_size is 48.0"),
        ({"hidden_size": True}, "hidden_size is True"),
        ({"hidden_size": 10**400}, "a number of 1329 bits"),
        ({"hidden_size": 2**40, "head_dim": 8}, "hidden_size is 1099511627776"),
        ({"rms_norm_eps": 10**400}, "rms_norm_eps is inf"),
        ({"rms_norm_eps": "1e-5"}, "rms_norm_eps is '1e-5'"),
        ({"rms_norm_eps": 1e-50}, "within the range of float32"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 10**400}}, "factor is inf"),
        ({"rope_parameters": {"rope_type": "linear", "factor": float("inf")}}, "factor is inf"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 1e300}}, "range of float32"),
        (
            {"rope_parameters": {**LLAMA3, "original_max_position_embeddings": 10**400}},
            "original_max_position_embeddings is a number of",
        ),
        ({"num_attention_heads": 0}, "does not divide into 0 heads"),
        ({"num_attention_heads": -6}, "does not divide into -6 heads"),
        ({"tie_word_embeddings": "true"}, "tie_word_embeddings is 'true'"),
        ({"head_dim": 512}, "head_dim is 512"),
        ({"head_dim": 13}, "even ones up to 256"),
        ({"hidden_size": 50, "head_dim": ...}, "does not divide into 6 heads"),
        ({"num_attention_heads": 0, "head_dim": ...}, "does not divide into 0 heads"),
        ({"num_key_value_heads": 4}, "multiple"),
        ({"num_hidden_layers": 10**12}, "num_hidden_layers is 1000000000000"),
        ({"num_hidden_layers": 900}, "not of one model"),
        ({"num_hidden_layers": 3}, "model.layers.2.input_layernorm.weight is missing"),
        ({"num_hidden_layers": 1}, "no plain Llama"),
        ({"intermediate_size": 64}, "has shape [80, 48]"),
        ({"rms_norm_eps": 0}, "rms_norm_eps is 0.0"),
        ({"rope_parameters": {"rope_theta": float("nan")}}, "rope_theta is nan, it must be finite"),
        ({"vocab_size": -1}, "vocab_size is -1"),
        ({"head_dim": 9}, "head_dim is 9"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(saved, changes, message):
    edit_json(saved / "config.json", **changes)
    assert message in refusal(saved)


def test_token_ids_outside_the_vocabulary_are_refused(saved):
    edit_json(saved / "generation_config.json", eos_token_id=[2, 96])
    assert "eos_token_id is 96" in refusal(saved)


def test_query_norms_and_biases_are_refused(saved):
    state = dict(tiny().state_dict())
    state["model.layers.0.self_attn.q_norm.weight"] = torch.ones(8)
    write_safetensors(saved / "model.safetensors", state)
    assert "q_norm.weight" in refusal(saved)


def test_integer_weights_are_refused(saved):
    state = dict(tiny().state_dict())
    state["model.norm.weight"] = torch.ones(48, dtype=torch.int64)
    write_safetensors(saved / "model.safetensors", state)
    assert "model.norm.weight is stored as I64" in refusal(saved)


@pytest.mark.parametrize("kept", [0, 7, 8, 100, -1])
def test_truncated_weights_are_refused(saved, kept):
    file = saved / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:kept])
    message = refusal(saved)
    assert str(file) in message
    if kept < 0 or kept >= 8:
        assert f"{len(whole[:kept])} found" in message
    if kept < 0:
        assert f"{len(whole)} bytes expected" in message


@pytest.mark.parametrize(
    "header",
    [
        b"{ ",
        b"[]",
        b"\xff\xfe",
        b"[" * 100_000,
        b'{"a": 1}',
        b'{"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [-1], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}',
        b'{"a": {"dtype": "F32", "shape": [1], "data_offsets": [0]}}',
        b'{"a": {"dtype": "F32", "shape": [4611686018427387904], "data_offsets": [0, 4]}}',
        b'{"a": {"dtype": ["F32"], "shape": [1], "data_offsets": [0, 4]}}',
    ],
)
def test_damaged_headers_are_refused(saved, header):
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert "header is damaged" in refusal(saved)


def entry(name, begin, end, shape=None, **changes):
    fields = {"dtype": "F32", "shape": shape or [(end - begin) // 4], "data_offsets": [begin, end]}
    return f'"{name}": {json.dumps(fields | changes)}'


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([entry("a", 0, 32), entry("b", 28, 64)], "'b' overlaps the one before"),
        ([entry("a", 0, 32), entry("b", 36, 64)], "'b' leaves a hole before it"),
        ([entry("a", 4, 64)], "'a' leaves a hole before it"),
        ([entry("a", 0, 32)], "its header accounts for"),
        ([entry("a", 0, 32), entry("a", 32, 64)], "'a' is given twice"),
        ([entry("a", 0, 64, [1] * 8 + [16])], "a shape of 9 dimensions"),
        ([entry("a", 0, 64, [0] + [2**62] * 6)], "elements|header accounts|overlaps|shape"),
        ([entry("a", 0, 64, [2**63])], "a shape with an extent that no tensor has"),
        ([entry("a", 0, 64, [16.0])], "16.0 is not an integer"),
        ([entry("a", 0, 64, [True, 16])], "a shape with an extent"),
        (
            ['"a": {"dtype": "F32", "data_offsets": [0, 64], "shape": [' + "9" * 4000 + "]}"],
            "a number has 4000 digits",
        ),
        ([entry("a", 0, 64), '"__metadata__": {"format": 1}'], "__metadata__ is not"),
        ([entry("a", 0, 64), '"b": []'], "does not have the three fields"),
    ],
)
def test_headers_that_the_format_forbids_are_refused(saved, entries, message):
    header = ("{" + ", ".join(entries) + "}").encode()
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(64))
    assert re.search(message, refusal(saved))


def test_many_long_numbers_cost_no_more_than_reading_them(saved):
    numbers = ",".join(["9" * 4000] * 3000)
    header = f'{{"x": {{"dtype": "F32", "data_offsets": [0, 4], "shape": [{numbers}]}}}}'.encode()
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(4))
    began = time.process_time()
    assert "a number has 4000 digits" in refusal(saved)
    assert time.process_time() - began < 5


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(saved_once, data):
    path, whole, data_at = saved_once
    damaged = bytearray(whole)
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, data_at - 1))
        damaged[at] = data.draw(st.sampled_from([*b'"{}[],:-0123456789\n\xff', damaged[at] ^ 1]))
    (path / "model.safetensors").write_bytes(damaged)
    refused_or_harmless(path, len(damaged))


def test_a_header_longer_than_the_format_allows_is_refused(saved):
    (saved / "model.safetensors").write_bytes(struct.pack("<Q", 2**63) + bytes(64))
    assert str(2**63) in refusal(saved)


def test_files_that_are_missing_are_named(tmp_path):
    assert "an empty directory" in refusal(tmp_path)
    tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    index = tmp_path / "model.safetensors.index.json"
    whole = index.read_text()

    weights = json.loads(whole)["weight_map"]

    stray = next(name for name, file in weights.items() if file != shard.name)
    edit_json(index, weight_map={**weights, stray: shard.name})
    assert f"{shard}: tensor {stray!r} is not in it" in refusal(tmp_path)
    edit_json(index, weight_map={stray: "../elsewhere.safetensors"})
    assert "plain name" in refusal(tmp_path)
    edit_json(index, weight_map=3)
    assert "weight_map is 3" in refusal(tmp_path)
    index.write_text(whole[:-5])
    assert "not JSON" in refusal(tmp_path)
    index.write_text(whole)
    shard.unlink()
    assert f"{shard}: named by the index and missing" in refusal(tmp_path)
    index.unlink()
    assert "index.json is missing" in refusal(tmp_path)
    for part in tmp_path.glob("*.safetensors"):
        part.unlink()
    assert "neither" in refusal(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"")
    assert "pickled" in refusal(tmp_path)
    (tmp_path / "config.json").write_text("[]")
    assert "JSON object" in refusal(tmp_path)


def test_models_that_are_not_there(tmp_path, monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert "no such model" in refusal(tmp_path / "nowhere")
    assert "no such model" in refusal("no-such-name")
    assert "no such model" in refusal("some/file.gguf")
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert "give the directory" in refusal(tmp_path / "model.safetensors")


def test_hub_ids_are_resolved_by_the_hub_library(saved, monkeypatch):
    import huggingface_hub

    asked = {}

    def snapshot_download(hub_id, allow_patterns, tqdm_class):
        asked[hub_id] = allow_patterns
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("org/tiny-llama").name == "org/tiny-llama"
    assert "*.json" in asked["org/tiny-llama"]

    def unreachable(hub_id, **_):
        raise ConnectionError("no route to host\nsecond line")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", unreachable)
    assert "could not be downloaded from the hub (no route to host)" in refusal("org/tiny-llama")


# Two answers to one question


def rope(**fields):
    """A configuration's rotary settings in transformers 4's fields alone."""
    return {"rope_parameters": ..., "rope_theta": 1e4, **fields}


OLDER_LLAMA3 = {"rope_type": "llama3", **{k: v for k, v in LLAMA3.items() if k != "rope_theta"}}


def test_the_original_context_outside_goes_before_the_one_inside(saved):
    changes = rope(rope_scaling=OLDER_LLAMA3)
    edit_json(saved / "config.json", **changes, original_max_position_embeddings=32)
    checkpoint = open_checkpoint(str(saved))
    assert checkpoint.config.rope_scaling.original_context == 32
    assert (
        "original_max_position_embeddings is 32, and 64 inside rope_scaling"
        in (checkpoint.notes[0])
    )
    edit_json(saved / "config.json", original_max_position_embeddings=64)
    assert open_checkpoint(str(saved)).notes == ()
    inside = {k: v for k, v in OLDER_LLAMA3.items() if not k.startswith("original")}
    edit_json(saved / "config.json", rope_scaling=inside, original_max_position_embeddings=...)
    assert open_checkpoint(str(saved)).config.rope_scaling.original_context == 512


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rope_theta": 1e6}, "rope_theta is 1000000.0, and 10000.0 inside rope_parameters"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "disagree; remove the wrong one"),
        (rope(rope_scaling={"type": "linear", "rope_type": "llama3"}), "rope_type 'llama3' and"),
        (rope(rope_scaling={"factor": 4}), "a factor of 4.0 and no type"),
        (rope(rope_scaling={"rope_type": {}, "factor": 4}), "rope type {} is not supported"),
        (
            rope(rope_scaling={"type": "linear", "factor": 4, "attention_factor": 1.2}),
            "attention_factor is 1.2",
        ),
    ],
)
def test_rotary_settings_that_disagree_are_refused(saved, changes, message):
    edit_json(saved / "config.json", **changes)
    assert message in refusal(saved)


def test_rotary_settings_that_agree_are_one(saved):
    both = {"type": "linear", "factor": 2}
    edit_json(
        saved / "config.json",
        rope_theta=10000,
        rope_scaling=both,
        rope_parameters={"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    )
    assert open_checkpoint(str(saved)).config.rope_scaling == RopeScaling(kind="linear", factor=2.0)


@pytest.mark.parametrize(
    ("fields", "context"),
    [
        ({}, 2048),
        ({"max_sequence_length": 2048}, 2048),
        ({"max_sequence_length": 512}, 512),
        ({"original_max_position_embeddings": 128}, 512),
        ({"original_max_position_embeddings": 512}, 2048),
    ],
)
def test_linear_scaling_stretches_the_original_context(saved, fields, context):
    scaling = rope(rope_scaling={"type": "linear", "factor": 4.0})
    edit_json(saved / "config.json", **scaling, **fields)
    assert open_checkpoint(str(saved)).config.max_position_embeddings == context


def test_the_head_of_the_file_goes_before_the_flag(saved):
    edit_json(saved / "config.json", tie_word_embeddings=True)
    checkpoint = open_checkpoint(str(saved))
    assert not checkpoint.config.tie_word_embeddings
    assert "differs from the embedding" in checkpoint.notes[0]
    state = dict(tiny().state_dict())
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    write_safetensors(saved / "model.safetensors", state)
    assert open_checkpoint(str(saved)).notes == ()
    del state["lm_head.weight"]
    write_safetensors(saved / "model.safetensors", state)
    assert open_checkpoint(str(saved)).config.tie_word_embeddings
    edit_json(saved / "config.json", tie_word_embeddings=False)
    assert 'set "tie_word_embeddings" to true' in refusal(saved)


def test_files_and_index_must_agree(tmp_path):
    tiny().save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    files = list(weights.values())
    full = sorted({file for file in files if files.count(file) > 1})
    first, second = (tmp_path / file for file in full[:2])
    listed = next(name for name, file in weights.items() if file == first.name)
    edit_json(index, weight_map={n: f for n, f in weights.items() if n != listed})
    assert f"tensor {listed!r} is in it and not in" in refusal(tmp_path)
    edit_json(index, weight_map=weights)
    content = second.read_bytes()
    second.write_bytes(first.read_bytes())
    assert f"is both in {first.name} and in {second.name}" in refusal(tmp_path)
    second.write_bytes(content)
    tiny().save_pretrained(tmp_path)  # One file now, and what is left of the others' index.
    index.write_text("{}")
    assert "are both there" in open_checkpoint(str(tmp_path)).notes[0]


# Sound files of other kinds


def quantised(directory, *suffixes):
    """The checkpoint with its projections under the names of quantised ones."""
    state = dict(tiny().state_dict())
    for name in [name for name in state if name.endswith("_proj.weight")]:
        tensor = state.pop(name)
        for suffix in suffixes:
            state[name.removesuffix("weight") + suffix] = tensor
    write_safetensors(directory / "model.safetensors", state)


@pytest.mark.parametrize(
    ("suffixes", "message"),
    [
        (("qweight", "qzeros", "scales"), "GPTQ or AWQ"),
        (("weight", "weight.absmax", "weight.quant_map"), "bitsandbytes"),
        (("weight_packed", "weight_scale", "weight_shape"), "compressed-tensors"),
        (("weight", "weight_scale_inv"), "FP8"),
        (("W_q", "meta"), "HQQ"),
        (("weight", "scales", "biases"), "quantised weights"),
        (("weight", "lora_A.weight", "lora_B.weight"), "an adapter"),
    ],
)
def test_quantised_weights_are_named(saved, suffixes, message):
    quantised(saved, *suffixes)
    found = refusal(saved)
    assert message in found and "fetch" not in found


def test_quantised_configurations_are_named(saved):
    for method in ("gptq", "awq", "bitsandbytes", "compressed-tensors", "hqq"):
        edit_json(saved / "config.json", quantization_config={"quant_method": method})
        assert f"quantised by {method!r}" in refusal(saved)


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("adapter_config.json", "{}", "an adapter (LoRA or the like), not a model"),
        ("modules.json", "[]", "sentence-transformers"),
        ("model_index.json", "{}", "diffusers"),
        ("model.onnx", "x", "an ONNX graph"),
        ("tf_model.h5", "x", "TensorFlow weights"),
        ("tokenizer.json", "{}", "only a tokenizer"),
        ("pytorch_model.bin", "x", "weights without a config.json"),
        ("notes.txt", "x", "no config.json"),
    ],
)
def test_directories_of_other_kinds_are_named(tmp_path, file, content, message):
    (tmp_path / file).write_text(content)
    assert message in refusal(tmp_path)


def test_an_adapter_beside_a_model_is_refused_by_both_names(saved):
    (saved / "adapter_config.json").write_text("{}")
    message = refusal(saved)
    assert "adapter_config.json" in message and "config.json)" in message and "merge" in message


@pytest.mark.parametrize(
    ("architecture", "why"),
    [
        ("LlamaModel", "no output matrix"),
        ("LlamaForSequenceClassification", "reward models"),
        ("MixtralForCausalLM", "not supported; use"),
    ],
)
def test_other_heads_and_models_are_named(saved, architecture, why):
    edit_json(saved / "config.json", architectures=[architecture])
    assert architecture in refusal(saved) and why in refusal(saved)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "generation_config.json"])
@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n", "git lfs pull"),
        (b"<!DOCTYPE html>\n<html>Entry not found</html>", "a web page"),
        (b"", "an empty file"),
        (bytes(64), "a file of zero bytes"),
        (b"\x1f\x8b" + bytes(64), "a gzip archive"),
        (b"GGUF" + bytes(64), "a GGUF file"),
        ("{}".encode("utf-16"), "plain UTF-8"),
        (b"\xef\xbb\xbf{}", "plain UTF-8"),
    ],
)
def test_other_files_under_the_name_are_named(saved, file, content, message):
    (saved / file).write_bytes(content)
    assert message in refusal(saved)


@pytest.mark.parametrize("file", ["config.json", "model.safetensors", "generation_config.json"])
def test_links_to_nothing_are_named(saved, file):
    (saved / file).unlink()
    (saved / file).symlink_to("../../blobs/0123")
    assert "a link to ../../blobs/0123, which does not exist" in refusal(saved)


# Fields

TRANSFORMERS_OWN = SamplingDefaults(temperature=1.0)


@pytest.mark.parametrize(
    ("fields", "expected", "note"),
    [
        ({"temperature": 0.6, "top_p": 0.9}, SamplingDefaults(temperature=0.6, top_p=0.9), None),
        ({"top_p": 0.95}, SamplingDefaults(temperature=1.0, top_p=0.95), None),
        ({}, TRANSFORMERS_OWN, None),
        ({"temperature": 0}, SamplingDefaults(temperature=0.0), None),
        ({"temperature": -1}, TRANSFORMERS_OWN, "temperature is -1.0, which is below 0"),
        ({"top_p": 7}, TRANSFORMERS_OWN, "top_p is 7.0, which is not in (0, 1]"),
        (
            {"top_k": 20, "min_p": 0.1, "repetition_penalty": 1.05},
            SamplingDefaults(temperature=1.0, top_k=20, min_p=0.1, repetition_penalty=1.05),
            None,
        ),
        ({"top_k": -1}, TRANSFORMERS_OWN, "top_k is -1, which is below 0"),
        ({"min_p": 2}, TRANSFORMERS_OWN, "min_p is 2.0, which is not in [0, 1]"),
        ({"repetition_penalty": 0}, TRANSFORMERS_OWN, "penalty is 0.0, which is not above 0"),
        (
            {"do_sample": False, "repetition_penalty": 1.05, "top_k": 5},
            SamplingDefaults(repetition_penalty=1.05),
            None,
        ),
        ({"do_sample": None, "temperature": 0.6}, SamplingDefaults(), None),
    ],
)
def test_sampling_defaults_are_the_authors(saved, fields, expected, note):
    text = json.dumps({"do_sample": True, **fields})
    (saved / "generation_config.json").write_text(text)
    checkpoint = open_checkpoint(str(saved))
    assert checkpoint.sampling == expected
    assert [note in line for line in checkpoint.notes] == [True] * (note is not None)


def test_unknown_fields_that_are_set_are_named_once(saved):
    edit_json(saved / "config.json", my_setting=7, my_flag=True, my_off=False, my_one=1, none=None)
    edit_json(saved / "generation_config.json", typical_p=0.9, stranger="x")
    unknown, unapplied = open_checkpoint(str(saved)).notes
    assert unknown.endswith("does not know were ignored: my_setting, my_flag, stranger")
    assert unapplied.endswith("does not apply were ignored: typical_p")


def test_fields_of_real_configurations_need_no_note(saved):
    edit_json(
        saved / "config.json",
        **{"_name_or_path": "x", "torch_dtype": "float16", "pretraining_tp": 2, "use_cache": False},
        **{"unsloth_version": "2024.9", "attention_dropout": 0.1, "max_window_layers": 21},
        **{"use_sliding_window": False, "sliding_window": None, "head_dim": None, "rope_ratio": 1},
        **{"residual_multiplier": 1.0, "logits_scaling": 1, "layer_types": ["full_attention"] * 2},
        **{"attention_multiplier": 8**-0.5, "is_decoder": True, "auto_map": {"AutoModel": "x"}},
    )
    assert open_checkpoint(str(saved)).notes == ()


@pytest.mark.parametrize("tied", [False, True])
def test_tensors_of_a_bare_model_get_the_prefix(tmp_path, tied):
    tiny(tie_word_embeddings=tied).save_pretrained(tmp_path)
    expected = stored_tensors(tmp_path)
    bare = {name.removeprefix("model."): tensor for name, tensor in expected.items()}
    write_safetensors(tmp_path / "model.safetensors", bare)
    found = stored_tensors(tmp_path)
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda name: f"language_model.{name}", "'language_model.model.embed_tokens.weight'"),
        (lambda name: name.replace("model.", "model.text_model."), "'model.text_model.embed"),
        (lambda name: name.replace("layers.1", "layers.1._orig_mod"), "'model.layers.1._orig_mod."),
        (lambda name: name.replace("q_proj", "qkv_proj"), "joined into one matrix"),
    ],
)
def test_tensors_under_other_names_are_not_said_to_be_missing(saved, change, message):
    tensors = {change(name): tensor for name, tensor in stored_tensors(saved).items()}
    write_safetensors(saved / "model.safetensors", tensors)
    said = refusal(saved)
    assert message in said
    assert "fetch" not in said


def test_an_index_may_list_what_need_not_be_stored(tmp_path):
    tiny(tie_word_embeddings=True).save_pretrained(tmp_path, max_shard_size="20KB")
    index = tmp_path / "model.safetensors.index.json"
    weights = json.loads(index.read_text())["weight_map"]
    first = next(iter(weights.values()))
    table = "model.layers.0.self_attn.rotary_emb.inv_freq"
    edit_json(index, weight_map={**weights, "lm_head.weight": first, table: first})
    assert open_checkpoint(str(tmp_path)).config.tie_word_embeddings
    edit_json(tmp_path / "config.json", tie_word_embeddings=False)
    assert "'lm_head.weight' is not in it" in refusal(tmp_path)


def test_a_token_id_of_minus_one_is_none(saved):
    edit_json(saved / "config.json", eos_token_id=-1)
    edit_json(saved / "generation_config.json", eos_token_id=[3, -1], bos_token_id=-1)
    assert open_checkpoint(str(saved)).eos_ids == (3,)
    edit_json(saved / "generation_config.json", eos_token_id=[3, 96])
    assert "generation_config.json: eos_token_id is 96" in refusal(saved)


def test_the_first_spelling_of_the_architecture_is_known(saved):
    edit_json(saved / "config.json", architectures=["LLaMAForCausalLM"], pad_token_id=-1)
    assert open_checkpoint(str(saved)).notes == ()


def test_a_window_that_is_not_used_is_no_window(saved):
    edit_json(saved / "config.json", sliding_window=16)
    assert "sliding_window is 16" in refusal(saved)
    edit_json(saved / "config.json", use_sliding_window=False)
    assert open_checkpoint(str(saved)).notes == ()


def test_another_architecture_is_named_before_its_fields(saved):
    fields = {"num_local_experts": 8, "sliding_window": 16, "no_rope_layers": [1, 0]}
    edit_json(saved / "config.json", architectures=["MixtralForCausalLM"], **fields)
    assert "architecture ['MixtralForCausalLM']" in refusal(saved)
