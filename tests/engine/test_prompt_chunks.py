"""A prompt that is read in chunks: the tokens of one piece, and room for its KV made once."""

import random

import pytest
import torch
from ranks import run_ranks
from test_logprobs import TOP, assert_right

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import decode, next_tokens
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.prefill import chunks
from cptool.engine.prefill.prompt import read
from cptool.engine.samples import sampled
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.errors import Interrupted
from cptool.llm.options import engine_options
from cptool.sharding import balanced
from cptool.variants import names


def prompt(length: int) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * length) % 290 for i in range(length)]


BATCH = [prompt(37), [], prompt(1), prompt(90), prompt(12)]
NEXT = [prompt(3), prompt(5), [], prompt(40), prompt(1)]


def test_sequences_advance_in_step_until_they_end():
    assert list(chunks.cut([5, 0, 2, 9], 6)) == [[2, 0, 2, 2], [3, 0, 0, 3], [0, 0, 0, 4]]
    assert list(chunks.cut([2, 1], 1)) == [[1, 0], [1, 0], [0, 1]]
    assert list(chunks.cut([3, 1], 4)) == [[3, 1]]
    assert list(chunks.cut([0, 0], 4)) == [] and chunks.count([0, 0], 4) == 0


def test_every_chunk_but_the_last_is_full_and_fits_the_room(monkeypatch):
    monkeypatch.setattr(chunks, "SHORT", 0)  # a longer chunk is always dealt to all ranks
    numbers = random.Random(3)
    for _ in range(100):
        ranks, most = numbers.randint(1, 5), numbers.choice([1, 2, 3, 7, 8, 13, 31])
        left = [numbers.randint(0, 120) for _ in range(numbers.randint(1, 4))]
        parts = list(chunks.cut(left, most))
        assert len(parts) == chunks.count(left, most)
        assert all(sum(part) == most for part in parts[:-1])
        assert [sum(column) for column in zip(*parts, strict=True)] == left or not any(left)
        held, starts = [[0] * len(left) for _ in range(ranks)], [0] * len(left)
        for part in parts:
            layout = balanced(part, ranks, starts=starts, held=held)
            for rank, placement in enumerate(layout.placements()):
                added = placement.cu_seqlens.diff().tolist()
                held[rank] = [n + more for n, more in zip(held[rank], added, strict=True)]
            starts = [n + more for n, more in zip(starts, part, strict=True)]
        room = chunks.room(left, most, ranks=ranks)
        assert all(n <= slots for row in held for n, slots in zip(row, room, strict=True))


def engine_of(world, path, **options):
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    return Engine(model, world, batch=len(BATCH), options=EngineOptions(**options))


def two_turns(world, path, settings, top=None):
    """For each setting, what a batch of uneven prompts, and a next turn, give: logits of all
    sequences, tokens, log-probabilities, how often the cache has moved while a prompt was read.
    """
    found = []
    for chunk, variant, static in settings:
        engine = engine_of(world, path, chunk=chunk, variant=variant, static=static)
        logits, moves, scores, reads = {}, [], [], []
        for turn in (BATCH, NEXT):
            places, reserve = set(), engine.cache.extend

            def extend(placement, reserve=reserve, places=places, engine=engine):
                reserve(placement)
                places.add(engine.cache.place)

            engine.cache.extend = extend
            reads.append(read(engine, turn, top, answer=6))
            del engine.cache.extend
            moves.append(len(places))
            scores.append(reads[-1].scores)
            rows = {b: row.tolist() for b, row in engine.logits.items()}
            logits[len(moves)] = world.gather({str(b): row for b, row in rows.items()})
            decode(engine, AnswerOptions(limit=4))
        found.append((logits, engine.tokens, moves, scores, [r.chunks for r in reads]))
    return found


def rows_of(gathered):
    return {b: torch.tensor(row) for ranks in gathered for b, row in ranks.items()}


