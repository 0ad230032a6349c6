"""Chameleon in Meta's layout and in GGUF: the tensors and settings of its Hugging Face files."""

import json

import gguf
import pytest
import torch
from conftest import edit_json, refusal
from families import CASES, IMAGES, random_model, write_gguf, write_meta
from tokenizers import Tokenizer, decoders, models

from cptool.checkpoint import open_checkpoint

SWIN = "chameleon-swin"  # two files, whose heads have norms of their own


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    """A folder with the same model in all three layouts."""
    folder = tmp_path_factory.mktemp("chameleon")
    model = random_model(SWIN, folder / "model")
    write_gguf(model, folder / "model.gguf")
    write_meta(SWIN, model, folder / "meta")
    return folder


@pytest.mark.parametrize("name", ["meta", "model.gguf"])
def test_tensors_and_settings_are_those_of_the_hugging_face_files(written, name):
    ours, theirs = (open_checkpoint(str(written / each)) for each in (name, "model"))
    assert ours.names() == theirs.names()
    for tensor in theirs.names():
        assert torch.equal(ours.read(tensor), theirs.read(tensor)), tensor
    norms = ours.read("model.layers.0.self_attn.q_norm.weight").view(2, 3, -1)
    assert torch.equal(norms[:, 0], norms[:, 2]) and not torch.equal(norms[0, 0], norms[1, 0])
    for field in ("swin_norm", "image_ids", "num_key_value_heads", "rms_norm_eps", "rope_theta"):
        assert getattr(ours.config, field) == getattr(theirs.config, field), field


def test_gguf_files_without_a_template_have_that_of_chameleon(written):
    ours = open_checkpoint(str(written / "model.gguf")).tokenizer()
    assert "<reserved08706>" in ours.chat_template


@pytest.fixture
def meta(written, tmp_path):
    """A Chameleon in Meta's layout, as the release has it: its fields among those of its training,
    and the tokenizer in a folder of its own.
    """
    folder = tmp_path / "models" / "7b"
    folder.mkdir(parents=True)
    for file in (written / "meta").glob("*.pth"):
        (folder / file.name).symlink_to(file)
    params = json.loads((written / "meta" / "params.json").read_text())
    training = {"model": params | {"swin_norm": False}, "optim": {"lr": 1e-4}, "seed": 7}
    (folder / "params.json").write_text(json.dumps(training))
    (folder / "consolidate_params.json").write_text(json.dumps({"swin_norm": True}))
    tokenizer = tmp_path / "tokenizer" / "text_tokenizer.json"
    tokenizer.parent.mkdir()
    tokenizer.write_text((written / "meta" / "text_tokenizer.json").read_text())
    return folder


def test_the_files_of_the_release(meta):
    checkpoint = open_checkpoint(str(meta))
    assert checkpoint.config.swin_norm and checkpoint.config.family == "chameleon"
    assert (checkpoint.bos_id, checkpoint.eos_ids) == (1, (2,))
    assert checkpoint.config.image_ids == ((4, 20), (41, 43))


def test_texts_begin_with_bos_and_messages_end_as_those_of_chameleon(meta):
    names = {**IMAGES, "<s>": 1, "</s>": 2, "<unk>": 3, "<reserved08706>": 22, "a": 50, "b": 51}
    backend = Tokenizer(models.BPE(names, [], unk_token="<unk>"))
    backend.add_special_tokens(["<s>", "</s>", "<unk>", "<reserved08706>"])
    backend.decoder = decoders.Fuse()
    backend.save(str(meta.parents[1] / "tokenizer" / "text_tokenizer.json"))
    tokenizer = open_checkpoint(str(meta)).tokenizer()
    assert tokenizer.encode("ab") == [1, 50, 51]
    assert tokenizer.chat([{"role": "user", "content": "ba"}]) == [1, 51, 50, 22]
    assert tokenizer.decode([1, 50, 51, 2]) == "ab"


@pytest.mark.parametrize(
    ("vocabulary", "message"),
    [
        ({"<s>": 1}, "names no image tokens (IMGIMG...)"),
        ({**IMAGES, "<s>": 10**6}, "model.vocab"),
        ({**IMAGES, "IMGIMGAZ": -2}, "model.vocab"),
        (7, "vocab is 7, it must be an object"),
    ],
)
def test_a_tokenizer_that_is_damaged_is_refused(meta, vocabulary, message):
    file = meta.parents[1] / "tokenizer" / "text_tokenizer.json"
    edit_json(file, model={"vocab": vocabulary})
    assert message in refusal(meta)


def test_fields_that_are_no_chameleons_are_refused(meta):
    edit_json(meta / "consolidate_params.json", qk_normalization=False)
    assert "qk_normalization is not true" in refusal(meta)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(tokens=[f"<{i}>" for i in range(98)]), "names no image tokens"),
        (dict(swin_norm=1), "chameleon.swin_norm is 1, it must be true or false"),
    ],
)
def test_gguf_files_that_are_damaged_are_refused(tmp_path, changes, message):
    config = {**CASES[SWIN][1], **changes}
    writer = gguf.GGUFWriter(str(tmp_path / "m.gguf"), "chameleon")
    writer.add_embedding_length(96)
    writer.add_block_count(1)
    writer.add_head_count(6)
    writer.add_context_length(512)
    writer.add_feed_forward_length(112)
    writer.add_layer_norm_rms_eps(1e-5)
    if type(config["swin_norm"]) is bool:
        writer.add_swin_norm(config["swin_norm"])
    else:
        writer.add_uint32("chameleon.swin_norm", config["swin_norm"])
    writer.add_token_list(config.get("tokens", [*IMAGES]))
    writer.add_tensor("token_embd.weight", torch.zeros(98, 96).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert message in refusal(tmp_path / "m.gguf")
