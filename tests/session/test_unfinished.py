"""Turns whose reading was interrupted: what the session has of them, and what goes on there."""

from dataclasses import replace
from pathlib import Path

import pytest

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import turn as turns
from cptool.engine.options import EngineOptions
from cptool.engine.prefill.session import TurnSession
from cptool.engine.turn import Turn
from cptool.errors import Interrupted, UserError
from cptool.session import maintenance, store, unfinished
from cptool.session.manifest import Sequence
from cptool.session.manifest_format import parse


def prompt(length: int) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * length) % 290 for i in range(length)]


BATCH = [prompt(37), [], prompt(1), prompt(90), prompt(12)]


def run_turn(world, turn, chunks=None, every=60.0):
    """The kept tokens of a turn that is interrupted after `chunks` of them, or its report."""
    done, between = 0, TurnSession.between_chunks

    def stop(session):
        nonlocal done
        done += 1
        if done == chunks:
            raise Interrupted
        between(session)

    TurnSession.between_chunks = stop
    try:
        return turns.run(world, replace(turn, save_every=every))
    except Interrupted as interrupted:
        return interrupted.kept
    finally:
        TurnSession.between_chunks = between


def run_ranks(n, turn, chunks=None, every=60.0, tp=1):
    ranks = RankOptions(cp=n, tp=tp, device="cpu", threads=1)
    return run(run_turn, turn, chunks, every, ranks=ranks)


def turn_of(path, place, prompts, chunk=20, **fields):
    made = store.exists(place)
    return Turn(
        model=str(path),
        dtype="float32",
        options=EngineOptions(chunk=chunk),
        session=str(place),
        resume=store.load(place).revision if made else None,
        prompts=tuple(map(tuple, prompts)),
        **fields,
    )


def tokens_of(place):
    return [list(s.tokens) for s in store.load(place).sequences]


def check_sound(place) -> None:
    """As far as any reader sees; and the manifest survives being written and read."""
    manifest = store.load(place)
    assert maintenance.problems(place, manifest) == []
    assert parse(manifest.dump().encode()) == manifest


@pytest.fixture(scope="module")
def expected(mqa_path, tmp_path_factory):
    """What an uninterrupted turn gives: first tokens, the tokens of the session after an answer."""
    place = tmp_path_factory.mktemp("whole") / "s"
    report = run_ranks(1, turn_of(mqa_path, place, BATCH, max_new_tokens=4))
    return report.first_token, tokens_of(place)


@pytest.mark.parametrize("n, m", [(1, 2), (2, 1), (3, 2)])
@pytest.mark.parametrize("every", [60.0, 1e-9])
def test_a_first_turn_goes_on_where_it_was_on_any_ranks(mqa_path, tmp_path, expected, n, m, every):
    """Interrupted twice, with commits of every chunk beside it and without."""
    place = tmp_path / "s"
    # Of the two prompts that were whole, the last token is computed again for what follows it.
    for chunks, kept in ((2, 40), (3, 98)):
        asked = turn_of(mqa_path, place, BATCH, max_new_tokens=4)
        assert run_ranks(n, asked, chunks, every) == kept
        check_sound(place)
        manifest = store.load(place)
        assert tokens_of(place) == [[]] * len(BATCH) and manifest.turns == ()
        assert unfinished.read_ahead(manifest) == kept
        with pytest.raises(UserError, match=f"holds no turn yet, and {kept} tokens"):
            unfinished.check_begun(place, manifest)
        n = m
    report = run_ranks(n, turn_of(mqa_path, place, BATCH, max_new_tokens=4))
    assert report.resumed == 95  # a third one was whole by then
    assert report.resumed + report.tokens == sum(map(len, BATCH))
    assert (report.first_token, tokens_of(place)) == expected
    check_sound(place)
    assert unfinished.read_ahead(store.load(place)) == 0
    assert len(store.load(place).turns) == 1


def test_tensor_parallel_ranks_keep_their_heads_beside_it(tiny_model, tmp_path):
    def asked(place):
        turn = turn_of(tiny_model, place, BATCH, max_new_tokens=4)
        return replace(turn, options=replace(turn.options, kv_dtype="bfloat16"))

    whole, place = tmp_path / "whole", tmp_path / "s"
    expected = run_ranks(1, asked(whole)).first_token
    assert run_ranks(2, asked(place), 4, 1e-9, tp=2) == 80
    check_sound(place)
    report = run_ranks(1, asked(place))
    assert report.first_token == expected and tokens_of(place) == tokens_of(whole)


FIRST, NEXT = [prompt(30), prompt(9)], [prompt(50), []]


@pytest.fixture
def begun(mqa_path, tmp_path):
    """A session of two sequences and two turns."""
    place = tmp_path / "s"
    for prompts in (FIRST, [prompt(6), prompt(2)]):
        run_ranks(1, turn_of(mqa_path, place, prompts))
    return place


def continued(mqa_path, place, prompts, keep=None, chunks=None, n=2):
    asked = turn_of(mqa_path, place, prompts, chunk=11, keep=keep)
    return run_ranks(n, asked, chunks)


