"""`tokenizer.model` files of both kinds: against the sentencepiece library, and against ranked
merging as it is defined.
"""

import base64
import hashlib
import io
import json
from itertools import pairwise
from pathlib import Path

import pytest
import sentencepiece
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st
from llama_reference import random_llama
from meta_checkpoint import save_meta
from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers
from transformers.convert_slow_tokenizer import bytes_to_unicode

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.tokenizer.tokenizer_model import read_tokenizer_model
from cptool.cli.main import main
from cptool.errors import UserError

CORPUS = Path(json.__file__).read_text().splitlines() + ["naïve 你好 🙂 1234"] * 9
LLAMA2 = dict(
    model_type="bpe",
    vocab_size=600,
    byte_fallback=True,
    split_digits=True,
    pad_id=-1,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    allow_whitespace_only_pieces=True,
    character_coverage=0.99,
)
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
WORDS = st.sampled_from(["</s>", "<s>", "<unk>", "[INST]", "<|eot_id|>", *CORPUS[:40]])
CHARACTERS = st.sampled_from(" \n\t0189'aeé你🙂") | st.characters(codec="utf-8")
TEXT = st.lists(st.text(CHARACTERS, max_size=9) | WORDS, max_size=6).map("".join)
relaxed = settings(deadline=None, max_examples=300)


def train_sentencepiece(**changes) -> bytes:
    file = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(CORPUS), model_writer=file, minloglevel=2, **{**LLAMA2, **changes}
    )
    return file.getvalue()


@pytest.fixture(scope="session")
def llama2_model():
    return train_sentencepiece()


