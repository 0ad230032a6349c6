"""The whole of run.py, by `pytest -m slow tests/faults`."""

import subprocess
import sys
from pathlib import Path

import pytest

RUN = Path(__file__).with_name("run.py")


def run(*arguments) -> None:
    done = subprocess.run(
        [sys.executable, str(RUN), *map(str, arguments)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-5000:]


@pytest.mark.slow
@pytest.mark.parametrize("what", ["files", "kills", "turns"])
def test_nothing_is_lost_or_wrong(what):
    others = {"files", "kills", "turns"} - {what}
    run(*[argument for name in sorted(others) for argument in (f"--{name}", 0)])
