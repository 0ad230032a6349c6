"""`cptool generate`: from prompts to answers in one command."""

from __future__ import annotations

import dataclasses
import sys
from typing import Any

import click

from cptool.cli.answers.output import OutputRequest, output_options
from cptool.cli.answers.run import run_and_write
from cptool.cli.batch.options import BatchRequest, batch_options
from cptool.cli.batch.run import Job, answer_file
from cptool.cli.figures.tables import wide_option
from cptool.cli.options import completion
from cptool.cli.options.answering import AnswerRequest, answering_options
from cptool.cli.options.common import check_profile, dtype_option, profile_option
from cptool.cli.options.examples import examples
from cptool.cli.options.lengths import tokens_option, tokens_to_append
from cptool.cli.options.models import context_option, open_model
from cptool.cli.options.next_turn import begun
from cptool.cli.options.prompts import Prompts, completion_prompt_options
from cptool.cli.options.ranks import RankRequest, attention_options, ranks_by_default
from cptool.cli.options.samples import check_samples, samples_option
from cptool.cli.options.sampling import SamplingRequest, sampling_options
from cptool.cli.progress_lines import progress_option
from cptool.cli.turns import SessionRequest, session_options
from cptool.engine.options import EngineOptions
from cptool.engine.setup.types import setup_types

DEFAULT_TOKENS = 256


@click.command(
    short_help="Answer a prompt.",
    epilog=examples(
        'cptool generate smollm2-135m-instruct --chat --prompt "Why is the sky blue?"',
        'cptool generate MODEL --chat --file doc.txt --prompt "Sum it up." --cp 2',
        "cptool generate MODEL --batch-file prompts.jsonl --output answers.jsonl",
    ),
)
@click.argument("model", shell_complete=completion.models)
@completion_prompt_options
@tokens_option(DEFAULT_TOKENS)
@samples_option
@sampling_options
@answering_options
@output_options
@batch_options
@session_options
@profile_option
@ranks_by_default("1, or what the launcher started")
@attention_options
@context_option
@dtype_option
@progress_option
@wide_option
def generate(
    model: str,
    asked: Prompts,
    count: int | None,
    samples: int,
    sampler: SamplingRequest,
    wanted: AnswerRequest,
    output: OutputRequest,
    batch: BatchRequest,
    kept: SessionRequest,
    profile: str | None,
    ranks: RankRequest,
    attention: EngineOptions,
    context_length: int | None,
    dtype: str,
) -> None:
    """Read a prompt and write the model's answer as it comes; figures follow on standard error.

    MODEL is a directory in Hugging Face's layout or in Meta's, a .gguf file, a name known to
    `cptool pull`, or a hub id. Several prompts are a batch, whose answers are written whole, in
    order, as are several samples. Without a prompt option, standard input is the prompt unless it
    is a terminal. --batch-file answers a whole file of prompts.
    """
    output.check()
    others = {"--session": kept.directory, "--profile": profile, "--samples": samples > 1}
    batch.check(asked, output, others)
    asked = asked if batch else _or_piped(asked)
    check_profile(profile)
    manifest = kept.open()
    checkpoint = open_model(model, context_length)
    sampling, placed = sampler.resolve(checkpoint), ranks.resolve(checkpoint.config)
    check_samples(samples, sampling, kept.directory)
    held = (kept.directory, manifest)
    shared: Any = setup_types(dtype, attention, checkpoint, placed.device, held=held)
    shared["sampling"] = sampling
    if batch:
        places: Any = {"batch": batch, "texts": asked, "checkpoint": checkpoint, "ranks": placed}
        job = Job(wanted=wanted, answering=wanted.fields(checkpoint), **places, **shared)
        return answer_file(job, sampler, count=count or DEFAULT_TOKENS, as_json=output.as_json)
    prompts = asked.read(checkpoint, begin=True)
    sequences = [prompt.tokens for prompt in prompts]
    turn = kept.turn(
        manifest,
        checkpoint,
        prompts,
        max_new_tokens=tokens_to_append(count, DEFAULT_TOKENS, checkpoint.config, new=sequences),
        stop_ids=checkpoint.answer_ends(*sequences),
        samples=samples,
        profile=profile,
        chat=begun(prompts, asked, kept.directory, manifest),
        **shared,
        **wanted.fields(checkpoint),
    )
    run_and_write(
        turn,
        placed,
        output,
        tokenizer=checkpoint.tokenizer(),
        prompts=sequences,
        manifest=manifest,
        after=[() if asked.chat else said for said in sequences for _ in range(samples)],
        sampling=sampler.describe(sampling),
    )


def _or_piped(asked: Prompts) -> Prompts:
    """Return the prompts, or standard input as the prompt; UsageError if that is a terminal."""
    from cptool.distributed.environment import launched_size

    if asked:
        return asked
    if sys.stdin is None or sys.stdin.isatty() or (launched_size() or 1) > 1:
        raise click.UsageError(
            "no prompt; give --prompt, --prompt-file, --file, --token-ids, --synthetic or "
            "--batch-file"
        )
    return dataclasses.replace(asked, given=(("--prompt", "-"),))
