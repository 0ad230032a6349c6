"""Decode over static memory says what `extend` says token for token, and leaves the same state."""

import itertools

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import saving
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.graphs import Recorded
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.session.store import identity


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * length + salt) % 290 for i in range(length)]


TURNS = [
    [prompt(37), [], prompt(1), prompt(5), prompt(12)],
    [prompt(2, 1), prompt(3, 1), [], prompt(20, 1), []],
]


def say(
    world,
    path,
    static,
    turns,
    steps,
    *,
    stop=(),
    sampling=Sampling(),
    draws=None,
    partials="float32",
):
    """Answers to each turn, positions that this rank holds of each sequence, ways of decode."""
    shared = world if world.tp > 1 else None
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, shared)
    options = EngineOptions(static=static, partials=partials)
    engine = Engine(model, world, batch=len(turns[0]), options=options)
    answers, ways = [], []
    for turn in turns:
        engine.extend(turn)
        options = AnswerOptions(limit=steps, sampling=sampling, draws=draws, stop_ids=stop)
        answers.append(decode(engine, options).token_ids)
        ways.append(engine.choice.variant)
        assert engine.cache.lengths == engine.holdings.counts[world.cp_rank]
    return answers, ways, [row.tolist() for row in engine.cache.held.sequences()], engine.computed


def assert_same(results, expected):
    """The tokens of one rank, and every token's KV on exactly one."""
    for answers, ways, _, computed in results:
        assert answers == expected[0] and computed == expected[3]
        assert set(ways) == {"all-q"} and "all-q" not in expected[1]
    for b, computed in enumerate(results[0][3]):
        rows = [held[b] for _, _, held, _ in results]
        assert sorted(itertools.chain(*rows)) == list(range(computed))


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_same_tokens_as_step_by_step(mqa_path, n):
    """Two turns of a batch with an empty member; memory moves between them."""
    expected = run_ranks(1, say, mqa_path, False, TURNS, 9)[0]
    assert_same(run_ranks(n, say, mqa_path, True, TURNS, 9), expected)


@pytest.mark.parametrize("n", [1, 3])
def test_sequences_that_stop_leave(mqa_path, n):
    """Stop tokens and draws end sequences early; fewer rows than half open a new set of steps."""
    options = {"stop": tuple(range(40)), "sampling": Sampling(temperature=2.0, seed=5)}
    expected = run_ranks(1, say, mqa_path, False, TURNS, 24, **options)[0]
    assert len({len(answer) for answer in expected[0][0]}) > 3
    assert_same(run_ranks(n, say, mqa_path, True, TURNS, 24, **options), expected)


@pytest.mark.parametrize("static", [False, True])
def test_each_sequence_has_a_limit_and_an_index_of_its_own(mqa_path, static):
    """As if each were said in a batch that has it at that place."""

    def one(b: int, at: int, steps: int):
        turn = [[] if a != at else TURNS[1][b] for a in range(5)]
        sampling = Sampling(temperature=2.0, seed=5)
        return run_ranks(1, say, mqa_path, static, [turn], steps, sampling=sampling)[0][0][0][at]

    limits = [9, 0, 5, 14, 3]
    draws = {"draws": [2, 3, 4, 1, 4], "sampling": Sampling(temperature=2.0, seed=5)}
    for n in (1, 3):
        results = run_ranks(n, say, mqa_path, static, TURNS[1:], limits, **draws)
        (answers,) = results[0][0]
        assert [len(answer) for answer in answers] == [9, 0, 0, 14, 0]
        assert answers[0] == one(0, 2, 9) and answers[3] == one(3, 1, 14)


def test_kv_grows_evenly(mqa_path):
    results = run_ranks(3, say, mqa_path, True, [[prompt(1), prompt(2), prompt(4)]], 40)
    for rows in zip(*(held for _, _, held, _ in results), strict=True):
        assert max(map(len, rows)) - min(map(len, rows)) <= 1


def test_more_steps_than_room_is_made_for(mqa_path, monkeypatch):
    expected = run_ranks(1, say, mqa_path, False, TURNS, 30)[0]
    monkeypatch.setattr("cptool.engine.engine.STATIC_STEPS", 7)
    assert run(say, mqa_path, True, TURNS, 30)[0] == expected[0]


def test_tensor_and_context_parallel(tiny_model):
    expected = run_ranks(1, say, tiny_model, False, TURNS[:1], 8)[0]
    answers, ways, _, _ = run(
        say, tiny_model, True, TURNS[:1], 8, ranks=RankOptions(cp=2, tp=2, threads=1)
    )
    assert answers == expected[0] and ways == ["all-q"]


def saved_and_resumed(world, path, directory, static):
    """A turn, saved, and what another engine says on top of it."""
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, torch.float32, world.device, world)
    engine = Engine(model, world, options=EngineOptions(static=static))
    engine.extend([prompt(21)])
    said = decode(engine, AnswerOptions(limit=6)).token_ids
    manifest = saving.save(engine, directory, None, identity(checkpoint))
    resumed = Engine(model, world, options=EngineOptions(static=static))
    saving.restore(resumed, directory, manifest)
    return said + decode(resumed, AnswerOptions(limit=6)).token_ids


@pytest.mark.parametrize("n", [1, 2])
def test_a_session_of_static_steps(mqa_path, tmp_path, n):
    results = [
        run(
            saved_and_resumed,
            mqa_path,
            tmp_path / str(static),
            static,
            ranks=RankOptions(cp=n, threads=1),
        )
        for static in (False, True)
    ]
    assert results[0] == results[1]


def test_partials_in_the_working_dtype(mqa_path):
    options = {"partials": "working"}
    expected = run_ranks(2, say, mqa_path, False, TURNS[:1], 5, **options)[0]
    assert run_ranks(2, say, mqa_path, True, TURNS[:1], 5, **options)[0][0] == expected[0]


def test_a_call_that_nothing_records_is_called():
    calls = []
    recorded = Recorded(lambda: calls.append(1) or torch.ones(1), torch.device("cpu"))
    assert not calls and recorded.reason == "cpu has no graphs"
    assert torch.equal(recorded(), torch.ones(1)) and len(calls) == 1