def test_a_next_turn_leaves_what_was_said_until_it_is_whole(mqa_path, begun, tmp_path):
    before = store.load(begun)
    whole = continued(mqa_path, begun, NEXT).first_token
    place = tmp_path / "t"
    for prompts in (FIRST, [prompt(6), prompt(2)]):
        run_ranks(1, turn_of(mqa_path, place, prompts))
    known = continued(mqa_path, place, [[], []]).first_token
    assert continued(mqa_path, place, NEXT, chunks=2) == 22
    check_sound(place)
    found = store.load(place)
    assert [s.tokens for s in found.sequences] == [s.tokens for s in before.sequences]
    assert found.turns == before.turns
    assert [s.held for s in found.sequences] == [36, 11]
    # Nothing is added: what follows is known as before, and what was read ahead stays.
    assert continued(mqa_path, place, [[], []]).first_token == known
    assert store.load(place) == found
    report = continued(mqa_path, place, NEXT, n=3)
    assert (report.first_token, report.resumed, report.tokens) == (whole, 22, 28)
    assert len(store.load(place).turns) == 3
    check_sound(place)


def test_another_turn_gives_up_what_was_read_ahead(mqa_path, begun):
    other = [prompt(50)[:30] + prompt(7), prompt(3)]
    assert continued(mqa_path, begun, NEXT, chunks=4) == 44
    report = continued(mqa_path, begun, other, n=1)
    assert (report.resumed, report.tokens) == (30, 10)
    assert tokens_of(begun)[0][36:] == other[0]
    check_sound(begun)
    assert unfinished.read_ahead(store.load(begun)) == 0


def test_a_turn_that_goes_back_first_takes_nothing_away(mqa_path, begun, tmp_path):
    """Turns and tokens stay until it is whole; the KV beyond its beginning does not."""
    before, keep, changed = store.load(begun), (20, 11), [prompt(40), []]
    # The last token before it is computed again in its first chunk.
    assert continued(mqa_path, begun, changed, keep, chunks=2) == 21
    check_sound(begun)
    found = store.load(begun)
    assert (found.turns, tokens_of(begun)) == (
        before.turns,
        [list(s.tokens) for s in before.sequences],
    )
    assert [s.held for s in found.sequences] == [20, 11]
    report = continued(mqa_path, begun, changed, keep, n=1)
    assert (report.resumed, report.cached, report.tokens) == (21, 52, 19)
    assert tokens_of(begun)[0] == tokens_of(begun)[0][:20] + changed[0]
    assert store.load(begun).turns == ((60, 11),)
    again = tmp_path / "again"
    run_ranks(1, turn_of(mqa_path, again, tokens_of(begun)))
    assert report.first_token == run_ranks(1, turn_of(mqa_path, again, [[], []])).first_token


def test_what_was_said_goes_on_after_a_turn_that_went_back(mqa_path, begun, tmp_path):
    said = tokens_of(begun)
    continued(mqa_path, begun, [prompt(40), []], (20, 11), chunks=1)
    report = continued(mqa_path, begun, [[5], []])
    assert tokens_of(begun) == [[*said[0], 5], said[1]]
    assert (report.cached, report.tokens) == (31, 17)
    check_sound(begun)


def test_compact_and_rollback_know_of_it(mqa_path, begun):
    continued(mqa_path, begun, NEXT, chunks=3)
    maintenance.compact(begun, store.load(begun))
    check_sound(begun)
    assert unfinished.read_ahead(store.load(begun)) == 33
    maintenance.roll_back(begun, store.load(begun), 1)
    check_sound(begun)
    assert tokens_of(begun) == [list(said) for said in FIRST]


def saved(tokens, cached, logits=None, **ahead):
    return Sequence(tokens=tokens, cached=cached, logits=logits, **ahead)


@pytest.mark.parametrize(
    "sequence, added, tokens, cached",
    [
        (saved((1, 2), 5, "x", ahead=(3, 4, 5, 6), ahead_from=2), (3, 4, 5, 6, 7), 6, 5),
        (saved((1, 2), 5, "x", ahead=(3, 4, 5), ahead_from=2), (3, 4, 5, 6, 7), 5, 5),
        (saved((1, 2), 5, "x", ahead=(3, 4, 5, 6), ahead_from=2), (3, 4), 4, 3),
        (saved((1, 2), 5, "x", ahead=(3, 4, 5, 6), ahead_from=2), (9,), 2, 2),
        (saved((1, 2), 5, ahead=(3, 4, 5, 6), ahead_from=2), (9,), 2, 2),
        (saved((1, 2, 3), 3, ahead=(7, 8, 9), ahead_from=1), (4,), 3, 1),
        (saved((), 2, ahead=(7, 8, 9)), (), 0, 0),
        (saved((1, 2), 2, "x"), (9,), 2, 2),
    ],
)
def test_what_a_turn_takes_over(sequence, added, tokens, cached):
    found = unfinished._going_on(sequence, added)
    assert (len(found.tokens), found.cached, found.ahead) == (tokens, cached, ())
    assert found.tokens == (*sequence.tokens, *added)[:tokens]
    assert found.logits == (sequence.logits if tokens == len(sequence.tokens) else None)


def test_a_manifest_without_it_is_as_older_versions_wrote_it(mqa_path, begun):
    assert "ahead" not in (Path(begun) / store.MANIFEST).read_text()
    assert open_checkpoint(str(mqa_path)).config.vocab_size == 301
