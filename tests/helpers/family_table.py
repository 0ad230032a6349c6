"""The README's table of families, made of what a run of the tests showed.

    CPTOOL_FAMILY_OUTCOMES=benchmarks/results/families.json pytest tests/model/test_family_tokens.py
    python tests/helpers/family_table.py

The first command records the outcome of each configuration that the tests compared, beside those
that earlier runs of other tests did; a new family takes its own tests alone (`-k`). The second
writes the table into the README. `tests/test_readme.py` holds the README against the outcomes, and
these against the families and configurations that there are.
"""

import datetime
import json
import platform
import re
import subprocess
import sys
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path

from families import CASES, META_FILES, NO_GGUF

ROOT = Path(__file__).resolve().parents[2]
README, OUTCOMES = ROOT / "README.md", ROOT / "benchmarks" / "results" / "families.json"
TABLE = re.compile(r"^\| family \|.*\n\| --- .*\n(?:\|.*\n)+", re.M)

CHECKS = ("1 rank", "2 ranks", "3 ranks", "tp 2", "chunks", "session", "GGUF", "Meta")
"""What is compared with the greedy tokens of transformers, each a column."""

REFUSED = "refused"
"""The check of one-line refusals, whose outcome is the line itself."""

_PROPERTY = "family outcome"


def family_of(case: str) -> str:
    """The name of the family of one of `CASES`."""
    kind = CASES[case][0]
    return "gemma3" if kind == "gemma3_text" else kind


class Recorder:
    """A plugin of pytest that writes what tests with `record` have shown to `path`.

    With several workers the controller writes, to which their reports come.
    """

    def __init__(self, path: Path):
        self.path = path
        self.found = defaultdict(lambda: defaultdict(dict))

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        for name, value in report.user_properties:
            if name == _PROPERTY:
                family, check, case, line = value
                passed = line or report.outcome
                self.found[family][check][case] = passed if report.passed else report.outcome

    def pytest_sessionfinish(self, session):
        if hasattr(session.config, "workerinput"):
            return
        commit = _git("describe", "--always", "--dirty", "--exclude=*")
        before = json.loads(self.path.read_text()) if self.path.is_file() else {}
        shown = _still_there(before.get("families", {}))
        for family, checks in self.found.items():
            for check, cases in checks.items():
                kept = shown.setdefault(family, {}).setdefault(check, {})
                kept.update({case: [outcome, commit] for case, outcome in cases.items()})
        runs = {
            **before.get("runs", {}),
            commit: {
                "date": datetime.date.today().isoformat(),
                "processor": _processor(),
                "transformers": version("transformers"),
                "torch": version("torch"),
            },
        }
        named = {run for checks in shown.values() for c in checks.values() for _, run in c.values()}
        outcomes = {
            "runs": {run: facts for run, facts in runs.items() if run in named},
            "families": shown,
        }
        self.path.write_text(json.dumps(outcomes, indent=1, sort_keys=True) + "\n")


def _still_there(shown: dict) -> dict:
    """The outcomes of configurations that the tests still have."""
    cases = expected()
    return {
        family: {
            check: {
                case: outcome
                for case, outcome in found.items()
                if check == REFUSED or case in cases[family][check]
            }
            for check, found in checks.items()
        }
        for family, checks in shown.items()
        if family in cases
    }


def recorder(record_property):
    """A function that tells the table which configuration a test compares in which check, or the
    line by which something of a family is refused.
    """

    def record(check: str, case: str, *, family: str | None = None, line: str = "") -> None:
        record_property(_PROPERTY, (family or family_of(case), check, case, line))

    return record


def _git(*arguments: str) -> str:
    done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip()


def _processor() -> str:
    names = re.findall(r"^model name\s*: (.*)$", Path("/proc/cpuinfo").read_text(), re.M)
    return names[0] if names else platform.machine()


def table(outcomes: dict) -> str:
    """The README's table: a row per family that cptool has, a column per check."""
    from cptool.model.architectures.registry import families

    columns = ["family", "models", "in `config.json`", *CHECKS, "refused"]
    lines = [columns, ["---"] * len(columns)]
    for family in families():
        shown = outcomes["families"].get(family.name, {})
        cells = [_cell(shown.get(check, {}), family, check) for check in CHECKS]
        lines_of = shown.get(REFUSED, {})
        refused = "; ".join(f"{what}: {line}" for what, (line, _) in lines_of.items())
        names = [family.title, family.members, f"`{family.architectures[0]}`"]
        lines.append([*names, *cells, refused or "-"])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _cell(shown: dict[str, list[str]], family, check: str) -> str:
    if not shown:
        return "-"
    right = sum(outcome == "passed" for outcome, _ in shown.values())
    count = f"{right} of {len(shown)}"
    if check != "GGUF":
        return count
    return f"`{family.gguf}`, {count}" if family.gguf else f"as a Llama, {count}"


def expected() -> dict[str, dict[str, set[str]]]:
    """The configurations that a run of the tests compares, by family and check."""
    cases = defaultdict(lambda: defaultdict(set))
    for case in CASES:
        for check in CHECKS:
            written = {"GGUF": case not in NO_GGUF, "Meta": case in META_FILES}
            if written.get(check, True):
                cases[family_of(case)][check].add(case)
    return cases


def main() -> None:
    text, made = README.read_text(), table(json.loads(OUTCOMES.read_text()))
    if TABLE.search(text) is None:
        sys.exit(f"{README}: it has no table of families; write its first two lines")
    README.write_text(TABLE.sub(lambda _: made, text))


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
