"""kill -9 at any write of a turn, of a rollback or of compaction leaves a sound session: the one
before, or the one after.
"""

import datetime
import errno
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from test_session import HEADS, LAYERS, save_turn

from cptool import files
from cptool.distributed import launch
from cptool.distributed.options import RankOptions
from cptool.errors import RunError
from cptool.session import committing, maintenance, segments
from cptool.session import store as session
from cptool.session.manifest import ModelIdentity


def kill_this_process() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def kill_the_tree() -> None:
    os.killpg(0, signal.SIGKILL)


def kill_at(point: int, kill: Callable[[], None] = kill_this_process) -> None:
    """Kills before or after this process's `point`-th operation on the file system, or in the
    middle of a write.
    """
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            kill()

    def around(owner, name: str, torn=None) -> None:
        original = getattr(owner, name)

        def replacement(*args, **kwargs):
            step()
            if torn is not None and passed + 1 == point:
                torn(*args)
            result = original(*args, **kwargs)
            step()
            return result

        setattr(owner, name, replacement)

    around(files, "create")
    around(files, "write_all", torn=lambda file, data: file.write(data[: len(data) // 2]))
    for name in ("replace", "unlink"):
        around(Path, name)
    around(os, "fsync")


def turn(directory, manifest):
    save_turn(directory, [5, 3], [40, 7], 2, 1, manifest)


def rollback(directory, manifest):
    maintenance.roll_back(directory, manifest, 1)


def compact(directory, manifest):
    maintenance.compact(directory, manifest)


CHANGES = {"turn": turn, "rollback": rollback, "compact": compact}


def kill_at_every_point(change, places: Path) -> None:
    survived = set()
    for point in range(1, 200):
        directory = places / str(point)
        first = save_turn(directory, [30, 7], [0, 0], 2, 1, None)
        before = save_turn(directory, [10, 0], [30, 7], 3, 1, first)
        child = os.fork()
        if child == 0:
            kill_at(point)
            change(directory, before)
            os._exit(0)
        exitcode = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        found = session.load(directory)
        assert maintenance.problems(directory, found) == []
        assert found == before or found.revision == before.revision + 1
        survived.add(found.revision)
        if exitcode == 0:
            break
        assert exitcode == -signal.SIGKILL
        # What a killed run left behind must not keep the next one from working.
        after = save_turn(directory, [1, 1], [s.cached for s in found.sequences], 2, 1, found)
        assert {p.name for p in directory.iterdir()} == {"manifest.json"} | {
            s.file for s in after.segments
        }
    assert exitcode == 0 and point > 4
    assert survived == {before.revision, before.revision + 1}


def world_of(rank: int, size: int):
    from cptool.distributed.group import Group
    from cptool.distributed.status_board import Board
    from cptool.distributed.world import World

    group = Group() if size == 1 else Group(torch.distributed.group.WORLD, torch.device("cpu"))
    return World(
        rank=rank,
        size=size,
        local_rank=rank,
        local_size=size,
        cp_rank=rank,
        cp=size,
        tp_rank=0,
        tp=1,
        device=torch.device("cpu"),
        group=group,
        cp_group=group,
        board=Board(size),
    )


def tiny_llama():
    from cptool.model.config import LlamaConfig
    from cptool.model.llama import Llama

    torch.manual_seed(0)
    model = Llama(
        LlamaConfig(
            vocab_size=31,
            hidden_size=32,
            intermediate_size=32,
            num_hidden_layers=LAYERS,
            num_attention_heads=4,
            num_key_value_heads=HEADS,
            head_dim=8,
            rms_norm_eps=1e-5,
            rope_theta=1e4,
            max_position_embeddings=64,
            tie_word_embeddings=True,
        ),
        device="cpu",
    )
    for parameter in model.parameters():
        parameter.normal_()
    return model


IDENTITY = ModelIdentity(
    path="model",
    fingerprint="f" * 64,
    layers=LAYERS,
    kv_heads=HEADS,
    head_dim=8,
    vocab_size=31,
)


def tree_turn(model, rank: int, store: Path, directory: Path) -> None:
    """One of two ranks that continue a session and save it, as the commands have them."""
    from cptool.engine import saving
    from cptool.engine.engine import Engine

    torch.distributed.init_process_group(
        "gloo",
        init_method=f"file://{store}",
        rank=rank,
        world_size=2,
        timeout=datetime.timedelta(seconds=30),
    )
    manifest = session.load(directory)
    engine = Engine(model, world_of(rank, 2), batch=2)
    saving.restore(engine, directory, manifest)
    engine.extend([[3, 4, 5], [6]])
    saving.save(engine, directory, manifest, IDENTITY)


def kill_the_tree_at_every_point(places: Path) -> None:
    """Two ranks and the process that started them end at once, wherever either rank is."""
    from cptool.engine import saving
    from cptool.engine.engine import Engine

    model, base = tiny_llama(), places / "base"
    engine = Engine(model, world_of(0, 1), batch=2)
    engine.extend([[1, 2, 3, 4, 5, 6, 7], [8, 9]])
    before = saving.save(engine, base, None, IDENTITY)
    engine.extend([[3, 4, 5], [6]])
    after = [tuple(said) for said in engine.tokens]
    survived = {0: set(), 1: set()}
    for victim in survived:
        for point in range(1, 200):
            directory = places / f"{victim}-{point}"
            shutil.copytree(base, directory)
            leader = os.fork()
            if leader == 0:
                os.setsid()
                ranks = []
                for rank in range(2):
                    ranks.append(os.fork())
                    if ranks[-1] == 0:
                        if rank == victim:
                            kill_at(point, kill_the_tree)
                        tree_turn(model, rank, places / f"store-{victim}-{point}", directory)
                        os._exit(0)
                os._exit(max(os.waitstatus_to_exitcode(os.waitpid(r, 0)[1]) for r in ranks))
            exitcode = os.waitstatus_to_exitcode(os.waitpid(leader, 0)[1])
            found = session.load(directory)
            assert maintenance.problems(directory, found) == []
            assert found == before or [s.tokens for s in found.sequences] == after
            survived[victim].add(found.revision)
            # What is left carries on, with the logits that one rank has.
            engine = Engine(model, world_of(0, 1), batch=2)
            saving.restore(engine, directory, found)
            engine.extend([[7], [7]])
            saving.save(engine, directory, found, IDENTITY)
            if exitcode == 0:
                break
            assert exitcode == -signal.SIGKILL, exitcode
        assert exitcode == 0 and point > 4
    # Only the first rank replaces the manifest, after every segment is on disk.
    assert survived[0] == {1, 2} and 1 in survived[1]


CASES = [*CHANGES, "tree"]


@pytest.mark.parametrize("name", CASES)
def test_a_kill_at_any_write_leaves_a_sound_session(tmp_path, name):
    # In a process of its own: a fork of this one could find torch's threads in the middle of
    # something.
    command, paths = (
        [sys.executable, __file__, name, str(tmp_path)],
        os.pathsep.join(filter(None, sys.path)),
    )
    done = subprocess.run(
        command,
        env={**os.environ, "PYTHONPATH": paths},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO, errno.EDQUOT])
@pytest.mark.parametrize("at", range(1, 8))
def test_what_the_disk_refuses_is_one_line_and_changes_nothing(tmp_path, monkeypatch, error, at):
    """The `at`-th write or fsync of a turn of two segments and a manifest fails."""
    directory = tmp_path / "s"
    before = save_turn(directory, [30, 7], [0, 0], 2, 1, None)
    passed = 0

    def failing(original):
        def replacement(*arguments):
            nonlocal passed
            passed += 1
            if passed == at:
                raise OSError(error, os.strerror(error))
            return original(*arguments)

        return replacement

    monkeypatch.setattr(files, "write_all", failing(files.write_all))
    monkeypatch.setattr(os, "fsync", failing(os.fsync))
    with pytest.raises((RunError, OSError)) as told:
        save_turn(directory, [5, 3], [30, 7], 2, 1, before)
    monkeypatch.undo()
    assert os.strerror(error) in str(told.value) and "\n" not in str(told.value)
    assert session.load(directory) == before
    assert maintenance.problems(directory, before) == []
    after = save_turn(directory, [5, 3], [30, 7], 2, 1, before)
    assert {p.name for p in directory.iterdir()} == {"manifest.json"} | {
        s.file for s in after.segments
    }


def save_where_one_rank_cannot(world, directory: str, failing: str) -> list[list]:
    """What each rank is told where rank 1 cannot write, or rank 0 not commit; then all save."""
    from cptool.engine import saving
    from cptool.engine.engine import Engine

    engine = Engine(tiny_llama(), world, batch=1)
    engine.extend([[3, 4, 5, 6, 7]])
    owner, name = (segments, "write_segment") if failing == "write" else (committing, "commit")
    original = getattr(owner, name)

    def fail(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), "there")

    if world.rank == (1 if failing == "write" else 0):
        setattr(owner, name, fail)
    try:
        with pytest.raises((RunError, OSError)) as told:
            saving.save(engine, Path(directory), None, IDENTITY)
    finally:
        setattr(owner, name, original)
    saved = saving.save(engine, Path(directory), None, IDENTITY)
    return world.gather([str(told.value), list(saved.sequences[0].tokens)])


@pytest.mark.parametrize("failing", ["write", "commit"])
def test_where_one_rank_cannot_save_none_does_and_all_go_on(tmp_path, failing):
    place = str(tmp_path / "s")
    found = launch.run(
        save_where_one_rank_cannot, place, failing, ranks=RankOptions(cp=2, device="cpu")
    )
    assert all(os.strerror(errno.ENOSPC) in told for told, _ in found)
    assert [tokens for _, tokens in found] == [[3, 4, 5, 6, 7]] * 2
    manifest = session.load(tmp_path / "s")
    assert {p.name for p in (tmp_path / "s").iterdir()} == {"manifest.json"} | {
        s.file for s in manifest.segments
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    if sys.argv[1] == "tree":
        kill_the_tree_at_every_point(Path(sys.argv[2]))
    else:
        kill_at_every_point(CHANGES[sys.argv[1]], Path(sys.argv[2]))
