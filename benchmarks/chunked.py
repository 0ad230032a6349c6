"""Prompts in chunks: their time against one piece, what a kill loses, and whether plans are true.

    python benchmarks/chunked.py [--tokens 64K] [--long 256K] [--json FILE]

A small random-weight Llama (that of million.py, with `--heads` heads on `--kv-heads`) on two ranks
with one thread each.

- `--tokens` are read in one piece and in chunks as `--chunk auto` and a sixteenth of the prompt cut
  them, in turn; the ratio is that of the medians.
- `--long` are read with `--chunk auto` and a session. The same is killed by SIGKILL at 60% of the
  tokens, and what the session holds goes on on 1, 2 and 3 ranks. Each then says the next tokens
  with their log-probabilities, which are compared with those after the unbroken run.
- From a tenth of the unbroken run on, the time left that progress lines state is held against the
  time that was left; and the planned memory against the peak, and both against weights and KV.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
from million import write_model
from rich.console import Console

from cptool.bench.timing import circumstances, summary
from cptool.cli.options.types import TokenCount
from cptool.units import duration, size

KILLED_AT = 0.6
FROM = 0.1
"""The part of the run from which on the time left is to be true."""
ANSWER = 8


def command(name: str, *options: object) -> list[str]:
    return [sys.executable, "-m", "cptool", name, *map(str, options), "--json"]


def environment() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}


def run(given: list[str]) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what a command reports, and its progress lines."""
    done = subprocess.run(given, capture_output=True, text=True, env=environment())
    if done.returncode:
        raise click.ClickException(f"{' '.join(given[2:])}: {done.stderr[-2000:]}")
    lines = [json.loads(line) for line in done.stderr.splitlines() if line.startswith("{")]
    return json.loads(done.stdout), lines


def reading(model: Path, tokens: int, *options: object, cp: int = 2) -> list[str]:
    given = ("--synthetic", tokens, "--cp", cp, "--threads", 1, "--context-length", tokens + 64)
    return command("prefill", model, *given, "--progress", "json", *options)


