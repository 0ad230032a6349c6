"""Checkpoints in Meta's layout: Llamas of transformers, divided into files, read by cptool."""

import json
import pickle
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from conftest import edit_json, greedy, refusal, refused_or_harmless
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_reference import random_llama
from meta_checkpoint import save_meta

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.meta.torch_file import read_header
from cptool.cli.main import main
from cptool.model.config import RopeScaling

WIDTHS = dict(vocab_size=96, max_position_embeddings=4096)
HEADS = {"mha": 4, "gqa": 2, "mqa": 1}
IDS = [(7 * i * i + 3 * i) % 96 for i in range(61)]


@pytest.fixture(scope="module", params=HEADS)
def llama(request, tmp_path_factory):
    """A random Llama, and the directory that transformers saved it in."""
    path = tmp_path_factory.mktemp(request.param)
    return random_llama({**WIDTHS, "num_key_value_heads": HEADS[request.param]}, path), path


@pytest.fixture(scope="module")
def gqa(tmp_path_factory):
    return random_llama({**WIDTHS, "num_key_value_heads": 2}, tmp_path_factory.mktemp("gqa"))


@pytest.fixture
def saved(gqa, tmp_path):
    """Two files whose embedding is divided as Llama 2's."""
    return save_meta(gqa, tmp_path / "model", shards=2)


# Tensors


