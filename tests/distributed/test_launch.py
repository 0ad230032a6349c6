"""Starting and joining ranks, and their ends: what is told, that nobody is left, and signals."""

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch

from cptool.distributed import devices, launch, server_process
from cptool.distributed.devices import resolve_device, transport
from cptool.distributed.environment import Seat, launched, set_rendezvous_address
from cptool.distributed.failure import RankFailed
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions, check_size
from cptool.distributed.signals import held_back, orderly
from cptool.distributed.status_board import Board, Status
from cptool.errors import UserError
from cptool.host import affinity
from cptool.parallel.ring import Ring

GENEROUS_S = 60
"""Upper bound of anything that takes a few seconds, on a machine that does much else."""

LAUNCHERS = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@pytest.fixture(autouse=True)
def outside_of_a_launcher(monkeypatch):
    for name in [*LAUNCHERS, *(name for name in os.environ if name.startswith("SLURM_"))]:
        monkeypatch.delenv(name, raising=False)
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)  # a run of one rank sets them in this process


# What ranks run. Ranks import these by name.


def describe(world, word):
    """Where every rank is, and what sums over its groups give."""

    def total(group):
        return group.sum_of([10**world.rank])[0] if group.size > 1 else None

    place = (world.rank, world.cp_rank, world.tp_rank, world.local_rank, world.local_size)
    facts = (place, total(world.cp_group), total(world.tp_group), torch.get_num_threads())
    return word, world.gather((*facts, str(world.device), launched() is not None))


def own_place(world):
    values = world.gather(world.rank)
    return f"{world.rank} of {values}, {world.local_rank} of {world.local_size} here"


def mistake(world):
    raise UserError(f"--prompt: {world.size} ranks find it empty; give one")


def mistake_of_one(world):
    if world.rank == 1:
        raise UserError("--prompt: it is empty; give one")
    world.barrier()


def defect_of_one(world):
    world.report("decode, token", 2, 5)
    if world.rank == world.size - 1:
        raise KeyError("no\nsuch key")
    world.barrier()


def leaves(world):
    world.report("prefill")
    if world.rank == 1:
        os._exit(7)
    world.barrier()


def returns(world, kind):
    """Tensors and what holds them, more than a pipe takes at a time, and what cannot arrive."""
    if kind == "none":
        sys.exit(0)
    if kind == "unreadable":
        return Unreadable()
    if kind == "stopped" and world.rank == 0:
        world.report("answer")
        threading.Timer(0.2, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return Slow()
    return {"one": torch.arange(3), "many": [Status("x", 1, 2), torch.ones(300_000)]}


class Unreadable:
    def __reduce__(self):
        return int, ("no number",)


class Slow:
    def __reduce__(self):
        time.sleep(2)
        return list, ()


def mistake_beside_a_death(world, number):
    if world.rank == 0:
        raise UserError("--prompt: it is empty; give one")
    os.kill(os.getpid(), number)


def defect_beside_an_abort(world):
    if world.rank == 1:
        raise KeyError("cause")
    os.abort()


def loses_its_server(world, number):
    world.report("serve")
    if world.rank == 0:
        os.kill(os.getppid(), number)
    time.sleep(10 * GENEROUS_S)


def hangs(world):
    world.report("hang" if world.rank == 1 else "wait")
    if world.rank == 1:
        time.sleep(10 * GENEROUS_S)
    world.barrier()


def ring_for_ever(world, folder, victim=None):
    """Blocks go round until somebody ends it; rank `victim` does so itself, between two blocks."""
    for pid, kind in ((os.getpid(), f"rank{world.rank}"), (os.getppid(), "server")):
        file = Path(folder, f"{kind}.tmp{world.rank}")
        file.write_text(str(pid))
        file.rename(Path(folder, kind))  # whoever waits for the file finds it whole
    ring = Ring(world.cp_group)
    local = torch.ones(20_000, 8)
    for turn in range(10**9):
        world.report("ring, turn", turn, 10**9)
        for source, _ in ring.blocks(local, [20_000] * ring.size):
            if turn == 3 and world.rank == victim and source != world.rank:
                os.kill(os.getpid(), signal.SIGKILL)


def alive(pid):
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] != "Z"


