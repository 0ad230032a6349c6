"""Stop texts: which token ends an answer, as transformers has it, and what is shown of its text."""

import random

import pytest
import torch
from transformers import StopStringCriteria

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.tokenizer.stops import StopStream, before_stop

TEXT = (
    'The harbour lay still.\n\n"Naïve café", she said — 日本語のテキスト, 🙂🙂 and e\u0301.\n'
    "    def stop(self):\n        return self.ended  # aaab aab aabaab\n\n\nUser: 1,234.50 €\n"
)


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return open_checkpoint(str(smollm2_path)).tokenizer()


class OnlyTokens:
    """transformers' tokenizer with the tokens of one text alone, so that a criterion is made in
    milliseconds.
    """

    def __init__(self, oracle, ids):
        self._oracle = oracle
        self._vocabulary = {oracle.convert_ids_to_tokens(i): i for i in ids}

    def __getattr__(self, name):
        return getattr(self._oracle, name)

    def __call__(self, *args, **options):
        return self._oracle(*args, **options)

    def get_vocab(self):
        return self._vocabulary


def tokenised(tokenizer, rng) -> list[int]:
    """The text as the tokenizer splits it, or cut at random, also within words and characters."""
    if rng.random() < 0.3:
        return tokenizer.encode(TEXT, bos=False)
    ids, start = [], 0
    while start < len(TEXT):
        end = start + rng.randint(1, 4)
        ids += tokenizer.encode(TEXT[start:end], bos=False)
        start = end
    return ids


def random_stop(rng) -> str:
    """A part of the text, most often; sometimes one that goes on otherwise."""
    start = rng.randrange(len(TEXT))
    part = TEXT[start : start + rng.choice([1, 2, 3, 5, 9, 30])]
    if rng.random() < 0.25:
        part = part[: len(part) // 2 + 1] + rng.choice(TEXT)
    return part


def last_token(criterion, ids) -> int | None:
    for n in range(1, len(ids) + 1):
        if criterion(torch.tensor([ids[:n]]), None).item():
            return n
    return None


@pytest.mark.parametrize("seed", range(3))
def test_the_token_that_ends_an_answer_is_that_of_transformers(tokenizer, template, seed):
    """240 cases of one to three stop texts; what is shown, piece by piece, is the text before."""
    rng, ended = random.Random(seed), 0
    for _ in range(80):
        ids = tokenised(tokenizer, rng)
        stops = list({random_stop(rng) for _ in range(rng.randint(1, 3))})
        try:
            expected = last_token(StopStringCriteria(OnlyTokens(template, ids), stops), ids)
        except ValueError:  # none of the tokens has the end of one
            expected = None
        stream, shown, found = StopStream(tokenizer.stream(), stops), "", None
        for n, token in enumerate(ids, 1):
            shown += stream.push(token)
            if stream.found:
                found = n
                break
        assert found == expected, stops
        shown += stream.flush(ended=True)
        assert shown == before_stop(tokenizer.decode(ids[:found]), stops)
        assert not any(stop in shown for stop in stops)
        ended += found is not None
    assert 20 < ended < 80


def test_only_what_may_begin_a_stop_text_is_held_back(tokenizer):
    rng = random.Random(1)
    for _ in range(100):
        ids = tokenised(tokenizer, rng)
        stops = [random_stop(rng) for _ in range(2)]
        stream, plain = StopStream(tokenizer.stream(), stops), tokenizer.stream()
        shown = certain = ""
        for token in ids:
            shown += stream.push(token)
            certain += plain.push(token)
            if stream.found:
                break
            held = certain[len(shown) :]
            assert certain.startswith(shown)
            longest = max(
                (n for stop in stops for n in range(len(stop)) if certain.endswith(stop[:n])),
                default=0,
            )
            assert len(held) == longest


def test_the_first_of_several_stop_texts_cuts(tokenizer):
    for text, stops, shown in (
        ("ab", ["b", "ab"], ""),
        ("one END two", ["END", "ne E"], "o"),
        ("aaab", ["aab"], "a"),
        ("xyz", ["zz"], "xyz"),
    ):
        stream = StopStream(tokenizer.stream(), stops)
        pieces = [stream.push(token) for token in tokenizer.encode(text, bos=False)]
        assert "".join([*pieces, stream.flush(ended=False)]) == shown == before_stop(text, stops)
