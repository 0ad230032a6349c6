"""`cptool verify`: compare every variant and number of ranks with one rank and with float64, on the
user's machine.
"""

from __future__ import annotations

import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import click

from cptool.cli.figures import tables
from cptool.cli.figures.tables import Column, wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import (
    device_option,
    dtype_option,
    json_option,
    kv_dtype_option,
    threads_option,
    timeout_option,
    weights_option,
)
from cptool.cli.options.examples import examples
from cptool.cli.options.models import context_option, open_model
from cptool.cli.options.prompts import Prompts, prompt_options
from cptool.cli.options.ranks import RankRequest
from cptool.cli.options.records import as_object
from cptool.cli.progress import following
from cptool.cli.turn_report import types_of
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import resolve_types
from cptool.errors import OptionError, UserError
from cptool.model.context import check_context

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.exactness.verify import Trial, Verdict
    from cptool.exactness.weights import WeightErrors

TOKENS = 768
STEPS = 8


@click.command(
    epilog=examples(
        "cptool verify smollm2-135m-instruct",
        "cptool verify MODEL --prompt-file doc.txt --max-cp 3 --dtype float32",
    ),
)
@click.argument("model", shell_complete=completion.models)
@prompt_options
@click.option(
    "--max-cp",
    type=click.IntRange(min=2),
    metavar="N",
    help="Up to this many ranks.  [default: 4, or the GPUs]",
)
@as_object("ranks", RankRequest, (device_option, threads_option, timeout_option))
@context_option
@dtype_option
@kv_dtype_option
@weights_option
@json_option
@wide_option
def verify(
    model: str,
    asked: Prompts,
    max_cp: int | None,
    ranks: RankRequest,
    context_length: int | None,
    dtype: str,
    kv_dtype: str,
    weights: str | None,
    as_json: bool,
) -> None:
    """Check that results are exact with your MODEL on your devices.

    Runs every variant on 1 to N ranks over one prompt (by default, 768 synthetic tokens, or what
    fits a shorter context), in two turns and some decode steps. Exits with 1 if an error exceeds
    its bound, a token differs from one rank's, or a repeated run gives other bits.
    """
    from cptool.distributed import devices
    from cptool.distributed.environment import launched_size
    from cptool.distributed.options import RankOptions

    if launched_size() is not None:
        raise UserError("cptool verify starts its own ranks; run it without a launcher")
    checkpoint = open_model(model, context_length)
    tokens = _prompt(asked, checkpoint)
    device = devices.resolve_device(ranks.device)
    most = max_cp or _most_ranks(device)

    from cptool.exactness import verify as verifier
    from cptool.exactness.weights import weight_errors

    options = EngineOptions(kv_dtype=kv_dtype, weights=weights)
    dtype, options = resolve_types(dtype, options, checkpoint, device)
    half = max(1, len(tokens) * 2 // 3)
    trial = verifier.Trial(
        model=str(checkpoint.path),
        dtype=dtype,
        kv_dtype=options.kv_dtype,
        weights=options.weights or "file",
        turns=(tuple(tokens[:half]), tuple(tokens[half:])),
        steps=STEPS,
    )
    each = RankOptions(device=device, threads=ranks.threads, timeout=ranks.timeout)
    counts = list(range(2, most + 1))
    with following(verifier.PHASE, verifier.run_count(len(counts))) as watch:
        verdicts = list(verifier.verify(trial, counts, each, watch))
    errors = None
    if trial.weights != "file":
        errors = weight_errors(checkpoint, trial.weights, dtype, device)
    if as_json:
        print_object(_fields(trial, verdicts, errors))
    else:
        _draw(verdicts)
        click.echo(_summary(trial, verdicts, errors, device=device))
    sys.exit(0 if all(verdict.passed for verdict in verdicts) else 1)


def _prompt(asked: Prompts, checkpoint: Checkpoint) -> list[int]:
    """Return the tokens of the one prompt; UserError for several, or one without room for STEPS."""
    if not asked:
        asked = replace(asked, given=(("--synthetic", _default_length(checkpoint)),))
    sequences = asked.encode(checkpoint, begin=True)
    if len(sequences) != 1 or len(sequences[0]) < 2:
        raise UserError("cptool verify takes one prompt of at least 2 tokens")
    check_context([len(sequences[0])], [0], STEPS, checkpoint.config)
    return sequences[0]


def _most_ranks(device: str) -> int:
    """Return up to how many ranks are compared by default: 4, or the number of GPUs."""
    if device != "cuda":
        return 4
    import torch

    gpus = torch.cuda.device_count()
    if gpus < 2:
        raise OptionError(
            "device", device, "one GPU leaves nothing to compare", "add `device` cpu to verify here"
        )
    return gpus


def _default_length(checkpoint: Checkpoint) -> int:
    """Return the length of the synthetic prompt: TOKENS, or what the context has room for."""
    limit = checkpoint.config.max_position_embeddings
    if limit < STEPS + 2:
        raise UserError(
            f"{checkpoint.path} has a context of {limit}, and cptool verify takes {STEPS} steps "
            "after a prompt of at least 2 tokens; verify another model, or allow more positions by "
            "--context-length"
        )
    return min(TOKENS, limit - STEPS)


def _fields(trial: Trial, verdicts: list[Verdict], errors: WeightErrors | None) -> dict[str, Any]:
    """Return what --json prints."""
    return {
        "model": trial.model,
        "dtype": trial.dtype,
        "kv_dtype": trial.kv_dtype,
        "weights": trial.weights,
        **({} if errors is None else errors.fields()),
        "tokens": [*map(len, trial.turns), trial.steps],
        "passed": all(verdict.passed for verdict in verdicts),
        "runs": [
            {
                "variant": v.measurement.variant,
                "cp": v.measurement.ranks,
                "error": v.measurement.error,
                "one_call_error": v.measurement.one_call_error,
                "allowed": v.measurement.allowed,
                "tokens": v.tokens,
                "repeated": v.measurement.repeated,
                "passed": v.passed,
            }
            for v in verdicts
        ],
    }


def _summary(
    trial: Trial, verdicts: list[Verdict], errors: WeightErrors | None, *, device: str
) -> str:
    """Return what was run, and whether it is exact, which quantised weights never are."""
    failed = sum(not verdict.passed for verdict in verdicts)
    said = (
        f"NOT exact: {failed} of {len(verdicts)} runs failed"
        if failed
        else "exact: all within the bound, same tokens"
    )
    if errors is not None:
        sound = "FAILED" if failed else "attention within the bound, same tokens"
        said = (
            f"{sound}\nproducts with the quantised weights differ from float64 products with the "
            f"original weights by {errors.of_original:.2g}, and from those with the quantised "
            f"weights by {errors.of_quantised:.2g} (root mean square, relative, worst matrix)"
        )
    first, second = map(len, trial.turns)
    return (
        f"{trial.model}, {types_of(trial)}, {first} + {second} tokens and {trial.steps} steps on "
        f"{device}: {said}"
    )


_COLUMNS = (
    Column(name="ranks"),
    Column(name="variant", left=True),
    Column(name="error"),
    Column(name="one call's", rank=2),
    Column(name="allowed", rank=1),
    Column(name="tokens", left=True),
    Column(name="same bits twice", left=True),
    Column(name="verdict", left=True),
)


def _draw(verdicts: list[Verdict]) -> None:
    rows = []
    for verdict in verdicts:
        m = verdict.measurement
        numbers = (f"{x:.3g}" for x in (m.error, m.one_call_error, m.allowed))
        ends = (
            verdict.tokens,
            "yes" if m.repeated else "NO",
            "ok" if verdict.passed else "FAILED",
        )
        rows.append((str(m.ranks), m.variant, *numbers, *ends))
    caption = "Root mean square errors of attention against float64 on the same inputs."
    tables.show(_COLUMNS, rows, caption=caption)
