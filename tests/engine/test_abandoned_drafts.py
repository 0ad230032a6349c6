"""Drafts that are given up between their computation and their check, and drafts that are no
numbers, leave nothing behind.
"""

import math

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.drafts.chooser import Chooser
from cptool.engine.engine import Engine
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model

SAID = [[5, 6, 7, 8, 9], [3, 4]]


def settled(engine, mark):
    engine.settle()


def truncated(engine, mark):
    engine.truncate(list(map(len, engine.tokens)))


def rewound(engine, mark):
    engine.rewind(mark)


def abandoned(world, path, leave):
    """Logits of two steps, the second after drafts were begun and given up by `leave`, if any."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device)
    engine = Engine(model, world, batch=2)
    engine.extend(SAID)
    mark = engine.mark()
    if leave is not None:
        for token in (11, 12):
            engine.begin({0: token, 1: token}, 1, variant="pass-kv", most={0: 2, 1: 2})
        leave(engine, mark)
    assert engine.cache.lengths == engine.holdings.counts[world.cp_rank]
    assert engine.held_tokens == sum(engine.computed)
    if leave is rewound or leave is None:
        engine.rewind(mark)
        engine.extend([[], []])
    engine.begin({0: 21, 1: 22}, 1, variant="pass-kv", most={0: 1, 1: 1})
    engine.advance({0: 21, 1: 22}, 1, variant="pass-kv")
    engine.settle()
    return {b: row.tolist() for b, row in engine.logits.items()}


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("leave", [settled, truncated, rewound])
def test_what_was_begun_is_dropped(mqa_path, n, leave):
    plain, found = (run_ranks(n, abandoned, mqa_path, how) for how in (None, leave))
    for ours, theirs in zip(found, plain, strict=True):
        assert ours.keys() == theirs.keys()
        for b, row in ours.items():
            assert row == pytest.approx(theirs[b], abs=1e-5)


def chosen(world, path, value):
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device)
    engine = Engine(model, world)
    engine.extend([[5, 6, 7]])
    found = []
    for temperature in (0.0, 0.7):
        sampling = Sampling(temperature=temperature, repetition_penalty=0.5)
        chooser = Chooser(engine, AnswerOptions(limit=2, sampling=sampling))
        chooser.begin([0])
        logits = torch.zeros(model.config.vocab_size)
        logits[6] = value
        found.append(chooser.choose({0: logits})[0])
    return found


@pytest.mark.parametrize("value", [math.inf, -math.inf, math.nan, 3e38])
def test_no_draft_is_an_error(mqa_path, value):
    for token, kind in run_ranks(1, chosen, mqa_path, value)[0]:
        assert (token == 6) == (value > 0) and kind >= 0
