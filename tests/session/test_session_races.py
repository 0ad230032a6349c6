"""Two runs on one session: the first to commit wins, and what the other computed is kept beside
it; whatever happens, the session stays whole.
"""

import os
import shutil
import stat
import subprocess
import sys
from contextlib import ExitStack

import pytest
from test_cli import MQA_IDS, as_json, cptool
from test_session import MODEL, new_cache, save_turn, store

from cptool.errors import RunError
from cptool.session import committing, maintenance, restoring, segments
from cptool.session import store as session
from cptool.session.manifest import Manifest, Sequence
from cptool.sharding import balanced


@pytest.fixture
def saved(tmp_path):
    directory = tmp_path / "s"
    return directory, save_turn(directory, [40, 7], [0, 0], 2, 1, None)


def began(directory, previous: Manifest | None, held: ExitStack, lengths=(3, 3)) -> Manifest:
    """The manifest of a turn on top of `previous` whose segment is written and not committed."""
    sequences = previous.sequences if previous else (Sequence(tokens=(), cached=0),) * 2
    starts = [s.cached for s in sequences]
    cache = new_cache(2)
    store(cache, balanced(list(lengths), 1, starts=starts).placement(0))
    total = [a + n for a, n in zip(starts, lengths, strict=True)]
    directory.mkdir(exist_ok=True)
    segment = segments.write_segment(
        directory,
        cache,
        segments.Addition(
            revision=previous.revision + 1 if previous else 1,
            rank=0,
            kv_heads=(0, 4),
            since=(0, 0),
            start=tuple(starts),
            until=tuple(total),
        ),
        logits={},
        held=held,
    )
    return Manifest(
        session=previous.session if previous else "7" * 16,
        model=previous.model if previous else MODEL,
        dtype="float32",
        kv_dtype="float32",
        weights="file",
        cp=1,
        tp=1,
        revision=segment.revision,
        turns=(*(previous.turns if previous else ()), tuple(n + 1 for n in total)),
        sequences=tuple(
            Sequence(tokens=tuple(range(n + 1)), cached=n) for n in total
        ),  # the last one is pending
        segments=(*(previous.segments if previous else ()), segment),
    )


def kept(directory):
    """The sessions beside `directory`."""
    return sorted(p for p in directory.parent.iterdir() if p.name.startswith(f"{directory.name}."))


def lose(directory, manifest: Manifest) -> Manifest:
    """What is kept of a turn that another run was faster than."""
    before = {p.name: p.read_bytes() for p in directory.iterdir()} if directory.exists() else {}
    with pytest.raises(RunError, match=r"this run's turn is kept in .* continue it with") as told:
        committing.commit_or_keep(directory, manifest)
    (place,) = kept(directory)
    assert str(place) in str(told.value) and "\n" not in str(told.value)
    found = session.load(place)
    assert maintenance.problems(place, found) == []
    assert [s.tokens for s in found.sequences] == [s.tokens for s in manifest.sequences]
    assert found.session != manifest.session
    # The session is as the other run left it, and nothing of the lost turn stays there.
    own = {s.file for s in manifest.segments if s.revision == manifest.revision}
    after = {p.name: p.read_bytes() for p in directory.iterdir()} if directory.exists() else {}
    assert after == {name: data for name, data in before.items() if name not in own}
    return found


def turn(directory, manifest):
    save_turn(directory, [1, 1], [40, 7], 2, 1, manifest)


def rewritten(directory, manifest):
    maintenance.compact(directory, manifest)


def gone_back(directory, manifest):
    maintenance.roll_back(directory, manifest, 1)


@pytest.mark.parametrize("faster", [turn, rewritten])
def test_the_turn_of_the_slower_run_is_kept(saved, faster):
    directory, manifest = saved
    with ExitStack() as held:
        slower = began(directory, manifest, held)
        faster(directory, manifest)
        winner = session.load(directory)
        assert maintenance.problems(directory, winner) == []
        found = lose(directory, slower)
    assert session.load(directory) == winner
    # A compaction removes the segments that the slower run needs: it computes their KV again.
    assert [s.cached for s in found.sequences] == ([43, 10] if faster is turn else [0, 0])


