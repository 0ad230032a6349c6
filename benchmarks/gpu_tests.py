"""Runs tests that a GPU may not survive, and reports all of them all the same.

    python benchmarks/gpu_tests.py [-k WORDS] [--limit S] [--patience S] --json FILE TEST_FILE...

An illegal address leaves the process that met it without a device, and a kernel that waits for ever
leaves it without an end. So a process that lost its device is replaced by another, which goes on
with the tests that are left; a test that does not end is killed with its process. Every result is
kept as it comes. Exits with 1 if a test did not pass, or was not run before the limit.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from gpu_timing import arguments, parser, write

MOST_PROCESSES = 12


class Session:
    """The tests so far; `folder` holds what the processes of pytest write."""

    def __init__(self, given: Any, folder: Path) -> None:
        self.given, self.folder = given, folder
        self.results: dict[str, dict[str, Any]] = {}
        self.processes, self.unfinished = 0, ""
        self.end = time.monotonic() + given.limit

    def read(self) -> str:
        """Take in what the process has written; return the test that it is at, "" for none."""
        path, at = self.folder / f"{self.processes}.jsonl", ""
        lines = path.read_text().splitlines() if path.exists() else []
        for line in lines:
            with contextlib.suppress(json.JSONDecodeError):  # half a line of a process that died
                fields = json.loads(line)
                at = fields.get("begins", "")
                # A test fails in its call and in its teardown: the first is why.
                if fields.get("test") and fields["test"] not in self.results:
                    self.results[fields["test"]] = fields
        return at

    def run_process(self) -> int | None:
        """Run one process of pytest and return its exit code; None if it was stopped."""
        self.processes += 1
        seen = self.folder / "seen.json"
        seen.write_text(json.dumps(list(self.results)))
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["-p", "gpu_test_lines", "--continue-on-collection-errors", "--tb=short"]
        command += ["--lines", str(self.folder / f"{self.processes}.jsonl"), "--seen", str(seen)]
        command += ["-k", self.given.k] if self.given.k else []
        path = os.pathsep.join([str(Path(__file__).parent), os.environ.get("PYTHONPATH", "")])
        process = subprocess.Popen(
            [*command, *self.given.files],
            env=os.environ | {"PYTHONPATH": path},
            start_new_session=True,
        )
        at, since = "", time.monotonic()
        while process.poll() is None:
            time.sleep(0.1)
            now, before = time.monotonic(), at
            at = self.read()
            since = now if at != before else since
            late = bool(at) and now - since > self.given.patience
            if late or now > self.end:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
                if late:
                    self._failed(at, f"no end within {self.given.patience:g} s")
                return None
        at = self.read()
        if at:
            self._failed(at, f"its process died with exit code {process.returncode}")
        return process.returncode

    def _failed(self, test: str, why: str) -> None:
        self.results.setdefault(test, {"test": test, "outcome": "failed", "why": why})

    def run(self) -> None:
        """Run processes until all tests have run, the time is over, or too many have died."""
        while self.processes < MOST_PROCESSES:
            before = len(self.results)
            code = self.run_process()
            self.write()
            if code in (0, 1, 5):  # all passed, some failed, none is left
                return
            if time.monotonic() > self.end:
                self.unfinished = f"the limit of {self.given.limit:g} s"
                break
            if len(self.results) == before:
                self.unfinished = f"pytest, which ended with {code} before any test"
                break
        self.unfinished = self.unfinished or f"{MOST_PROCESSES} processes that died"
        self.write()

    def write(self) -> None:
        count = {name: 0 for name in ("passed", "failed", "skipped")}
        wrong = []
        for fields in self.results.values():
            count[fields["outcome"]] += 1
            if fields["outcome"] == "failed":
                wrong.append({"test": fields["test"], "why": fields["why"]})
        self.passed = not wrong and not self.unfinished
        write(
            self.given,
            {
                **count,
                "processes": self.processes,
                "ended_by": self.unfinished or None,
                "not_passed": wrong,
            },
        )


def main() -> int:
    options = parser(__doc__.partition("\n\n")[0])
    options.add_argument("-k", default="", help="as in pytest")
    options.add_argument("--limit", type=float, default=540, help="seconds for all tests")
    options.add_argument("--patience", type=float, default=60, help="seconds for one test")
    options.add_argument("files", nargs="+")
    given = arguments(options)
    with tempfile.TemporaryDirectory() as folder:
        session = Session(given, Path(folder))
        session.run()
    for fields in session.results.values():
        if fields["outcome"] == "failed":
            print(f"FAILED {fields['test']}: {fields['why']}")
    if session.unfinished:
        print(f"not all tests were run: {session.unfinished}")
    return 0 if session.passed else 1


if __name__ == "__main__":
    sys.exit(main())
