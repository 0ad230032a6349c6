"""Rank processes for tests: started once a session, gloo over loopback, many cases a launch."""

import atexit
import datetime
import multiprocessing
import os
import tempfile
import traceback
from multiprocessing.connection import wait

from cptool.distributed import server_process
from cptool.engine.rank_modules import rank_modules

MOST = 8
CASE_TIMEOUT_S = 120


def run_ranks(n, fn, *args, **options):
    """Call fn(world, *args, **options) on n of up to eight ranks; return what each returned.

    fn is importable by name (the top level of a test module). An exception in a rank fails the call
    with that rank's traceback; the ranks, which may now wait for each other, are then replaced.
    """
    global _pool
    if _pool is None:
        _pool = _Pool()
    try:
        return _pool.run(n, fn, args, options)
    except BaseException:
        _pool.close()
        _pool = None
        raise


class _Pool:
    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        server_process.start(_serve, rank_modules())
        self.folder = tempfile.TemporaryDirectory(prefix="cptool-tests-")
        store = os.path.join(self.folder.name, "store")
        self.pipes, self.processes = [], []
        for rank in range(MOST):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(rank, store, theirs), daemon=True)
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)

    def run(self, n, fn, args, options):
        for pipe in self.pipes[:n]:
            pipe.send((n, fn, args, options))
        values, pending = {}, {pipe: rank for rank, pipe in enumerate(self.pipes[:n])}
        while pending:
            ready = wait(list(pending), timeout=CASE_TIMEOUT_S)
            if not ready:
                raise TimeoutError(f"ranks {sorted(pending.values())} of {n} did not answer")
            for pipe in ready:
                rank = pending.pop(pipe)
                failure, values[rank] = pipe.recv()
                if failure:
                    raise AssertionError(f"rank {rank} of {n}:\n{failure}")
        return [values[rank] for rank in range(n)]

    def close(self):
        for process in self.processes:
            process.kill()
            process.join()
        self.folder.cleanup()


_pool = None


@atexit.register
def _close():
    if _pool is not None:
        _pool.close()


def _serve(rank, store, pipe):
    import torch
    import torch.distributed as dist

    from cptool.distributed.group import Group
    from cptool.distributed.status_board import Board
    from cptool.distributed.world import World

    if os.path.exists("/sys/class/net/lo"):
        os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=CASE_TIMEOUT_S / 2)
    dist.init_process_group(
        "gloo", init_method=f"file://{store}", rank=rank, world_size=MOST, timeout=patience
    )
    groups = {1: Group()}
    for n in range(2, MOST + 1):
        members = dist.new_group(range(n), timeout=patience)
        if rank < n:
            groups[n] = Group(members, torch.device("cpu"))
    while True:
        try:
            n, fn, args, options = pipe.recv()
        except EOFError:
            return
        world = World(
            rank=rank,
            size=n,
            local_rank=rank,
            local_size=n,
            cp_rank=rank,
            cp=n,
            tp_rank=0,
            tp=1,
            device=torch.device("cpu"),
            group=groups[n],
            cp_group=groups[n],
            board=Board(n),
        )
        try:
            pipe.send((None, fn(world, *args, **options)))
        except Exception:
            pipe.send((traceback.format_exc(), None))
