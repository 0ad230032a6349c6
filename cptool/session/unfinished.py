"""Turns that were not read to their end, because their command was interrupted or killed.

A turn is part of a session once all of it was read and answered. What was read of one before is
kept beside what was said: tokens, messages and turns are those of before, and `Sequence.ahead` has
the tokens whose KV there is. A turn that begins with these tokens takes their KV over, whatever
command it comes from and on any number of ranks; another one gives them up. Where a turn goes back
before it goes on, the KV beyond that point is given up with its first chunk, and the tokens are
not.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from cptool.errors import UserError
from cptool.session.manifest import Manifest
from cptool.session.manifest import Sequence as Saved
from cptool.session.store import common_prefix
from cptool.units import some

Prompts = Sequence[Sequence[int]]
"""The tokens that a turn adds to each sequence."""


def read_ahead(manifest: Manifest) -> int:
    """Return how many tokens of an unfinished turn have KV, all sequences together."""
    return sum(sequence.read_ahead for sequence in manifest.sequences)


def check_begun(directory: Path, manifest: Manifest) -> None:
    """Raise UserError for a session whose first turn is unfinished."""
    if not manifest.turns:
        raise UserError(
            f"{directory} holds no turn yet, and {some(read_ahead(manifest), 'token')} of a prompt "
            "that was not read to its end; give the command that was reading it again"
        )


def going_on(
    manifest: Manifest, keep: Sequence[int] | None, prompts: Prompts
) -> tuple[Manifest, list[list[int]]]:
    """Return the state from which a turn goes on that goes back to the first `keep[b]` tokens of
    each sequence, None for all, and adds `prompts[b]`; and what it has yet to add.

    The state has as many of these tokens as were read ahead. It is a base to restore, not one to
    commit.
    """
    lengths = [len(s.tokens) for s in manifest.sequences] if keep is None else list(keep)
    back, states, rests = manifest.truncated(lengths), [], []
    for sequence, prompt in zip(back.sequences, prompts, strict=True):
        state = _going_on(sequence, prompt)
        states.append(state)
        rests.append(list(prompt[len(state.tokens) - len(sequence.tokens) :]))
    return back.with_sequences(states), rests


def _going_on(sequence: Saved, prompt: Sequence[int]) -> Saved:
    if not sequence.ahead:
        return sequence
    whole, length = (*sequence.tokens, *prompt), len(sequence.tokens)
    shared = common_prefix(sequence.line, whole)
    if shared <= length and sequence.logits is not None:
        return replace(sequence, cached=length, ahead=(), ahead_from=0)
    tokens = whole[: max(shared, length)]
    # Nothing knows what follows the last token of all, so it is computed again.
    cached = max(0, min(sequence.cached, shared, len(whole) - 1))
    ended = sequence.ended and len(tokens) == length
    return Saved(tokens=tokens, cached=cached, ended=ended)


def taken(manifest: Manifest, keep: Sequence[int] | None, prompts: Prompts) -> int:
    """Return how many tokens of `prompts` such a turn need not compute."""
    state, _ = going_on(manifest, keep, prompts)
    lengths = [len(s.tokens) for s in manifest.sequences] if keep is None else keep
    return sum(max(0, s.cached - n) for s, n in zip(state.sequences, lengths, strict=True))


def with_what_follows(manifest: Manifest) -> Manifest:
    """Return the state with what was read ahead as part of each sequence, where it follows all of
    its tokens: a base for requests that are not known yet.
    """
    follows = [s.ahead if s.ahead_from == len(s.tokens) else () for s in manifest.sequences]
    return going_on(manifest, None, follows)[0]


def interrupted(
    before: Sequence[Saved],
    said: Prompts,
    computed: Sequence[int],
    *,
    keep: Sequence[int],
    logits: dict[int, str],
) -> list[Saved]:
    """Return the sequences of a session while a turn is read.

    before: as they were before it. said, computed: the tokens of each, the turn's included, and how
    many have KV. keep: how many of them were said before it. logits: the segments that know what
    follows a sequence to which the turn adds nothing.
    """
    found = []
    for b, (old, tokens, done, kept) in enumerate(zip(before, said, computed, keep, strict=True)):
        # One more than have KV: what follows the last of them is not known.
        ahead = tuple(tokens[kept : done + 1]) if len(tokens) > kept else ()
        if ahead:
            known = old.logits if kept == len(old.tokens) and done >= kept else None
            found.append(replace(old, cached=done, logits=known, ahead=ahead, ahead_from=kept))
        else:
            cached = min(done, kept)
            known = logits.get(b, old.logits) if cached == len(old.tokens) else None
            found.append(Saved(tokens=old.tokens, cached=cached, logits=known, ended=old.ended))
    return found
