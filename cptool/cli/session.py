"""`cptool session`: show, verify or compact a session, or take back turns."""

import sys
from pathlib import Path
from typing import Any

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.figures import tables
from cptool.cli.figures.tables import wide_option
from cptool.cli.json_output import print_object
from cptool.cli.options import completion
from cptool.cli.options.common import json_option
from cptool.cli.options.examples import examples
from cptool.cli.session_export import export, list_sessions, message_rows, readable_dialogues
from cptool.cli.turn_report import types_of
from cptool.session import store as sessions
from cptool.session.manifest import Manifest
from cptool.session.unfinished import read_ahead

_WIDTH = 80
"""Columns that a message is shown in where there is no terminal."""

directory_argument = click.argument(
    "directory",
    metavar="SESSION",
    type=click.Path(path_type=Path),
    shell_complete=completion.sessions,
)


@click.group(
    epilog=examples(
        "cptool session list",
        "cptool session show s",
        "cptool session export s --format markdown --output talk.md",
    )
)
def session() -> None:
    """Inspect and maintain a session on disk."""


session.add_command(list_sessions)
session.add_command(export)


@session.command(epilog=examples("cptool session show s", "cptool session show s --json"))
@directory_argument
@json_option
@wide_option
def show(directory: Path, as_json: bool) -> None:
    """Show what a SESSION holds."""
    manifest = sessions.load(directory)
    tokens = [len(sequence.tokens) for sequence in manifest.sequences]
    cached = [sequence.held for sequence in manifest.sequences]
    total = sum(segment.bytes for segment in manifest.segments)
    dialogues = readable_dialogues(directory, manifest)
    fields = {
        "model": manifest.model.path,
        "fingerprint": manifest.model.fingerprint,
        "dtype": manifest.dtype,
        "kv_dtype": manifest.kv_dtype,
        "weights": manifest.weights,
        "cp": manifest.cp,
        "tp": manifest.tp,
        "revision": manifest.revision,
        "turns": [list(turn) for turn in manifest.turns],
        "tokens": tokens,
        "cached": cached,
        "read_ahead": read_ahead(manifest),
        "segments": len(manifest.segments),
        "bytes": total,
        "messages": None if dialogues is None else [d.dicts() for d in dialogues],
    }
    if as_json:
        print_object(fields)
        return
    rows = _rows(manifest, fields)
    width = None if tables.wide() else (tables.room() or _WIDTH) - draw.indent(rows)
    draw.table([*rows, *message_rows(dialogues or (), width)])


def _rows(manifest: Manifest, fields: dict[str, Any]) -> list[tuple[str, str]]:
    """Return the rows of the table of `show`."""
    tokens, cached = (", ".join(f"{n:,}" for n in fields[k]) for k in ("tokens", "cached"))
    model = manifest.model
    ends = " -> ".join("+".join(f"{n:,}" for n in turn) for turn in manifest.turns)
    lengths = f", tokens after each: {ends}" if ends else ""
    unfinished = (
        f"{units.some(fields['read_ahead'], 'token')} of a next turn; the command that was reading "
        "it goes on there"
    )
    messages = fields["messages"]
    said = [] if messages is None else [("messages", ", ".join(str(len(m)) for m in messages))]
    return [
        ("model", f"{sessions.printable(model.path)} ({model.fingerprint[:12]})"),
        ("last turn on", f"{manifest.cp} cp x {manifest.tp} tp, {types_of(manifest)}"),
        (
            "tokens",
            f"{tokens}, {cached} of them with KV",
        ),
        *([("unfinished", unfinished)] if fields["read_ahead"] else []),
        ("turns", f"{len(manifest.turns)}{lengths}"),
        (
            "on disk",
            f"{units.some(len(manifest.segments), 'segment')}, {units.size(fields['bytes'])}, "
            f"revision {manifest.revision}",
        ),
        *said,
    ]


@session.command(
    short_help="Read every byte of a SESSION and check it.",
    epilog=examples("cptool session verify s"),
)
@directory_argument
def verify(directory: Path) -> None:
    """Read every byte of a SESSION and check it; exit with 1 if something is wrong."""
    from cptool.session.maintenance import problems

    try:
        manifest = sessions.read(directory)
        found = problems(directory, manifest)
        if found and sessions.has_changed(directory, manifest):  # a run committed meanwhile
            manifest = sessions.read(directory)
            found = problems(directory, manifest)
    except sessions.Damaged as error:  # elsewhere a mistake, here the result
        found = [str(error)]
    for line in found:
        draw.say(line, always=True)
    if found:
        sys.exit(1)
    click.echo(
        f"{directory}: sound, {units.some(len(manifest.segments), 'segment')}, "
        f"{units.some(sum(s.cached for s in manifest.sequences), 'token')} with KV"
    )


@session.command(
    short_help="Rewrite a SESSION in few segments, without what was removed.",
    epilog=examples("cptool session compact s"),
)
@directory_argument
def compact(directory: Path) -> None:
    """Rewrite a SESSION in few segments, without the KV of turns that were taken back."""
    from cptool.session.maintenance import compact as rewrite

    before = sessions.load(directory)
    sessions.check_writable(directory)
    after = rewrite(directory, before)
    sizes = [units.size(sum(s.bytes for s in m.segments)) for m in (before, after)]
    click.echo(
        f"{directory}: {units.some(len(before.segments), 'segment')}, {sizes[0]} -> "
        f"{units.some(len(after.segments), 'segment')}, {sizes[1]}"
    )


@session.command(
    epilog=examples("cptool session rollback s", "cptool session rollback s --turns 2")
)
@directory_argument
@click.option(
    "--turns",
    type=click.IntRange(min=1),
    default=1,
    show_default=True,
    help="How many turns to go back.",
)
def rollback(directory: Path, turns: int) -> None:
    """Take back the last turns of a SESSION.

    A turn is what one command added: all questions and answers of a `cptool chat` are one.
    """
    from cptool.session.maintenance import roll_back

    before = sessions.load(directory)
    sessions.check_writable(directory)
    after = roll_back(directory, before, turns)
    click.echo(
        f"{directory}: {units.some(len(after.turns), 'turn')}, "
        f"{', '.join(str(len(s.tokens)) for s in after.sequences)} tokens"
    )
