"""Nobody else gets in: what a run listens on, what it unpickles, and what killed runs leave."""

import ast
import contextlib
import os
import socket
import stat
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from test_launch import GENEROUS_S, start, wait_until

import cptool
from cptool.distributed import rendezvous
from cptool.distributed.connect import connect
from cptool.distributed.environment import Seat
from cptool.distributed.failure import RankFailed
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.distributed.rendezvous import check_loopback, launchers_store, meet
from cptool.distributed.status_board import Board
from cptool.distributed.stopped import is_stopped
from cptool.errors import UserError
from cptool.host import abandoned
from cptool.host.scratch import Folder, make_folder

PACKAGE = Path(cptool.__file__).parent
RESTRICTED = PACKAGE / "checkpoint" / "torch_file.py"
"""The reader of .pth files: an unpickler that builds tensors and nothing else."""
SENDER = PACKAGE / "distributed" / "local.py"
ANSWER = PACKAGE / "distributed" / "supervision.py"
ALLOWED = {RESTRICTED: {"pickle", "Unpickler"}, SENDER: {"pickle"}, ANSWER: {"pickle"}}
"""What rank 0 returned comes through a pipe that it inherited from the process which reads it."""


# What is unpickled.


def names_in(tree):
    """Every name that a module imports or reads an attribute by."""
    for node in ast.walk(tree):
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            yield from (alias.name for alias in node.names)
            yield getattr(node, "module", None) or ""
        elif isinstance(node, ast.Attribute):
            yield node.attr
            if isinstance(node.value, ast.Name):
                yield f"{node.value.id}.{node.attr}"


def test_the_package_unpickles_nothing_but_tensors_of_pth_files():
    forbidden = {
        "torch.load",
        "pickle",
        "cPickle",
        "dill",
        "cloudpickle",
        "marshal",
        "shelve",
        "joblib",
        "Listener",
        "Client",
        "SyncManager",
        "BaseManager",
        "Unpickler",
        "numpy.load",
        "np.load",
        "rpc",
        "TCPStore.set",
    }
    for path in PACKAGE.rglob("*.py"):
        found = set(names_in(ast.parse(path.read_text())))
        ends = ("_object", "_object_list", "_objects")
        objects = {n for n in found if n.endswith(ends) and hasattr(torch.distributed, n)}
        allowed = ALLOWED.get(path, set())
        assert not (found & forbidden - allowed) | objects, path


def unpickled_while_at_work(world):
    """Classes that a rank looked up for a pickle while it exchanged all kinds of values."""
    found = []
    sys.addaudithook(lambda event, args: event == "pickle.find_class" and found.append(args[1:]))
    world.gather({"a": (1, torch.ones(2))})
    world.gather("x" * 5000)
    world.barrier()
    from cptool.distributed.shared_memory import shared_tensors
    from cptool.parallel.transport import ring_of

    with shared_tensors(world, {"w": (2, 3)}, torch.float32):
        pass
    ring_of(world.cp_group).all_gather(torch.ones(3))
    return list(map(str, found))


def test_ranks_at_work_unpickle_nothing():
    assert run(unpickled_while_at_work, ranks=RankOptions(cp=2, device="cpu", threads=1)) == []


# What listens.


def idle(world, folder):
    Path(folder, f"ready{world.rank}").touch()
    while not Path(folder, "over").exists():
        time.sleep(0.05)


TWO_RANKS = """
import sys
sys.path.insert(0, {tests!r})
import test_trust
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
if __name__ == "__main__":
    run(test_trust.idle, {folder!r}, ranks=RankOptions(cp=2, device="cpu", threads=1))
"""

RESIDENT = """
from pathlib import Path
import time
from cptool.distributed.options import RankOptions
from cptool.engine.resident import Resident
from cptool.engine.requests import Continue
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.setup.loading import Setup
if __name__ == "__main__":
    setup = Setup(model={model!r}, dtype="float32")
    with Resident(setup, RankOptions(cp=2, device="cpu", threads=1, timeout=60)) as resident:
        request = Continue(tokens=((1, 2, 3),), options=AnswerOptions(limit=4))
        answer = resident.answer(request, lambda *token: None)
        assert len(answer.token_ids[0]) == 4
        Path({folder!r}, "ready0").touch(), Path({folder!r}, "ready1").touch()
        while not Path({folder!r}, "over").exists():
            time.sleep(0.05)
"""


def descendants(pid):
    """The process and all that it or one of them started."""
    children = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            parent = path.read_text(errors="replace").rpartition(")")[2].split()[1]
        except OSError:
            continue
        children.setdefault(int(parent), []).append(int(path.parent.name))
    found = [pid]
    for process in found:
        found += children.get(process, [])
    return found


def sockets(pids):
    """Inodes of the sockets that the processes hold."""
    found = set()
    for pid in pids:
        with contextlib.suppress(OSError):  # it has ended
            for descriptor in Path(f"/proc/{pid}/fd").iterdir():
                with contextlib.suppress(OSError):
                    target = os.readlink(descriptor)
                    if target.startswith("socket:["):
                        found.add(target[8:-1])
    return found