def wait_until(condition):
    deadline = time.monotonic() + GENEROUS_S
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def pids_in(folder, *kinds, of=None):
    """What ring_for_ever wrote, as soon as it is there; `of`, a process, must live until then."""
    wait_until(lambda: all(Path(folder, kind).exists() for kind in kinds) or (of and of.poll()))
    return [int(Path(folder, kind).read_text()) for kind in kinds]


# Starting.


def test_one_rank_runs_in_this_process():
    word, [facts] = run(describe, "word", ranks=RankOptions(threads=3, device="cpu"))
    assert word == "word"
    assert facts == ((0, 0, 0, 0, 1), None, None, 3, "cpu", False)
    with pytest.raises(KeyError):  # as it is
        run(defect_of_one, ranks=RankOptions(device="cpu"))
    with pytest.raises(UserError, match="1 ranks find it empty"):
        run(mistake, ranks=RankOptions(device="cpu"))


def test_ranks_form_groups_and_rank_0_answers():
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    word, facts = run(describe, "word", ranks=RankOptions(cp=2, tp=2, device="cpu", threads=2))
    over_cp, over_tp = (101, 1010, 101, 1010), (11, 11, 1100, 1100)
    assert word == "word"
    assert facts == [
        ((r, r // 2, r % 2, r, 4), over_cp[r], over_tp[r], 2, "cpu", True) for r in range(4)
    ]
    assert {number: signal.getsignal(number) for number in before} == before


def test_cores_are_shared_out_and_groups_of_one_are_none():
    _, facts = run(describe, "word", ranks=RankOptions(tp=2, device="cpu"))
    share = max(1, devices.cores() // 2)
    assert [(cp, tp, threads) for _, cp, tp, threads, *_ in facts] == [(None, 11, share)] * 2


def test_cores_are_physical_ones(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 1, 2}, raising=False)
    monkeypatch.setattr(affinity, "cpu_quota", lambda: None)
    siblings = {"cpu0": "0,2", "cpu1": "1,3", "cpu2": "0,2"}
    monkeypatch.setattr(Path, "read_text", lambda path: siblings[path.parent.parent.name])
    assert devices.cores() == 2


def test_devices(monkeypatch):
    monkeypatch.setattr(devices, "_gpus", lambda: 2)
    monkeypatch.setattr(devices, "_cuda_kernels", lambda: True)
    assert [resolve_device("auto", n) for n in (1, 2, 3)] == ["cuda", "cuda", "cpu"]
    assert resolve_device("cpu") == "cpu"
    assert resolve_device("cuda", 3) == "cuda"  # two of them share one
    with pytest.raises(UserError, match="`device` tpu: it must be auto, cpu or cuda"):
        resolve_device("tpu")
    monkeypatch.setattr(devices, "_cuda_kernels", lambda: False)
    assert resolve_device("auto") == "cpu"
    with pytest.raises(UserError, match="`device` cuda: cptool was built without CUDA kernels; re"):
        resolve_device("cuda")
    monkeypatch.setattr(devices, "_gpus", lambda: 0)
    with pytest.raises(UserError, match="`device` cuda: torch sees no GPU here; use `device` cpu"):
        resolve_device("cuda")


def test_transports(monkeypatch):
    monkeypatch.setattr(devices, "_gpus", lambda: 2)
    assert [transport("cuda", n) for n in (2, 3)] == ["direct", "staged"]
    assert transport("cpu", 3) == "direct"
    assert transport("cuda", 2, "staged") == transport("cpu", 2, "staged") == "staged"
    with pytest.raises(UserError, match="3 ranks share 2 GPUs and NCCL takes one rank per GPU"):
        transport("cuda", 3, "direct")
    with pytest.raises(UserError, match="it must be auto, direct or staged"):
        transport("cpu", 1, "nccl")


def test_a_wrong_transport_is_told_before_ranks_start(monkeypatch):
    monkeypatch.setenv("CPTOOL_TRANSPORT", "pigeon")
    with pytest.raises(UserError, match=r"^CPTOOL_TRANSPORT is 'pigeon'"):
        run(mistake_of_one, ranks=RankOptions(cp=2, device="cpu"))


# Ends.


def test_a_users_mistake_on_one_rank():
    with pytest.raises(UserError, match=r"^--prompt: it is empty; give one$"):
        run(mistake_of_one, ranks=RankOptions(cp=3, device="cpu"))


def test_an_exception_names_rank_step_and_error():
    told = (
        r"^rank 2 failed during decode, token, step 3 of 5: internal error: KeyError: "
        r"'no\\nsuch key' \(.*\); please report this, .*; all ranks were ended$"
    )
    with pytest.raises(RankFailed, match=told):
        run(defect_of_one, ranks=RankOptions(cp=3, device="cpu"))


def test_a_rank_that_leaves():
    told = r"^rank 1 \(pid \d+\) exited with code 7 during prefill; all ranks were ended$"
    with pytest.raises(RankFailed, match=told):
        run(leaves, ranks=RankOptions(cp=3, device="cpu"))


def test_an_answer_of_any_kind_arrives_whole():
    answer = run(returns, "tensors", ranks=RankOptions(cp=2, device="cpu", threads=1))
    assert answer["one"].tolist() == [0, 1, 2] and answer["many"][0] == Status("x", 1, 2)
    assert answer["many"][1].sum() == 300_000


@pytest.mark.parametrize(
    "kind, told",
    [
        ("none", "^no answer from rank 0 during start; all ranks were ended$"),
        ("unreadable", "^what rank 0 returned cannot be read .ValueError: invalid literal for int"),
        ("stopped", r"^no answer within 2 s from rank 0 \(pid \d+, which is stopped\) during a"),
    ],
)
def test_an_answer_that_is_lost_is_an_error_that_names_the_rank(kind, told):
    with pytest.raises(RankFailed, match=told):
        run(returns, kind, ranks=RankOptions(cp=2, device="cpu", threads=1, timeout=2))


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGABRT])
def test_a_mistake_comes_before_the_death_of_another_rank(number):
    with pytest.raises(UserError, match=r"^--prompt: it is empty; give one$"):
        run(mistake_beside_a_death, number, ranks=RankOptions(cp=2, device="cpu", threads=1))


