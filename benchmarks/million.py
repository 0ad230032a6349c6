"""A million tokens through a small model on this machine: killed twice, resumed, and predicted.

    python benchmarks/million.py                            # the same command again goes on
    python benchmarks/million.py --heads 1 --json FILE --plot FILE    # half the attention

A random-weight Llama reads the prompt in chunks with `cptool prefill --session`. Its ranks are
killed by SIGKILL when a third and two thirds of the tokens are done, and the same command goes on
from what the session holds. This command ends after `--limit` minutes by a Ctrl-C, which keeps what
is computed; the next one goes on. Everything is in `--folder`: the model, the session, and what the
progress lines said.

The table has a row for each tenth of the prompt: the rate over its chunks, the time that the cost
model predicts for them (of this machine if `cptool bench calibrate` has measured it), and the
resident memory of rank 0, of which its KV. The exponent is that of the time as a power of the
tokens, from a tenth of the prompt on, and beside it that of the operations counted. "Computing" is
the processor time of a rank: on a machine that other programs use, it is what the time would be
without them, and has an exponent of its own.
"""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import checkout  # noqa: F401
import click
from rich.console import Console
from rich.table import Table

from cptool.bench.timing import circumstances
from cptool.checkpoint import open_checkpoint
from cptool.cli.figures import plot
from cptool.cli.options.types import TokenCount
from cptool.distributed.options import RankOptions
from cptool.engine.setup.types import resolve_dtype
from cptool.engine.world_profile import local_profile
from cptool.model.config import LlamaConfig
from cptool.planning.chunks import plan_chunk
from cptool.planning.cost.counts import attention_flops, linear_flops
from cptool.planning.cost.forward import Forward
from cptool.units import duration, size, token_rate

SHAPE = {
    "vocab_size": 1024,
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 64,
}
ROWS = 10


@dataclass(frozen=True, kw_only=True)
class Asked:
    """What is to be read, and how."""

    folder: Path
    heads: int
    tokens: int
    cp: int
    chunk: str
    dtype: str
    save_every: str
    kills: tuple[int, ...]

    @property
    def command(self) -> list[str]:
        """The command that reads the prompt, and that goes on."""
        options = {
            "--synthetic": self.tokens,
            "--session": self.folder / "session",
            "--cp": self.cp,
            "--threads": 1,
            "--chunk": self.chunk,
            "--dtype": self.dtype,
            "--context-length": self.tokens + 16,
            "--save-every": self.save_every,
            "--progress": "json",
        }
        parts = [str(part) for option in options.items() for part in option]
        return [sys.executable, "-m", "cptool", "prefill", str(self.model), *parts, "--json"]

    @property
    def model(self) -> Path:
        return self.folder / "model"

    @property
    def log(self) -> Path:
        return self.folder / "progress.jsonl"


def shape(heads: int) -> dict[str, int]:
    return {**SHAPE, "num_attention_heads": heads}


def write_model(path: Path, heads: int, kv_heads: int = 1) -> None:
    """Write the model, unless it is there."""
    if (path / "config.json").exists():
        return
    import torch
    from transformers import LlamaConfig as Config
    from transformers import LlamaForCausalLM

    torch.manual_seed(0)
    fields = {**shape(heads), "num_key_value_heads": kv_heads}
    config = Config(**fields, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2)
    LlamaForCausalLM(config).to(torch.bfloat16).save_pretrained(path)


def logged(asked: Asked) -> list[dict[str, Any]]:
    """Return what all runs so far said, in order."""
    if not asked.log.exists():
        return []
    return [json.loads(line) for line in asked.log.read_text().splitlines()]


def run(asked: Asked, number: int, until: float) -> str:
    """Run the command once and log its progress; return how it ended: "done", "killed" or
    "interrupted".
    """
    kills = asked.kills[sum(end["how"] == "killed" for end in ends(asked)) :]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with (
        subprocess.Popen(
            asked.command,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=environment,
            start_new_session=True,
        ) as process,
        asked.log.open("a") as log,
    ):
        how, said, taken = "done", [], 0.0
        assert process.stderr is not None and process.stdout is not None
        for line in process.stderr:
            if not line.startswith("{"):
                said.append(line)
                continue
            record = json.loads(line)
            # Ranks that have ended are not counted any more.
            taken = max(taken, processor_time(process.pid) / asked.cp)
            log.write(json.dumps({"run": number, **record, "computing": taken}) + "\n")
            log.flush()
            done = asked.tokens - record["tokens"] + record["tokens_done"]
            if kills and done >= kills[0]:
                os.killpg(process.pid, signal.SIGKILL)
                how = "killed"
                break
            if time.time() > until and how == "done":
                process.send_signal(signal.SIGINT)
                how = "interrupted"
        output = process.stdout.read()
        code = process.wait()
    if how == "done" and code != 0:
        raise click.ClickException(f"exit code {code}: {''.join(said)[-2000:]}")
    with asked.log.open("a") as log:
        report = json.loads(output) if how == "done" else {}
        log.write(json.dumps({"run": number, "how": how, "said": said, "report": report}) + "\n")
    return how