def addresses(inodes):
    """Local addresses of the listening and the datagram sockets among them; names of those of
    AF_UNIX, "@" before one in no directory.
    """
    network, unix = [], []
    for protocol in ("tcp", "tcp6", "udp", "udp6"):
        table = Path("/proc/net", protocol)
        for line in table.read_text().splitlines()[1:] if table.exists() else []:
            _, local, _, state, *rest = line.split()
            if rest[5] in inodes and (state == "0A" or protocol.startswith("udp")):
                raw = bytes.fromhex(local.split(":")[0])
                raw = b"".join(raw[i : i + 4][::-1] for i in range(0, len(raw), 4))
                family = socket.AF_INET if len(raw) == 4 else socket.AF_INET6
                network.append(socket.inet_ntop(family, raw))
    for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
        fields = line.split(maxsplit=7)
        if len(fields) > 7 and fields[6] in inodes:
            unix.append(fields[7])
    return network, unix


@pytest.mark.parametrize("kind", ["two ranks", "resident ranks"])
def test_no_process_of_a_run_listens_beyond_loopback(kind, tmp_path, mqa_path):
    script = TWO_RANKS if kind == "two ranks" else RESIDENT
    names = {"tests": str(Path(__file__).parent), "folder": str(tmp_path), "model": str(mqa_path)}
    process = start(tmp_path, script=script.format(**names))
    ready = [tmp_path / "ready0", tmp_path / "ready1"]
    wait_until(lambda: all(map(Path.exists, ready)) or process.poll() is not None)
    pids = descendants(process.pid)
    network, unix = addresses(sockets(pids))
    folders = [Path(name).parent for name in unix if not name.startswith("@")]
    modes = [stat.S_IMODE(folder.stat().st_mode) for folder in folders]
    (tmp_path / "over").touch()
    _, errors = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 0, errors
    assert len(pids) >= 4 and network  # the process, the server, two ranks; gloo does listen
    assert set(network) <= {"127.0.0.1", "::1"}
    assert not [name for name in unix if name.startswith("@")]
    assert modes and set(modes) == {0o700}


# What killed runs leave.


def test_folders_of_dead_processes_are_swept_and_no_other(tmp_path):
    holder = subprocess.Popen(
        [
            sys.executable,
            "-c",
            "import sys, time\nfrom cptool.host.scratch import Folder\n"
            "folder = Folder(sys.argv[1])\nprint(folder.name, flush=True)\ntime.sleep(600)",
            str(tmp_path),
        ],
        stdout=subprocess.PIPE,
        text=True,
        cwd=PACKAGE.parent,
    )
    left = Path(holder.stdout.readline().strip())
    (left / "pymp-x").mkdir()
    (left / "pymp-x" / "listener").touch()
    kept = tmp_path / "kept"
    kept.mkdir()
    (kept / "lock").touch()
    (tmp_path / "cptool-link").symlink_to(kept)
    foreign = tmp_path / "cptool-of-mine"  # like ours, but for its mode
    foreign.mkdir(mode=0o755)
    (foreign / "lock").touch()
    young = Path(Folder(str(tmp_path)).name)
    (young / "lock").unlink()
    linked = tmp_path / "cptool-linked"
    linked.mkdir(mode=0o700)
    (linked / "lock").symlink_to(kept / "lock")
    with make_folder(str(tmp_path)) as own:
        assert left.exists()  # its process lives
        holder.kill()
        holder.communicate()
        abandoned.sweep(str(tmp_path))
        assert Path(own, "lock").exists()
    names = {"kept", "cptool-link", "cptool-of-mine", young.name, "cptool-linked"}
    assert {path.name for path in tmp_path.iterdir()} == names
    hours_ago = time.time() - 2 * abandoned._UNLOCKED_FOR_S
    os.utime(young, (hours_ago, hours_ago))
    abandoned.sweep(str(tmp_path))
    assert not young.exists()