def test_an_exception_comes_before_an_abort():
    with pytest.raises(RankFailed, match=r"^rank 1 failed during start: .*KeyError: 'cause'"):
        run(defect_beside_an_abort, ranks=RankOptions(cp=2, device="cpu", threads=1))


@pytest.mark.parametrize("number, how", [(signal.SIGKILL, "ended"), (signal.SIGSTOP, "stopped")])
def test_the_end_of_the_server_of_ranks_is_told_and_the_next_run_has_a_new_one(number, how):
    told = rf"the process that ranks are forked from \(pid \d+\),? .*{how}; all ranks were ended$"
    with pytest.raises(RankFailed, match=told):
        run(loses_its_server, number, ranks=RankOptions(cp=2, device="cpu", threads=1, timeout=3))
    assert (
        run(own_place, ranks=RankOptions(cp=2, device="cpu", threads=1))
        == "0 of [0, 1], 0 of 2 here"
    )


def test_a_rank_that_hangs_is_named_after_the_timeout():
    with pytest.raises(RankFailed, match=r"^no answer from rank 1 during hang .*during wait: "):
        run(hangs, ranks=RankOptions(cp=3, device="cpu", timeout=1))


@pytest.mark.parametrize("victim", [0, 1, 2, 1])
def test_the_killed_rank_is_named_and_no_peer(victim, tmp_path):
    began = time.monotonic()
    with pytest.raises(RankFailed) as failed:
        run(ring_for_ever, str(tmp_path), victim, ranks=RankOptions(cp=3, device="cpu"))
    assert time.monotonic() - began < GENEROUS_S
    pids = pids_in(tmp_path, "rank0", "rank1", "rank2")
    assert str(failed.value) == (
        f"rank {victim} (pid {pids[victim]}) was killed by SIGKILL during "
        f"ring, turn, step 4 of {10**9} (as the system does where memory, or a control "
        "group's limit, runs out); all ranks were ended"
    )
    wait_until(lambda: not any(map(alive, pids)))


