"""Many turns of one session: its files, and the time and memory of a turn, stay flat."""

import contextlib
import io
import json
import os
import resource
import statistics
import time
from pathlib import Path

TOKENS = 2
"""Tokens of each turn."""


def run(model: Path, directory: Path, count: int, watch=lambda text: None) -> dict:
    """Takes `count` turns, each a command in a fork of this process.

    Returns, of the first and of the last tenth, the median seconds and the largest memory of a
    turn; and how many files the session came to have.
    """
    from damaged import _warm_up

    _warm_up()
    rest = ["--threads", "1", "--device", "cpu", "--json"]
    ids = directory.parent / "ids.json"
    seconds, memory, files = [], [], []
    for turn in range(count):
        ids.write_text(json.dumps([2 + turn % 200, 3 + turn % 150]))
        arguments = ["decode", str(directory), "--token-ids", str(ids), "-n", "1", *rest]
        if turn == 0:
            arguments = ["prefill", str(model), "--token-ids", str(ids), "--session"]
            arguments += [str(directory), *rest]
        began = time.perf_counter()
        code, kilobytes, said = _fork(arguments)
        seconds.append(time.perf_counter() - began)
        if code:
            raise RuntimeError(f"turn {turn}: {said}")
        memory.append(kilobytes)
        files.append(len(list(directory.iterdir())))
        if turn % 100 == 99:
            watch(f"{turn + 1} turns: {seconds[-1]:.2f} s, {kilobytes} kB, {files[-1]} files")
    tenth = max(1, count // 10)
    return {
        "turns": count,
        "seconds": [statistics.median(seconds[:tenth]), statistics.median(seconds[-tenth:])],
        "kilobytes": [max(memory[:tenth]), max(memory[-tenth:])],
        "files": [files[tenth - 1], files[-1]],
        "most_files": max(files),
    }


def _fork(arguments: list[str]) -> tuple[int, int, str]:
    """Exit code, largest resident memory in kB, and what was said on standard error."""
    ours, theirs = os.pipe()
    pid = os.fork()
    if pid == 0:
        from cptool.cli.main import main

        err, code = io.StringIO(), 1
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(err):
            try:
                main(arguments)
            except SystemExit as stop:
                code = stop.code or 0
            except BaseException as error:
                err.write(repr(error))
        kilobytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        os.write(theirs, json.dumps([code, kilobytes, err.getvalue()[-500:]]).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as reader:
        said = reader.read()
    os.waitpid(pid, 0)
    return tuple(json.loads(said)) if said else (1, 0, "it crashed")
