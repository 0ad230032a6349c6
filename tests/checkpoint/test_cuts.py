"""How byte-level vocabularies cut a text: as the tokenizers of `transformers` do."""

import pytest
from tokenizers import Regex, pre_tokenizers
from transformers.models.qwen2.tokenization_qwen2 import PRETOKENIZE_REGEX

from cptool.checkpoint.tokenizer import backends


@pytest.mark.parametrize(
    "text",
    ["It's 12345 o'clock,  isn't\n\n  it?", "naïve ünïcode 你好 ١٢٣", "a\r\n\tb   ", "x;"],
)
def test_qwen_cuts_as_in_transformers(text):
    theirs = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRETOKENIZE_REGEX), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    assert backends.QWEN2_CUT.pre_tokenize_str(text) == theirs.pre_tokenize_str(text)
