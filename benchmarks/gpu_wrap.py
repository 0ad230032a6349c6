"""Puts the device, driver, commit and command at the head of the JSON that another program wrote.

python benchmarks/gpu_wrap.py [--device cpu] JSON RESULT_JSON
"""

from __future__ import annotations

import json
from pathlib import Path

from gpu_timing import arguments, parser, write


def main() -> None:
    options = parser(__doc__.partition("\n\n")[0])
    options.add_argument("source", type=Path)
    options.add_argument("target", type=Path)
    given = arguments(options)
    given.json = given.target
    results = json.loads(given.source.read_text())
    layer = results.get("layer", {}).get("seconds") if isinstance(results, dict) else None
    if layer:
        print(
            f"{results['shape']} {results['tokens']} tokens cp {results['cp']} "
            f"tp {results['tp']} {'fp8 ' if results['fp8_feed_forward'] else ''}"
            f"on {results['device_name']}: layer {1e3 * layer:.2f} ms, "
            f"first token {results['ttft_s']:.2f} s, {results['tflops_per_rank']:.0f} TFLOP/s"
        )
    write(given, results)


if __name__ == "__main__":
    main()
