"""The share of a prefill's work that is done, and a prefill's end on request."""

import itertools

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import reading
from cptool.engine.answers.decode import next_tokens
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.prefill.course import Course, Seconds
from cptool.engine.reading import Layers
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.errors import Interrupted
from cptool.sharding import balanced
from cptool.variants import names


def prompt(length: int) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * length) % 290 for i in range(length)]


def engine_of(world, path, report, variant="auto", batch=1):
    shared = world if world.tp > 1 else None
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, shared)
    options = EngineOptions(variant=variant)
    return Engine(model, world, batch=batch, options=options, progress=report)


def shares(world, path, variant, turns):
    """What the board says at every report of each turn: layer, share; pairs counted in all."""
    said = []

    def report(phase, done, total, *, work=None):
        if phase.startswith("prefill"):
            before = world.board.read(world.rank)
            world.report(phase, done, total, work=work)
            after = world.board.read(world.rank)
            # What the kernels have counted is what is said to be done once they have ended.
            if before.work is not None and 0 < after.work.share and work.running == 0:
                assert before.work.share <= after.work.share + 1e-9
            said.append((done, after.work.share, work.pairs))

    engine = engine_of(world, path, report, variant, len(turns[0]))
    results = []
    for turn in turns:
        said.clear()
        counted = world.board.pairs(world.rank)
        engine.extend(turn)
        layers = engine.model.config.num_hidden_layers
        results.append((list(said), world.board.pairs(world.rank) - counted, layers))
    return results


@pytest.mark.parametrize("variant", names())
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_share_grows_to_one_and_the_kernels_count_what_was_predicted(mqa_path, n, variant):
    turns = [[prompt(67), [], prompt(31)], [prompt(3), prompt(40), prompt(1)]]
    for turns_of_rank in run_ranks(n, shares, mqa_path, variant, turns):
        for said, counted, layers in turns_of_rank:
            values = [share for _, share, _ in said]
            assert values == sorted(values) and values[-1] == 1
            assert counted == layers * said[0][2]
            for layer in range(1, layers):  # at a border, whatever the weights of the parts
                ahead = max(share for done, share, _ in said if done < layer)
                later = min(share for done, share, _ in said if done >= layer)
                assert ahead <= layer / layers + 1e-9 and later >= layer / layers - 1e-9
                assert n > 1 or ahead == pytest.approx(layer / layers)


def test_the_parts_of_a_layer_weigh_what_they_take(mqa_path):
    config = open_checkpoint(str(mqa_path)).config
    parts = Layers(config, 0.25)
    whole = parts.after_rows(0, 9) - parts.before - parts.attention  # the product after attention
    assert 0 < parts.before and 0 < whole < 0.75
    assert parts.after_rows(9, 9) == 1


def test_chunks_weigh_their_pairs_and_tokens():
    course = Course([100, 60], [50, 0], most=80, predicted=Seconds(3.0, 1.0))
    assert (course.tokens, course.chunks) == (160, 2)
    pairs = [40 * 50 + 820 + 820, 60 * 90 + 1830 + 20 * 40 + 210]
    course.begin([40, 40], [50, 0])
    # As predicted of the mean of both: attention takes three times as long as the rest.
    first, second = (3 * 2 * p / sum(pairs) + 1 for p in pairs)
    assert course.share(0.5) == pytest.approx(first / 2 / (first + second), rel=0.01)
    for _ in range(3):
        course.took(1.0, 4.0)  # seconds of a layer of this chunk
    second = pairs[1] / pairs[0] + 4
    assert course.attention == pytest.approx(1 / 5)
    assert course.share(1.0) == pytest.approx(5 / (5 + second))
    course.begin([60, 20], [90, 40])
    assert (course.chunk, course.done) == (1, 80)
    assert course.attention == pytest.approx((second - 4) / second)
    assert course.share(0.0) == pytest.approx(5 / (5 + second))
    assert course.share(1.0) == pytest.approx(1)


def stopped(world, path, at, pending, long=reading.LONG):
    """Where a turn that is stopped in layer `at` ended, which leaves the state as it was.

    pending: how many of its 600 tokens the engine had already, without KV. long: the number of
    tokens up to which only the predicted time says that it can be stopped.
    """
    reading.LONG, reading.LONG_S = long, 0.0 if long > 600 else 1e9
    layer = -1

    def report(phase, done, total, *, work=None):
        nonlocal layer
        world.report(phase, done, total, work=work)
        if phase.startswith("prefill"):
            layer = done
            if world.rank == world.size - 1 and armed and done == at:
                world.board.cancel()

    armed = False
    engine = engine_of(world, path, report)
    engine.extend([prompt(70)])
    engine.append([prompt(600)[:pending]])
    before = [list(engine.tokens[0]), list(engine.computed), engine.cache.lengths]
    logits = {b: row.clone() for b, row in engine.logits.items()}
    armed = True
    with pytest.raises(Interrupted):
        engine.extend([prompt(600)[pending:]])
    ended_at = layer
    armed = False
    assert before == [engine.tokens[0], engine.computed, engine.cache.lengths]
    assert engine.cache.lengths == engine.holdings.counts[world.cp_rank]
    assert logits.keys() == engine.logits.keys()
    assert all(torch.equal(row, engine.logits[b]) for b, row in logits.items())
    world.barrier()
    if world.rank == 0:
        world.board.cancel(False)
    world.barrier()
    engine.extend([prompt(600)[pending:]])
    return world.gather(ended_at), next_tokens(engine, Sampling())


def unstopped(world, path):
    engine = engine_of(world, path, world.report)
    engine.extend([prompt(70)])
    engine.extend([prompt(600)])
    return next_tokens(engine, Sampling())


@pytest.mark.parametrize("cp, tp", [(1, 1), (2, 1), (1, 2)])
@pytest.mark.parametrize("at, pending, long", [(0, 0, 512), (1, 0, 9999), (1, 550, 512)])
def test_a_prefill_that_is_stopped_leaves_no_trace(tiny_model, cp, tp, at, pending, long):
    ranks = RankOptions(cp=cp, tp=tp, device="cpu")
    with_limits = reading.LONG, reading.LONG_S
    ended, token = run(stopped, tiny_model, at, pending, long, ranks=ranks)
    reading.LONG, reading.LONG_S = with_limits  # a single rank is this process
    assert len(set(ended)) == 1 and ended[0] - at in (0, 1)
    assert token == run(unstopped, tiny_model, ranks=ranks)


def test_a_rank_counts_what_it_sees():
    """Against a mask, where keys travel and where queries do."""
    from cptool.engine.holdings import Holdings
    from cptool.engine.reading import attention_pairs

    lengths, starts, ranks = [13, 0, 40, 1], [5, 9, 0, 7], 3
    holdings = Holdings(ranks, 4)
    cached = balanced(starts, ranks)
    holdings.append(cached.placements())
    layout = balanced(lengths, ranks, starts=starts, held=holdings.counts)
    holdings.append(layout.placements())
    new, held = layout.placements(), holdings.placements()

    def seen(queries, keys, window):
        pairs = zip(queries.sequences(), keys.sequences(), strict=True)
        ahead = [q[:, None] - k[None, :] for q, k in pairs]
        return sum(int(((a >= 0) & (a < (window or 1000))).sum()) for a in ahead)

    for r, window in itertools.product(range(ranks), (None, 1, 6, 30, 500)):
        kept = sum(seen(new[r], keys, window) for keys in held)
        assert attention_pairs(layout, r, None, window) == kept
        asked = sum(seen(q, held[r], window) for q in new)
        assert attention_pairs(layout, r, holdings, window) == asked
