"""A pytest plugin for `gpu_tests.py`: a line of JSON as each test begins and ends, so that a
process that dies takes no other test's result with it.

`--lines FILE`: where the lines go. `--seen FILE`: JSON list of the tests to leave out.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

LOST = ("CUDA error", "AcceleratorError", "CUBLAS_STATUS", "device-side assert")
"""What is in the message of an error after which every call of the process fails, too."""


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--lines", type=Path)
    parser.addoption("--seen", type=Path)


def pytest_configure(config: pytest.Config) -> None:
    config.pluginmanager.register(Lines(config), "gpu-test-lines")


class Lines:
    def __init__(self, config: pytest.Config) -> None:
        self.path: Path = config.option.lines
        self.seen = set(json.loads(config.option.seen.read_text()))
        self.lost = False

    def say(self, **fields: object) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(fields) + "\n")

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = [item for item in items if item.nodeid not in self.seen]

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say(test=report.nodeid, outcome="failed", why=_reason(report))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say(begins=nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" or report.outcome != "passed":
            why = _reason(report) if report.outcome == "failed" else ""
            self.lost |= any(word in why for word in LOST)
            self.say(test=report.nodeid, outcome=report.outcome, why=why, seconds=report.duration)

    @pytest.hookimpl(trylast=True)
    def pytest_runtest_teardown(self, item: pytest.Item) -> None:
        if self.lost:
            item.session.shouldstop = "the device is lost to this process"


def _reason(report: pytest.CollectReport | pytest.TestReport) -> str:
    """Return the first line of why, and of all that was said, what tells of a lost device."""
    text = report.longreprtext
    errors = [line[1:].strip() for line in text.splitlines() if line.startswith("E ")]
    return " ".join(" ".join(errors or [text[-200:]]).split())[:300]
