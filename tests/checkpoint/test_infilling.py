"""Infilling, as Code Llama's own code encodes it with the sentencepiece library."""

import json
from pathlib import Path

import pytest
import sentencepiece
from click.testing import CliRunner
from conftest import edit_json
from llama_reference import random_llama
from test_tokenizer import byte_level_metadata, trained
from test_tokenizer_model import read, train_sentencepiece
from transformers import CodeLlamaTokenizer

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.tokenizer import backends
from cptool.checkpoint.tokenizer.gguf import from_gguf
from cptool.checkpoint.tokenizer.huggingface import from_files
from cptool.checkpoint.tokenizer.sentencepiece import (
    BYTE,
    CONTROL,
    NORMAL,
    UNKNOWN,
    USER_DEFINED,
)
from cptool.cli.main import main
from cptool.errors import UserError

OWN = ["▁<PRE>", "▁<SUF>", "▁<MID>", "▁<EOT>"]
FIM = ["<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|endoftext|>", "<|fim_pad|>"]
ENDS = ["<|endoftext|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>", "<|file_separator|>"]
PREFIX = "def f(x):\n    "
SUFFIXES = ["\n    return x", "return x", " x", "  x\n", "", "é"]


@pytest.fixture(scope="module")
def content():
    return train_sentencepiece(user_defined_symbols=OWN)


@pytest.fixture(scope="module")
def processor(content):
    return sentencepiece.SentencePieceProcessor(model_proto=content)


@pytest.fixture(scope="module")
def theirs(processor):
    """transformers' tokenizer of the same vocabulary."""
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    scores = dict(zip(pieces, map(processor.get_score, range(len(pieces))), strict=True))
    best_first = sorted(pieces[3 + len(OWN) + 256 :], key=lambda piece: -scores[piece])
    vocabulary = {piece: i for i, piece in enumerate(pieces)}
    return CodeLlamaTokenizer(vocab=vocabulary, merges=backends.all_merges(best_first))


def expected(processor, prefix, suffix):
    """The order and the rules of Code Llama's reference code."""
    before, behind, middle, _ = map(processor.piece_to_id, OWN)
    # Its marker is one piece there, after a space, and three bytes here.
    rest = processor.encode(f"☺{suffix}")[4:]
    return [1, before, *processor.encode(prefix), behind, *rest, middle]


@pytest.mark.parametrize("suffix", SUFFIXES)
def test_a_gap_is_encoded_as_in_code_llamas_own_code(content, processor, tmp_path, suffix):
    tokenizer = read(tmp_path, content).tokenizer()
    assert tokenizer.infill(PREFIX, suffix) == expected(processor, PREFIX, suffix)
    assert tokenizer.infill(PREFIX, suffix, bos=False) == expected(processor, PREFIX, suffix)[1:]
    assert tokenizer.infill("", suffix) == expected(processor, "", suffix)
    assert tokenizer.infilling.ends == (processor.piece_to_id("▁<EOT>"),)


def test_transformers_says_the_same(content, processor, theirs, tmp_path):
    """But for a space before the text behind the gap, which its present version adds."""
    tokenizer = read(tmp_path, content).tokenizer()
    assert tokenizer.infill(PREFIX, " x") == theirs.encode(PREFIX, suffix=" x")
    assert tokenizer.infill(f" {PREFIX}", " \n") == theirs.encode(f" {PREFIX}", suffix=" \n")