@pytest.fixture(scope="session")
def llama3_tokens():
    """Byte strings by rank: 256 bytes, then what a byte-level BPE learns."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    to_byte = {character: byte for byte, character in bytes_to_unicode().items()}
    learnt = sorted(backend.get_vocab().items(), key=lambda item: item[1])
    return [bytes(to_byte[character] for character in token) for token, _ in learnt]


@pytest.fixture(scope="session")
def llama3_model(llama3_tokens):
    lines = (base64.b64encode(token) + b" %d" % i for i, token in enumerate(llama3_tokens))
    return b"\n".join(lines) + b"\n"


def read(directory, content):
    file = directory / "tokenizer.model"
    file.write_bytes(content)
    return read_tokenizer_model(file)


@pytest.fixture(scope="session")
def llama2(llama2_model, tmp_path_factory):
    return read(tmp_path_factory.mktemp("llama2"), llama2_model).tokenizer()


@pytest.fixture(scope="session")
def llama3(llama3_model, tmp_path_factory):
    return read(tmp_path_factory.mktemp("llama3"), llama3_model).tokenizer()


# SentencePiece


@pytest.fixture(scope="session")
def processor(llama2_model):
    return sentencepiece.SentencePieceProcessor(model_proto=llama2_model)


@relaxed
@given(text=TEXT)
def test_sentencepiece_models_encode_as_the_library(llama2, processor, text):
    ids = llama2.encode(text)
    assert ids == [processor.bos_id(), *processor.encode(text)]
    assert llama2.encode(text, bos=False) == ids[1:]
    assert llama2.decode(ids) == processor.decode(ids) == text.replace("▁", " ")
    stream = llama2.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == llama2.decode(ids)


def test_ids_and_sizes_are_those_of_the_library(llama2_model, processor, tmp_path):
    model = read(tmp_path, llama2_model)
    assert (model.size, model.bos_id, model.eos_ids) == (len(processor), 1, (2,))
    moved = read(tmp_path, train_sentencepiece(bos_id=2, eos_id=0, unk_id=1))
    assert (moved.bos_id, moved.eos_ids) == (2, (0,))


def test_no_dummy_prefix_where_the_model_says_so(tmp_path):
    content = train_sentencepiece(add_dummy_prefix=False)
    found = read(tmp_path, content).tokenizer()
    oracle = sentencepiece.SentencePieceProcessor(model_proto=content)
    for text in ("hello", " hello", "  a  b "):
        ids = found.encode(text, bos=False)
        assert ids == oracle.encode(text)
        assert found.decode(ids) == text


def test_code_llamas_own_tokens_are_never_text(tmp_path):
    content = train_sentencepiece(user_defined_symbols=["▁<PRE>", "▁<EOT>"])
    oracle = sentencepiece.SentencePieceProcessor(model_proto=content)
    model = read(tmp_path, content)
    assert model.chat_template is not None
    control = {oracle.piece_to_id(piece) for piece in ("▁<PRE>", "▁<EOT>")}
    text = "a <PRE> b <EOT>"
    assert control <= set(oracle.encode(text))
    ids = model.tokenizer().encode(text)
    assert not control & set(ids) and model.tokenizer().decode(ids) == text


def test_the_largest_code_llama_has_a_chat_format_of_its_own(tmp_path):
    found = read(tmp_path, train_sentencepiece(user_defined_symbols=["<step>"])).tokenizer()
    with pytest.raises(UserError, match="no chat template"):
        found.chat([{"role": "user", "content": "hi"}])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "unigram"}, "model_type is 1"),
        ({"byte_fallback": False}, "byte_fallback is 0"),
        ({"normalization_rule_name": "nmt_nfkc"}, "precompiled_charsmap"),
        ({"remove_extra_whitespaces": True}, "remove_extra_whitespaces is 1"),
        ({"treat_whitespace_as_suffix": True}, "treat_whitespace_as_suffix is 1"),
        ({"user_defined_symbols": ["<new>"]}, "'<new>' is of type 4"),
    ],
)
def test_other_sentencepiece_models_are_refused(tmp_path, changes, message):
    content = train_sentencepiece(**changes)
    with pytest.raises(UserError) as error:
        read(tmp_path, content)
    assert message in str(error.value) and "\n" not in str(error.value)
    assert len(str(error.value)) < 400


# Ranks


def merge_by_rank(tokens, text):
    """Ranked merging as defined: cut, then the pair of the lowest rank, leftmost first."""
    ranks = {token: rank for rank, token in enumerate(tokens)}
    cut = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    ids = []
    for piece, _ in cut.pre_tokenize_str(text):
        parts = [bytes([byte]) for byte in piece.encode()]
        if piece.encode() in ranks:
            parts = [piece.encode()]
        while candidates := [
            (ranks[a + b], i) for i, (a, b) in enumerate(pairwise(parts)) if a + b in ranks
        ]:
            _, at = min(candidates)
            parts[at : at + 2] = [parts[at] + parts[at + 1]]
        ids += [ranks[part] for part in parts]
    return ids


@relaxed
@given(text=TEXT)
def test_ranks_merge_as_defined(llama3, llama3_tokens, text):
    ids = llama3.encode(text, bos=False)
    assert ids == merge_by_rank(llama3_tokens, text)
    assert llama3.encode(text) == [len(llama3_tokens), *ids]
    assert llama3.decode(ids) == text


def test_special_tokens_follow_the_ranks(llama3_model, llama3_tokens, tmp_path):
    model, first = read(tmp_path, llama3_model), len(llama3_tokens)
    assert model.size == first + 256 and model.bos_id == first
    assert model.eos_ids == (first + 1, first + 8, first + 9)
    assert model.model.special[2] == "<|reserved_special_token_0|>"
    assert len(set(model.model.special)) == 256


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda content: b"", "the file is empty"),
        (lambda content: content[:-9], "neither"),
        (lambda content: content.replace(b" 300\n", b" 301\n"), "ranks do not count"),
        (lambda content: content.split(b"\n", 1)[1], "ranks do not count"),
        (lambda content: b"IQ== 0\n" + b"IQ== 1\n", "twice"),
        (lambda content: b"IQ== 0\n", "no token for byte 0"),
        (lambda content: b"no such file", "neither"),
        (lambda content: b"IQ=! 0\n", "neither"),
    ],
)
def test_damaged_ranks_are_one_line(llama3_model, tmp_path, change, message):
    with pytest.raises(UserError) as error:
        read(tmp_path, change(llama3_model))
    assert message in str(error.value) and "\n" not in str(error.value)


@pytest.fixture(scope="session")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("scratch")


@pytest.mark.parametrize("piece", [b"\x08\x05", b"\x10\x05", b"\x1a\x01\x01"])
def test_fields_of_another_wire_type_are_refused(llama2_model, tmp_path, piece):
    """The text or the score of a piece as a number, or its type as bytes."""
    with pytest.raises(UserError, match="of another wire type"):
        read(tmp_path, llama2_model + b"\x0a" + bytes([len(piece)]) + piece).tokenizer()


@settings(deadline=None, max_examples=200)
@given(data=st.data())
def test_a_damaged_sentencepiece_model_is_refused_or_read(llama2_model, scratch, data):
    damaged = bytearray(llama2_model)
    for _ in range(data.draw(st.integers(1, 3))):
        damaged[data.draw(st.integers(0, len(damaged) - 1))] = data.draw(st.integers(0, 255))
    damaged = damaged[: data.draw(st.sampled_from([len(damaged), len(damaged) // 2]))]
    try:
        read(scratch, bytes(damaged)).tokenizer()
    except UserError as error:
        assert "\n" not in str(error)


# Chats


def test_llama_2_chats_are_pairs_encoded_alone(llama2, processor):
    def pair(question, answer=None):
        text = f"[INST] {question} [/INST]"
        if answer is None:
            return [1, *processor.encode(text)]
        return [1, *processor.encode(f"{text} {answer} "), 2]

    said = [
        {"role": "user", "content": " hi </s> \n"},
        {"role": "assistant", "content": "\nyes  "},
        {"role": "user", "content": "and?"},
    ]
    assert llama2.chat(said) == pair("hi </s>", "yes") + pair("and?")
    system = {"role": "system", "content": "Be <s> brief."}
    block = "<<SYS>>\nBe <s> brief.\n<</SYS>>\n\n"
    # What is stripped is the system block and the message together.
    expected = pair(f"{block} hi </s>", "yes") + pair("and?")
    assert llama2.chat([system, *said]) == expected
    assert llama2.chat(said[:2], add_generation_prompt=False) == pair("hi </s>", "yes")


@pytest.mark.parametrize(
    ("roles", "content", "message"),
    [
        (["user", "user"], "x", "must alternate"),
        (["assistant"], "x", "must alternate"),
        (["user", "system"], "x", "must alternate"),
        (["user"], "a [/INST] b", r"holds \[/INST\]"),
        (["system", "user"], "<<SYS>>", "holds <<SYS>>"),
    ],
)
def test_llama_2_refuses_what_it_was_not_trained_on(llama2, roles, content, message):
    with pytest.raises(UserError, match=message):
        llama2.chat([{"role": role, "content": content} for role in roles])


def test_llama_3_chats_are_headers_and_ends(llama3):
    begin, start, end, eot = (llama3.bos_id + i for i in (0, 6, 7, 9))

    def message(role, content):
        header = llama3.encode(role, bos=False)
        return [start, *header, end, *llama3.encode(f"\n\n{content}", bos=False), eot]

    said = [("system", "Be brief."), ("user", "a <|eot_id|> b"), ("ipython", "1"), ("user", "c")]
    messages = [{"role": role, "content": f" {content}\n"} for role, content in said]
    expected = [begin, *(i for role, content in said for i in message(role, content))]
    assert llama3.chat(messages, add_generation_prompt=False) == expected
    opened = [start, *llama3.encode("assistant", bos=False), end, *llama3.encode("\n\n", bos=False)]
    assert llama3.chat(messages) == expected + opened
    with pytest.raises(UserError, match="role tool"):
        llama3.chat([{"role": "tool", "content": "x"}])


# Beside weights


@pytest.fixture(params=["llama2_model", "llama3_model"])
def checkpoint(request, tmp_path):
    """A random model in Meta's layout, its tokenizer.model one directory up."""
    content = request.getfixturevalue(request.param)
    size = read(tmp_path, content).size
    model = random_llama({"vocab_size": size, "num_key_value_heads": 2}, tmp_path / "hf")
    return save_meta(model, tmp_path / "model", shards=2, embedding_dim=0)