def processor_time(session: int) -> float:
    """Return the processor time of the ranks of a command that leads this session of processes."""
    ticks = 0
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            fields = (folder / "stat").read_text().rpartition(")")[2].split()
            if int(fields[3]) == session != int(folder.name):
                ticks += int(fields[11]) + int(fields[12])
        except (OSError, IndexError):  # it has just ended
            continue
    return ticks / os.sysconf("SC_CLK_TCK")


def ends(asked: Asked) -> list[dict[str, Any]]:
    return [record for record in logged(asked) if "how" in record]


@dataclass(frozen=True, kw_only=True)
class Chunk:
    """A chunk that was read in one run, whole: `new` tokens over `cached` ones."""

    cached: int
    new: int
    seconds: float
    computing: float
    variant: str
    memory: int


def chunks(records: list[dict[str, Any]], tokens: int) -> Iterator[Chunk]:
    """Yield each chunk of a prompt of `tokens` once, in order, of the run that read it last."""
    found: dict[int, Chunk] = {}
    begun: dict[str, Any] | None = None
    for record in records:
        if "how" in record:
            begun = None
        elif begun is None or record["run"] != begun["run"]:
            begun = record
        elif record["chunk"] != begun["chunk"] or record["share"] >= 1:
            # A run counts the tokens that it computes itself.
            cached = tokens - begun["tokens"] + begun["tokens_done"]
            found[cached] = Chunk(
                cached=cached,
                new=record["tokens_done"] - begun["tokens_done"],
                seconds=record["seconds"] - begun["seconds"],
                computing=record["computing"] - begun["computing"],
                variant=begun["variant"],
                memory=max(begun["memory_bytes"] or 0, record["memory_bytes"] or 0),
            )
            begun = record
    end = 0
    for cached in sorted(found):
        if cached >= end and found[cached].new > 0:
            end = cached + found[cached].new
            yield found[cached]


def slope(tokens: list[float], values: list[float]) -> float:
    """Return the exponent of `values` as a power of `tokens`, by least squares."""
    xs, ys = [math.log(t) for t in tokens], [math.log(v) for v in values]
    x, y = sum(xs) / len(xs), sum(ys) / len(ys)
    covariance = sum((a - x) * (b - y) for a, b in zip(xs, ys, strict=True))
    return covariance / sum((a - x) ** 2 for a in xs)


def whole_forward(asked: Asked, config: LlamaConfig) -> Forward:
    return Forward(
        config=config,
        dtype=asked.dtype,
        new=asked.tokens,
        cached=0,
        ranks=asked.cp,
        active=asked.cp,
    )


def results(asked: Asked) -> dict[str, Any]:
    """Return the measured and predicted time of each chunk, and the exponents."""
    config = open_checkpoint(str(asked.model), asked.tokens + 16).config
    profile = local_profile(RankOptions(cp=asked.cp, device="cpu", threads=1))
    whole = whole_forward(asked, config)
    rows, ends_at, measured, computed, counted = [], [], [], [], []
    seconds = computing = operations = 0.0
    for chunk in chunks(logged(asked), asked.tokens):
        part = Forward(**{**vars(whole), "new": chunk.new, "cached": chunk.cached})
        planned = plan_chunk(part, profile, variant=chunk.variant, room=asked.tokens)
        seconds += chunk.seconds
        computing += chunk.computing
        operations += linear_flops(config, chunk.new) + attention_flops(
            config, chunk.new, chunk.cached
        )
        kv = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim
        element = 2 if asked.dtype == "bfloat16" else 4
        rows.append(
            {
                **vars(chunk),
                "predicted_s": planned.seconds,
                "kv": kv * element * (chunk.cached + chunk.new) // asked.cp,
            }
        )
        if chunk.cached + chunk.new >= asked.tokens / 10:
            ends_at.append(chunk.cached + chunk.new)
            measured.append(seconds)
            computed.append(computing)
            counted.append(operations)
    return {
        "tokens": asked.tokens,
        "cp": asked.cp,
        "dtype": asked.dtype,
        "shape": shape(asked.heads),
        "source": profile.source,
        "runs": ends(asked),
        "seconds": seconds,
        "predicted_s": sum(row["predicted_s"] for row in rows),
        "computing": computing,
        "exponent": slope(ends_at, measured),
        "exponent_computing": slope(ends_at, computed),
        "exponent_counted": slope(ends_at, counted),
        "chunks": rows,
    }