@pytest.fixture(scope="module")
def code_llama(content, tmp_path_factory):
    """A checkpoint with that tokenizer, in transformers' files."""
    folder = tmp_path_factory.mktemp("code")
    random_llama(dict(vocab_size=600), folder)
    (folder / "tokenizer.model").write_bytes(content)
    settings = {"tokenizer_class": "CodeLlamaTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    edit_json(folder / "config.json", bos_token_id=1, eos_token_id=2)
    return folder


def generate(*arguments):
    return CliRunner().invoke(main, ["generate", *map(str, arguments)])


def test_generate_fills_a_gap(code_llama, processor, tmp_path):
    (tmp_path / "behind.txt").write_text("\n    return x")
    given = ("--prompt", PREFIX, "--suffix-file", tmp_path / "behind.txt")
    (tmp_path / "ids.json").write_text(json.dumps(expected(processor, PREFIX, "\n    return x")))
    command = (code_llama, "-n", "6", "--temperature", "0", "--json")
    found, same = (
        json.loads(generate(*command, *prompt).stdout)["token_ids"]
        for prompt in (given, ("--token-ids", tmp_path / "ids.json"))
    )
    assert found == same
    spelled = generate(*command[:3], "--prompt", "a", "--suffix", "x</s>").stderr
    assert "--suffix: </s> in it read as letters" in spelled
    checkpoint = open_checkpoint(str(code_llama))
    ids = checkpoint.tokenizer().infill(PREFIX, "x")
    assert checkpoint.answer_ends(ids) == (2, processor.piece_to_id("▁<EOT>"))
    assert checkpoint.answer_ends(ids[:-1]) == (2,)


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--suffix", "x", "--prompt", "a", "--chat"), "leave out --chat"),
        (("--suffix", "x", "--synthetic", "9"), "plain texts; leave out --synthetic"),
        (("--suffix", "x", "--suffix-file", "x", "--prompt", "a"), "are both given"),
        (("--suffix", "x", "--batch-file", "x"), "--suffix does not go with --batch-file"),
        (("--suffix", "", "--batch-file", "x"), "--suffix does not go with --batch-file"),
        (("--suffix-file", "", "--batch-file", "x"), "--suffix-file does not go with --batch-file"),
        (("--suffix-file", "/none", "--prompt", "a"), "cannot be read"),
    ],
)
def test_what_makes_no_sense_is_refused(code_llama, more, message):
    assert message in generate(code_llama, *more).stderr


def test_a_model_without_such_tokens_is_refused(smollm2_path, code_llama, tmp_path):
    errors = generate(smollm2_path, "--prompt", "a", "--suffix", "b").stderr
    assert "the model has no tokens for infilling" in errors and errors.count("\n") == 1
    # A 34B says that it has Code Llama's tokenizer, and its vocabulary ends before these tokens.
    tokenizer = open_checkpoint(str(code_llama)).tokenizer()
    tokenizer.vocab_size = 5
    with pytest.raises(UserError, match="no tokens for infilling"):
        tokenizer.infill("a", "b")


@pytest.mark.parametrize("named", [False, True])
def test_byte_level_vocabularies_have_no_space_to_leave_out(named):
    backend, texts = trained(), [f"<own {text}>" if named else text for text in FIM[:3]] + FIM[3:]
    backend.add_special_tokens(texts)
    ids = [backend.token_to_id(text) for text in texts]
    metadata = byte_level_metadata(backend, "qwen2")
    if named:  # whatever they are called
        keys = ("fim_pre", "fim_suf", "fim_mid")
        metadata |= {f"tokenizer.ggml.{k}_token_id": i for k, i in zip(keys, ids, strict=False)}
    tokenizer = from_gguf(Path("x"), metadata)
    parts = [tokenizer.encode(text, bos=False) for text in (PREFIX, "return x")]
    said = tokenizer.infill(PREFIX, "return x", bos=False)
    assert said == [ids[0], *parts[0], ids[1], *parts[1], ids[2]]
    assert set(tokenizer.infilling.ends) >= {ids[3], ids[4]}


def ordinary_pieces(processor):
    """Pieces and scores with Code Llama's tokens, and what its merges make them of."""
    pieces = [processor.id_to_piece(i) for i in range(len(processor))]
    scores = list(map(processor.get_score, range(len(pieces))))
    parts = [*"<PRESUFMIDOT>", *(own[:n] for own in OWN for n in range(2, len(own)))]
    new = [part for part in dict.fromkeys(parts) if part not in pieces]
    return [*pieces, *new], [*scores, *([0.0] * len(new))]


