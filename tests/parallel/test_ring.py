"""The ring: whose block comes when, exact sizes, buffers, transfers that overlap the caller."""

import itertools

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from cptool.parallel.ring import Ring

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def content(source, size, dtype=torch.float32, salt=0):
    """A block that tells its source, token and call."""
    values = torch.arange(size * 6).reshape(size, 2, 3) % 50 + 50 * source + salt
    return values.to(dtype)


def blocks_of_all_cases(world, cases):
    ring = Ring(world.cp_group)
    assert (ring.rank, ring.size) == (world.rank, world.size)
    order = []
    for salt, (sizes, dtype) in enumerate(cases):
        local = content(ring.rank, sizes[ring.rank], dtype, salt)
        sources = []
        for source, block in ring.blocks(local, sizes):
            assert block.dtype == dtype and block.is_contiguous()
            assert torch.equal(block, content(source, sizes[source], dtype, salt))
            sources.append(source)
        order.append(sources)
        gathered = ring.gather(local, sizes)
        for source, block in enumerate(gathered):
            assert torch.equal(block, content(source, sizes[source], dtype, salt))
        assert gathered[ring.rank] is local
    return order


def size_cases(n):
    some = itertools.islice(itertools.product((0, 3, 1, 70), repeat=n), 0, None, max(1, 4**n // 24))
    sizes = [*some, (5,) * n, (0,) * n, tuple(range(n)), (100_000, *(1,) * (n - 1))]
    return list(zip(sizes, itertools.cycle(DTYPES)))


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_blocks_and_gather(n):
    cases = size_cases(n)
    for rank, order in enumerate(run_ranks(n, blocks_of_all_cases, cases)):
        assert order == [[(rank + step) % n for step in range(n)]] * len(cases)


def gather_into_slices(world):
    ring = Ring(world.cp_group)
    sizes = [4, 0, 7, 1][: ring.size]
    whole = torch.full((sum(sizes), 2, 3), -1.0)
    ring.gather(content(ring.rank, sizes[ring.rank]), sizes, into=whole.split(sizes))
    for source, part in enumerate(whole.split(sizes)):
        expected = content(source, sizes[source])
        assert torch.equal(part, torch.full_like(part, -1) if source == ring.rank else expected)


def test_gather_receives_in_place():
    run_ranks(4, gather_into_slices)


def exchange_of_all_cases(world):
    ring = Ring(world.cp_group)
    n = ring.size
    for salt, dtype in enumerate(DTYPES):
        # What s gives to r has 3s + r tokens, none for s = r = 0.
        outgoing = [content(ring.rank * n + r, 3 * ring.rank + r, dtype, salt) for r in range(n)]
        incoming = ring.exchange(outgoing, [3 * s + ring.rank for s in range(n)])
        for s, block in enumerate(incoming):
            expected = content(s * n + ring.rank, 3 * s + ring.rank, dtype, salt)
            assert block.dtype == dtype and torch.equal(block, expected)


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_exchange(n):
    run_ranks(n, exchange_of_all_cases)


def yielded_block_survives_the_next_transfer(world):
    """The block in hand keeps its value although the following one has certainly arrived."""
    ring = Ring(world.cp_group)
    sizes = [1000] * ring.size
    for salt in range(3):
        for source, block in ring.blocks(content(ring.rank, 1000, salt=salt), sizes):
            dist.barrier(world.cp_group.process_group)
            assert torch.equal(block, content(source, 1000, salt=salt))
            dist.barrier(world.cp_group.process_group)


def test_a_block_stays_valid_while_the_next_arrives():
    run_ranks(4, yielded_block_survives_the_next_transfer)


def next_block_arrives_while_this_one_is_in_hand(world):
    """Every transfer completes without the generator being resumed: it runs beside the caller.

    Waiting for the pending work from outside, before any rank goes on, would block for ever if the
    transfer started only with the next iteration.
    """
    ring = Ring(world.cp_group)
    batches = []
    start = ring._start
    ring._start = lambda *messages: batches.append(start(*messages)) or batches[-1]
    transfers = 0
    for _ in ring.blocks(content(ring.rank, 50_000), [50_000] * ring.size):
        for works in batches:
            for work in works:
                work.wait()
            transfers += bool(works)
            works.clear()  # nothing is left for the ring to wait for
        dist.barrier(world.cp_group.process_group)
    assert transfers == ring.size - 1


def test_transfer_runs_while_the_caller_computes():
    run_ranks(3, next_block_arrives_while_this_one_is_in_hand)


def memory_is_kept(world):
    ring = Ring(world.cp_group)
    sizes = [64, 3, 20][: ring.size]
    places = set()
    for _ in range(4):
        for source, block in ring.blocks(content(ring.rank, sizes[ring.rank]), sizes):
            if source != ring.rank:
                places.add(block.data_ptr())
    assert len(places) <= 2
    # Per pass: this rank's own block and all received ones but the last are sent on.
    kept_for_successor = sizes[(ring.rank - 1) % ring.size]
    assert ring.sent_bytes == 4 * 24 * (sum(sizes) - kept_for_successor)
    assert ring.exposed_s >= 0


def test_two_buffers_serve_all_layers():
    run_ranks(3, memory_is_kept)


def receives_are_posted_first(world):
    posted = []
    batch = dist.batch_isend_irecv
    dist.batch_isend_irecv = lambda operations: posted.append(operations) or batch(operations)
    try:
        ring = Ring(world.cp_group)
        for _ in ring.blocks(content(ring.rank, 9), [9] * ring.size):
            pass
        ring.gather(content(ring.rank, 9), [9] * ring.size)
    finally:
        dist.batch_isend_irecv = batch
    assert len(posted) == ring.size
    for operations in posted:
        half = len(operations) // 2
        assert [o.op for o in operations] == [dist.irecv] * half + [dist.isend] * half


def test_both_directions_run_at_once():
    """gloo lets a peer send once it knows of the receive, and tells it behind what it sends itself:
    with the sends first, two ranks that exchange took turns on a slow link.
    """
    run_ranks(3, receives_are_posted_first)


def test_buffers_of_one_variant_are_kept_at_a_time():
    """Those of rings have numbers, those of gathers names; what is not used any more is freed."""
    ring, like = Ring(), torch.empty(0, 4)
    first, second = (ring.buffer(name, 8, like).data_ptr() for name in (0, 1))
    assert [ring.buffer(name, 5, like).data_ptr() for name in (0, 1)] == [first, second]
    ring.buffer("received", 8, like)
    assert [*ring._memory] == ["received"]
    ring.buffer(0, 8, like)
    assert [*ring._memory] == [0]
