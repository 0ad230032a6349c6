"""How byte-level vocabularies cut a text: as the tokenizers of `transformers` do."""

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.integrations.gguf.gguf_tokenizer_mapping import GGUF_PRE_TOKENIZER_SPLITS
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cptool.checkpoint.tokenizer import backends
from cptool.checkpoint.tokenizer.gguf import CUTS

TEXTS = [
    "It's 12345 o'clock,  isn't\n\n  it?",
    "naïve ünïcode 你好 ١٢٣",
    "a\r\n\tb   ",
    "x;",
    "camelCase HTTPServer's DON'T ǅungla a/b//\n/c नमस्ते",
]
SHARED = sorted(CUTS.keys() & GGUF_PRE_TOKENIZER_SPLITS.keys())


def cut_at(pattern):
    split = pre_tokenizers.Split(Regex(pattern), behavior="isolated")
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    return pre_tokenizers.Sequence([split, byte_level])


@pytest.mark.parametrize("text", TEXTS)
def test_qwen_cuts_as_in_transformers(text):
    theirs = cut_at(PRETOKENIZE_REGEX)
    assert backends.QWEN2_CUT.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


@pytest.mark.parametrize("name", SHARED)
def test_names_in_gguf_files_mean_the_cuts_of_transformers(name):
    theirs = cut_at(GGUF_PRE_TOKENIZER_SPLITS[name])
    for text in TEXTS:
        assert CUTS[name].pre_tokenize_str(text) == theirs.pre_tokenize_str(text)


def test_chameleons_cut():
    """As llama.cpp has it, for transformers has none: spaces by twos and fours, digits and
    punctuation each on its own, parts of images whole.
    """
    text = "a  b     c 12.5, it's\n\tIMGIMGABZ<x> é"
    cuts = [text[a:b] for _, (a, b) in CUTS["chameleon"].pre_tokenize_str(text)]
    said = "a|  |b|    | c| |1|2|.|5|,| it|'|s|\n|\t|IMGIMGABZ|<|x|>| é"
    assert cuts == said.split("|")


def test_the_families_names_are_known():
    """Llama 3, Qwen and DeepSeek's distillations, Mistral, Phi 4, OLMo 2 and 3, SmolLM 3."""
    assert {"llama-bpe", "qwen2", "deepseek-r1-qwen", "tekken", "gpt-4o", "dbrx", "smaug-bpe"} < {
        *SHARED
    }
    assert {"refact", "smollm"} < CUTS.keys()  # Granite, SmolLM