@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_tokens_of_one_piece_for_every_variant_and_chunk(mqa_path, n):
    some = [(None, "auto", False)]
    some += [(size, "auto", False) for size in (1, 2, 7, 64, 139, 5000)]
    some += [(16, variant, False) for variant in names()] + [(30, "auto", True)]
    first, *others = run_ranks(n, two_turns, mqa_path, some)[0]
    for (chunk, *_), (logits, tokens, moves, _, counts) in zip(some[1:], others, strict=True):
        assert tokens == first[1]
        assert moves[0] == 1  # room for the whole prompt was there from the beginning
        assert counts[0] == -(-sum(map(len, BATCH)) // chunk)
        for turn, expected in first[0].items():
            ours, theirs = rows_of(logits[turn]), rows_of(expected)
            assert ours.keys() == theirs.keys()
            for b, row in theirs.items():
                torch.testing.assert_close(ours[b], row, rtol=1e-4, atol=1e-4)


def test_log_probabilities_of_prompts_are_those_of_transformers(mqa_path, mqa_reference):
    for chunk in (1, 11):
        ((_, tokens, _, (first, second), _),) = run_ranks(
            2, two_turns, mqa_path, [(chunk, "auto", False)], TOP
        )[0]
        for b, said in enumerate(tokens):
            assert_right(first[b], mqa_reference, said, 0)
            start = len(BATCH[b]) + (4 if BATCH[b] else 0)
            assert_right(second[b], mqa_reference, said, start)


def stopped_and_read_again(world, path, at):
    """What is computed once a stop is requested in chunk `at` of a prompt, within which it takes
    effect or after which it does, and the tokens after reading the rest."""

    def report(phase, done, total, *, work=None):
        world.report(phase, done, total, work=work)
        if armed and work is not None and work.chunk == at and world.rank == world.size - 1:
            world.board.cancel()

    armed = True
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    options = EngineOptions(chunk=600)
    engine = Engine(model, world, batch=2, options=options, progress=report)
    with pytest.raises(Interrupted):
        read(engine, [prompt(1500), prompt(900)])
    armed, computed = False, list(engine.computed)
    world.barrier()
    world.board.cancel(False)
    world.barrier()
    again = read(engine, [[], []] if at else [prompt(1500), prompt(900)])
    return computed, again.chunks, next_tokens(engine, Sampling())


@pytest.mark.parametrize("cp", [1, 2])
def test_chunks_that_were_computed_stay_when_the_next_is_stopped(mqa_path, cp):
    ranks = RankOptions(cp=cp, device="cpu", threads=1)
    expected = None
    for at, computed, left in ((0, [0, 0], 4), (2, [600, 600], 2)):
        found, chunks, tokens = run(stopped_and_read_again, mqa_path, at, ranks=ranks)
        assert (found, chunks) == (computed, left)
        expected = expected or tokens
        assert tokens == expected


def answers_of(world, path, chunk, kv_dtype):
    """Greedy answers of several samples of each prompt, over tensor-parallel ranks too."""
    engine = engine_of(world, path, chunk=chunk, kv_dtype=kv_dtype)
    read(engine, BATCH)
    options = AnswerOptions(limit=(5,) * len(BATCH))
    return decode(sampled(engine, 2, room=5), options).token_ids, engine.cache.nbytes


@pytest.mark.parametrize("kv_dtype", ["float32", "bfloat16"])
def test_samples_over_both_kinds_of_ranks(tiny_model, kv_dtype):
    ranks = RankOptions(cp=2, tp=2, device="cpu", threads=1)
    whole, held = run(answers_of, tiny_model, None, kv_dtype, ranks=ranks)
    chunked, reserved = run(answers_of, tiny_model, 8, kv_dtype, ranks=ranks)
    assert chunked == whole
    assert reserved <= 2 * held  # fewer than all ranks may take a short chunk


def test_a_chunk_is_a_number_of_tokens_or_auto():
    assert engine_options("auto", {"chunk": "auto"}).chunk is None
    assert engine_options("auto", {"chunk": 7}).chunk == 7
    for wrong in (0, -1, 2.5, "x", True):
        with pytest.raises(ValueError, match="`chunk`"):
            engine_options("auto", {"chunk": wrong})
