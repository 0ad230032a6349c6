"""What progress bars say, from the share of the work that is done."""

import contextlib
import ctypes
import io
from types import SimpleNamespace

import pytest
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn
from terminal import terminal

from cptool.cli import progress
from cptool.distributed.status_board import IDLE, Board, Work


def test_time_left_is_that_of_the_share():
    assert progress.figures(0.25, 30.0, 4000) == "25%, 33.3 tokens/s, 0:30, 1:30 left"
    assert progress.figures(0.001, 3.0, 4000) == "0%, 1.33 tokens/s, 0:03"
    assert progress.figures(0.999, 3661.0) == "99%, 1:01:01, 0:04 left"
    assert progress.figures(1.0, 9.0) == "100%, 0:09"
    assert progress.figures(0.0, 0.0, 5) == "0%, 0:00"


def test_time_left_goes_by_the_last_two_thirds_of_the_time():
    steady = progress.Pace(10.0)
    for second in range(1, 100):
        assert steady.left(10.0 + second, second / 100) == pytest.approx(100 - second)
    # A fifth in 40 s, and then twice as fast.
    faster = progress.Pace(0.0)
    shares = [(t, t / 200 if t <= 40 else 0.2 + (t - 40) / 100) for t in range(0, 121, 5)]
    left = [faster.left(t, share) for t, share in shares]
    assert left[0] is None and left[8] == pytest.approx(160)
    assert left[-1] == pytest.approx(0, abs=1e-9) and left[-2] == pytest.approx(5, rel=0.05)
    assert steady.left(150.0, 0.99) > 1  # while nothing is done, it grows


@pytest.fixture
def drawn(monkeypatch):
    """A bar of 80 columns at 100 s of the clock, and what it has drawn."""
    monkeypatch.setattr(progress.time, "monotonic", lambda: 100.0)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        TextColumn("{task.fields[figures]}"),
    )
    console = Console(file=io.StringIO(), width=80)
    bars = Progress(*columns, console=console, expand=True, auto_refresh=False)
    bar = progress.Bar(bars, "start the ranks")

    def line():
        with console.capture() as captured:
            console.print(bars.make_tasks_table(bars.tasks))
        (only,) = captured.get().splitlines()
        return only

    return bar, line


def test_a_line_says_what_is_read_and_fits(drawn):
    bar, line = drawn
    board = Board(1)
    bar.watch(board)
    assert line().startswith("start the ranks ")
    board.write(0, IDLE)
    bar.watch(board)
    assert line().startswith("start the ranks ")
    work = Work(tokens=3812, began=60.0, share=0.2)
    board.write(0, "prefill, layer", 6, 30, work=work)
    bar.watch(board)
    assert line().startswith("reading 3,812 tokens, layer 7 of 30 ")
    assert line().endswith(" 20%, 19.1 tokens/s, 0:40, 2:40 left") and len(line()) == 80
    board.write(0, "prefill, layer", 6, 30, work=Work(tokens=3812, began=60.0, share=0.1))
    bar.watch(board)
    assert " 20%, " in line()  # it never goes back
    work = Work(tokens=1_128_000, began=-4e5, share=0.5)
    board.write(0, "prefill, layer", 99, 126, work=work)
    bar.watch(board)
    assert line().startswith("reading 1,128,000 tokens, layer 100 of 126 ")
    assert line().endswith(" 50%, 111:08:20 left") and len(line()) == 80
    work = Work(tokens=1_128_000, began=-4e5, share=0.6, done=9000, chunk=9, chunks=1128)
    board.write(0, "prefill, layer", 99, 126, work=work)
    bar.watch(board)
    assert line().startswith("reading 9,000 of 1,128,000 tokens, chunk 10 of 1,128 ")
    board.write(0, "decode, token", 4, 16)
    bar.watch(board)
    assert line().startswith("answering, token 5 of 16 ") and " 25%, 0:00, 0:00 left" in line()
    bar.end()
    bar.watch(board)  # has no effect any more


def test_the_share_grows_while_attention_computes():
    board = Board(1)
    work = Work(tokens=8, began=0.0, share=0.5, running=0.25, pairs=100, since=0)
    board.write(0, "prefill, layer", 2, 4, work=work)
    assert board.read(0).work.share == 0.5
    counter = ctypes.c_int64.from_address(board.pairs_address(0))
    for pairs, share in ((40, 0.6), (100, 0.75), (140, 0.75)):
        counter.value = pairs
        assert board.pairs(0) == pairs
        assert board.read(0).work.share == pytest.approx(share)
    assert not board.cancelled
    ctypes.c_int64.from_address(board.cancelled_address()).value = 1
    assert board.cancelled and not board.noticed and not board.cancellable
    board.cancel(False)
    board.notice()
    board.allow_cancelling()
    assert not board.cancelled and board.noticed and board.cancellable


def test_nothing_is_drawn_where_there_is_no_terminal(capfd):
    with progress.counting("measure", 3) as advance, progress.progress() as watch:
        advance()
    with progress.counted("pass", 3) as show, progress.following("run", 3) as follow:
        show(1)
    assert watch is None and follow is None and capfd.readouterr() == ("", "")


def test_a_phase_is_followed_through_several_launches(monkeypatch):
    drawn = []
    bar = SimpleNamespace(hidden=True, draw=lambda what, share, shown: drawn.append((what, share)))
    monkeypatch.setattr(progress, "drawn_bar", lambda first: contextlib.nullcontext(bar))
    monkeypatch.setattr(progress, "draws_bars", lambda: True)
    with progress.following("verify, run", 4) as watch:
        for done in (0, 2):
            board = Board(1)
            for phase in ("loading weights", "verify, run", "decode, token"):
                board.write(0, phase, done, 4)
                watch(board)
    assert drawn == [("verify, run 1 of 4", 0.0), ("verify, run 3 of 4", 0.5)]


def test_commands_that_compute_for_minutes_show_their_steps(tiny_model):
    emulate = ("bench", "emulate", "--shape", tiny_model, "--context", 4096, "--repeats", 2)
    for line, step in (
        (("verify", tiny_model, "--max-cp", 2), r"verify, run \d of 7"),
        (emulate, r"emulate, pass \d of 3"),
    ):
        with terminal(*line, "--device", "cpu") as command:
            command.wait_for(step)
            assert command.end() == 0
