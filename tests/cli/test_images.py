"""`--image-tokens` and the chat format of Chameleon, random weights and a tokenizer of letters."""

import json

import pytest
from conftest import edit_json
from families import IMAGES, greedy, random_model
from test_cli import as_json, cptool
from tokenizers import Tokenizer, models, processors
from transformers import PreTrainedTokenizerFast

from cptool.checkpoint import open_checkpoint
from cptool.cli.options.images import with_images

NAMED = {"<pad>": 0, "<s>": 1, "</s>": 2, "<unk>": 3}
NAMED |= {"<racm3:break>": 20, "<eoss>": 21, "<reserved08706>": 22}
IMAGE = [5, 4, 19, 41]


@pytest.fixture(scope="module")
def chameleon(tmp_path_factory):
    """The folder of a model with its tokenizer, and the model."""
    folder = tmp_path_factory.mktemp("chameleon")
    model = random_model("chameleon", folder)
    vocabulary = {**IMAGES, **NAMED}
    letters = iter("abcdefghijklmnopqrstuvwxyz ?" + "".join(map(chr, range(0x4E00, 0x4F00))))
    for token in set(range(97)) - set(vocabulary.values()):
        vocabulary[next(letters)] = token
    backend = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>"))
    backend.add_special_tokens([*NAMED, *IMAGES])
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 1)])
    PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<s>",
        eos_token="</s>",
        sep_token="<reserved08706>",
        pad_token="<pad>",
    ).save_pretrained(folder)
    edit_json(folder / "config.json", bos_token_id=1, eos_token_id=2)
    return folder, model


def answer(folder, *prompt):
    command = ("generate", folder, *prompt, "-n", "5", "--temperature", "0")
    return as_json(*command)["token_ids"][0]


def test_images_stand_before_the_text(chameleon, tmp_path):
    folder, model = chameleon
    (tmp_path / "image.json").write_text(json.dumps([IMAGE, IMAGE[::-1]]))
    text = open_checkpoint(str(folder)).tokenizer().encode("what is it?", bos=False)
    assert 3 not in text
    prompt = [1, 20, *IMAGE, 21, 20, *IMAGE[::-1], 21, *text]
    said = answer(folder, "--image-tokens", tmp_path / "image.json", "--prompt", "what is it?")
    assert said == greedy(model, prompt, 5)
    # transformers masks the parts of an image alone, so that <image> may be in an answer.
    assert not {*said} & {IMAGES[text] for text in IMAGES if text.startswith("IMGIMG")}


def test_images_stand_after_bos():
    assert with_images([20, 5, 21], [1, 7], 1) == [1, 20, 5, 21, 7]
    assert with_images([20, 5, 21], [7, 1], 1) == [20, 5, 21, 7, 1]
    assert with_images([], [1, 7], 1) == [1, 7]


@pytest.mark.parametrize(
    ("ids", "more", "message"),
    [
        ([5, 23], ("--prompt", "a"), "23 is not the id of a token that stands for a part of an"),
        ([[]], ("--prompt", "a"), "an image without tokens"),
        ([5], (), "no text follows the image"),
        ([5], ("--synthetic", "8"), "after --image-tokens: token ids do not join a text"),
        ([5], ("--chat", "--prompt", "a"), "the messages of a chat are text"),
    ],
)
def test_what_makes_no_sense_is_refused(chameleon, tmp_path, ids, more, message):
    (tmp_path / "image.json").write_text(json.dumps(ids))
    command = ("generate", chameleon[0], "--image-tokens", tmp_path / "image.json", *more)
    errors = cptool(*command, code=2).stderr
    assert message in errors and errors.count("\n") == 1


def test_other_models_have_no_images(smollm2_path, tmp_path):
    (tmp_path / "image.json").write_text("[5]")
    command = ("generate", smollm2_path, "--image-tokens", tmp_path / "image.json", "--prompt", "a")
    assert "the model's vocabulary has no tokens of images" in cptool(*command, code=2).stderr


def test_messages_end_as_in_the_processor_of_transformers(chameleon):
    tokenizer = open_checkpoint(str(chameleon[0])).tokenizer()
    letters = [tokenizer.encode(text, bos=False) for text in ("ab", "c", "d")]
    messages = [
        {"role": "user", "content": "ab"},
        {"role": "assistant", "content": "c"},
        {"role": "user", "content": "d"},
    ]
    assert tokenizer.chat(messages) == [
        *(1, *letters[0], 22),
        *(*letters[1], 22),
        *(*letters[2], 22),
    ]
    assert set(tokenizer.turn_ends) == {2, 22}
