"""How many tokens of a prompt `--chunk auto` reads at a time."""

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.prefill.auto import MODEST, SMALL, chunk_for
from cptool.engine.setup.memory import rank_limit
from cptool.engine.weights import load_model
from cptool.planning.chunks import UNIT, plan_chunks


def chosen(world, path, asked):
    """The chunk for each of (options, tokens left, tokens cached, seconds), and the most bytes and
    seconds that such chunks are predicted to take.
    """
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    found = []
    for options, left, cached, every in asked:
        engine = Engine(model, world, batch=len(left), options=EngineOptions(**options))
        chunk = chunk_for(engine, left, cached, every=every)
        if not any(left):
            found.append((chunk, 0, 0))
            continue
        engine.computed = cached
        chunks = plan_chunks(engine.forward(left), engine.profile, chunk)
        longest = max(each.seconds for each in chunks.chunks)  # the last one may be a short rest
        found.append((chunk, chunks.fullest.memory_bytes, longest))
    return found, rank_limit(world), rank_limit(world, 10)


@pytest.mark.parametrize("n, most", [(1, 470_000_000), (2, 325_000_000)])
def test_the_largest_that_fits_and_is_worth_it(mqa_path, n, most):
    tokens = [100_000, 20_000]
    plenty, little = {}, {"memory": most}
    asked = [
        ({"chunk": 7}, tokens, [0, 0], None),
        ({"chunk": 10**6}, tokens, [0, 0], None),
        (plenty, [SMALL], [9], None),
        (plenty, [MODEST - 1, 1], [0, 0], None),
        (plenty, tokens, [50, 0], None),
        (little, tokens, [50, 0], None),
        ({"memory": 1}, tokens, [0, 0], None),
        (plenty, tokens, [50, 0], 1e-6),
        (plenty, [0, 0], [5, 5], 60.0),
    ]
    results = run_ranks(n, chosen, mqa_path, asked)
    found, limit, least = results[0]
    assert all(each == found for each, _, _ in results)
    chunks = [chunk for chunk, _, _ in found]
    assert chunks[:4] == [7, 120_000, SMALL, MODEST]
    free, small, none, quick = chunks[4:8]
    assert UNIT < free < 120_000 and free % UNIT == 0
    assert UNIT <= small < free and found[5][1] <= most < found[4][1]
    assert none == UNIT and quick <= free and found[7][2] <= found[4][2]
    assert chunks[8] == 0
    assert 1e8 < limit and least == 10


def test_a_prompt_that_does_not_fit_at_once_is_divided(mqa_path):
    asked = [({"memory": 290_000_000}, [MODEST], [0], None)]
    ((chunk, most, _),), _, _ = run_ranks(1, chosen, mqa_path, asked)[0]
    assert UNIT <= chunk < MODEST and most <= 290_000_000
