"""`cptool prefill`: reads a prompt, tells the first token and how long it took, keeps the KV if
asked to.
"""

import json
import shlex
from pathlib import Path

import click

from cptool.cli import draw
from cptool.cli.models import context_option, open_model, say_reading
from cptool.cli.options import (
    check_profile,
    check_room,
    dtype_option,
    json_option,
    profile_option,
    rank_options,
    resolve_dtype,
    resolve_ranks,
)
from cptool.cli.prompts import Prompts, check_context, prompt_options
from cptool.errors import UserError


@click.command()
@click.argument("model")
@prompt_options
@click.option(
    "--chat",
    is_flag=True,
    help="Put each text prompt into the model's chat template, as a user's message.",
)
@click.option(
    "--session",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Keep the KV here; of a session that is here, compute only what the prompt adds.",
)
@click.option(
    "--rewind",
    is_flag=True,
    help="Where the prompt differs from the session, go back to what they have in common.",
)
@profile_option
@rank_options
@context_option
@dtype_option
@json_option
def prefill(
    model,
    prompts,
    prompt_files,
    token_files,
    synthetic,
    parse_control_tokens,
    chat,
    session,
    rewind,
    cp,
    tp,
    device,
    variant,
    partials,
    threads,
    timeout,
    context_length,
    dtype,
    as_json,
    profile,
):
    """Compute the KV of a prompt and the token that follows it.

    MODEL is a directory in Hugging Face's layout or in Meta's, a .gguf file, a name known to
    `cptool pull`, or a hub id. Several prompts, by any of the prompt options, are a batch.
    """
    from cptool.session import store as sessions

    asked = Prompts(prompts, prompt_files, token_files, synthetic, chat, parse_control_tokens)
    if not asked:
        raise click.UsageError(
            "no prompt; give --prompt, --prompt-file, --token-ids or --synthetic"
        )
    if rewind and session is None:
        raise click.UsageError("--rewind: there is nothing to go back in; add --session DIR")
    check_profile(profile)
    manifest = None
    if session is not None:
        sessions.check_writable(session)
        manifest = (
            sessions.load(session) if sessions.exists(session) else sessions.check_new(session)
        )
    checkpoint = open_model(model, context_length)
    sequences = asked.encode(checkpoint, begin=True)
    lengths = [len(tokens) for tokens in sequences]
    check_context(lengths, [0] * len(lengths), 0, checkpoint.config)
    keep = None
    if session is not None:
        say_reading(checkpoint)
    if manifest is not None:
        sessions.check_model(manifest, sessions.identity(checkpoint))
        if dtype not in ("auto", manifest.dtype):
            raise UserError(
                f"--dtype {dtype}: the KV of {session} is {manifest.dtype}; leave --dtype out, or "
                "name a new directory"
            )
        keep = sessions.shared_prefixes(session, manifest, sequences, rewind)
        sequences = [tokens[n:] for tokens, n in zip(sequences, keep, strict=True)]
    ranks = resolve_ranks(
        cp=cp, tp=tp, device=device, threads=threads, timeout=timeout, config=checkpoint.config
    )
    dtype = manifest.dtype if manifest else resolve_dtype(dtype, checkpoint, ranks.device)
    if session is not None:
        new = sum(map(len, sequences))
        check_room(session, checkpoint.config, new, len(sequences), dtype)

    from cptool.cli.launch import run_turn
    from cptool.engine.options import EngineOptions
    from cptool.engine.turn import Turn

    turn = Turn(
        model=str(checkpoint.path),
        prompts=tuple(map(tuple, sequences)),
        dtype=dtype,
        options=EngineOptions(variant=variant, partials=partials),
        session=None if session is None else str(session),
        resume=manifest.revision if manifest else None,
        fingerprint=None if session is None else checkpoint.fingerprint,
        state=None if session is None else checkpoint.state,
        keep=None if keep is None else tuple(keep),
        profile=profile,
    )
    report = run_turn(turn, ranks)
    if report is None:
        return
    if as_json:
        fields = {
            "tokens": report.tokens,
            "tokens_per_sequence": lengths,
            **report.shared_fields(),
            "load_s": report.load_s,
            "ttft_s": report.ttft_s,
            "tflops": report.flops / report.ttft_s / 1e12,
            "exposed_s": report.exposed_s,
            "wire_bytes": report.wire_bytes,
            "first_token": list(report.first_token),
            "session": turn.session,
            **draw.profile_fields(report),
        }
        click.echo(json.dumps(fields))
        return
    tokenizer = checkpoint.tokenizer()
    named = [repr(tokenizer.decode([t])) if tokenizer else f"id {t}" for t in report.first_token]
    rows = [*draw.prefill_rows(report), ("continues", ", ".join(named))]
    if session is not None:
        command = f"cptool decode {shlex.quote(str(session))}"
        rows.append(("session", f"{session}; continue with: {command}"))
    draw.table(rows)
    draw.phases(report, profile)
