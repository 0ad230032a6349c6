"""Every rank knows what all ranks hold, and tokens are dealt by one rule everywhere."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cptool.engine.holdings import Holdings, highest_count
from cptool.sharding import Placement, balanced, dealt, next_owner


def placement(rows: list[list[int]]) -> Placement:
    return Placement.of([torch.tensor(row, dtype=torch.int32) for row in rows])


def test_a_rank_with_the_fewest_tokens_takes_the_next_one():
    assert [next_owner([5, 3, 4], first) for first in range(3)] == [1, 1, 1]
    assert [next_owner([0, 0, 0], first) for first in range(3)] == [0, 1, 2]
    assert next_owner([2, 1, 1], 2) == 2


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
    st.lists(st.sets(st.integers(0, 2)), max_size=20),
)
def test_steps_deal_as_layouts_do(ranks, lengths, steps):
    """A decode step over static memory and one by `extend` give a token to the same rank."""
    first = balanced(lengths, ranks).placements()
    by_step, by_layout, said = Holdings(ranks, 3), Holdings(ranks, 3), list(lengths)
    by_step.append(first)
    by_layout.append(first)
    for step in steps:
        new = [int(b in step) for b in range(3)]
        layout = dealt(new, said, by_layout.counts)
        by_layout.append(layout.placements())
        owners = by_step.deal({b: said[b] for b in sorted(step)})
        assert owners == {b: layout.owners[b][0] for b in step}
        said = [length + added for length, added in zip(said, new, strict=True)]
    by_step.settle()
    assert by_step.counts == by_layout.counts
    for ours, theirs in zip(by_step.placements(), by_layout.placements(), strict=True):
        assert torch.equal(ours.positions, theirs.positions)


@settings(deadline=None, max_examples=60)
@given(
    st.integers(1, 5),
    st.lists(st.integers(0, 9), min_size=3, max_size=3),
    st.lists(st.tuples(*[st.integers(0, 4)] * 3), max_size=5),
)
def test_a_token_lies_where_it_lies_if_it_is_dealt_alone(ranks, lengths, steps):
    """Whatever goes with it: other tokens of its sequence, or other sequences."""
    together = Holdings(ranks, 3)
    together.append(balanced(lengths, ranks).placements())
    said = list(lengths)
    for step in steps:
        layout = dealt(step, said, together.counts)
        for rank in range(ranks):
            flat = [p for s, n in zip(said, step, strict=True) for p in range(s, s + n)]
            ours = layout.placements()[rank].positions.tolist()
            assert [flat[i] for i in layout.indices(rank)] == ours
        together.append(layout.placements())
        said = [length + added for length, added in zip(said, step, strict=True)]
    alone = Holdings(ranks, 3)
    alone.append(balanced(lengths, ranks).placements())
    for b in (2, 0, 1):
        for position in range(lengths[b], said[b]):
            alone.deal({b: position})
    alone.settle()
    for ours, theirs in zip(alone.placements(), together.placements(), strict=True):
        assert torch.equal(ours.positions, theirs.positions)


@pytest.mark.parametrize("counts", [[5], [0, 0, 0], [9, 2, 4], [3, 3, 4, 100], [1, 0]])
def test_room_is_made_for_what_comes(counts):
    holdings = Holdings(len(counts), 1)
    holdings.append([placement([list(range(count))]) for count in counts])
    for step in range(40):
        highest = highest_count(counts, step)
        now = [row[0] for row in holdings.counts]
        assert all(n <= max(before, highest) for n, before in zip(now, counts, strict=True))
        assert step == 0 or highest in now  # and for no more
        holdings.deal({0: 1000 + step})


def test_truncation_and_replacement():
    holdings = Holdings(2, 2)
    holdings.append([placement([[0, 3], [1]]), placement([[1, 2], []])])
    assert holdings.counts == [[2, 1], [2, 0]] and holdings.ranks == 2
    holdings.truncate([2, 5])
    assert holdings.counts == [[1, 1], [1, 0]]
    assert [held.positions.tolist() for held in holdings.placements()] == [[0, 1], [1]]
    holdings.replace([placement([[7], []])] * 2)
    assert holdings.counts == [[1, 0], [1, 0]]
    assert holdings.room(0, [0], 3) == [3, 0]
