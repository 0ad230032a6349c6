"""`cptool bench perplexity`: how well a model predicts a text, by position in its windows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptool.cli.bench.options import emit
from cptool.cli.figures import plot as plots
from cptool.cli.figures.tables import Column, wide_option
from cptool.cli.options import completion
from cptool.cli.options.common import dtype_option, json_option
from cptool.cli.options.examples import examples
from cptool.cli.options.models import context_option, open_model
from cptool.cli.options.prompt_files import read_corpus, read_token_ids
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.cli.options.records import as_object
from cptool.cli.options.types import TokenCount
from cptool.cli.progress import following
from cptool.cli.turn_report import types_of
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import setup_types
from cptool.errors import OptionError, UserError
from cptool.units import some, token_rate

if TYPE_CHECKING:
    from cptool.bench.perplexity import Job
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.options import RankOptions
    from cptool.distributed.world import World
    from cptool.engine.setup.loading import Setup


@dataclass(frozen=True, kw_only=True)
class TextRequest:
    """The text, how it is cut, and how the result is printed."""

    file: str
    ids: bool
    window: int | None
    stride: int | None
    whole: bool
    plot: Path | None
    as_json: bool

    def tokens(self, checkpoint: Checkpoint) -> list[int]:
        """Return the text's tokens, those that begin a sequence included."""
        from cptool.checkpoint.tokenizer.input_checks import check_ids

        if self.ids:
            rows = read_token_ids(self.file, checkpoint.config.max_position_embeddings)
            if len(rows) > 1:
                raise UserError(f"{self.file} holds {len(rows)} sequences; give one text")
            (_, ids), *_ = rows
            if ids:
                check_ids(ids, checkpoint.config.vocab_size)
            return ids
        tokenizer = checkpoint.tokenizer()
        if tokenizer is None:
            raise UserError(
                f"{checkpoint.path} has no tokenizer, so a text cannot be read; give a file of "
                "token ids with `ids`"
            )
        tokenizer.context = None  # no window is longer than the context, the text may be
        return tokenizer.encode(read_corpus(self.file))

    def cut(self, checkpoint: Checkpoint) -> tuple[Job, int, int]:
        """Return what is measured, the window and the stride."""
        from cptool.bench.perplexity import WINDOW, Job, windows

        context = checkpoint.config.max_position_embeddings
        window = min(WINDOW, context) if self.window is None else self.window
        if window > context:
            rule = f"the model's context is {context:,}"
            raise OptionError("window", window, rule, "give `context_length` to allow more")
        stride = window if self.stride is None else self.stride
        tokens = self.tokens(checkpoint)
        found = windows(len(tokens), window=window, stride=stride, whole=self.whole)
        if not found:
            least = window if self.whole else 2
            raise UserError(
                f"{self.file} has {some(len(tokens), 'token')}, and at least {least:,} are needed; "
                "give a longer text"
            )
        return Job(tokens=tuple(tokens), windows=tuple(found)), window, stride


text_options = as_object(
    "text",
    TextRequest,
    [
        click.argument("file", metavar="FILE", type=click.Path(dir_okay=False)),
        click.option("--ids", is_flag=True, help="FILE is a JSON list of token ids, not a text."),
        click.option(
            "--window",
            type=TokenCount(2),
            metavar="N",
            help="Cut the text into windows of N tokens.  [default: 2048, or a shorter context]",
        ),
        click.option(
            "--stride",
            type=TokenCount(),
            metavar="N",
            help="Begin a window every N tokens; what overlaps is context alone.  [default: the "
            "window]",
        ),
        click.option(
            "--whole-windows",
            "whole",
            is_flag=True,
            help="Leave out a last window that is shorter, as GPTQ's figures do.",
        ),
        click.option(
            "--plot",
            type=click.Path(path_type=Path, dir_okay=False),
            metavar="FILE",
            help="Draw perplexity by position, as PNG, SVG or PDF.",
        ),
        json_option,
    ],
)