@pytest.mark.parametrize("embedding_dim", [0, 1])
@pytest.mark.parametrize("shards", [1, 2, 4])
def test_tensors_are_those_that_transformers_saved(llama, tmp_path, shards, embedding_dim):
    model, directory = llama
    checkpoint = open_checkpoint(str(save_meta(model, tmp_path / "m", shards, embedding_dim)))
    expected = open_checkpoint(str(directory))
    assert checkpoint.config == expected.config
    assert checkpoint.names() == expected.names()
    head_dim, kv_heads = checkpoint.config.head_dim, checkpoint.config.num_key_value_heads
    for name in expected.names():
        tensor = expected.read(name)
        assert checkpoint.shape(name) == tuple(tensor.shape)
        assert torch.equal(checkpoint.read(name), tensor)
        rotary = name.endswith(("q_proj.weight", "k_proj.weight"))
        whole = shards == 1 or "norm" in name or ("v_proj" in name and HEADS["mqa"] == kv_heads)
        assert checkpoint.is_mapped(name) == (whole and not rotary)
        for dim, size in enumerate(tensor.shape):
            for bounds in ((0, head_dim), (size - head_dim, size), (head_dim // 2, size - 8)):
                if not (rotary and dim == 0 and bounds[0] % head_dim):
                    found = checkpoint.read(name, dim, bounds)
                    assert torch.equal(found, tensor.narrow(dim, bounds[0], bounds[1] - bounds[0]))
        if rotary:
            with pytest.raises(ValueError, match="cut a head"):
                checkpoint.read(name, 0, (head_dim // 2, head_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_dtype_is_read_as_stored(gqa, tmp_path, dtype):
    model = type(gqa)(gqa.config).to(dtype)
    checkpoint = open_checkpoint(str(save_meta(model, tmp_path, shards=2)))
    for name, tensor in model.state_dict().items():
        assert checkpoint.read(name).dtype == dtype
        assert torch.equal(checkpoint.read(name), tensor)
    assert checkpoint.matrix_dtype == str(dtype).removeprefix("torch.")


def test_tied_embeddings_are_absent_or_one_storage(tmp_path):
    model = random_llama({**WIDTHS, "tie_word_embeddings": True}, tmp_path / "hf")
    assert open_checkpoint(str(save_meta(model, tmp_path / "a"))).config.tie_word_embeddings
    file = tmp_path / "a" / "consolidated.00.pth"
    state = torch.load(file)
    torch.save(state | {"output.weight": state["tok_embeddings.weight"]}, file)
    assert open_checkpoint(str(tmp_path / "a")).config.tie_word_embeddings
    torch.save(state | {"output.weight": state["tok_embeddings.weight"].clone()}, file)
    assert not open_checkpoint(str(tmp_path / "a")).config.tie_word_embeddings


def test_fingerprint_knows_the_model_and_not_its_split(gqa, tmp_path):
    def fingerprint(model, *split):
        directory = tmp_path / str(len(list(tmp_path.iterdir())))
        return open_checkpoint(str(save_meta(model, directory, *split))).fingerprint

    first = fingerprint(gqa)
    assert {fingerprint(gqa, n, dim) for n in (2, 4) for dim in (0, 1)} == {first}
    for name in ("model.embed_tokens.weight", "model.layers.1.mlp.down_proj.weight"):
        for at in (0, -1):
            other = type(gqa)(gqa.config)
            other.load_state_dict(gqa.state_dict())
            other.get_parameter(name).data[at, at] += 1
            assert fingerprint(other, 2) != first


# Whole models


@pytest.mark.parametrize(
    ("shards", "embedding_dim", "cp", "tp"),
    [(1, 1, 1, 1), (1, 1, 2, 1), (2, 0, 1, 2), (4, 1, 2, 1), (4, 0, 2, 2)],
)
def test_tokens_are_those_of_transformers(
    llama, tmp_path, token_file, shards, embedding_dim, cp, tp
):
    model, _ = llama
    path = save_meta(model, tmp_path / "m", shards, embedding_dim)
    layout = ("--cp", cp, "--tp", tp)
    prefill = ("prefill", path, "--token-ids", token_file(IDS), "--session", tmp_path / "s")
    for arguments in ((*prefill, *layout), ("decode", tmp_path / "s", "-n", 16, *layout)):
        result = CliRunner().invoke(main, [*map(str, arguments), "--json"])
        assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["token_ids"] == [greedy(model, IDS, 16, ())]


def test_a_session_goes_on_with_other_files_of_the_model(gqa, tmp_path, token_file):
    path = save_meta(gqa, tmp_path / "m", shards=4)
    arguments = ["prefill", path, "--token-ids", token_file(IDS), "--session", tmp_path / "s"]
    assert CliRunner().invoke(main, [*map(str, arguments)]).exit_code == 0
    save_meta(gqa, path, shards=1, embedding_dim=0)
    for number in (1, 2, 3):
        (path / f"consolidated.{number:02}.pth").unlink()
    result = CliRunner().invoke(main, ["decode", str(tmp_path / "s"), "-n", "8", "--json"])
    assert json.loads(result.stdout)["token_ids"] == [greedy(gqa, IDS, 8, ())]


# params.json


@pytest.mark.parametrize(
    ("params", "context", "scaling"),
    [
        ({}, 4096, None),
        ({"norm_eps": 1e-6}, 2048, None),
        ({"rope_theta": 5e5}, 8192, None),
        ({"rope_theta": 1e6}, 16384, None),
        ({"rope_theta": 1000000, "max_seq_len": 99}, 99, None),
        ({"rope_theta": 3e5, "max_seq_len": 77}, 77, None),
        ({"rope_theta": 5e5, "use_scaled_rope": False}, 8192, None),
        (
            {"rope_theta": 5e5, "use_scaled_rope": True},
            131072,
            RopeScaling(kind="llama3", factor=8.0),
        ),
        (
            {"use_scaled_rope": True, "rope_scaling_factor": 16, "rope_high_freq_factor": 1.5},
            131072,
            RopeScaling(kind="llama3", factor=16.0, low_freq_factor=1.0, high_freq_factor=1.5),
        ),
    ],
)
def test_what_the_release_tells_of_positions(saved, params, context, scaling):
    edit_json(saved / "params.json", **params)
    config = open_checkpoint(str(saved)).config
    assert config.max_position_embeddings == context
    assert config.rope_scaling == scaling
    assert config.rope_theta == params.get("rope_theta", 10000.0)


def test_llama_3_2_stretches_by_32(tmp_path):
    shape = dict(hidden_size=2048, num_hidden_layers=16, head_dim=8, intermediate_size=8)
    model = random_llama({**WIDTHS, **shape}, tmp_path / "hf")
    path = save_meta(model, tmp_path / "m", use_scaled_rope=True, head_dim=8)
    assert open_checkpoint(str(path)).config.rope_scaling.factor == 32.0


def test_absent_key_value_heads_are_as_many_as_heads(tmp_path):
    model = random_llama(WIDTHS, tmp_path / "hf")
    path = save_meta(model, tmp_path / "m", shards=2, n_kv_heads=...)
    assert open_checkpoint(str(path)).config.num_key_value_heads == 4


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"dim": "64"}, "dim is '64'"),
        ({"dim": 60, "n_heads": 8}, "makes no head size"),
        ({"dim": 128}, "has shape"),
        ({"n_heads": 0}, "makes no head size"),
        ({"n_kv_heads": 0}, "makes no head size"),
        ({"n_kv_heads": 4}, "has shape"),
        ({"n_kv_heads": 3}, "multiple"),
        ({"n_heads": 2}, "has shape"),
        ({"n_layers": 2}, "no plain Llama"),
        ({"n_layers": 4}, "is missing"),
        ({"n_layers": ...}, "n_layers is None"),
        ({"norm_eps": ...}, "norm_eps is None"),
        ({"norm_eps": 0}, "must be positive"),
        ({"rope_theta": 3e5}, 'add "max_seq_len"'),
        ({"max_seq_len": -1}, "must be positive"),
        ({"use_scaled_rope": True, "rope_scaling_factor": 0}, "make no sense"),
        ({"use_scaled_rope": True, "rope_high_freq_factor": 1}, "make no sense"),
        ({"sliding_window": 4096}, "sliding_window is 4096"),
        ({"dim": 10**400}, "dim is a number of 1329 bits"),
        ({"norm_eps": 10**400}, "norm_eps is inf"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"vocab_size": 97}, "vocab_size is 97, and the embedding"),
        ({"rope_scaling_factor": 8}, "rope_scaling_factor is 8.0 without use_scaled_rope"),
        ({"use_scaled_rope": "yes"}, "use_scaled_rope is 'yes'"),
        ({"attention_chunk_size": 8192}, "does not know this field"),
        ({"moe_args": {"num_experts": 16}}, "moe_args is"),
        ({"model": {"dim": 64, "qk_normalization": True}}, "text_tokenizer.json is not beside"),
        ({"qk_normalization": False}, "qk_normalization is not true"),
        ({"quantization_args": {"scheme": "int8"}}, "quantization_args"),
    ],
)
def test_what_is_not_a_plain_llama_is_refused(saved, changes, message):
    edit_json(saved / "params.json", **changes)
    assert message in refusal(saved)


