"""`cptool bench levers`: what each lever gives on one model, and whether the answer is the same."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

import cptool
from cptool.cli.bench.options import SPREAD, MeasureOptions, emit, measure_options, spread
from cptool.cli.figures import plot as plots
from cptool.cli.figures.tables import Column
from cptool.cli.options import completion
from cptool.cli.options.common import dtype_option
from cptool.cli.options.examples import examples
from cptool.cli.options.models import open_model
from cptool.cli.options.records import as_object
from cptool.cli.options.types import TokenCount
from cptool.cli.progress import following
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import resolve_types
from cptool.errors import OptionError, UserError
from cptool.units import byte_rate, duration, percent, size, three

if TYPE_CHECKING:
    from cptool.bench.lever_rows import Lever, Trial
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.world import World

_AGAIN = "\n\nAgain, word for word:\n\n"
_LENGTH, _QUOTED = 512, 12
"""Tokens of a prompt by default, and of the text that it ends with once more, so that the answer
quotes it.
"""


@dataclass(frozen=True, kw_only=True)
class WorkRequest:
    """What every row does, and on how many ranks the last one does it."""

    prompt: int | None
    tokens: int
    scored: int | None
    names: tuple[str, ...]
    cp: int

    def trial(self, checkpoint: Checkpoint, dtype: str, device: str, repeats: int) -> Trial:
        """Return the work of all rows. Raises UserError for what cannot be."""
        from cptool.bench.lever_rows import Trial

        context = checkpoint.config.max_position_embeddings
        prompt = min(_LENGTH, context - self.tokens) if self.prompt is None else self.prompt
        scored = min(_LENGTH, context) if self.scored is None else self.scored
        for name, value, more in (("prompt", prompt, self.tokens), ("scored", scored, 0)):
            if value + more > context:
                rule = f"the model's context is {context:,}, of which the answer takes {more:,}"
                raise OptionError(name, value, rule)
        text = _text(checkpoint, prompt + scored)
        return Trial(
            model=str(checkpoint.path),
            dtype=dtype,
            levers=self.levers(checkpoint, dtype, device),
            prompt=tuple(_prompt(checkpoint, text, prompt)),
            scored=tuple(text[-scored:]),
            answer=self.tokens,
            repeats=repeats,
        )

    def levers(self, checkpoint: Checkpoint, dtype: str, device: str) -> tuple[Lever, ...]:
        """Return the rows that were requested, the first of which the others are compared with."""
        from cptool.bench.lever_rows import levers
        from cptool.engine.setup.types import mean_weight_size

        stored = mean_weight_size(checkpoint, dtype, device) is not None
        layers = checkpoint.config.num_hidden_layers
        rows = levers(device, layers=layers, stored=stored, ranks=self.cp)
        found = {lever.name: lever for lever in rows}
        for name in self.names:
            if name not in found:
                raise OptionError("lever", repr(name), f"on {device} there are {', '.join(found)}")
        return tuple(lever for name, lever in found.items() if not self.names or name in self.names)


work_options = as_object(
    "work",
    WorkRequest,
    [
        click.option(
            "--prompt",
            type=TokenCount(2 * _QUOTED),
            metavar="N",
            help="Tokens of the prompt: a text, and its beginning once more.  [default: 512]",
        ),
        click.option(
            "-n",
            "--tokens",
            type=click.IntRange(min=2),
            default=64,
            show_default=True,
            metavar="N",
            help="Tokens of the answer, whatever it says.",
        ),
        click.option(
            "--scored",
            type=TokenCount(2),
            metavar="N",
            help="Tokens of the text whose perplexity is measured.  [default: 512]",
        ),
        click.option(
            "--lever",
            "names",
            multiple=True,
            metavar="NAME",
            help="Measure this row; repeat for several.  [default: all]",
        ),
        click.option(
            "--cp",
            type=click.IntRange(min=1),
            default=2,
            show_default=True,
            metavar="N",
            help="Context-parallel ranks of the row on several; 1 leaves it out.",
        ),
    ],
)


@click.command(
    short_help="What makes decode faster, row by row, and whether answers stay the same.",
    epilog=examples(
        "cptool bench levers smollm2-135m-instruct",
        'cptool bench levers MODEL --lever "fused attention" --lever "lookup drafts"',
    ),
)
@click.argument("model", shell_complete=completion.models)
@work_options
@dtype_option
@measure_options
def levers(model: str, work: WorkRequest, dtype: str, measuring: MeasureOptions) -> None:
    """Measure naive attention and each lever that is switched on in place of it.

    All rows read one prompt and give an answer of one length. Rows differ in what they name alone:
    weights are those of the file in the type of the products unless a row says otherwise, and each
    rank has as many threads. The ceiling is reading a weight matrix, in the same rounds and on as
    many ranks at once. The prompt ends by quoting itself, so lookup is at its best.
    """
    from cptool.distributed.devices import resolve_device

    measuring.check()
    checkpoint = open_model(model)
    device = resolve_device(measuring.device, work.cp)
    dtype, _ = resolve_types(dtype, EngineOptions(), checkpoint, device)
    trial = work.trial(checkpoint, dtype, device, measuring.repeats)
    fields = _measured(trial, replace(measuring, device=device))
    if fields is None:
        return
    head = {
        "model": model,
        "dtype": dtype,
        "prompt_tokens": len(trial.prompt),
        "answer_tokens": trial.answer,
        "scored": len(trial.scored) - 1,
    }
    emit(
        {**head, **fields},
        as_json=measuring.as_json,
        columns=_COLUMNS,
        row=_row,
        caption=_caption(model, trial, fields),
    )
    if measuring.plot:
        _draw(measuring.plot, fields["results"], f"{model}, {dtype}")


def _measured(trial: Trial, measuring: MeasureOptions) -> dict[str, Any] | None:
    """Return what rank 0 measured; None in all processes of a launcher but the first."""
    from cptool.bench.levers import PHASE
    from cptool.distributed import launch
    from cptool.distributed.environment import launched_size
    from cptool.distributed.options import RankOptions
    from cptool.engine.rank_modules import rank_modules

    most = max(lever.ranks for lever in trial.levers)
    if (launched := launched_size()) not in (None, most):
        raise UserError(f"the rows take {most} ranks; start as many processes, not {launched}")
    ranks = RankOptions(cp=most, device=measuring.device, threads=measuring.threads)
    total = (measuring.repeats + 1) * len(trial.levers)
    with following(PHASE, total) as watch:
        fields = launch.run(_on_rank, trial, ranks=ranks, watch=watch, preload=rank_modules())
    return fields or None


def _on_rank(world: World, trial: Trial) -> dict[str, Any]:
    import torch

    from cptool.bench.levers import measure

    fields = measure(world, trial)
    return {"device": world.device.type, "threads": torch.get_num_threads(), **fields}


def _text(checkpoint: Checkpoint, count: int) -> list[int]:
    """Return that many tokens of the lighthouse keeper's logbook, again and again; without a
    tokenizer, tokens that follow no pattern.
    """
    tokenizer = checkpoint.tokenizer()
    if tokenizer is None:
        vocabulary = checkpoint.config.vocab_size
        return [(n * n * 31 + n * 17 + n // 13) % vocabulary for n in range(count)]
    path = Path(cptool.__file__).parent / "data" / "lighthouse.txt"
    tokens = tokenizer.encode(path.read_text())
    return (tokens * -(-count // len(tokens)))[:count]


def _prompt(checkpoint: Checkpoint, text: list[int], count: int) -> list[int]:
    """Return a prompt of `count` tokens that ends with the beginning of the text once more."""
    tokenizer = checkpoint.tokenizer()
    between = [] if tokenizer is None else tokenizer.encode(_AGAIN, bos=False)
    room = count - len(between) - _QUOTED
    if room < _QUOTED:
        rule = f"it must be at least {len(between) + 2 * _QUOTED} tokens for this model"
        raise OptionError("prompt", count, rule)
    return [*text[:room], *between, *text[:_QUOTED]]


_COLUMNS = (
    Column(name="lever", left=True),
    Column(name="first token", rank=2),
    Column(name="further", rank=0),
    Column(name="times as fast"),
    Column(name="read", rank=4),
    Column(name="of ceiling", rank=3),
    Column(name="idle", rank=6),
    Column(name="memory", rank=5),
    Column(name="drafts", rank=7),
    Column(name="perplexity", rank=1),
    Column(name="same tokens"),
    *SPREAD,
)


def _caption(model: str, trial: Trial, fields: dict[str, Any]) -> str:
    rates = [byte_rate(times["median"]) for times in fields["ceilings"].values()]
    ranks = dict.fromkeys(lever.ranks for lever in trial.levers)
    ceilings = " and ".join(f"{rate} ({n})" for n, rate in zip(ranks, rates, strict=True))
    return (
        f"{model}, {trial.dtype}, a prompt of {len(trial.prompt):,} tokens and {trial.answer} of "
        f"answer, threads per rank: {fields['threads']}. Further: time of each token after the "
        "first. The prompt ends by quoting itself, so lookup is at its best. Times as fast: of "
        f"these, as {fields['results'][0]['lever']}. Read: weights and KV per rank, each once a "
        f"step; the ceiling is {ceilings}, by so many ranks at once. Idle: part of the threads' "
        "time, or of the GPU's, in which nothing ran. Memory: of a rank with this row alone, as "
        "predicted. Drafts: tokens that came true, of those computed. Same tokens: as the first "
        "row's, from the beginning."
    )


def _row(r: dict[str, Any]) -> list[str]:
    drafted = f"{r['accepted_tokens']} of {r['drafted_tokens']}" if r["drafted_tokens"] else ""
    return [
        r["lever"],
        duration(r["ttft_seconds"]["median"]),
        duration(r["ttit_seconds"]["median"]),
        three(r["faster"]),
        "" if r["bytes"] is None else byte_rate(r["bytes"]),
        percent(r["of_ceiling"]),
        percent(r["idle"]),
        size(r["memory_bytes"]),
        drafted,
        f"{r['perplexity']:.4g}",
        "all" if r["same_answer"] else f"{r['same_tokens']}",
        *spread(r["ttit_seconds"]),
    ]


def _draw(path: Path, results: list[dict[str, Any]], title: str) -> None:
    plots.draw_bars(
        path,
        [
            plots.Bar(
                label=r["lever"],
                value=r["tokens_per_s"],
                note=f"{three(r['faster'])}x"
                + ("" if r["same_answer"] else f", {r['same_tokens']} tokens the same"),
                pale=not r["same_answer"],
            )
            for r in results
        ],
        title=f"{title}; pale: the answer is another one",
        x="further tokens per second",
    )
