"""Commands with standard streams that are closed, full or abandoned, and signals that come at
inconvenient moments.
"""

import codecs
import io
import os
import signal
import subprocess
import sys

import pytest

from cptool.cli.chat.lines import questions
from cptool.session import store

CPTOOL = [sys.executable, "-m", "cptool"]


def shell(command: str, *arguments, **options) -> subprocess.CompletedProcess:
    """`command` in bash, where $@ is the cptool command with `arguments`."""
    return subprocess.run(
        ["bash", "-c", command, "bash", *CPTOOL, *map(str, arguments)],
        capture_output=True,
        text=True,
        **options,
    )


def test_closed_streams_do_not_give_their_numbers_to_files(tiny_model, tmp_path):
    """What is printed must not go into the session that is written meanwhile."""
    made = tmp_path / "s"
    done = shell('"$@" <&- >&- 2>&-', "prefill", tiny_model, "--synthetic", 9, "--session", made)
    assert done.returncode == 0
    assert store.load(made).turns == ((9,),)
    assert all(b"first token" not in file.read_bytes() for file in made.iterdir())


@pytest.mark.parametrize("arguments", [["--help"], ["plan", "llama3-8b", "--context", "8K"]])
def test_output_that_cannot_be_written_is_one_line_and_a_reader_that_has_gone_none(arguments):
    done = shell('"$@" > /dev/full', *arguments)
    assert (done.returncode, done.stderr) == (
        1,
        "cptool: standard output: No space left on device\n",
    )
    done = shell('"$@" | true; exit ${PIPESTATUS[0]}', *arguments)
    assert done.returncode in (0, 1) and done.stderr == ""
    done = shell('"$@" 2> /dev/full', *arguments)
    assert done.returncode == 0 and done.stdout


def test_characters_that_the_output_lacks_are_replaced(tiny_model, tmp_path):
    """In a name of a file, which may be bytes of no encoding at all."""
    name = os.fsdecode(os.fsencode(tmp_path) + b"/m\xff")
    os.symlink(tiny_model, name)
    made = os.fsdecode(os.fsencode(tmp_path) + b"/s\xfe")
    done = shell(
        '"$@"',
        "prefill",
        name,
        "--synthetic",
        9,
        "--session",
        made,
        env=os.environ | {"PYTHONIOENCODING": "latin-1:strict"},
    )
    assert done.returncode == 0 and done.stderr == "" and "/s?; continue" in done.stdout
    missing = shell('"$@"', "session", "show", made + "x", env=os.environ | {"LC_ALL": "C"})
    assert missing.returncode == 2 and len(missing.stderr.splitlines()) == 1


def test_a_directory_that_is_gone_is_one_line(tmp_path):
    (tmp_path / "gone").mkdir()
    command = f'cd {tmp_path}/gone; rmdir ../gone; "$@"'
    path = os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)}
    done = shell(command, "plan", "llama3-8b", "--context", "8K", env=path)
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr == "cptool: the current directory was removed; change to one that exists\n"


def interrupted(script: str, number: int, **options) -> subprocess.CompletedProcess:
    """What becomes of a Python `script` that gets a signal once it has printed a line."""
    with subprocess.Popen(
        [sys.executable, "-c", script],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    ) as process:
        assert process.stdout.readline() == "now\n"
        process.send_signal(number)
        output, errors = process.communicate(timeout=60)
    return subprocess.CompletedProcess(script, process.returncode, output, errors)


ENTRY = "from cptool.cli.entry import main; main()"


def test_ctrl_c_while_the_command_line_is_imported_is_one_line(tmp_path):
    (tmp_path / "click.py").write_text(
        "import os, time\nos.write(1, b'now\\n')\n"
        "try: time.sleep(60)\nexcept BaseException: raise ImportError\n"
    )
    path = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *filter(None, sys.path)])}
    done = interrupted(ENTRY, signal.SIGINT, env=path)
    assert (done.returncode, done.stderr) == (130, "cptool: interrupted\n")


