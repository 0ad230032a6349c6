"""The ring through host memory does what the direct one does; here with tensors of the CPU."""

import itertools

import numpy
import pytest
import test_attention_variants
import test_ring
import torch
from ranks import run_ranks
from test_static_decode import TURNS, say

from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.parallel.staged_ring import StagedRing


def with_staged_ring(world, module, function, *args):
    """A case of another module's with this ring in the place of its own."""
    own, module.Ring = (
        module.Ring,
        lambda group: StagedRing(group) if group.size > 1 else own(group),
    )
    try:
        return getattr(module, function)(world, *args)
    finally:
        module.Ring = own


def ring_case(world, function, *args):
    return with_staged_ring(world, test_ring, function, *args)


def variants_case(world, function, *args):
    return with_staged_ring(world, test_attention_variants, function, *args)


@pytest.mark.parametrize("n", [2, 3])
def test_blocks_and_gather(n):
    cases = test_ring.size_cases(n)
    for rank, order in enumerate(run_ranks(n, ring_case, "blocks_of_all_cases", cases)):
        assert order == [[(rank + step) % n for step in range(n)]] * len(cases)


@pytest.mark.parametrize(
    "function",
    [
        "gather_into_slices",
        "exchange_of_all_cases",
        "yielded_block_survives_the_next_transfer",
        "next_block_arrives_while_this_one_is_in_hand",
        "memory_is_kept",
    ],
)
def test_cases_of_the_direct_ring(function):
    run_ranks(3, ring_case, function)


def test_every_variant_gives_the_bits_of_the_direct_ring():
    cases, variants = test_attention_variants.CASES[5:11:2], test_attention_variants.ALL
    direct = run_ranks(3, test_attention_variants.attend_all_cases, cases, variants)
    staged = run_ranks(3, variants_case, "attend_all_cases", cases, variants)
    for mine, theirs in zip(
        itertools.chain(*direct),
        itertools.chain(*staged),
        strict=True,
    ):
        assert all(numpy.array_equal(a, b) for a, b in zip(mine, theirs, strict=True))


def all_gathers(world):
    ring = StagedRing(world.cp_group)
    for size in (5, 1, 70_000):
        parts = ring.all_gather(test_ring.content(world.rank, size))
        for rank, part in enumerate(parts):
            assert torch.equal(part, test_ring.content(rank, size))
    return ring.sent_bytes


def test_all_gather():
    assert run_ranks(3, all_gathers) == [2 * 24 * 70_006] * 3


def a_transfer_that_fails(world):
    ring = StagedRing(world.cp_group)

    def broken(transfer):
        raise RuntimeError("gloo: connection closed by peer")

    carried, ring._exchange_on_host = ring._exchange_on_host, broken
    with pytest.raises(RuntimeError, match="connection closed by peer"):
        ring.all_gather(torch.ones(3))
    ring._exchange_on_host = carried
    return [part.tolist() for part in ring.all_gather(torch.full((2,), float(world.rank)))]


def test_whoever_waits_is_told_of_a_failure():
    assert run_ranks(2, a_transfer_that_fails) == [[[0, 0], [1, 1]]] * 2


@pytest.mark.parametrize("layout", [(3, 1), (2, 2)])
@pytest.mark.parametrize("static", [False, True])
def test_the_engine_over_it(tiny_model, monkeypatch, layout, static):
    expected = run_ranks(1, say, tiny_model, False, TURNS, 6)[0]
    monkeypatch.setenv("CPTOOL_TRANSPORT", "staged")
    cp, tp = layout
    answers, _, _, computed = run(
        say_staged,
        tiny_model,
        static,
        TURNS,
        6,
        ranks=RankOptions(cp=cp, tp=tp, threads=1, device="cpu"),
    )
    assert (answers, computed) == (expected[0], expected[3])


def say_staged(world, *args):
    assert world.group.staged
    return say(world, *args)