def test_a_rollback_wins_over_a_turn(saved):
    directory, manifest = saved
    second = save_turn(directory, [1, 1], [40, 7], 2, 1, manifest)
    with ExitStack() as held:
        slower = began(directory, second, held)
        gone_back(directory, second)
        lose(directory, slower)
    assert [len(s.tokens) for s in session.load(directory).sequences] == [40, 7]


def test_the_first_turns_of_two_runs(tmp_path):
    directory = tmp_path / "s"
    with ExitStack() as held:
        slower = began(directory, None, held)
        winner = save_turn(directory, [9, 2], [0, 0], 2, 1, None)
        assert [s.cached for s in lose(directory, slower).sequences] == [3, 3]
    assert session.load(directory) == winner


def test_another_session_in_the_same_place(saved):
    """The same revision of another session is not continued by accident."""
    directory, manifest = saved
    with ExitStack() as held:
        slower = began(directory, manifest, held)
        other = began(directory, None, held)
        shutil.rmtree(directory)
        directory.mkdir()
        committing.commit(directory, Manifest.without_kv(other))
        lose(directory, slower)
    assert session.load(directory).session == other.session


def test_a_directory_that_is_gone(saved):
    directory, manifest = saved
    with ExitStack() as held:
        slower = began(directory, manifest, held)
        shutil.rmtree(directory)
        assert [s.cached for s in lose(directory, slower).sequences] == [0, 0]
    assert not directory.exists()


def test_a_segment_that_is_gone(saved):
    directory, manifest = saved
    with ExitStack() as held:
        slower = began(directory, manifest, held)
        (directory / manifest.segments[0].file).unlink()
        assert [s.cached for s in lose(directory, slower).sequences] == [0, 0]


@pytest.mark.parametrize("loser", [rewritten, gone_back])
def test_maintenance_that_lost_changes_nothing(saved, loser, monkeypatch):
    directory, manifest = saved
    before = save_turn(directory, [1, 1], [40, 7], 2, 1, manifest)
    commit, winner = committing.commit, []

    def after_another(directory, manifest):
        if not winner:
            winner.append(None)
            winner.append(save_turn(directory, [2, 2], [41, 8], 1, 1, before))
        return commit(directory, manifest)

    monkeypatch.setattr(committing, "commit", after_another)
    with pytest.raises(RunError, match=r"changed by another run .* nothing was changed"):
        loser(directory, before)
    assert session.load(directory) == winner[1] and kept(directory) == []
    assert maintenance.problems(directory, winner[1]) == []


@pytest.mark.parametrize(
    ("home", "step"),
    [(segments, "verify"), (restoring, "read_logits"), (restoring, "restore")],
)
def test_a_session_that_changes_while_it_is_read(saved, home, step, monkeypatch):
    """Segments that another run has removed are not called damaged; those that nobody replaced
    are.
    """
    directory, manifest = saved
    read = getattr(home, step)

    def after_another(*arguments, **named):
        monkeypatch.undo()
        maintenance.compact(directory, manifest)
        return read(*arguments, **named)

    monkeypatch.setattr(home, step, after_another)
    with pytest.raises(RunError, match="was changed by another run while it was read; give the"):
        maintenance.compact(directory, manifest)
    found = session.load(directory)
    assert found.revision == 2 and maintenance.problems(directory, found) == []
    (directory / found.segments[0].file).unlink()
    with pytest.raises(session.Damaged, match="is missing"):
        maintenance.compact(directory, found)


def test_what_a_living_run_has_written_stays(saved):
    """Another run commits, and later another; the segment of the first is there until it ends."""
    directory, manifest = saved
    with ExitStack() as held:
        written = directory / began(directory, manifest, held).segments[-1].file
        second = save_turn(directory, [1, 1], [40, 7], 2, 1, manifest)
        third = save_turn(directory, [1, 1], [41, 8], 2, 1, second)
        assert written.exists() and committing.is_held(written)
    assert not committing.is_held(written)
    save_turn(directory, [1, 1], [42, 9], 2, 1, third)
    assert not written.exists()


