"""Puts the device, driver, commit and command at the head of what another program has written.

python benchmarks/gpu_tests_report.py JUNIT_XML RESULT_JSON
python benchmarks/gpu_tests_report.py --wrap JSON RESULT_JSON
"""

from __future__ import annotations

import json
import xml.etree.ElementTree
from pathlib import Path

from gpu_timing import arguments, parser, write


def summary(report: Path) -> dict[str, object]:
    """Counts of a JUnit report, and each test that did not pass, with the first line of why."""
    counts, wrong = {"passed": 0, "failed": 0, "skipped": 0}, []
    for case in xml.etree.ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error")), None)
        if outcome is not None:
            counts["failed"] += 1
            name = f"{case.get('classname')}::{case.get('name')}"
            wrong.append({"test": name, "why": (outcome.get("message") or "").split("\n")[0]})
        elif case.find("skipped") is not None:
            counts["skipped"] += 1
        else:
            counts["passed"] += 1
    return {**counts, "not_passed": wrong}


def main() -> None:
    options = parser(__doc__.partition("\n\n")[0])
    options.add_argument("--wrap", action="store_true", help="the first file is JSON already")
    options.add_argument("source", type=Path)
    options.add_argument("target", type=Path)
    given = arguments(options)
    given.json = given.target
    results = json.loads(given.source.read_text()) if given.wrap else summary(given.source)
    if given.wrap:
        layer = results.get("layer", {}).get("seconds") if isinstance(results, dict) else None
        if layer:
            print(
                f"{results['shape']} {results['tokens']} tokens cp {results['cp']} "
                f"tp {results['tp']} {'fp8 ' if results['fp8_feed_forward'] else ''}"
                f"on {results['device_name']}: layer {1e3 * layer:.2f} ms, "
                f"first token {results['ttft_s']:.2f} s, {results['tflops_per_rank']:.0f} TFLOP/s"
            )
    else:
        print({key: value for key, value in results.items() if key != "not_passed"})
    write(given, results)


if __name__ == "__main__":
    main()