# Files


def test_files_that_are_missing_are_named(saved, gqa):
    last = saved / "consolidated.01.pth"
    listed = "".join(f"00000000000000000000000000000000  {f.name}\n" for f in saved.iterdir())
    (saved / "checklist.chk").write_text(listed)
    open_checkpoint(str(saved))
    content = last.read_bytes()
    last.unlink()
    assert "consolidated.01.pth is missing" in refusal(saved)
    (saved / "checklist.chk").unlink()
    assert "has shape" in refusal(saved)
    last.write_bytes(content)
    (saved / "consolidated.00.pth").rename(saved / "consolidated.02.pth")
    assert "consolidated.00.pth is missing" in refusal(saved)
    (saved / "params.json").unlink()
    assert "params.json: missing" in refusal(saved)
    for file in saved.glob("*.pth"):
        file.unlink()
    (saved / "params.json").write_text(json.dumps({"dim": 64, "n_heads": 4}))
    assert "no consolidated.00.pth" in refusal(saved)
    (saved / "consolidated.safetensors").touch()
    assert "Mistral's own layout" in refusal(saved)


def test_a_directory_that_holds_both_layouts(llama, tmp_path):
    """Hugging Face's own weights are read if present; else a hint names those in `original`."""
    model, directory = llama
    path = Path(shutil.copytree(directory, tmp_path / "both"))
    save_meta(model, path)
    assert open_checkpoint(str(path)).stored["model.norm.weight"].file.suffix == ".safetensors"
    (path / "model.safetensors").unlink()
    assert open_checkpoint(str(path)).stored["model.norm.weight"].file.suffix == ".pth"
    save_meta(model, tmp_path / "hub" / "original")
    assert "original" in refusal(tmp_path / "hub")