BUSY = """
import hashlib, sys
from cptool.distributed import signals
from cptool.cli import entry, main, streams
from cptool.host.scratch import make_folder
signals.PATIENCE_S = 0.1
def name(self, ctx, asked):
    with make_folder({place!r}):
        print("now", flush=True)
        {busy}
main.Commands.get_command = name
sys.argv = ["cptool", "plan"]
entry.main()
"""


@pytest.mark.parametrize(
    "number, line",
    [
        (signal.SIGINT, "cptool: interrupted\n"),
        (signal.SIGTERM, ""),
        (signal.SIGHUP, ""),
    ],
)
def test_a_long_operation_is_ended_in_time_and_leaves_no_folder(tmp_path, number, line):
    """Python runs no handler while one call computes, as a layer of a long prompt does."""
    busy = "hashlib.pbkdf2_hmac('sha256', b'x', b'y', 1 << 30)"
    done = interrupted(BUSY.format(place=str(tmp_path), busy=busy), number)
    assert (done.returncode, done.stdout, done.stderr) == (128 + number, "", line)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupt_that_a_library_swallows_is_not_lost(tmp_path):
    busy = "\n".join(
        [
            "import time",
            "    while True:",
            "        try: time.sleep(60)",
            "        except BaseException: pass",
        ]
    )
    done = interrupted(BUSY.format(place=str(tmp_path), busy=busy), signal.SIGINT)
    assert (done.returncode, done.stderr) == (130, "cptool: interrupted\n")


def test_an_exception_of_any_kind_is_one_line():
    """Also of a kind that is no Exception, as a panic in Rust is."""
    script = """
import sys
from cptool.cli import entry, main
class Panic(BaseException): pass
def fail(self, ctx, name): raise {}
main.Commands.get_command = fail
sys.argv = ["cptool", "plan"]
entry.main()
"""
    for raised, told in (
        ("Panic('in\\nRust')", "cptool: internal error: Panic: in Rust ("),
        ("MemoryError", "cptool: out of memory in "),
        ("EOFError('x')", "cptool: internal error: EOFError: x ("),
    ):
        command = [sys.executable, "-c", script.format(raised)]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 1 and done.stderr.startswith(told), done.stderr
        assert len(done.stderr.splitlines()) == 1
    traced = subprocess.run(
        command, capture_output=True, text=True, env=os.environ | {"CPTOOL_TRACEBACK": "1"}
    )
    assert "Traceback" in traced.stderr


def test_a_byte_order_mark_before_the_first_line_is_none_of_it(monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(codecs.BOM_UTF8 + b"hi\r\n" + codecs.BOM_UTF8 + b"you"))
    monkeypatch.setattr(sys, "stdin", given)
    assert list(questions(paragraphs=False)) == ["hi", "\ufeffyou"]


def test_paragraphs_are_parted_by_blank_lines(monkeypatch):
    given = io.TextIOWrapper(io.BytesIO(b"\n a\r\nb\n \t\n\n/save x\n\nc\n\xff"))
    monkeypatch.setattr(sys, "stdin", given)
    assert list(questions(paragraphs=True)) == [" a\nb", "/save x", "c\n\udcff"]


@pytest.mark.parametrize("cp", [1, 2])
def test_tokens_arrive_in_the_process_that_prints(tiny_model, cp):
    """And what fails there is raised once the turn is over, and stops no rank."""
    from cptool.cli.launch import run_turn
    from cptool.distributed.options import RankOptions
    from cptool.engine.turn import Turn

    turn = Turn(model=str(tiny_model), prompts=((1, 2, 3), (4,)), dtype="float32", max_new_tokens=5)
    came, ranks = [], RankOptions(cp=cp, device="cpu")
    report = run_turn(turn, ranks, emit=lambda b, token, _: came.append((b, token, os.getpid())))
    assert came == [(b, report.token_ids[b][i], os.getpid()) for i in range(5) for b in (0, 1)]

    def fail(sequence, token, score):
        came.append(token)
        raise OSError("no room")

    with pytest.raises(OSError, match="no room"):
        run_turn(turn, ranks, emit=fail)
