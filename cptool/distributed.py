"""The ranks of one run: starting or joining them, their groups, and the death of one of them.

Nothing here imports torch before it is needed: a local launch starts importing it in the process
that ranks are forked from and in this one at the same time.
"""

from __future__ import annotations

import atexit
import contextlib
import ctypes
import datetime
import math
import os
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from cptool.errors import (
    RunError,
    UserError,
    explain,
    is_out_of_memory,
    show_traceback,
    text_of,
)
from cptool.launcher import Seat, launched, launched_size
from cptool.scratch import make_folder
from cptool.status import Board
from cptool.termination import held_back, orderly

if TYPE_CHECKING:
    import torch
    import torch.distributed as dist

DEFAULT_TIMEOUT_S = 300.0
# More on one machine is not what anybody means; they are processes, each with a connection to all.
MOST_LOCAL_RANKS = 128
# OpenMP ends the process, without a word of ours, where it cannot start as many as it is told.
MOST_THREADS = 1024


class RankFailed(RunError):
    """A rank died or raised: one line names it and what it was doing. All ranks were ended."""


@dataclass(frozen=True)
class World:
    """This rank's place: rank = cp_rank * tp + tp_rank.

    Groups are None where they hold this rank alone. `mesh` has dimensions "cp" and "tp"; it is None
    for one rank. `local_rank` of `local_size` counts the ranks of this machine. `staged`: messages
    between devices go through host memory (`cptool.parallel.staged_ring`), and groups carry tensors
    of the CPU alone. `direct`: by the group's library and nothing else, as CPTOOL_TRANSPORT asked.
    """

    rank: int
    size: int
    local_rank: int
    local_size: int
    cp_rank: int
    cp: int
    tp_rank: int
    tp: int
    device: torch.device
    mesh: dist.DeviceMesh | None
    cp_group: dist.ProcessGroup | None
    tp_group: dist.ProcessGroup | None
    board: Board
    staged: bool = False
    direct: bool = False

    @property
    def wire(self) -> torch.device:
        """Where tensors lie that the groups' collectives take."""
        import torch

        return torch.device("cpu") if self.staged else self.device

    def report(self, phase: str, done: int = 0, total: int = 0) -> None:
        """Record on the status board what this rank is doing; about a microsecond."""
        self.board.write(self.rank, phase, done, total)

    def gather(self, value: Any, *types: type) -> list[Any]:
        """The `value` of every rank, in rank order, on every rank: one that `cptool.encoding`
        takes, with dataclasses of `types`. Tensors arrive on the CPU.
        """
        if self.size == 1:
            return [value]
        from cptool.gathering import gather_values

        return gather_values(value, types)

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.gather(None)


def check_size(cp: int, tp: int) -> None:
    """UserError unless cp and tp are at least 1 and fill the launcher's world, if there is one, or
    are few enough for the ranks to be started here.
    """
    for name, value in (("--cp", cp), ("--tp", tp)):
        if value < 1:
            raise UserError(f"{name} {value}: it must be at least 1; leave it out for one rank")
    launched = launched_size()
    if launched is not None and cp * tp != launched:
        raise UserError(
            f"--cp {cp} --tp {tp} make {cp * tp} ranks, the launcher started {launched}; "
            "give it as many processes, or other --cp and --tp"
        )
    if launched is None and cp * tp > MOST_LOCAL_RANKS:
        raise UserError(
            f"--cp {cp} --tp {tp} make {cp * tp} ranks, one command starts at most "
            f"{MOST_LOCAL_RANKS}; use fewer, or torchrun on several machines"
        )


def check_threads(threads: int | None) -> None:
    """UserError for more threads than a rank can have."""
    if threads is not None and not 1 <= threads <= MOST_THREADS:
        raise UserError(
            f"--threads {threads}: it must be 1 to {MOST_THREADS}; leave it out for this rank's "
            "share of the cores"
        )


def check_limits(threads: int | None, timeout: float) -> None:
    """UserError for more threads than a rank can have, or a time to wait that is none."""
    check_threads(threads)
    if not 0 < timeout < math.inf:
        raise UserError(f"--timeout {timeout}: it must be a positive number of seconds")


def resolve_device(device: str, local_size: int = 1) -> str:
    """What "auto", "cpu" or "cuda" is, "cpu" or "cuda", where a machine runs `local_size` ranks.

    "auto" is CUDA where every rank has a GPU of its own; asked for by name, ranks share GPUs where
    there are fewer. Raises UserError when CUDA is asked for and the build has no CUDA kernels, or
    the machine no GPU.
    """
    if device not in ("auto", "cpu", "cuda"):
        raise UserError(f"--device {device}: it must be auto, cpu or cuda")
    gpus = 0 if device == "cpu" else _gpus()
    if gpus and not _cuda_kernels():
        if device == "cuda":
            raise UserError(
                "--device cuda: cptool was built without CUDA kernels; "
                "reinstall where nvcc is found, or use --device cpu"
            )
        return "cpu"
    if device == "cuda" and not gpus:
        raise UserError("--device cuda: torch sees no GPU here; use --device cpu")
    return "cuda" if gpus >= local_size or device == "cuda" else "cpu"