def driver(entry, *arguments, **options):
    """A script that calls run(entry, *arguments, **options) and prints what it got, each process
    in one write: those of a launcher share a pipe, and `print` may write the line's end apart."""
    return f"""
import sys
sys.path[:0] = [{str(Path(__file__).parent)!r}, {str(Path(launch.__file__).parents[2])!r}]
import test_launch as tests
from cptool.distributed.launch import RankFailed, run
from cptool.distributed.options import RankOptions
if __name__ == "__main__":
    try:
        got = run(tests.{entry}, *{arguments!r}, ranks=RankOptions(device="cpu", **{options!r}))
        sys.stdout.write(f"{{got}}\\n")
    except (tests.UserError, RankFailed, KeyboardInterrupt) as error:
        sys.exit(f"{{type(error).__name__}}: {{error}}")
"""


def start(tmp_path, *prefix, script, **options):
    file = tmp_path / "driver.py"
    file.write_text(script)
    command = [sys.executable, *prefix, str(file)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options
    )


def test_a_mistake_of_all_ranks_is_told_once(tmp_path):
    process = start(tmp_path, script=driver("mistake", cp=2))
    output, errors = process.communicate(timeout=GENEROUS_S)
    assert (output, errors) == ("", "UserError: --prompt: 2 ranks find it empty; give one\n")


def test_the_traceback_of_a_defect_is_shown_on_request_once_and_no_echo_of_it(tmp_path):
    process = start(
        tmp_path, script=driver("defect_of_one", cp=3), env=os.environ | {"CPTOOL_TRACEBACK": "1"}
    )
    output, errors = process.communicate(timeout=GENEROUS_S)
    assert (process.returncode, output) == (1, "")
    assert errors.count("Traceback") == 1 and "in defect_of_one" in errors
    assert errors.splitlines()[-1].startswith("RankFailed: rank 2 failed during decode, token")


@pytest.mark.parametrize(
    "number, to_all, code, told",
    [
        (signal.SIGINT, False, 1, "KeyboardInterrupt: \n"),
        (signal.SIGINT, True, 1, "KeyboardInterrupt: \n"),
        (signal.SIGTERM, False, 128 + signal.SIGTERM, ""),
        (signal.SIGKILL, False, -signal.SIGKILL, None),
    ],
    ids=["interrupt", "Ctrl-C at the terminal", "terminate", "kill"],
)
def test_no_process_outlives_the_launcher(tmp_path, number, to_all, code, told):
    script = driver("ring_for_ever", str(tmp_path), cp=2)
    process = start(tmp_path, script=script, start_new_session=True)
    pids = pids_in(tmp_path, "rank0", "rank1", "server", of=process)
    (os.killpg if to_all else os.kill)(process.pid, number)
    output, errors = process.communicate(timeout=GENEROUS_S)
    assert (process.returncode, output) == (code, "")
    assert told in (None, errors)  # Python's own tracker of semaphores tells of a kill
    wait_until(lambda: not any(map(alive, pids)))


def test_stopped_ranks_and_their_server_end_with_a_launcher_that_is_killed(tmp_path):
    process = start(tmp_path, script=driver("ring_for_ever", str(tmp_path), cp=2))
    pids = pids_in(tmp_path, "rank0", "rank1", "server", of=process)
    for pid in pids:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.communicate(timeout=GENEROUS_S)
    wait_until(lambda: not any(map(alive, pids)))


def launched_in(folder, script):
    """A process whose temporary folders are in `folder`, once its run has put one in order."""
    folder.mkdir()
    process = start(folder.parent, script=script, env={**os.environ, "TMPDIR": str(folder)})
    wait_until(lambda: list(folder.glob("cptool-*/status")) or process.poll() is not None)
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_no_folder_is_left_by_a_run_that_ends_while_ranks_start(tmp_path, number):
    folder = tmp_path / "temporary"
    process = launched_in(folder, driver("hangs", cp=2))
    process.send_signal(number)
    process.communicate(timeout=GENEROUS_S)
    assert process.returncode == (1 if number == signal.SIGINT else 128 + number)
    assert list(folder.iterdir()) == []


def test_a_folder_that_is_removed_under_a_run_is_named_and_no_traceback_is_shown(tmp_path):
    begin = "    import shutil; from cptool.distributed import server_process\n"
    begin += "    server_process.start(run)\n"
    begin += "    shutil.rmtree(server_process.folder())\n    try:"
    script = driver("mistake", cp=2).replace("    try:", begin)
    output, errors = start(tmp_path, script=script).communicate(timeout=GENEROUS_S)
    assert output == "" and errors.startswith("RankFailed: /") and errors.count("\n") == 1
    assert errors.endswith(" was removed while the run used it\n")