def tenths(found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the sums over the chunks that end in each tenth of the prompt."""
    for tenth in range(1, ROWS + 1):
        low, high = (found["tokens"] * n / ROWS for n in (tenth - 1, tenth))
        part = [c for c in found["chunks"] if low < c["cached"] + c["new"] <= high]
        if part:
            new, seconds = sum(c["new"] for c in part), sum(c["seconds"] for c in part)
            yield {
                "tokens": part[-1]["cached"] + part[-1]["new"],
                "seconds": seconds,
                "computing": sum(c["computing"] for c in part),
                "predicted_s": sum(c["predicted_s"] for c in part),
                "rate": new / seconds,
                "memory": max(c["memory"] for c in part),
                "kv": part[-1]["kv"],
                "variants": ", ".join(sorted({c["variant"] for c in part})),
            }


def show(found: dict[str, Any]) -> None:
    table = Table(box=None, header_style="bold", padding=(0, 1))
    for name in ("tokens", "time", "computing", "predicted", "ratio", "rate", "memory", "of it KV"):
        table.add_column(name, justify="right")
    table.add_column("variant")
    for row in tenths(found):
        table.add_row(
            f"{row['tokens']:,}",
            duration(row["seconds"]),
            duration(row["computing"]),
            duration(row["predicted_s"]),
            f"{row['predicted_s'] / row['seconds']:.2f}",
            token_rate(row["rate"]),
            size(row["memory"]),
            size(row["kv"]),
            row["variants"],
        )
    console = Console()
    console.print(table)
    console.print(
        f"{found['tokens']:,} tokens in {duration(found['seconds'])}, "
        f"{duration(found['computing'])} of it computing (predicted "
        f"{duration(found['predicted_s'])}, {found['source']}), runs that ended: "
        f"{', '.join(end['how'] for end in found['runs'])}; the time grows with the power "
        f"{found['exponent']:.3f} of the tokens, computing with {found['exponent_computing']:.3f}, "
        f"the operations with that of {found['exponent_counted']:.3f}"
    )


def draw(found: dict[str, Any], to: Path) -> None:
    rows = list(tenths(found))
    tokens = [row["tokens"] for row in rows]
    plot.draw(
        to,
        [
            plot.Line(
                label="by a rank's processor time",
                x=tokens,
                y=[row["rate"] * row["seconds"] / row["computing"] for row in rows],
            ),
            plot.Line(label="by the clock", x=tokens, y=[row["rate"] for row in rows]),
            plot.Line(
                label="predicted",
                x=tokens,
                y=[row["rate"] * row["seconds"] / row["predicted_s"] for row in rows],
                dashed=True,
            ),
        ],
        title=f"Prefill of {found['tokens']:,} tokens, {found['cp']} ranks",
        x="tokens read",
        y="tokens per second",
        logarithmic="y",
    )


@click.command()
@click.option("--heads", type=click.IntRange(min=1), default=2, help="Of queries, over one of KV.")
@click.option("--tokens", type=TokenCount(), default=1_000_000)
@click.option("--cp", type=click.IntRange(min=1), default=2)
@click.option("--chunk", default="auto")
@click.option("--dtype", type=click.Choice(["auto", "float32", "bfloat16"]), default="auto")
@click.option("--save-every", default="60s")
@click.option("--kills", type=click.IntRange(min=0), default=2, help="Evenly over the prompt.")
@click.option("--limit", type=float, default=115.0, help="Minutes that this command may take.")
@click.option("--folder", type=Path, default=Path("million"))
@click.option("--json", "to", type=Path)
@click.option("--plot", "drawing", type=Path)
def main(
    heads: int,
    tokens: int,
    cp: int,
    chunk: str,
    dtype: str,
    save_every: str,
    kills: int,
    limit: float,
    folder: Path,
    to: Path | None,
    drawing: Path | None,
) -> None:
    """Read the prompt, or go on with it, and print the table once it is read."""
    plot.check(drawing)
    write_model(folder / "model", heads)
    checkpoint = open_checkpoint(str(folder / "model"), tokens + 16)
    asked = Asked(
        folder=folder,
        heads=heads,
        tokens=tokens,
        cp=cp,
        chunk=chunk,
        dtype=resolve_dtype(dtype, checkpoint, "cpu"),
        save_every=save_every,
        kills=tuple(tokens * n // (kills + 1) for n in range(1, kills + 1)),
    )
    until = time.time() + 60 * limit
    while not any(end["how"] == "done" for end in ends(asked)):
        how = run(asked, len(ends(asked)), until)
        click.echo(f"run {len(ends(asked))}: {how}", err=True)
        if how == "interrupted":
            click.echo("the same command goes on", err=True)
            return
    found = results(asked)
    show(found)
    if to is not None:
        to.write_text(json.dumps({**found, **circumstances()}, indent=1) + "\n")
    if drawing is not None:
        draw(found, drawing)


if __name__ == "__main__":
    main()
