"""Joining the process group, with the rank's device, cores and groups, and leaving it in order."""

from __future__ import annotations

import datetime
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from cptool.distributed.devices import (
    cores,
    nccl_options,
    resolve_device,
    settle_kernels,
    transport,
)
from cptool.distributed.environment import Seat
from cptool.distributed.group import Group
from cptool.distributed.options import RankOptions
from cptool.distributed.status_board import Board
from cptool.distributed.world import World

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist


def take_device(seat: Seat, ranks: RankOptions) -> None:
    """Choose this rank's GPU if it computes on one, before any group exists: otherwise all ranks
    open device 0.

    To be called before a deadline runs for the ranks to meet, because the first use of a build on a
    kind of GPU tests the kernels, which takes up to minutes.
    """
    if resolve_device(ranks.device, seat.local_size) == "cpu":
        return
    import torch

    where = _gpu(seat)
    torch.cuda.set_device(where)
    settle_kernels(where.index, tell=seat.local_rank == 0)


def connect(
    seat: Seat, ranks: RankOptions, board: Board, store: dist.Store, *, place: str = ""
) -> World:
    """Join the process group whose ranks meet in `store`, and build its CP and TP groups. Call
    `take_device` before.

    place: appended to the error that is raised if some ranks do not arrive.
    """
    import torch
    import torch.distributed as dist

    from cptool.distributed.gathering import gather_values
    from cptool.distributed.rendezvous import START_S, meet
    from cptool.host.affinity import bind

    cp, tp, timeout = ranks.cp, ranks.tp, ranks.timeout
    device = resolve_device(ranks.device, seat.local_size)
    staged = transport(device, seat.local_size, ranks.transport) == "staged"
    where = torch.device("cpu")
    if device == "cuda":
        where = _gpu(seat)
    if staged and device == "cuda" and seat.rank == 0:
        print("cptool: messages between ranks go through host memory", file=sys.stderr, flush=True)
    # A shorter timeout could end a sound run on a busy machine, where a rank may get no core for
    # that long.
    patience = datetime.timedelta(seconds=max(timeout, START_S))
    nccl = device == "cuda" and not staged
    backend = "cpu:gloo,cuda:nccl" if nccl else "gloo"
    meet(store, seat, timeout + START_S, place)
    dist.init_process_group(
        backend, store=store, rank=seat.rank, world_size=seat.size, timeout=patience
    )

    if device == "cpu":  # threads that are started from here on inherit this one's affinity
        torch.set_num_threads(bind(gather_values, seat.rank, ranks.threads))
    else:
        torch.set_num_threads(ranks.threads or max(1, cores() // seat.local_size))

    grid = torch.arange(seat.size).view(cp, tp)
    # Not by a DeviceMesh: the groups that it makes have the library's timeout, half an hour.
    # Few thread blocks for the rings alone: all-reduces, which nothing hides, take as many as they
    # can use.
    cp_members, _ = dist.new_subgroups_by_enumeration(
        grid.T.tolist(), timeout=patience, pg_options=nccl_options(patience) if nccl else None
    )
    tp_members, _ = dist.new_subgroups_by_enumeration(grid.tolist(), timeout=patience)
    carry = {"staged": staged, "direct": ranks.transport == "direct"}
    cp_group, tp_group = (
        Group(members if size > 1 else None, where, **carry)
        for members, size in ((cp_members, cp), (tp_members, tp))
    )
    for group in (cp_group, tp_group):
        # Connections are made here and not in the first layer; NCCL also needs every rank of a
        # group in the group's first operation, which a batch of point-to-point ones may not have.
        group.sum_(torch.ones(1, device=where))
    return World(
        rank=seat.rank,
        size=seat.size,
        local_rank=seat.local_rank,
        local_size=seat.local_size,
        cp_rank=seat.rank // tp,
        cp=cp,
        tp_rank=seat.rank % tp,
        tp=tp,
        device=where,
        group=Group(dist.group.WORLD, where, **carry),
        cp_group=cp_group,
        tp_group=tp_group,
        board=board,
    )


def _gpu(seat: Seat) -> torch.device:
    import torch

    return torch.device("cuda", seat.local_rank % torch.cuda.device_count())


def call_entry(entry: Callable[..., Any], args: tuple, world: World) -> Any:
    """Run `entry`, leave the world in order, and return what `entry` returned."""
    import torch.distributed as dist

    value = entry(world, *args)
    world.barrier()  # the rank that hosts the store must not leave while others still use it
    dist.destroy_process_group()
    return value