def test_termination_is_an_exception_but_not_to_a_rank_of_a_launcher(monkeypatch):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup has it
    try:
        with pytest.raises(SystemExit) as ended, orderly():
            assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
            signal.raise_signal(signal.SIGTERM)
        assert ended.value.code == 128 + signal.SIGTERM
        for name, value in TORCHRUN.items():
            monkeypatch.setenv(name, value)
        with orderly():
            assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_is_held_back_while_an_import_would_swallow_it():
    before = signal.getsignal(signal.SIGINT)
    reached = []
    with pytest.raises(KeyboardInterrupt):
        with held_back():
            try:
                signal.raise_signal(signal.SIGINT)
            except BaseException:  # as torch's import of NumPy does
                pytest.fail("it was raised within")
            reached.append(1)
        reached.append(2)
    assert reached == [1] and signal.getsignal(signal.SIGINT) == before


def test_a_signal_that_is_held_back_comes_in_place_of_an_exception_of_the_body():
    with pytest.raises(KeyboardInterrupt), held_back():
        signal.raise_signal(signal.SIGINT)
        raise EOFError


def test_ctrl_c_while_the_server_of_ranks_starts_is_not_lost():
    with pytest.raises(KeyboardInterrupt):
        with server_process.interrupts_blocked():
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(1)  # until another thread of this process has told of it
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, [])


# The world of a launcher.


def test_torchruns_world_is_joined_and_every_rank_gets_its_own_value(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    script = driver("own_place", cp=2, threads=1)
    process = start(tmp_path, *torchrun, script=script)
    output, errors = process.communicate(timeout=GENEROUS_S)
    assert process.returncode == 0, errors
    assert sorted(output.splitlines()) == ["0 of [0, 1], 0 of 2 here", "1 of [0, 1], 1 of 2 here"]


def test_in_torchruns_world_only_the_cause_shows_a_traceback(tmp_path):
    torchrun = ("-m", "torch.distributed.run", "--nproc-per-node", "2")
    process = start(tmp_path, *torchrun, script=driver("defect_of_one", cp=2))
    output, errors = process.communicate(timeout=GENEROUS_S)
    assert (process.returncode, output) == (1, "")
    failed = "RankFailed: rank 1 failed during decode, token, step 3 of 5: internal error: KeyError"
    assert failed in errors and "please report this" in errors


@pytest.mark.parametrize("cp, tp", [(2, 1), (1, 1), (4, 2)])
def test_ranks_that_do_not_fill_the_launchers_world(monkeypatch, cp, tp):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "4")
    told = f"^`cp` {cp} and `tp` {tp} make {cp * tp} ranks, the launcher started 4; give it as many"
    with pytest.raises(UserError, match=told):
        run(describe, "word", ranks=RankOptions(cp=cp, tp=tp))


def test_sizes_below_one():
    for sizes, name in (((0, 1), "`cp` 0"), ((1, -2), "`tp` -2")):
        with pytest.raises(UserError, match=f"^{name}: it must be at least 1"):
            check_size(*sizes)


TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4"}
# What Slurm sets for a batch script of 7 tasks on 3 nodes, which is a process on its own ...
BATCH = {
    "SLURM_JOB_ID": "200505",
    "SLURM_NTASKS": "7",
    "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0",
    "SLURM_NODEID": "0",
    "SLURM_TASKS_PER_NODE": "2(x2),3",
    "SLURM_JOB_NODELIST": "n[1-3]",
}
# ... and add for the tasks of `srun` in it.
STEP = {
    **BATCH,
    "SLURM_STEP_ID": "0",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_PROCID": "6",
    "SLURM_STEP_TASKS_PER_NODE": "2(x2),3",
    "SLURM_LOCALID": "2",
    "SLURM_NODEID": "2",
    "SLURM_STEP_NODELIST": "n[1-3]",
}

SECOND_NODE = {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}


