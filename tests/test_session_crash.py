"""kill -9 at any write of a turn, of a rollback or of compaction leaves a sound session: the one
before, or the one after.
"""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from test_session import save_turn

from cptool import segments, session, session_care


def kill_at(point: int) -> None:
    """Ends this process with SIGKILL before or after the `point`-th operation on the file system,
    or in the middle of a write.
    """
    passed = 0

    def step() -> None:
        nonlocal passed
        passed += 1
        if passed == point:
            os.kill(os.getpid(), signal.SIGKILL)

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

    around(
        safetensors.torch,
        "save_file",
        torn=lambda tensors, path: Path(path).write_bytes(b"half a segment"),
    )
    around(
        Path,
        "write_text",
        torn=lambda path, text: path.write_bytes(text[: len(text) // 2].encode()),
    )
    for name in ("rename", "replace", "unlink"):
        around(Path, name)
    around(session, "sync")
    around(segments, "sync")


def turn(directory, manifest):
    save_turn(directory, [5, 3], [40, 7], 2, 1, manifest)


def rollback(directory, manifest):
    session_care.roll_back(directory, manifest, 1)


def compact(directory, manifest):
    session_care.compact(directory, manifest)


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
        assert session_care.problems(directory, found) == []
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


@pytest.mark.parametrize("name", CHANGES)
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


def test_a_full_disk_is_one_line_and_changes_nothing(tmp_path, monkeypatch):
    directory = tmp_path / "s"
    before = save_turn(directory, [30, 7], [0, 0], 2, 1, None)

    def no_room(tensors, path):
        Path(path).write_bytes(b"half a segment")
        raise safetensors.SafetensorError(
            "Error while serializing: I/O error: No space left on device (os error 28)"
        )

    monkeypatch.setattr(safetensors.torch, "save_file", no_room)
    with pytest.raises(OSError, match="cannot be written"):
        save_turn(directory, [5, 3], [30, 7], 2, 1, before)
    assert session.load(directory) == before
    assert session_care.problems(directory, before) == []


if __name__ == "__main__":
    torch.set_num_threads(1)
    kill_at_every_point(CHANGES[sys.argv[1]], Path(sys.argv[2]))