def test_a_folder_whose_removal_was_cut_short_is_swept(tmp_path, monkeypatch):
    folder = Folder(str(tmp_path))
    for name in ("a", "status", "zz"):
        Path(folder.name, name).touch()
    removed = []

    def killed(path, **_):
        removed.append(path)
        if len(removed) == 2:
            raise KeyboardInterrupt
        Path(path).unlink()

    with monkeypatch.context() as patched:
        patched.setattr(os, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            folder.cleanup()
    os.close(folder._lock)  # as a process's end does
    folder._lock = None
    assert Path(folder.name, "lock").exists()
    abandoned.sweep(str(tmp_path))
    assert list(tmp_path.iterdir()) == []


# Ranks that are stopped.


def is_stopped_itself(world, victim):
    world.report("wait")
    if world.rank in victim:
        world.report("nap")
        os.kill(os.getpid(), 19)  # SIGSTOP
    world.barrier()


@pytest.mark.parametrize(
    "victim, told",
    [
        ([0], r"^no answer from rank 0 \(pid \d+, which is stopped\) during nap"),
        ([1], r"^no answer from rank 1 \(pid \d+, which is stopped\) during nap"),
        ([0, 1], r"^no answer within 2 s from rank 0 \(pid \d+, which is stopped\) during nap, ra"),
    ],
)
def test_a_stopped_rank_is_named_and_ended(victim, told):
    with pytest.raises(RankFailed, match=told):
        run(is_stopped_itself, victim, ranks=RankOptions(cp=2, device="cpu", threads=1, timeout=2))


PARENT = """
import os, signal, subprocess, sys, time
def child(code, **world):
    return subprocess.Popen([sys.executable, "-c", code], env={**os.environ, **world})
world = {"MASTER_ADDR": "h", "MASTER_PORT": "1", "WORLD_SIZE": "3"}
nap = "import time; time.sleep(600)"
victim = child(nap, RANK="0", **world)
others = [
    child(nap, RANK="0", **world, TORCHELASTIC_RUN_ID="other"), child(nap), child(nap, RANK="2", **world)
]
for process in [victim, *others[:2]]:
    process.send_signal(signal.SIGSTOP)
    while open(f"/proc/{process.pid}/stat").read().rpartition(")")[2].split()[0] != "T":
        time.sleep(0.01)
child("from cptool.distributed.stopped import kill_stopped_peers; kill_stopped_peers()", RANK="1", **world).wait()
print(victim.wait(timeout=30), [process.poll() for process in others])
for process in others:
    process.kill()
"""  # noqa: E501


def test_a_rank_of_a_launcher_kills_the_stopped_ranks_of_its_world_alone(tmp_path):
    place = {**os.environ, "PYTHONPATH": str(PACKAGE.parent)}
    process = start(tmp_path, script=PARENT, env=place)
    assert process.communicate(timeout=GENEROUS_S) == ("-9 [None, None, None]\n", "")
    assert not is_stopped(os.getpid()) and not is_stopped(2**22 + 1)


# Where ranks meet.


@pytest.fixture
def held_port(monkeypatch):
    """A port at which something else listens and never answers."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", str(port))
        for name in ("TORCHELASTIC_USE_AGENT_STORE", "GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
            monkeypatch.setenv(name, "")
            monkeypatch.delenv(name)
        yield port


@pytest.mark.parametrize("rank, told", [(0, "cannot listen there"), (1, "is not the ranks' store")])
def test_a_port_that_another_service_holds(held_port, rank, told):
    place = f"^MASTER_ADDR 127.0.0.1, MASTER_PORT {held_port}: "
    with pytest.raises(UserError, match=f"{place}.*{told}"):
        launchers_store(Seat(rank, 2, rank, 2), 0.5)


@pytest.mark.parametrize(
    "name, value, told",
    [
        ("MASTER_PORT", "1", "nothing answers there"),
        ("MASTER_PORT", "70000", "^MASTER_PORT is '70000'; it must be a port"),
        ("MASTER_ADDR", "no.such.host.invalid", "the address is not known here"),
    ],
)
def test_an_address_at_which_nobody_is(held_port, monkeypatch, name, value, told):
    monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        launchers_store(Seat(1, 2, 1, 2), 0.5)


class EmptyStore:
    """A store to which no other rank comes."""

    def set(self, key, value):
        self.own = key

    def check(self, keys):
        return keys == [self.own]


def test_ranks_that_do_not_come_are_named_with_the_place():
    options = RankOptions(
        cp=3, device="cpu", threads=1, timeout=-4.9
    )  # a start is given 5 s beyond the timeout
    told = "^rank 0, rank 2 did not come to MASTER_ADDR h in 0.1 s$"
    with pytest.raises(torch.distributed.DistStoreError, match=told):
        connect(Seat(1, 3, 1, 3), options, Board(3), EmptyStore(), place=" to MASTER_ADDR h")


def test_rank_0_listens_at_the_named_address_alone_and_names_who_does_not_come(monkeypatch):
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(port))
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    before = sockets([os.getpid()])
    store = launchers_store(Seat(0, 3, 0, 3), 5)
    network, _ = addresses(sockets([os.getpid()]) - before)
    assert set(network) == {"127.0.0.1"}
    assert os.environ["GLOO_SOCKET_IFNAME"] == os.environ["NCCL_SOCKET_IFNAME"] == "lo"
    with pytest.raises(
        torch.distributed.DistStoreError, match=r"^rank 1, rank 2 did not come here"
    ):
        meet(store, Seat(0, 3, 0, 3), 0.1, " here")
    with pytest.raises(UserError, match="on rank 0's host, where other hosts cannot reach"):
        launchers_store(Seat(0, 3, 0, 2), 5)


def test_a_loopback_that_is_down_is_told(monkeypatch):
    check_loopback()

    class Down(socket.socket):
        def connect(self, address):
            raise OSError(101, "Network is unreachable")

    monkeypatch.setattr(rendezvous.socket, "socket", Down)
    with pytest.raises(UserError, match=r"\(Network is unreachable\); bring it up .*, or use one"):
        check_loopback()