def test_the_next_revision_of_a_run_that_waits_stays(saved):
    """A run that begins right after a commit has written its segment before that commit's sweep."""
    directory, manifest = saved
    waiting = ExitStack()
    replaced = session.files.replace_whole

    def overtaken(path, data):
        replaced(path, data)
        committed.append(began(directory, session.load(directory), waiting))

    committed = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(session.files, "replace_whole", overtaken)
        save_turn(directory, [1, 1], [40, 7], 2, 1, manifest)
    waiting.close()  # as on a file system without locks
    committing.commit(directory, committed[0])
    assert maintenance.problems(directory, session.load(directory)) == []


@pytest.mark.parametrize("umask", [0, 0o777])
def test_a_session_is_for_its_user_alone(tmp_path, umask, mqa_path):
    code = (
        "import os, sys; os.umask(int(sys.argv[1])); sys.argv[1:2] = []\n"
        "from cptool.cli.main import main; main()"
    )
    where = tmp_path / "some" / "where"
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            code,
            str(umask),
            "prefill",
            mqa_path,
            "--synthetic",
            "9",
            "--session",
            where,
            "--cp",
            "1",
        ],
        env={**os.environ, "CPTOOL_CACHE": str(tmp_path / "cache")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    for place in (where, where.parent):
        assert stat.S_IMODE(place.stat().st_mode) == 0o700
    assert len(list(where.iterdir())) == 2
    assert {stat.S_IMODE(file.stat().st_mode) for file in where.iterdir()} == {0o600}


def test_links_in_a_session_are_not_written_through(saved, tmp_path):
    directory, manifest = saved
    victim = tmp_path / "victim"
    victim.write_text("precious")
    for name in ("manifest.tmp", "manifest.json.0123abcd.tmp", "chat.tmp"):
        (directory / name).symlink_to(victim)
    save_turn(directory, [1, 1], [40, 7], 2, 1, manifest)
    assert victim.read_text() == "precious"


@pytest.mark.parametrize("cp", [1, 2])
def test_decode_that_was_overtaken(mqa_path, token_file, tmp_path, monkeypatch, cp):
    """By the command line: the answer that was given goes on in the session beside."""
    where = tmp_path / "s"
    prompt = ("--token-ids", token_file(MQA_IDS[:50]))
    as_json("prefill", mqa_path, *prompt, "--session", where)
    whole = tmp_path / "whole"
    shutil.copytree(where, whole)
    if cp == 1:
        write = segments.write_segment

        def overtaken(*arguments, **named):
            with monkeypatch.context() as patch:
                patch.setattr(segments, "write_segment", write)
                as_json("decode", where, "-n", 2)
            return write(*arguments, **named)

        monkeypatch.setattr(segments, "write_segment", overtaken)
        told = cptool("decode", where, "-n", 5, "--json", code=1).stderr
        monkeypatch.undo()
    else:  # ranks are processes of their own: the other run comes while they start
        from cptool.cli import launch

        run_turn = launch.run_turn

        def overtaken(*arguments, **named):
            monkeypatch.undo()
            as_json("decode", where, "-n", 2, "--cp", 1)
            return run_turn(*arguments, **named)

        monkeypatch.setattr(launch, "run_turn", overtaken)
        told = cptool("decode", where, "-n", 5, "--cp", 2, "--json", code=1).stderr
        assert "changed by another run" in told and len(told.splitlines()) == 1
        assert kept(where) == []  # nothing had been computed yet
        return
    (place,) = kept(where)
    assert f"continue it with: cptool decode {place}" in told and len(told.splitlines()) == 1
    cptool("session", "verify", where)
    cptool("session", "verify", place)
    as_json("decode", whole, "-n", 5)
    answers = [as_json("decode", each, "-n", 4)["token_ids"] for each in (place, whole)]
    assert answers[0] == answers[1]
