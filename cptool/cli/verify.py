"""`cptool verify`: holds every variant and number of ranks against one rank and against float64, on
the user's machine.
"""

import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING

import click

from cptool.cli import draw
from cptool.cli.models import context_option, open_model
from cptool.cli.options import (
    device_option,
    dtype_option,
    json_option,
    resolve_dtype,
    threads_option,
    timeout_option,
)
from cptool.cli.prompts import Prompts, check_context, prompt_options
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint

TOKENS = 768
STEPS = 8


@click.command()
@click.argument("model")
@prompt_options
@click.option(
    "--max-cp",
    type=click.IntRange(min=2),
    metavar="N",
    help="Up to this many ranks.  [default: 4, or the GPUs]",
)
@device_option
@threads_option
@timeout_option
@context_option
@dtype_option
@json_option
def verify(
    model,
    prompts,
    prompt_files,
    token_files,
    synthetic,
    parse_control_tokens,
    max_cp,
    device,
    threads,
    timeout,
    context_length,
    dtype,
    as_json,
):
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
    asked = Prompts(prompts, prompt_files, token_files, synthetic, chat=False)
    if not asked:
        asked = replace(asked, synthetic=(_default_length(checkpoint),))
    sequences = asked.encode(checkpoint, begin=True)
    if len(sequences) != 1 or len(sequences[0]) < 2:
        raise UserError("cptool verify takes one prompt of at least 2 tokens")
    tokens = sequences[0]
    check_context([len(tokens)], [0], STEPS, checkpoint.config)
    device = devices.resolve_device(device)
    if max_cp is None:
        import torch

        max_cp = torch.cuda.device_count() if device == "cuda" else 4
        if max_cp < 2:
            raise UserError(
                "--device cuda: one GPU leaves nothing to compare; add --device cpu to verify here"
            )

    from cptool.exactness import verify as verifier

    half = max(1, len(tokens) * 2 // 3)
    plan = verifier.Plan(
        model=str(checkpoint.path),
        dtype=resolve_dtype(dtype, checkpoint, device),
        turns=(tuple(tokens[:half]), tuple(tokens[half:])),
        steps=STEPS,
    )
    verdicts = []
    ranks = RankOptions(device=device, threads=threads, timeout=timeout)
    with draw.progress() as watch:
        verdicts += verifier.verify(plan, list(range(2, max_cp + 1)), ranks, watch)
    passed = all(verdict.passed for verdict in verdicts)
    if as_json:
        fields = {
            "model": plan.model,
            "dtype": plan.dtype,
            "tokens": [half, len(tokens) - half, STEPS],
            "passed": passed,
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
        click.echo(json.dumps(fields))
    else:
        _draw(verdicts)
        count = sum(not verdict.passed for verdict in verdicts)
        said = (
            "exact: all within the bound, same tokens"
            if passed
            else f"NOT exact: {count} of {len(verdicts)} runs failed"
        )
        click.echo(
            f"{checkpoint.path}, {plan.dtype}, {half} + {len(tokens) - half} tokens and {STEPS} "
            f"steps on {device}: {said}"
        )
    sys.exit(0 if passed else 1)


def _default_length(checkpoint: "Checkpoint") -> int:
    """Tokens of the prompt where none was given: TOKENS, or what the context has room for."""
    limit = checkpoint.config.max_position_embeddings
    if limit < STEPS + 2:
        raise UserError(
            f"{checkpoint.path} has a context of {limit}, and cptool verify takes {STEPS} steps "
            "after a prompt of at least 2 tokens; verify another model, or allow more positions by "
            "--context-length"
        )
    return min(TOKENS, limit - STEPS)


def _draw(verdicts) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table(
        caption="Root mean square errors of attention against float64 on the same inputs.", box=None
    )
    for name in (
        "ranks",
        "variant",
        "error",
        "one call's",
        "allowed",
        "tokens",
        "same bits twice",
        "",
    ):
        table.add_column(
            name, justify="right" if name in ("ranks", "error", "one call's", "allowed") else "left"
        )
    for verdict in verdicts:
        m = verdict.measurement
        numbers = (f"{x:.3g}" for x in (m.error, m.one_call_error, m.allowed))
        table.add_row(
            str(m.ranks),
            m.variant,
            *numbers,
            verdict.tokens,
            "yes" if m.repeated else "NO",
            "ok" if verdict.passed else "FAILED",
        )
    Console(highlight=False).print(table)
