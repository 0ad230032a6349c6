"""`cptool session list` and `export`: sessions under folders, and what one of them says."""

import os
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import click

from cptool import units
from cptool.cli import draw
from cptool.cli.json_output import line, print_object
from cptool.cli.options import completion
from cptool.cli.options.common import json_option
from cptool.cli.options.examples import examples
from cptool.errors import UserError
from cptool.session import store as sessions
from cptool.session.conversation import find_dialogues
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Damaged, Manifest


@click.command(
    "list",
    short_help="List the sessions in folders.",
    epilog=examples("cptool session list", "cptool session list work archive --json"),
)
@click.argument("folders", metavar="[DIR]...", nargs=-1, type=click.Path(path_type=Path))
@click.option(
    "--depth",
    type=click.IntRange(min=0),
    default=3,
    show_default=True,
    help="Look into folders within folders this many levels down; links are not followed.",
)
@json_option
def list_sessions(folders: tuple[Path, ...], depth: int, as_json: bool) -> None:
    """List the sessions in folders and in the folders within, by default in the current one."""
    for folder in folders:
        if not folder.is_dir():
            raise UserError(f"{folder} is not a directory; name one that has sessions in it")
    found = [
        _described(directory)
        for folder in folders or (Path(),)
        for directory in _sessions_in(folder, depth)
    ]
    if as_json:
        print_object({"sessions": found})
    elif not found:
        draw.say("no sessions here")
    for each in () if as_json else found:
        click.echo(each["session"] + ": " + (each["fault"] or _line(each)))


def _sessions_in(folder: Path, depth: int) -> Iterator[Path]:
    """Yield `folder` if it is a session, otherwise those up to `depth` levels down, by name.

    A folder that cannot be read is named on standard error.
    """
    if sessions.exists(folder):
        yield folder
        return
    if not depth:
        return
    try:
        with os.scandir(folder) as entries:
            within = sorted(e.name for e in entries if e.is_dir(follow_symlinks=False))
    except OSError as error:
        draw.say(f"{folder} cannot be read ({error.strerror})", always=True)
        return
    for name in within:
        yield from _sessions_in(folder / name, depth - 1)


def _described(directory: Path) -> dict[str, Any]:
    """Return what `list` says of a session; only `session` and `fault` where it cannot be read."""
    try:
        manifest = sessions.load(directory)
    except UserError as error:
        return {"session": str(directory), "fault": str(error)}
    dialogues = readable_dialogues(directory, manifest)
    age = time.time() - (directory / sessions.MANIFEST).stat().st_mtime
    return {
        "session": str(directory),
        "fault": None,
        "model": Path(manifest.model.path).name,
        "messages": None if dialogues is None else [len(d.messages) for d in dialogues],
        "turns": len(manifest.turns),
        "tokens": [len(sequence.tokens) for sequence in manifest.sequences],
        "bytes": sum(segment.bytes for segment in manifest.segments),
        "age_s": age,
    }


def _line(each: dict[str, Any]) -> str:
    said = units.some(each["turns"], "turn")
    if each["messages"] is not None:
        said += f", {units.some(sum(each['messages']), 'message')}"
    return (
        f"{sessions.printable(each['model'])}, {said}, {units.some(sum(each['tokens']), 'token')}, "
        f"{units.size(each['bytes'])}, {units.duration(each['age_s'])} old"
    )


def readable_dialogues(directory: Path, manifest: Manifest) -> tuple[Dialogue, ...] | None:
    """Return the messages of each sequence; None if it is no conversation, or cannot be read."""
    try:
        return find_dialogues(directory, manifest)
    except Damaged as error:
        draw.say(str(error))
        return None


def message_rows(dialogues: tuple[Dialogue, ...], width: int | None) -> list[tuple[str, str]]:
    """Return a row for each message: its role, and what it says in `width` characters: of a longer
    one the beginning and the end, where a question follows a document.
    """
    return [
        (role, _ends(sessions.printable(" ".join(content.split())), width))
        for dialogue in dialogues
        for role, content in dialogue.messages
    ]


def _ends(text: str, width: int | None) -> str:
    """Return a text of words, or its beginning and its end in `width` characters."""
    if width is None or len(text) <= width:
        return text
    room = (width - len(_LEFT_OUT)) // 2
    begin, end = text[:room], text[-room:]
    if text[room] != " ":
        begin = begin.rpartition(" ")[0] or begin
    if text[-room - 1] != " ":
        end = end.partition(" ")[2] or end
    return f"{begin.rstrip()}{_LEFT_OUT}{end.lstrip()}"


_LEFT_OUT = " ... "


@click.command(
    short_help="Write what was said in a SESSION to a file.",
    epilog=examples(
        "cptool session export s > talk.json",
        "cptool session export s --format markdown --output talk.md",
    ),
)
@click.argument(
    "directory",
    metavar="SESSION",
    type=click.Path(path_type=Path),
    shell_complete=completion.sessions,
)
@click.option("--output", type=click.Path(path_type=Path), metavar="FILE", help="Write it here.")
@click.option(
    "--format",
    "form",
    type=click.Choice(["json", "markdown", "text"]),
    default="json",
    show_default=True,
    help="json has OpenAI's messages, or token ids where there are none.",
)
def export(directory: Path, output: Path | None, form: str) -> None:
    """Write the conversation of a SESSION, or its text where it is not a conversation."""
    manifest = sessions.load(directory)
    text = _exported(manifest, find_dialogues(directory, manifest), form)
    if output is None:
        click.echo(text)
        return
    try:
        output.write_text(text + "\n", encoding="utf-8")
    except OSError as error:
        raise UserError(f"{output} cannot be written ({error.strerror})") from None


def _exported(manifest: Manifest, dialogues: tuple[Dialogue, ...] | None, form: str) -> str:
    if dialogues is None:
        from cptool.checkpoint import open_checkpoint

        tokenizer = open_checkpoint(sessions.model_path(manifest)).tokenizer()
        ids = [list(sequence.tokens) for sequence in manifest.sequences]
        texts = [tokenizer.decode(row) if tokenizer else None for row in ids]
        if form == "json":
            return line({"token_ids": ids, "text": texts})
        pairs = zip(texts, ids, strict=True)
        return "\n\n".join(str(row) if text is None else text for text, row in pairs)
    if form == "json":
        rows = [dialogue.dicts() for dialogue in dialogues]
        fields = {"messages": rows[0]} if len(rows) == 1 else {"conversations": rows}
        return line(fields)
    mark = "## {}\n\n{}" if form == "markdown" else "{}: {}"
    said = [message for dialogue in dialogues for message in dialogue.messages]
    return "\n\n".join(mark.format(role, content) for role, content in said)