def test_hub_ids_fetch_these_weights_where_there_are_no_others(saved, monkeypatch):
    import huggingface_hub

    asked = []

    def snapshot_download(hub_id, allow_patterns, tqdm_class):
        asked.append(allow_patterns)
        return str(saved)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    assert open_checkpoint("org/llama").name == "org/llama"
    assert [("consolidated*.pth" in patterns) for patterns in asked] == [False, True]


def test_files_of_two_models_are_refused(saved, tmp_path):
    other = random_llama({**WIDTHS, "intermediate_size": 96}, tmp_path / "hf")
    shutil.copy(save_meta(other, tmp_path / "m", shards=2) / "consolidated.01.pth", saved)
    assert "are not of one model" in refusal(saved)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"layers.0.attention.q_norm.weight": torch.ones(16)}, "no plain Llama"),
        ({"layers.0.attention.wq.bias": torch.ones(64)}, "no plain Llama"),
        ({"norm.weight": torch.ones(64, dtype=torch.int64)}, "stored as LongStorage"),
        ({"norm.weight": torch.ones(64, 2)[:, 0]}, "not contiguous"),
        ({"norm.weight": 3}, "is a int, not a tensor"),
        ({"tok_embeddings.weight": None}, "embed_tokens.weight, as a Llama's do"),
    ],
)
def test_strange_tensors_are_refused(gqa, tmp_path, changes, message):
    file = save_meta(gqa, tmp_path) / "consolidated.00.pth"
    state = torch.load(file) | changes
    torch.save({name: tensor for name, tensor in state.items() if tensor is not None}, file)
    assert message in refusal(tmp_path)


def test_opening_imports_no_torch(saved):
    code = (
        "import sys; from cptool.checkpoint import open_checkpoint; "
        "c = open_checkpoint(sys.argv[1]); c.fingerprint; sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code, str(saved)], check=True)


# What torch.save writes


def test_modules_parameters_and_views_are_read(tmp_path):
    layer = torch.nn.Linear(3, 5, bias=False)
    whole = torch.arange(24.0).view(6, 4)
    file = tmp_path / "x.pth"
    torch.save(layer.state_dict(), file)
    assert read_header(file)["weight"].shape == (5, 3)
    torch.save({"a": layer.weight, "b": whole[2:4], "c": whole}, file)
    found = read_header(file)
    data = file.read_bytes()
    for name, tensor in {"a": layer.weight.detach(), "b": whole[2:4], "c": whole}.items():
        stored = found[name]
        raw = data[stored.offset : stored.offset + stored.nbytes]
        assert raw == tensor.contiguous().numpy().tobytes()
        assert (stored.shape, stored.encoding) == (tuple(tensor.shape), "F32")


class Evil:
    def __reduce__(self):
        return (exec, ("raise SystemExit('ran')",))


def rewrite(file, change):
    """The archive anew, with `change` applied to its pickle."""
    with zipfile.ZipFile(file) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, change(content) if name.endswith("data.pkl") else content)


