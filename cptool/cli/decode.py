"""`cptool decode`: continues a session, with a next turn or without one."""

import json
import sys
from pathlib import Path

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.models import context_option, open_model, say_reading
from cptool.cli.options import (
    check_profile,
    check_room,
    json_option,
    moved_option,
    profile_option,
    ranks_by_default,
    resolve_ranks,
    run_options,
    sampling_options,
)
from cptool.cli.prompts import Prompts, check_context, prompt_options
from cptool.errors import UserError

DEFAULT_TOKENS = 128


@click.command(short_help="Append tokens to a session, and save it.")
@click.argument("session", type=click.Path(path_type=Path))
@prompt_options
@click.option(
    "-n",
    "--tokens",
    "count",
    type=click.IntRange(min=0),
    help=f"Append up to this many tokens.  [default: {DEFAULT_TOKENS}]",
)
@sampling_options
@moved_option
@profile_option
@ranks_by_default(
    "the session's last, or what the launcher started",
    "the session's last, or 1 with --cp or a launcher",
)
@run_options
@context_option
@json_option
def decode(
    session,
    prompts,
    prompt_files,
    token_files,
    synthetic,
    parse_control_tokens,
    count,
    temperature,
    top_p,
    seed,
    model,
    cp,
    tp,
    device,
    variant,
    partials,
    threads,
    timeout,
    context_length,
    as_json,
    profile,
):
    """Append tokens to a SESSION that `cptool prefill --session` made, and save it.

    With prompt options, one for each sequence, their tokens are the next turn and are read first.
    A sequence whose answer has ended says nothing until it is given more. Without --cp and --tp,
    as many ranks as last time.
    """
    from cptool.distributed.environment import launched_size
    from cptool.engine.sampling import Sampling
    from cptool.session import store as sessions

    check_profile(profile)
    sampling = Sampling(temperature=temperature, top_p=top_p, seed=seed)
    manifest = sessions.load(session)
    sessions.check_writable(session)
    source = model or sessions.model_path(manifest)
    checkpoint = open_model(source, context_length)
    say_reading(checkpoint)
    sessions.check_model(manifest, sessions.identity(checkpoint))

    batch = len(manifest.sequences)
    asked = Prompts(
        prompts, prompt_files, token_files, synthetic, chat=False, parse=parse_control_tokens
    )
    sequences = asked.encode(checkpoint, begin=False)
    if sequences and len(sequences) != batch:
        raise UserError(
            f"{units.some(len(sequences), 'prompt')} for a session of "
            f"{units.some(batch, 'sequence')}; give one for each, or none"
        )
    sequences = sequences or [[]] * batch
    held = [len(sequence.tokens) for sequence in manifest.sequences]
    lengths = [len(tokens) for tokens in sequences]
    room = checkpoint.config.max_position_embeddings - max(
        h + n for h, n in zip(held, lengths, strict=True)
    )
    if count is None:
        count = max(1, min(DEFAULT_TOKENS, room))
    check_context(lengths, held, count, checkpoint.config)
    if cp is None and launched_size() is None:
        cp, tp = manifest.cp, manifest.tp if tp is None else tp
    ranks = resolve_ranks(
        cp=cp, tp=tp, device=device, threads=threads, timeout=timeout, config=checkpoint.config
    )
    new = sum(lengths) + batch * count
    check_room(session, checkpoint.config, new, batch, manifest.dtype)

    stop_ids = checkpoint.answer_ends(
        *(sequence.tokens for sequence in manifest.sequences), *sequences
    )

    from cptool.cli.launch import run_turn
    from cptool.engine.options import EngineOptions
    from cptool.engine.turn import Turn

    turn = Turn(
        model=str(checkpoint.path),
        prompts=tuple(map(tuple, sequences)),
        dtype=manifest.dtype,
        options=EngineOptions(variant=variant, partials=partials),
        session=str(session),
        resume=manifest.revision,
        fingerprint=checkpoint.fingerprint,
        state=checkpoint.state,
        max_new_tokens=count,
        stop_ids=stop_ids,
        sampling=sampling,
        profile=profile,
    )
    tokenizer = checkpoint.tokenizer()
    stream = not as_json and batch == 1 and tokenizer is not None
    report = run_turn(turn, ranks, stream=stream)
    if report is None:
        return
    texts = [tokenizer.decode(list(ids)) if tokenizer else None for ids in report.token_ids]
    if as_json:
        fields = {
            "tokens": report.tokens,
            **report.shared_fields(),
            "decode_variant": report.decode_variant,
            "decode_reason": report.decode_reason,
            "load_s": report.load_s,
            "ttft_s": report.ttft_s,
            "ttit_ms": report.ttit_ms,
            "token_ids": [list(ids) for ids in report.token_ids],
            "text": texts,
            "stopped": [
                "eos" if count and (not ids or ids[-1] in stop_ids) else "length"
                for ids in report.token_ids
            ],
            "session": turn.session,
            **draw.profile_fields(report),
        }
        click.echo(json.dumps(fields))
        return
    if not stream:
        for b, (ids, text) in enumerate(zip(report.token_ids, texts, strict=True), 1):
            click.echo(f"[{b}] {text if text is not None else ' '.join(map(str, ids))}")
    for b, ids in enumerate(report.token_ids, 1):
        if count and not ids:
            draw.say(f"sequence {b}: its answer has ended; give it a next turn, with --prompt say")
    rows = draw.prefill_rows(report) if report.tokens else []
    draw.table(rows + draw.decode_rows(report), to_stderr=True)
    draw.phases(report, profile, to_stderr=True)
    if sys.stdout is not None:  # closed from the beginning
        sys.stdout.flush()