def transport(device: str, local_size: int, asked: str | None = None) -> str:
    """How messages travel: "direct", by NCCL from GPU to GPU, from memory to memory between the CPU
    ranks of a machine (`cptool.parallel.shared_ring`; by gloo where "direct" is asked for) and by
    gloo from machine to machine; "staged" through host memory where ranks share a GPU, which NCCL does not
    take, or where that is asked for.

    asked: the value of CPTOOL_TRANSPORT in this process or that of the launcher. Raises UserError
    for one that is unknown, or cannot be.
    """
    asked = asked or "auto"
    if asked not in ("auto", "direct", "staged"):
        raise UserError(f"CPTOOL_TRANSPORT is {asked!r}; it must be auto, direct or staged")
    shared = device == "cuda" and _gpus() < local_size
    if shared and asked == "direct":
        raise UserError(
            f"CPTOOL_TRANSPORT is 'direct', but {local_size} ranks share {_gpus()} GPUs and NCCL "
            "takes one rank a GPU; unset it, or use fewer ranks"
        )
    return "staged" if shared or asked == "staged" else "direct"


def run(
    entry: Callable[..., Any],
    *args: Any,
    cp: int = 1,
    tp: int = 1,
    device: str = "auto",
    threads: int | None = None,
    timeout: float = DEFAULT_TIMEOUT_S,
    watch: Callable[[Board], None] | None = None,
    own: Sequence[Any] | None = None,
) -> Any:
    """Call entry(world, *args) on cp * tp ranks and return what rank 0 returned.

    Under torchrun or srun this process joins that world, and returns its own rank's value. Else one
    rank runs in this process, and more are started as local processes (`cptool.local_launch`);
    then `entry` must be importable by name and `args` picklable, and standard output and error of
    the ranks are this process's own.

    threads: intra-op threads per rank; default: this machine's cores dealt to its ranks, each of
        which is bound to its own (`cptool.host.affinity`).
    timeout: seconds that a rank waits for the others in one transfer before it gives up; in those
        between running ranks at least 5.
    watch: called with the status board about ten times a second while ranks work (on rank 0).
    own: a last argument for each rank, which no other rank gets, such as its end of a connection;
        for ranks that are started here.

    Raises the UserError that a rank raised; RankFailed when a rank died or raised anything else
    (with CPTOOL_TRACEBACK set, its traceback is on standard error); after all ranks are ended,
    KeyboardInterrupt for SIGINT and SystemExit for SIGTERM. With one rank, exceptions pass through
    as they are, but RunError where memory ran out.
    """
    check_size(cp, tp)
    check_limits(threads, timeout)
    options = (cp, tp, device, threads, timeout, os.environ.get("CPTOOL_TRANSPORT"))
    seat = launched()
    if seat is not None and seat.size > 1:
        board = Board(seat.size)
        with _watching(watch if seat.rank == 0 else None, board):
            return _joined(entry, args, seat, options, board)
    if cp * tp == 1:
        board = Board(1)
        with _watching(watch, board):
            last = () if own is None else own
            try:
                return entry(_alone(resolve_device(device), threads, board), *args, *last)
            except (MemoryError, RuntimeError, OSError) as error:
                if is_out_of_memory(error):
                    raise RunError(explain(error, during=str(board.read(0)))) from error
                raise
    from cptool.local_launch import launch

    with orderly(), make_folder() as folder:
        board = Board(cp * tp, os.path.join(folder, "status"))
        with _watching(watch, board):
            return launch(entry, args, options, board, folder, own)


def _gpus() -> int:
    try:
        ctypes.CDLL("libcuda.so.1")  # spares machines without a driver the import of torch
    except OSError:
        return 0
    import torch

    return torch.cuda.device_count()


def _cuda_kernels() -> bool:
    from cptool.ops.kernels import build_info

    return bool(build_info()["cuda_archs"])


def cores() -> int:
    """Threads that this process can keep busy: see `cptool.host.affinity`."""
    from cptool.host import affinity

    return affinity.cores()


def _alone(device: str, threads: int | None, board: Board) -> World:
    with held_back():
        import torch

    torch.set_num_threads(threads or cores())
    where = torch.device(device, 0) if device == "cuda" else torch.device(device)
    return World(0, 1, 0, 1, 0, 1, 0, 1, where, None, None, None, board)