def hostile_shape(shape):
    """A pickle of one tensor that has this shape."""

    def number(n):
        raw = n.to_bytes(n.bit_length() // 8 + 1, "little", signed=True)
        return b"\x8a" + bytes([len(raw)]) + raw

    def text(string):
        return b"X" + len(string).to_bytes(4, "little") + string.encode()

    storage = b"(" + text("storage") + b"ctorch\nFloatStorage\n" + text("0") + text("cpu")
    sizes, strides = b"".join(map(number, shape)), number(1) * len(shape)
    call = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"K\x10tQK\x00("
    hooks = b"t\x89ccollections\nOrderedDict\n)RtRs."
    return b"\x80\x02}" + text("a") + call + sizes + b"t(" + strides + hooks


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda _: pickle.dumps({"a": Evil()}, 2), "refers to __builtin__.exec"),
        (lambda _: pickle.dumps({"a": Evil()}, 4), "refers to builtins.exec"),
        (lambda _: b"\x80\x02cos\nsystem\n.", "refers to os.system"),
        (lambda _: b"\x80\x02\x82\x01.", "instruction EXT1, which no tensor needs"),
        (lambda _: pickle.dumps([1]), "holds a list"),
        (lambda _: b"", "pickle exhausted"),
        (lambda content: content[:-20], "not a whole file"),
        # A stand-in that is given itself as its function, and then called.
        (lambda _: b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\nq\x00(h\x00)}}tb)R.", "for a dict"),
        (lambda _: b"\x80\x02ccollections\nOrderedDict\n)\x81.", "instruction NEWOBJ"),
        # Hashing it as a key would have no end.
        (lambda _: b"\x80\x02}()" + b"q\0h\0\x86" * 60 + b"K\x01u.", "that is a tuple"),
        (lambda _: b"\x80\x02}" + b"}" * 1_000_001 + b".", "more than 1000000 instructions"),
        (lambda _: b"\x80\x02}X\xd0\x07\x00\x00" + b"k" * 2000 + b"K\x01s.", "a key that is a str"),
        (lambda _: b"\x80\x02h\x07.", "refers to value 7"),
        (lambda _: b"\x80\x02u.", "that is not there"),
        (lambda _: b"\x80\x02cos\x1b[31m\nsystem\n.", "refers to 'os\\x1b[31m.system'"),
        (lambda _: hostile_shape([0] + [2**62] * 60_000), "a shape of 60001 dimensions"),
        (lambda _: hostile_shape([2**62, 2**62]), "elements"),
        (lambda _: hostile_shape([2**100]), "an extent that no tensor has"),
        # A place in the memo that would make an array of it tens of gigabytes long.
        (lambda _: b"\x80\x02}r\xff\xff\xff\x7f.", "embed_tokens.weight"),
    ],
)
def test_hostile_pickles_are_refused(gqa, tmp_path, change, message):
    rewrite(save_meta(gqa, tmp_path) / "consolidated.00.pth", change)
    assert message in refusal(tmp_path)


def test_other_formats_are_refused(gqa, tmp_path):
    file = save_meta(gqa, tmp_path) / "consolidated.00.pth"
    state, whole = torch.load(file), file.read_bytes()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    assert "a file of torch.save before version 1.6" in refusal(tmp_path)
    file.write_bytes(whole[:-100])
    assert "not a whole file" in refusal(tmp_path)
    file.write_bytes(b"")
    assert "an empty file" in refusal(tmp_path)
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\n")
    assert "git lfs pull" in refusal(tmp_path)
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("other", "")
    assert "0 records data.pkl" in refusal(tmp_path)
    file.write_bytes(whole.replace(b"little", b"big\0\0\0"))
    assert "not a whole file" in refusal(tmp_path)


def test_the_list_of_records_is_bounded(gqa, tmp_path):
    file = save_meta(gqa, tmp_path) / "consolidated.00.pth"
    damaged = bytearray(file.read_bytes())
    end = damaged.rindex(b"PK\5\6")
    damaged[end + 12 : end + 16] = (10**9).to_bytes(4, "little")
    file.write_bytes(damaged)
    assert "its list of records has 1000000000 bytes" in refusal(tmp_path)


@pytest.fixture(scope="module")
def whole(tmp_path_factory, gqa):
    path = save_meta(gqa, tmp_path_factory.mktemp("damaged"))
    return path, (path / "consolidated.00.pth").read_bytes()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_header_is_refused_or_harmless(whole, data):
    path, content = whole
    damaged = bytearray(content)
    pickled = content.index(b"data.pkl"), content.index(b"PK", 100)
    directory = content.index(b"PK\1\2"), len(content) - 1
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(*data.draw(st.sampled_from([pickled, directory]))))
        damaged[at] = data.draw(st.integers(0, 255))
    (path / "consolidated.00.pth").write_bytes(damaged)
    refused_or_harmless(path, len(damaged))
