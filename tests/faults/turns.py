"""Many turns of one session: its files, and the time and memory of a turn, stay flat."""

import contextlib
import io
import json
import os
import resource
import statistics
from pathlib import Path

TOKENS = 2
"""Tokens of each turn."""


def run(model: Path, directory: Path, count: int, watch=lambda text: None) -> dict:
    """Takes `count` turns, each a command in a fork of this process.

    Returns, for the first and for the last tenth, the median processor seconds of a turn (which
    other programs of the machine change little) and its largest memory; and how many files the
    session came to have.
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
        code, said, usage = _fork(arguments)
        if code:
            raise RuntimeError(f"turn {turn}: {said}")
        seconds.append(usage.ru_utime + usage.ru_stime)
        memory.append(usage.ru_maxrss)
        files.append(len(list(directory.iterdir())))
        if turn % 100 == 99:
            watch(f"{turn + 1} turns: {seconds[-1]:.2f} s, {memory[-1]} kB, {files[-1]} files")
    tenth = max(1, count // 10)
    return {
        "turns": count,
        "processor_seconds": [
            statistics.median(seconds[:tenth]),
            statistics.median(seconds[-tenth:]),
        ],
        "kilobytes": [max(memory[:tenth]), max(memory[-tenth:])],
        "files": [files[tenth - 1], files[-1]],
        "most_files": max(files),
    }


def _fork(arguments: list[str]) -> tuple[int, str, resource.struct_rusage]:
    """Exit code, what was written to standard error, and the resources that the process used."""
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
        os.write(theirs, json.dumps([code, err.getvalue()[-500:]]).encode())
        os._exit(0)
    os.close(theirs)
    with os.fdopen(ours) as reader:
        said = reader.read()
    _, _, usage = os.wait4(pid, 0)
    code, message = json.loads(said) if said else (1, "it crashed")
    return code, message, usage