@click.command(
    short_help="How well a model predicts a text, by position.",
    epilog=examples(
        "cptool bench perplexity MODEL joined.txt --whole-windows",
        "cptool bench perplexity MODEL book.txt --window 4K --stride 512 --cp 2",
    ),
)
@click.argument("model", shell_complete=completion.models)
@text_options
@ranks_by_default("1, or what the launcher started")
@attention_options
@context_option
@dtype_option
@wide_option
def perplexity(
    model: str,
    text: TextRequest,
    ranks: RankRequest,
    attention: EngineOptions,
    context_length: int | None,
    dtype: str,
) -> None:
    """Measure the perplexity of MODEL on a text FILE: exp of the mean negative log-likelihood.

    The text is encoded once and cut into windows. Each token is scored once, given those before it
    in its window; the first token of a window that does not overlap the one before is not scored.
    The defaults, with --whole-windows, cut a text as published figures of quantised models do
    (GPTQ). Their text of WikiText-2 is the lines of the data set joined by blank lines; the file
    wiki.test.raw itself is another text, so its figure is another one. A smaller --stride gives
    each token more context, as in Hugging Face's guide.
    """
    from cptool.engine.setup.loading import Setup

    plots.check(text.plot)
    checkpoint = open_model(model, context_length)
    placed = ranks.resolve(checkpoint.config)
    job, window, stride = text.cut(checkpoint)
    types = setup_types(dtype, attention, checkpoint, placed.device)
    setup = Setup(model=str(checkpoint.path), state=checkpoint.state, **types)
    found = _measured(setup, job, placed)
    if found is None:
        return
    fields = {
        "model": model,
        "file": text.file,
        "tokens": len(job.tokens),
        "window": window,
        "stride": stride,
        "windows": len(job.windows),
        "cp": placed.cp,
        "tp": placed.tp,
        **found,
    }
    _show(fields, text, types_of(setup))


def _measured(setup: Setup, job: Job, ranks: RankOptions) -> dict[str, Any] | None:
    """Return what was found; None in all processes of a launcher but the first."""
    from cptool.bench.perplexity import PHASE
    from cptool.distributed import launch
    from cptool.engine.rank_modules import rank_modules

    with following(PHASE, len(job.windows)) as watch:
        return (
            launch.run(_on_rank, setup, job, ranks=ranks, watch=watch, preload=rank_modules())
            or None
        )


def _on_rank(world: World, setup: Setup, job: Job) -> dict[str, Any]:
    from cptool.bench.perplexity import measure

    return measure(world, setup, job)


_COLUMNS = (
    Column(name="tokens before"),
    Column(name="scored"),
    Column(name="nll"),
    Column(name="perplexity"),
)


def _row(part: dict[str, Any]) -> list[str]:
    first, last = part["from"], part["to"]
    place = f"{first:,}" if first == last else f"{first:,} to {last:,}"
    return [place, f"{part['scored']:,}", f"{part['nll']:.4f}", f"{part['perplexity']:.4f}"]


def _show(fields: dict[str, Any], text: TextRequest, types: str) -> None:
    """Print the result as one object or as a table, and draw it on request."""
    title = f"{fields['model']} on {fields['file']}"
    summary = (
        f"{title}: perplexity {fields['perplexity']:.4f} (nll {fields['nll']:.5f}) of "
        f"{fields['scored']:,} of {some(fields['tokens'], 'token')}, in "
        f"{some(fields['windows'], 'window')} of {fields['window']:,} every {fields['stride']:,}; "
        f"{fields['cp']} cp x {fields['tp']} tp on {fields['device']}, {types}, "
        f"{token_rate(fields['scored'] / fields['read_s'])}."
    )
    emit(fields, as_json=text.as_json, columns=_COLUMNS, row=_row, caption=summary)
    if text.plot is None:
        return
    at = [part["from"] for part in fields["results"]]
    line = plots.Line(label=types, x=at, y=[part["perplexity"] for part in fields["results"]])
    plots.draw(
        text.plot,
        [line],
        title=f"{title}: {fields['perplexity']:.4f}",
        x="tokens before, from",
        y="perplexity",
        logarithmic="xy",
        ticks=at,
    )
