"""What `--draft` takes, in one line where it cannot be."""

import pytest
from llama_reference import save_llama

from cptool.checkpoint import open_checkpoint
from cptool.engine.drafts.names import checked, layers_of, model_of
from cptool.errors import UserError


@pytest.fixture(scope="module")
def checkpoint(mqa_path):
    return open_checkpoint(str(mqa_path))


@pytest.mark.parametrize("draft", ["off", "lookup", "auto", "layers:1", "layers:2"])
def test_what_can_be(checkpoint, draft):
    assert checked(draft, checkpoint) == draft


@pytest.mark.parametrize(
    "draft", ["layers:0", "layers:3", "layers:", "layers:-1", "layers:2.5", "layers:²"]
)
def test_layers_are_some_of_the_model_s(checkpoint, draft):
    with pytest.raises(UserError, match="less than the 3 layers of the model") as error:
        checked(draft, checkpoint)
    assert "\n" not in str(error.value)


def test_the_number_of_layers():
    assert layers_of("layers:12") == 12
    assert layers_of("lookup") is model_of("layers:12") is model_of("auto") is None


def test_a_model_with_the_same_vocabulary(checkpoint, tiny_model):
    assert checked(str(tiny_model), checkpoint) == str(tiny_model) == model_of(str(tiny_model))


def test_a_model_with_another_vocabulary(checkpoint, small_smollm2_path, smollm2_path, tmp_path):
    smaller = save_llama(
        tmp_path / "smaller",
        seed=0,
        vocab_size=300,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=1,
        num_attention_heads=1,
        num_key_value_heads=1,
    )
    smollm2 = open_checkpoint(str(smollm2_path))
    assert checked(str(small_smollm2_path), smollm2) == str(small_smollm2_path)
    for draft, ours, why in (
        (smaller, checkpoint, "it has 300 tokens, and mqa has 301"),
        (small_smollm2_path, checkpoint, "and mqa has 301"),
    ):
        with pytest.raises(UserError, match=why) as error:
            checked(str(draft), ours)
        assert "\n" not in str(error.value)


def test_tokens_that_are_spelled_otherwise(smollm2_path, small_smollm2_path, monkeypatch):
    smollm2, small = open_checkpoint(str(smollm2_path)), open_checkpoint(str(small_smollm2_path))
    tokenizer = smollm2.tokenizer()
    monkeypatch.setattr(
        tokenizer,
        "spelling",
        lambda token: "x" if token == 5 else small.tokenizer().spelling(token),
    )
    with pytest.raises(UserError, match=r"its token 5 is .*, that of .* 'x'"):
        checked(str(small_smollm2_path), smollm2)


@pytest.mark.parametrize("draft", ["lokup", "", "/nowhere/at/all"])
def test_nothing_of_that_name(checkpoint, draft):
    with pytest.raises(UserError, match=r"lookup, auto, layers:E") as error:
        checked(draft, checkpoint)
    assert "\n" not in str(error.value)