def pieces(model: Path, tokens: int, repeats: int) -> dict[str, Any]:
    """Read a prompt in one piece and in chunks, in turn."""
    chunks = {"one piece": tokens, "auto": "auto", "sixteenths": tokens // 16}
    seconds: dict[str, list[float]] = {name: [] for name in chunks}
    sizes = {}
    for _ in range(repeats):
        for name, chunk in chunks.items():
            said, _ = run(reading(model, tokens, "--chunk", chunk))
            seconds[name].append(said["ttft_s"])
            sizes[name] = said["chunk"]
    middle = {name: statistics.median(each) for name, each in seconds.items()}
    return {
        "tokens": tokens,
        "chunks": sizes,
        "ttft_s": {name: summary(each) for name, each in seconds.items()},
        "over_one_piece": {name: each / middle["one piece"] for name, each in middle.items()},
    }


def time_left(lines: list[dict[str, Any]]) -> dict[str, Any]:
    """Return how far the time left was from the truth, as parts of what was left."""
    end = lines[-1]["seconds"]
    told = [
        line for line in lines if line["seconds"] >= FROM * end and line["seconds"] < 0.97 * end
    ]
    errors = [
        abs(line["seconds_left"] / (end - line["seconds"]) - 1)
        for line in told
        if line["seconds_left"] is not None
    ]
    return {
        "seconds": end,
        "lines": len(told),
        "without_estimate": len(told) - len(errors),
        "median_error": statistics.median(errors),
        "within_10_percent": sum(error <= 0.1 for error in errors) / len(errors),
    }


def kill_at(given: list[str], tokens: float) -> int:
    """Run a command until so many tokens are read, and kill it; return how many were."""
    with subprocess.Popen(
        given,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env=environment(),
        start_new_session=True,
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            done = json.loads(line)["tokens_done"] if line.startswith("{") else 0
            if done >= tokens:
                os.killpg(process.pid, signal.SIGKILL)
                return int(done)
    raise click.ClickException("the prompt was read before it could be killed")


def answer(session: Path, cp: int, context: int) -> dict[str, Any]:
    """Say the next tokens of a copy of a session, and drop it."""
    copy = session.with_name("copy")
    shutil.copytree(session, copy)
    options = ("--cp", cp, "--threads", 1, "-n", ANSWER, "--temperature", 0, "--logprobs", 1)
    options = (*options, "--context-length", context)
    said, _ = run(command("decode", copy, *options))
    shutil.rmtree(copy)
    return said


def long(model: Path, tokens: int, folder: Path) -> dict[str, Any]:
    """Read a long prompt without a break, and killed and resumed."""
    whole, killed = folder / "whole", folder / "killed"
    unbroken, lines = run(reading(model, tokens, "--session", whole))
    chunk = ("--chunk", unbroken["chunk"], "--save-every", "5s")
    done = kill_at(reading(model, tokens, "--session", killed, *chunk), KILLED_AT * tokens)
    resumed = {}
    for cp in (1, 2, 3):
        session = folder / f"resumed-{cp}"
        shutil.copytree(killed, session)
        said, _ = run(reading(model, tokens, "--session", session, *chunk, cp=cp))
        mine, its = (answer(each, cp, tokens + 64) for each in (session, whole))
        resumed[str(cp)] = {
            "resumed": said["resumed"],
            "ttft_s": said["ttft_s"],
            "tokens_equal": mine["token_ids"] == its["token_ids"],
            "logprobs_equal": mine["logprobs"] == its["logprobs"],
        }
    planned, peak = unbroken["memory_bytes_per_rank"], unbroken["peak_memory_bytes_per_rank"]
    parts = unbroken["memory_parts_bytes"]
    return {
        "tokens": tokens,
        "chunk": unbroken["chunk"],
        "ttft_s": unbroken["ttft_s"],
        "killed_at": done,
        "resumed": resumed,
        "time_left": time_left(lines),
        "planned_bytes": planned,
        "planned_parts_bytes": parts,
        "peak_bytes": peak,
        "planned_over_peak": planned / peak,
        "peak_over_weights_and_kv": peak / (parts["weights"] + parts["kv"]),
    }


def show(found: dict[str, Any]) -> None:
    console, parts, whole = Console(), found["pieces"], found["long"]
    for name, ratio in parts["over_one_piece"].items():
        taken = duration(parts["ttft_s"][name]["median"])
        console.print(
            f"{parts['tokens']:,} tokens, {name} ({parts['chunks'][name]:,}): {taken}, "
            f"{ratio:.3f} of one piece"
        )
    left = whole["time_left"]
    console.print(
        f"{whole['tokens']:,} tokens in chunks of {whole['chunk']:,}: {duration(whole['ttft_s'])}; "
        f"time left off by {left['median_error']:.1%} in the median of {left['lines']} lines; "
        f"memory {size(whole['peak_bytes'])}, planned {size(whole['planned_bytes'])}; "
        f"{whole['peak_over_weights_and_kv']:.2f} times weights and KV"
    )
    for cp, each in whole["resumed"].items():
        console.print(
            f"killed at {whole['killed_at']:,}, went on with {each['resumed']:,} on {cp} ranks: "
            f"tokens {'equal' if each['tokens_equal'] else 'DIFFER'}, log-probabilities "
            f"{'equal' if each['logprobs_equal'] else 'differ'}"
        )


@click.command()
@click.option("--tokens", type=TokenCount(), default=64_000)
@click.option("--long", "longer", type=TokenCount(), default=256_000)
@click.option("--heads", type=click.IntRange(min=1), default=4)
@click.option("--kv-heads", type=click.IntRange(min=1), default=1)
@click.option("--repeats", type=click.IntRange(min=1), default=3)
@click.option("--json", "to", type=Path)
def main(
    tokens: int, longer: int, heads: int, kv_heads: int, repeats: int, to: Path | None
) -> None:
    """Measure and print."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_model(folder / "model", heads, kv_heads)
        found = {
            "heads": heads,
            "kv_heads": kv_heads,
            "pieces": pieces(folder / "model", tokens, repeats),
            "long": long(folder / "model", longer, folder),
            **circumstances(),
        }
    show(found)
    if to is not None:
        to.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
