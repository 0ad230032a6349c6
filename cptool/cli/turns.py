"""Turns that begin with whole prompts, as `prefill` and `generate` run them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from cptool.cli.options import completion
from cptool.cli.options.models import check_turn_room, say_reading, session_fields
from cptool.cli.options.records import as_object
from cptool.cli.options.types import Duration
from cptool.engine.options import SAVE_EVERY_S
from cptool.session import store as sessions

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.cli.options.prompts import Prompt
    from cptool.engine.turn import Turn
    from cptool.session.manifest import Manifest


@dataclass(frozen=True, kw_only=True)
class SessionRequest:
    """Where the user wants the KV to be kept: nowhere without a directory.

    rewind: whether a session that is there may go back to what it and the prompts have in common.
    save_every: seconds between two commits of what was computed of a long prompt.
    """

    directory: Path | None = None
    rewind: bool = False
    save_every: float = SAVE_EVERY_S

    def open(self) -> Manifest | None:
        """Return the manifest of the session that is there, None for a new one or none.

        Raises UserError if a turn could not be saved there.
        """
        directory = self.directory
        if directory is None:
            if self.rewind:
                raise click.UsageError(
                    "--rewind: there is nothing to go back in; add --session DIR"
                )
            return None
        sessions.check_writable(directory)
        if not sessions.exists(directory):
            sessions.check_new(directory)
            return None
        return sessions.load(directory)

    def turn(
        self,
        manifest: Manifest | None,
        checkpoint: Checkpoint,
        prompts: Sequence[Prompt],
        **settings: Any,
    ) -> Turn:
        """Return the turn that makes the session hold `prompts` and computes what it lacks.

        manifest: what `open` returned. settings: further fields of the Turn. Raises UserError if
        the session is another model's, holds something else, or the disk has no room.
        """
        from cptool.engine.turn import Turn

        keep, sequences = None, [prompt.tokens for prompt in prompts]
        if self.directory is not None:
            say_reading(checkpoint)
        if self.directory is not None and manifest is not None:
            sessions.check_model(manifest, sessions.identity(checkpoint))
            keep = sessions.shared_prefixes(self.directory, manifest, sequences, self.rewind)
            sequences = [tokens[n:] for tokens, n in zip(sequences, keep, strict=True)]
        turn = Turn(
            model=str(checkpoint.path),
            prompts=tuple(map(tuple, sequences)),
            keep=None if keep is None else tuple(keep),
            save_every=self.save_every,
            **settings,
            **session_fields(self.directory, manifest, checkpoint),
        )
        check_turn_room(turn, checkpoint.config)
        return turn


save_every_option = click.option(
    "--save-every",
    type=Duration(),
    default=SAVE_EVERY_S,
    metavar="TIME",
    help="While a prompt is read in chunks, keep what is computed in the session this often: 30s, "
    "2min. The same command goes on from there after an interruption.  [default: 1min]",
)

session_options = as_object(
    "kept",
    SessionRequest,
    [
        click.option(
            "--session",
            "directory",
            type=click.Path(path_type=Path),
            shell_complete=completion.sessions,
            metavar="DIR",
            help="Keep the KV here; of a session that is here, compute only what the prompt adds.",
        ),
        click.option(
            "--rewind",
            is_flag=True,
            help="Where the prompt differs from the session, go back to what they have in common.",
        ),
        save_every_option,
    ],
)
