"""A tokenizer.model without a tokenizer.json: the ids of transformers' slow tokenizer, which calls
the sentencepiece library on each stretch of text between control tokens.
"""

import json

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_reference import random_llama
from test_tokenizer_model import CORPUS, train_sentencepiece
from transformers.tokenization_utils_sentencepiece import SentencePieceBackend

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.tokenizer.huggingface import from_files
from cptool.errors import UserError

SPECIAL = ["<s>", "</s>", "<unk>", "<|end|>"]
ADDED = {
    "600": {"content": "<|end|>", "special": True, "normalized": False},
    "601": {"content": "<tool>", "special": False, "normalized": False},
}
TEMPLATE = (
    "{% for m in messages %}{{ bos_token }}[INST] {{ m.content }} [/INST]{{ eos_token }}"
    "{% endfor %}{% if add_generation_prompt %}<|end|> {% endif %}"
)
PIECES = st.sampled_from([*SPECIAL, "<tool>", " ", "  ", "\n", "▁", *CORPUS[:40]])
TEXT = st.lists(PIECES | st.text(st.sampled_from(" \nab1é你🙂"), max_size=6), max_size=7).map(
    "".join
)


@pytest.fixture(scope="module")
def content():
    return train_sentencepiece()


@pytest.fixture(scope="module")
def place(content, tmp_path_factory):
    file = tmp_path_factory.mktemp("slow") / "tokenizer.model"
    file.write_bytes(content)
    return file


def slow(file, **fields):
    """transformers' slow tokenizer of the same files, BOS and EOS left out."""
    from transformers import AddedToken

    added = {int(i): AddedToken(**token) for i, token in ADDED.items()}
    return SentencePieceBackend(
        vocab_file=str(file),
        added_tokens_decoder=added,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        **fields,
    )


def read(file, **fields):
    return from_files(file, {"added_tokens_decoder": ADDED, "chat_template": TEMPLATE, **fields})


@pytest.mark.parametrize("fields", [{}, {"legacy": True, "add_prefix_space": False}])
def test_legacy_files_encode_as_the_slow_tokenizer(place, fields):
    found, oracle = read(place, **fields), slow(place, legacy=True)

    @settings(deadline=None, max_examples=400)
    @given(text=TEXT)
    def check(text):
        expected = oracle.encode(text, add_special_tokens=False)
        assert found.encode(text, bos=False, parse=True) == expected
        plain = text
        for token in SPECIAL:
            plain = plain.replace(token, "")
        if "<tool>" not in plain and not any(token in plain for token in SPECIAL):
            ids = found.encode(plain)
            assert ids == [1, *oracle.encode(plain, add_special_tokens=False)]
            assert found.decode(ids) == plain.replace("▁", " ")

    check()


@pytest.mark.parametrize("prefix", [True, False])
def test_other_files_have_one_space_at_most(content, place, prefix):
    """What transformers 4 does with `legacy` false, by the library's own encoding of stretches."""
    found = read(place, legacy=False, add_prefix_space=prefix)
    bare = sentencepiece.SentencePieceProcessor(model_proto=without_prefix(content))
    ids = {"<s>": 1, "</s>": 2, "<unk>": 0, "<|end|>": 600, "<tool>": 601}

    @settings(deadline=None, max_examples=400)
    @given(stretches=st.lists(st.sampled_from(list(ids)) | TEXT.filter(is_plain), max_size=5))
    def check(stretches):
        text = "".join(stretches)
        begins = bool(text) and not any(text.startswith(token) for token in SPECIAL)
        expected, run = [], " " if prefix and begins else ""
        for stretch in [*stretches, None]:
            if stretch is None or stretch in ids:
                expected += bare.encode(run)
                expected += [] if stretch is None else [ids[stretch]]
                run = ""
            else:
                run += stretch
        assert found.encode(text, bos=False, parse=True) == expected

    check()


def is_plain(text):
    return not any(token in text for token in [*SPECIAL, "<tool>"])


def without_prefix(content):
    """The same model with add_dummy_prefix off: the last value of a field counts."""
    return content + b"\x1a\x02\x18\x00"


def test_what_goes_around_a_text(place):
    hello = slow(place).encode("hello", add_special_tokens=False)
    assert read(place).encode("hello") == [1, *hello]
    assert read(place).bos_id == 1
    assert read(place, add_bos_token=False).encode("hello") == hello
    assert read(place, add_eos_token=True).encode("hello") == [1, *hello, 2]
    other = read(place, bos_token={"content": "<|end|>", "special": True})
    assert other.encode("hello") == [600, *hello] and other.bos_id == 600
    code = read(place, tokenizer_class="CodeLlamaTokenizer")
    assert code.encode("a") == [1, *slow(place).encode("a", add_special_tokens=False)]


def test_chats_by_the_template_of_the_files(place):
    found, oracle = read(place), slow(place, legacy=True)
    said = [{"role": "user", "content": "hi </s> there"}]
    ids = found.chat(said)
    letters = oracle.sp_model.encode("[INST] hi </s> there [/INST]")
    assert ids == [1, *letters, 2, 600, *oracle.sp_model.encode(" ")]
    assert found.turn_ends[0] == 2


def test_a_checkpoint_with_it_alone(content, tmp_path):
    random_llama({"vocab_size": 602}, tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(content)
    fields = {"tokenizer_class": "LlamaTokenizer", "add_bos_token": True, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(fields))
    (tmp_path / "added_tokens.json").write_text('{"<|end|>": 600}')
    found = open_checkpoint(str(tmp_path)).tokenizer()
    assert found.encode("hello")[0] == 1
    assert found.chat([{"role": "user", "content": "x"}])[-2] == 600


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tokenizer_class": "T5Tokenizer"}, "of a T5Tokenizer is not read"),
        ({"sp_model_kwargs": {"enable_sampling": True}}, "sp_model_kwargs are not supported"),
        ({"added_tokens_decoder": {"7": {"content": "<s>"}}}, "do not fit together"),
    ],
)
def test_what_is_refused(place, fields, message):
    with pytest.raises(UserError, match=message) as error:
        read(place, **fields)
    assert "\n" not in str(error.value)