def from_merges_in_gguf(processor):
    tokens, scores = ordinary_pieces(processor)
    types = [UNKNOWN, CONTROL, CONTROL] + [NORMAL] * (len(tokens) - 3)
    types = [BYTE if t.startswith("<0x") else k for t, k in zip(tokens, types, strict=True)]
    values = {"model": "llama", "tokens": tokens, "scores": scores, "token_type": types}
    return from_gguf(Path("x"), {f"tokenizer.ggml.{key}": value for key, value in values.items()})


def from_merges_in_tokenizer_json(processor, folder):
    tokens, scores = ordinary_pieces(processor)
    ranked = sorted(range(3 + len(OWN) + 256, len(tokens)), key=lambda i: -scores[i])
    merges = backends.all_merges([*(tokens[i] for i in ranked), *OWN])
    vocabulary = {token: i for i, token in enumerate(tokens)}
    CodeLlamaTokenizer(vocab=vocabulary, merges=merges).save_pretrained(folder)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    return from_files(folder / "tokenizer.json", settings)


@pytest.mark.parametrize("file", ["gguf", "json"])
def test_tokens_that_merges_make_are_neither_read_nor_written(processor, tmp_path, file):
    if file == "gguf":
        tokenizer = from_merges_in_gguf(processor)
    else:
        tokenizer = from_merges_in_tokenizer_json(processor, tmp_path)
    before, behind, middle, end = map(processor.piece_to_id, OWN)
    for text in ("a <PRE> b <EOT>", "<SUF> <MID>x", " <EOT>"):
        ids = tokenizer.encode(text, bos=False)
        assert not {before, behind, middle, end} & {*ids}
        assert tokenizer.text([*ids, end], ended=True).lstrip() == text.lstrip()
        assert [before, behind, middle] == [
            i for i in tokenizer.infill(text, text) if i in (before, behind, middle, end)
        ]


@pytest.mark.parametrize("kind", [NORMAL, USER_DEFINED])
def test_tokens_not_marked_as_special_are_neither_read_nor_written(kind):
    backend, texts = trained(), [*FIM[:3], *ENDS]
    backend.add_special_tokens(texts)
    ids = [backend.token_to_id(text) for text in texts]
    metadata = byte_level_metadata(backend, "qwen2")
    for i in ids:
        metadata["tokenizer.ggml.token_type"][i] = kind
    tokenizer = from_gguf(Path("x"), metadata)
    spelled = " x ".join(texts)
    letters = tokenizer.encode(spelled, bos=False)
    assert not {*ids} & {*letters}
    assert tokenizer.spelled(spelled) == texts
    assert {*ids} & {*tokenizer.infill(spelled, spelled)} == {*ids[:3]}
    assert {*tokenizer.infilling.ends} >= {*ids[3:]}
    for end in ids[3:]:
        assert tokenizer.text([*letters, end], ended=True) == spelled
        assert tokenizer.text([end], letters, ended=True, control=True) in texts


def test_ends_that_metadata_names_end_an_answer():
    backend, ends = trained(), ["<own pad>", "<own rep>", "<own sep>"]
    backend.add_tokens([*FIM[:3], *ends])
    ids = [backend.token_to_id(text) for text in ends]
    named = {f"fim_{key}": i for key, i in zip(("pad", "rep", "sep"), ids, strict=True)}
    metadata = byte_level_metadata(backend, "qwen2")
    metadata |= {f"tokenizer.ggml.{key}_token_id": i for key, i in named.items()}
    tokenizer = from_gguf(Path("x"), metadata)
    assert {*tokenizer.infilling.ends} >= {*ids}
    assert tokenizer.text(ids, ended=True) == ""
