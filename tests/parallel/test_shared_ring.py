"""The ring from memory to memory: the cases of `test_ring`, peers out of reach, ranks that end."""

import os
import signal
import time

import pytest
import test_ring
import torch
from ranks import run_ranks

from cptool.distributed.failure import RankFailed
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.parallel import shared_ring
from cptool.parallel.shared_ring import SLOTS, SharedRing

GENEROUS_S = 60  # as in test_launch


def over_shared_memory(world, name, *args, far=()):
    """A case of `test_ring`; pairs in `far` do not find each other's memory."""
    pairs = [tuple(sorted(pair)) for pair in far]
    opened, shared_ring._open = (
        shared_ring._open,
        (lambda offer, size: None if offer.fd == -2 else opened(offer, size)),
    )

    class Here(SharedRing):
        def _gather_values(self, value):
            values = super()._gather_values(value)
            if isinstance(value, tuple):  # the offers
                for rank in range(self.size):
                    if tuple(sorted((rank, self.rank))) in pairs:
                        values[rank] = (values[rank][0], -2, *values[rank][2:])
            return values

    plain, test_ring.Ring = (
        test_ring.Ring,
        lambda group: Here(group) if group.size > 1 else plain(group),
    )
    try:
        value = getattr(test_ring, name)(world, *args)
        return value, test_ring.Ring(world.cp_group).local
    finally:
        test_ring.Ring, shared_ring._open = plain, opened


@pytest.mark.parametrize("n", [2, 3, 4])
def test_blocks_and_gather(n):
    results = run_ranks(n, over_shared_memory, "blocks_of_all_cases", test_ring.size_cases(n))
    for rank, (order, local) in enumerate(results):
        assert all(sources == [(rank + step) % n for step in range(n)] for sources in order)
        assert local == [peer for peer in range(n) if peer != rank]


@pytest.mark.parametrize(
    "case",
    [
        "gather_into_slices",
        "exchange_of_all_cases",
        "yielded_block_survives_the_next_transfer",
        "next_block_arrives_while_this_one_is_in_hand",
        "memory_is_kept",
    ],
)
def test_other_cases(case):
    n = 3 if case in ("next_block_arrives_while_this_one_is_in_hand", "memory_is_kept") else 4
    run_ranks(n, over_shared_memory, case)


def test_pairs_out_of_reach_go_by_gloo():
    far = [(0, 1), (1, 2), (2, 3)]
    cases = test_ring.size_cases(4)
    results = run_ranks(4, over_shared_memory, "blocks_of_all_cases", cases, far=far)
    assert [local for _, local in results] == [[2, 3], [3], [0], [0, 1]]
    run_ranks(4, over_shared_memory, "exchange_of_all_cases", far=far)


def many_under_way(world):
    """Start as many messages as there are slots, three times; wait for them in another order."""
    ring, peer = SharedRing(world.cp_group), 1 - world.rank
    for turn in range(3):
        incoming = [torch.empty(5, dtype=torch.int64) for _ in range(SLOTS)]
        outgoing = [torch.full((5,), 1000 * turn + 10 * i + world.rank) for i in range(SLOTS)]
        pending = [
            ring.send_receive(peer, o, peer, i) for o, i in zip(outgoing, incoming, strict=True)
        ]
        for receipt, _ in reversed(pending):
            receipt.wait()
            receipt.wait()  # the second does nothing
        for _, post in pending:
            post.wait()
        assert [int(i[3]) for i in incoming] == [1000 * turn + 10 * i + peer for i in range(SLOTS)]
    return ring.sent_bytes


def test_many_messages_under_way():
    assert run_ranks(2, many_under_way) == [3 * SLOTS * 40] * 2


def wrong_size(world):
    ring, peer = SharedRing(world.cp_group), 1 - world.rank
    receipt, _ = ring.send_receive(peer, torch.ones(3), peer, torch.ones(4))
    with pytest.raises(RuntimeError, match=f"rank {peer} of the ring sent 12 bytes, 16 were due"):
        receipt.wait()


def test_a_message_of_another_size_is_refused():
    run_ranks(2, wrong_size)


def round_for_ever(world, ending):
    ring = SharedRing(world.cp_group)
    assert len(ring.local) == world.size - 1
    local = torch.ones(20_000, 8)
    for turn in range(10**9):
        world.report("ring, turn", turn, 10**9)
        for source, _ in ring.blocks(local, [20_000] * ring.size):
            if turn == 20 and world.rank == 1 and source == 2:
                ending()


def is_killed():
    os.kill(os.getpid(), signal.SIGKILL)


def hangs():
    time.sleep(10 * GENEROUS_S)


@pytest.mark.parametrize(
    ("ending", "told"),
    [
        (is_killed, r"^rank 1 \(pid \d+\) was killed by SIGKILL during ring, turn, step 21"),
        (hangs, r"^no answer from rank 1 during ring, turn, step 21"),
    ],
)
def test_the_end_of_a_rank_ends_all(ending, told):
    began = time.monotonic()
    with pytest.raises(RankFailed, match=told):
        run(round_for_ever, ending, ranks=RankOptions(cp=3, device="cpu", threads=1, timeout=2))
    assert time.monotonic() - began < GENEROUS_S