def connect(
    seat: Seat,
    cp: int,
    tp: int,
    device: str,
    threads: int | None,
    timeout: float,
    asked: str | None,
    board: Board,
    store: dist.Store,
    place: str = "",
) -> World:
    """Join the process group whose ranks meet in `store`, and build the mesh. place: what the error
    adds if some do not come.
    """
    import torch
    import torch.distributed as dist
    from torch.distributed.device_mesh import DeviceMesh

    from cptool.gathering import gather_values
    from cptool.host.affinity import bind
    from cptool.rendezvous import START_S, meet

    device = resolve_device(device, seat.local_size)
    staged = transport(device, seat.local_size, asked) == "staged"
    where = torch.device("cpu")
    if device == "cuda":
        where = torch.device("cuda", seat.local_rank % torch.cuda.device_count())
        torch.cuda.set_device(where)  # before any group exists, or all ranks open device 0
    if staged and device == "cuda" and seat.rank == 0:
        print("cptool: messages between ranks go through host memory", file=sys.stderr, flush=True)
    # Less would end a sound run on a busy machine, where a rank may get no core for so long.
    patience = datetime.timedelta(seconds=max(timeout, START_S))
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" and not staged else "gloo"
    # Transfers must start beside an attention kernel that fills the device, not behind it.
    os.environ.setdefault("TORCH_NCCL_HIGH_PRIORITY", "1")
    meet(store, seat, timeout + START_S, place)
    dist.init_process_group(
        backend, store=store, rank=seat.rank, world_size=seat.size, timeout=patience
    )

    if device == "cpu":  # threads that are started from here on inherit where this one is bound
        torch.set_num_threads(bind(gather_values, seat.rank, threads))
    else:
        torch.set_num_threads(threads or max(1, cores() // seat.local_size))

    ranks = torch.arange(seat.size).view(cp, tp)
    # Built by hand because a mesh gives the groups it makes the library's timeout, half an hour.
    cp_group, _ = dist.new_subgroups_by_enumeration(ranks.T.tolist(), timeout=patience)
    tp_group, _ = dist.new_subgroups_by_enumeration(ranks.tolist(), timeout=patience)
    mesh = DeviceMesh.from_group(
        [cp_group, tp_group],
        "cpu" if staged else device,
        mesh=ranks,
        mesh_dim_names=("cp", "tp"),
    )
    wire = torch.device("cpu") if staged else where
    for group in (cp_group, tp_group):
        # Connections are made here and not in the first layer; NCCL also needs every rank of a
        # group in the group's first operation, which a batch of point-to-point ones may not have.
        dist.all_reduce(torch.ones(1, device=wire), group=group)
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
        mesh=mesh,
        cp_group=cp_group if cp > 1 else None,
        tp_group=tp_group if tp > 1 else None,
        board=board,
        staged=staged,
        direct=asked == "direct",
    )


def call_entry(entry: Callable[..., Any], args: tuple, world: World) -> Any:
    """Run `entry` and leave the world in order."""
    import torch.distributed as dist

    value = entry(world, *args)
    world.barrier()  # the host of the store must not leave while others still use it
    dist.destroy_process_group()
    return value


def _joined(entry, args, seat: Seat, options: tuple, board: Board) -> Any:
    """One rank of a world that a launcher started, which also ends the others if this one dies."""
    from cptool.rendezvous import launchers_address, launchers_store, start_deadline
    from cptool.stopped import kill_stopped_peers

    timeout = options[4]

    def give_up() -> None:
        told = f"rank {seat.rank} did not meet the others at {launchers_address()}"
        print(f"cptool: {told} in {timeout:g} s", file=sys.stderr, flush=True)
        kill_stopped_peers()
        os._exit(1)

    try:
        store = launchers_store(seat, timeout)
        with start_deadline(timeout, give_up):
            world = connect(seat, *options, board, store, f" to {launchers_address()}")
        return call_entry(entry, args, world)
    except (UserError, KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # also what is no Exception, as a panic of Rust is
        if is_communication(error):
            # Last of all, for the launcher ends this rank too when it sees one die.
            atexit.register(kill_stopped_peers)
        else:
            show_traceback(error)
        raise RankFailed(describe(seat.rank, board, error)) from error


def is_communication(error: BaseException) -> bool:
    """Whether a transfer failed, most often as the echo of another rank's end."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and ("gloo" in str(error) or "NCCL" in str(error))
    )


def describe(rank: int, board: Board, error: BaseException) -> str:
    """One line: the rank, what it was doing, the error without the library's source path."""
    broke_off = is_communication(error)
    told = f"{type(error).__name__}: {text_of(error)}" if broke_off else explain(error)
    return f"rank {rank} failed during {board.read(rank)}: {told}"


@contextlib.contextmanager
def _watching(watch: Callable[[Board], None] | None, board: Board) -> Iterator[None]:
    """Call watch(board) from a thread while the body runs."""
    if watch is None:
        yield
        return
    over = threading.Event()

    def loop() -> None:
        while not over.wait(0.1):
            watch(board)

    thread = threading.Thread(target=loop, name="cptool-watch", daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