@pytest.mark.parametrize(
    "environment, expected",
    [
        ({}, None),
        (TORCHRUN, Seat(5, 8, 1, 4)),
        ({"RANK": "1", "WORLD_SIZE": "2"}, Seat(1, 2, 1, 2)),
        (BATCH, None),
        (STEP, Seat(6, 7, 2, 3)),
        ({**STEP, **SECOND_NODE}, Seat(2, 7, 0, 2)),
        ({**STEP, "SLURM_STEP_NUM_TASKS": "1", "SLURM_STEP_TASKS_PER_NODE": "1"}, None),
        ({**STEP, **TORCHRUN}, Seat(5, 8, 1, 4)),
    ],
    ids=["none", "torchrun", "by hand", "batch", "srun", "srun's second node", "shell", "both"],
)
def test_launchers_are_known_by_their_environment(monkeypatch, environment, expected):
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    assert launched() == expected


@pytest.mark.parametrize(
    "wrong, told",
    [
        ({"RANK": "one"}, "^RANK is 'one', it must be a number; start"),
        ({"RANK": "8"}, "^RANK 8 of WORLD_SIZE 8, LOCAL_RANK 1 of LOCAL_WORLD_SIZE 4: ranks"),
        ({"LOCAL_RANK": "4"}, "LOCAL_RANK 4 of LOCAL_WORLD_SIZE 4"),
        ({"LOCAL_WORLD_SIZE": "9"}, "LOCAL_WORLD_SIZE 9"),
    ],
)
def test_a_seat_that_cannot_be(monkeypatch, wrong, told):
    for name, value in {**TORCHRUN, **wrong}.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=told):
        launched()


def test_slurm_ranks_meet_on_the_first_node(monkeypatch, tmp_path):
    for name, value in STEP.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(UserError, match=r"^MASTER_ADDR is not set and scontrol does not name"):
        set_rendezvous_address()
    tool = tmp_path / "scontrol"
    tool.write_text('#!/bin/sh\n[ "$*" = "show hostnames n[1-3]" ] && printf "n1\\nn2\\nn3\\n"\n')
    tool.chmod(0o755)
    monkeypatch.delenv("MASTER_PORT", raising=False)
    set_rendezvous_address()
    first = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    assert first[0] == "n1" and 1024 <= int(first[1]) < 32768
    # The next step of the job may begin before the last one's port is free again.
    monkeypatch.setenv("SLURM_STEP_ID", "1")
    monkeypatch.delenv("MASTER_PORT")
    set_rendezvous_address()
    assert os.environ["MASTER_PORT"] != first[1]


# The status board.


def test_the_board_shows_what_ranks_write(tmp_path):
    board = Board(2, tmp_path / "status")
    other = Board(2, tmp_path / "status", make=False)
    assert str(board.read(1)) == "start"
    other.write(1, "decode, token", 4, 9)
    assert board.read(1) == Status("decode, token", 4, 9)
    assert [str(s) for s in (board.read(1), Status("load", 0, 0), Status("ring", 3, 3))] == [
        "decode, token, step 5 of 9",
        "load",
        "ring, step 3 of 3",
    ]
    other.fail(1, "error", "first")
    other.fail(0, "communication", "é" * 5000)
    failures = board.failures()
    assert [(f.rank, f.kind) for f in failures] == [(1, "error"), (0, "communication")]
    assert failures[0].message == "first" and failures[1].message.startswith("éé")


def test_a_rank_that_comes_too_late_leaves_nothing_and_says_nothing(tmp_path):
    """The launching process has ended, and removed its folder, before the rank looked there."""
    (tmp_path / "gone").mkdir()
    missing = str(tmp_path / "gone" / "status")
    process = start(
        tmp_path,
        script=f"""
import os
from cptool.distributed import local
local._die_with_launcher = lambda: None
ranks = local.RankOptions(cp=2)
seat = local.Seat(0, 2, 0, 2)
local._rank_main(seat, print, (), ranks=ranks, path={missing!r}, folder="", answer=None)
""",
        env={**os.environ, "PYTHONPATH": str(Path(launch.__file__).parents[2])},
    )
    assert process.communicate(timeout=GENEROUS_S) == ("", "") and process.returncode == 1
    assert list((tmp_path / "gone").iterdir()) == []


def test_ranks_are_a_call_away_for_programs_of_users():
    from cptool import distributed

    assert distributed.run(lambda world, x: (world.cp, x), 3, cp=1, device="cpu") == (1, 3)