def test_a_checkpoint_takes_the_tokenizer_one_directory_up(checkpoint):
    found = open_checkpoint(str(checkpoint))
    expected = read_tokenizer_model(checkpoint.parent / "tokenizer.model")
    assert (found.bos_id, found.eos_ids) == (expected.bos_id, expected.eos_ids)
    assert found.tokenizer().encode("hello")[0] == expected.bos_id
    prefill = ["prefill", str(checkpoint), "--prompt", "hello", "--chat", "--json"]
    result = CliRunner().invoke(main, prefill)
    assert result.exit_code == 0, result.output
    said = [{"role": "user", "content": "hello"}]
    assert json.loads(result.stdout)["tokens"] == len(expected.tokenizer().chat(said))


def test_a_tokenizer_that_is_not_the_models_is_refused(checkpoint):
    tokenizer = checkpoint.parent / "tokenizer.model"
    lists = checkpoint.parent / "tokenizer_checklist.chk"
    digest = hashlib.md5(tokenizer.read_bytes()).hexdigest()
    lists.write_text(f"{digest}  tokenizer.model\n")
    open_checkpoint(str(checkpoint))
    lists.write_text(f"{'0' * 32}  tokenizer.model\n")
    with pytest.raises(UserError, match="its MD5 is"):
        open_checkpoint(str(checkpoint))
    lists.unlink()
    files = sorted(checkpoint.glob("*.pth"))
    states = [torch.load(file) for file in files]
    for rows in (40, 600):  # of each of two files; more than either has tokens
        for file, state in zip(files, states, strict=True):
            resized = {
                name: state[name][:1].repeat(rows, 1)
                for name in ("tok_embeddings.weight", "output.weight")
            }
            torch.save(state | resized, file)
        with pytest.raises(UserError, match=f"the model {2 * rows};"):
            open_checkpoint(str(checkpoint))
    tokenizer.unlink()
    found = open_checkpoint(str(checkpoint))
    assert (found.bos_id, found.eos_ids, found.tokenizer()) == (None, (), None)
