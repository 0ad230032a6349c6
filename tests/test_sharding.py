"""Sharding: every new token on exactly one rank, ascending, balanced in tokens and causal work."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptool.sharding import Placement, balanced, concat, union

LENGTHS = st.lists(st.one_of(st.integers(0, 40), st.sampled_from([97, 257, 1009])), max_size=6)
BATCHES = LENGTHS.flatmap(
    lambda lengths: st.tuples(
        st.just(lengths),
        st.lists(st.integers(0, 500), min_size=len(lengths), max_size=len(lengths)),
    )
)


def reference(lengths, ranks, starts, active):
    """[rank][seq] -> positions, straight from the rule, one token at a time."""
    dealt = [[[] for _ in lengths] for _ in range(ranks)]
    running = 0
    for seq, (length, start) in enumerate(zip(lengths, starts, strict=True)):
        sizes = [length // (2 * active)] * (2 * active)
        order = list(range(active)) + list(range(2 * active - 1, active - 1, -1))
        for chunk in order[: length % (2 * active)]:
            sizes[chunk] += 1
        position = start
        for chunk, size in enumerate(sizes):
            rank = (min(chunk, 2 * active - 1 - chunk) + running) % ranks
            dealt[rank][seq] += range(position, position + size)
            position += size
        running += length % (2 * active)
    return dealt


@settings(deadline=None, max_examples=200)
@given(BATCHES, st.integers(1, 7), st.integers(1, 7))
def test_layout_follows_the_rule(batch, ranks, active):
    (lengths, starts), active = batch, min(active, ranks)
    layout = balanced(lengths, ranks, starts=starts, active=active)
    expected = reference(lengths, ranks, starts, active)
    new_tokens = [(s, p) for s, n in enumerate(lengths) for p in range(starts[s], starts[s] + n)]
    seen = []
    for rank, placement in enumerate(layout.placements()):
        assert placement.positions.dtype == placement.cu_seqlens.dtype == torch.int32
        assert [s.tolist() for s in placement.sequences()] == expected[rank]
        assert placement.tokens == layout.tokens(rank)
        held = [(s, p) for s in range(len(lengths)) for p in expected[rank][s]]
        indices = layout.indices(rank)
        assert indices.dtype == torch.int64
        assert [new_tokens[i] for i in indices.tolist()] == held
        for seq in range(len(lengths)):
            ranges = layout.ranges(rank, seq)
            assert [p for a, b in ranges for p in range(a, b)] == expected[rank][seq]
            assert all(a < b for a, b in ranges)
            assert all(left[1] < right[0] for left, right in itertools.pairwise(ranges))
        seen += held
    assert sorted(seen) == new_tokens
    if active == ranks:
        counts = [layout.tokens(rank) for rank in range(ranks)]
        assert max(counts) - min(counts) <= 1


@settings(deadline=None, max_examples=60)
@given(BATCHES, st.integers(1, 5), st.integers(1, 5))
def test_owner_agrees_with_the_placements(batch, ranks, active):
    lengths, starts = batch
    layout = balanced(lengths, ranks, starts=starts, active=min(active, ranks))
    for rank in range(ranks):
        for seq, positions in enumerate(layout.placement(rank).sequences()):
            for position in positions[:: max(1, len(positions) // 7)].tolist():
                assert layout.owner(seq, position) == rank


@pytest.mark.parametrize("ranks", [2, 3, 4, 8, 128])
@pytest.mark.parametrize("length", [65537, 131071, 1_000_003])
def test_causal_work_is_balanced(ranks, length):
    """Visible keys summed over a rank's queries differ by no more than the extras explain."""
    layout = balanced([length], ranks)
    work = [
        sum((b - a) * (a + b + 1) // 2 for a, b in layout.ranges(rank, 0)) for rank in range(ranks)
    ]
    # One query more or less sees at most `length` keys; the extras before a chunk shift each of a
    # rank's length / N queries by less than 2N positions.
    assert max(work) - min(work) <= length + 2 * length


def test_causal_work_is_the_same_for_divisible_lengths():
    layout = balanced([4096], 4)
    work = {sum((b - a) * (a + b + 1) // 2 for a, b in layout.ranges(rank, 0)) for rank in range(4)}
    assert len(work) == 1


def test_one_token_sequences_are_dealt_round_robin_and_move_on_each_step():
    held = [[0] * 7 for _ in range(3)]
    for step in range(5):
        layout = balanced([1] * 7, 3, starts=[step] * 7, held=held)
        owners = [layout.owner(seq, step) for seq in range(7)]
        assert owners == [(seq + step) % 3 for seq in range(7)]
        for seq, owner in enumerate(owners):
            held[owner][seq] += 1


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 6),
    st.lists(st.lists(st.integers(0, 1), min_size=4, max_size=4), max_size=40),
    BATCHES,
)
def test_no_sequence_grows_unevenly_whoever_leaves(ranks, steps, batch):
    lengths = (batch[0] + [5, 0, 3, 8])[:4]
    layout = balanced(lengths, ranks)
    held = [[sum(b - a for a, b in layout.ranges(r, s)) for s in range(4)] for r in range(ranks)]
    starts = list(lengths)
    for step in steps:
        layout = balanced(step, ranks, starts=starts, held=held)
        for seq in (seq for seq in range(4) if step[seq]):
            held[layout.owner(seq, starts[seq])][seq] += 1
            starts[seq] += 1
        for counts in zip(*held, strict=True):
            assert max(counts) - min(counts) <= 1


def test_one_rank_holds_one_range():
    layout = balanced([5, 0, 1], 1, starts=[3, 2, 1])
    assert [layout.ranges(0, seq) for seq in range(3)] == [[(3, 8)], [], [(1, 2)]]


def test_a_million_tokens_cost_no_python_loop():
    layout = balanced([1_000_000, 3], 4, starts=[7, 0])
    placement = layout.placement(2)
    assert placement.tokens == layout.tokens(2) == layout.indices(2).numel()
    assert placement.cu_seqlens.tolist() == [0, 250_000, placement.tokens]


@settings(deadline=None, max_examples=50)
@given(
    st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=5),
    st.integers(1, 4),
)
def test_concat_keeps_sequences_apart_and_ascending(sizes, ranks):
    cached = balanced([p for p, _ in sizes], ranks)
    new = balanced([t for _, t in sizes], ranks, starts=[p for p, _ in sizes])
    for rank in range(ranks):
        held = concat(cached.placement(rank), new.placement(rank))
        for seq, positions in enumerate(held.sequences()):
            expected = [
                position
                for layout in (cached, new)
                for start, stop in layout.ranges(rank, seq)
                for position in range(start, stop)
            ]
            assert positions.tolist() == expected == sorted(expected)


