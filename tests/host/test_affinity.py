"""Which cores a rank gets, on machines of any shape."""

import os

import pytest
import torch

from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.errors import UserError
from cptool.host import affinity
from cptool.host.affinity import Share, divide


def two_sockets(cpu):
    """8 CPUs: 4 cores of two threads (0 and 4, 1 and 5, ..), cores 0 and 2 on node 0."""
    return cpu % 2, cpu % 4


def shares(usable, core=two_sockets):
    return [divide(usable, rank, core) for rank in range(len(usable))]


ALL = frozenset(range(8))


def test_ranks_with_the_same_cpus_divide_the_cores_node_by_node():
    nodes = frozenset({0, 4, 2, 6}), frozenset({1, 5, 3, 7})
    assert shares([ALL] * 2) == [Share(node, 2) for node in nodes]
    assert [share.cpus for share in shares([ALL] * 4)] == [{0, 4}, {2, 6}, {1, 5}, {3, 7}]
    three = shares([ALL] * 3)
    assert [share.threads for share in three] == [1, 1, 2]
    assert frozenset().union(*(share.cpus for share in three)) == ALL


def test_ranks_take_turns_on_a_core_of_their_own_where_each_has_as_many():
    cores = [{0, 4}, {2, 6}, {1, 5}, {3, 7}]
    assert shares([ALL] * 8) == [Share(frozenset(cores[rank % 4]), 1) for rank in range(8)]


def test_one_rank_and_more_than_the_cores_can_share_evenly_are_not_bound():
    assert shares([ALL]) == [Share(None, 4)]
    assert shares([ALL] * 5) == [Share(None, 1)] * 5


def test_what_a_launcher_has_bound_is_not_divided_again():
    assert shares([frozenset({0, 4, 2, 6}), frozenset({1, 5, 3, 7})]) == [Share(None, 2)] * 2
    # Two containers, two ranks in each.
    left, right = frozenset({0, 4, 1, 5}), frozenset({2, 6, 3, 7})
    assert [share.cpus for share in shares([left, right, left, right])] == [
        {0, 4},
        {2, 6},
        {1, 5},
        {3, 7},
    ]


def test_ranks_that_overlap_in_part_share_but_are_not_bound():
    assert shares([ALL, frozenset({0, 4})]) == [Share(None, 2), Share(None, 1)]


def where(world):
    return world.gather((sorted(os.sched_getaffinity(0)), torch.get_num_threads()))


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="no affinity on this system")
def test_local_ranks_are_bound(monkeypatch):
    usable = affinity.usable_cpus()
    if len({affinity.core_of(cpu) for cpu in usable}) < 2:
        pytest.skip("one core")
    (first, threads), (second, _) = run(where, ranks=RankOptions(cp=2, device="cpu"))
    assert not set(first) & set(second) and set(first) | set(second) == usable
    assert threads == divide([usable] * 2, 0).threads
    assert os.sched_getaffinity(0) == usable
    # More threads than a share has cores: where they run is up to the system.
    (first, threads), (second, _) = run(
        where, ranks=RankOptions(cp=2, device="cpu", threads=len(usable))
    )
    assert set(first) == set(second) == usable and threads == len(usable)


def test_another_value_is_refused(monkeypatch):
    monkeypatch.setenv("CPTOOL_BIND", "socket")
    with pytest.raises(UserError, match=r"^CPTOOL_BIND is 'socket'"):
        affinity.bind(lambda value: [value], 0, None)
    monkeypatch.setenv("CPTOOL_BIND", "none")
    before = affinity.usable_cpus()
    assert affinity.bind(lambda value: [value, value], 1, None) >= 1
    assert affinity.usable_cpus() == before