@settings(deadline=None, max_examples=50)
@given(BATCHES.filter(lambda batch: batch[0]), st.integers(1, 5))
def test_union_of_all_ranks_is_the_batch(batch, ranks):
    lengths, starts = batch
    layout = balanced(lengths, ranks, starts=starts)
    placements = layout.placements()
    whole, order = union(placements)
    expected = balanced(lengths, 1, starts=starts).placement(0)
    assert torch.equal(whole.positions, expected.positions)
    assert torch.equal(whole.cu_seqlens, expected.cu_seqlens)
    assert whole.positions.dtype == whole.cu_seqlens.dtype == torch.int32
    indices = torch.cat([layout.indices(rank) for rank in range(ranks)])
    assert torch.equal(indices[order], torch.arange(sum(lengths)))


def test_placement_of_sequences():
    parts = [torch.tensor(p, dtype=torch.int32) for p in ([1, 5], [], [0])]
    placement = Placement.of(parts)
    assert placement.cu_seqlens.tolist() == [0, 2, 2, 3]
    assert [p.tolist() for p in placement.sequences()] == [[1, 5], [], [0]]


@pytest.mark.parametrize(
    "arguments, words",
    [
        (([1], 0), "ranks is 0"),
        (([1, -2], 2), "lengths contains -2"),
        (([1], 2, [-1]), "starts contains -1"),
        (([1, 2], 2, [1]), "starts has 1 entries; it must have 2"),
    ],
)
def test_bad_arguments(arguments, words):
    with pytest.raises(ValueError, match=words):
        balanced(*arguments)


def test_owner_of_a_token_that_is_not_new():
    with pytest.raises(ValueError, match=r"position is 8; .* 3 to 7"):
        balanced([5], 2, starts=[3]).owner(0, 8)


def test_concat_of_different_batches():
    with pytest.raises(ValueError, match="new has 2 sequences; it must have 1"):
        concat(balanced([1], 1).placement(0), balanced([1, 1], 1).placement(0))
