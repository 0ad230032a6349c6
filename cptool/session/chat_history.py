"""The history of a conversation: which states a session keeps, so that going back finds them."""

from collections.abc import Iterable, Sequence
from dataclasses import replace

from cptool.session.chat_state import Lengths, State, digests, old_digest
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Manifest
from cptool.session.store import common_prefix


def advanced(
    manifest: Manifest,
    previous: Manifest | None,
    states: Sequence[State],
    dialogues: Sequence[Dialogue],
) -> tuple[tuple[Lengths, ...], list[State]]:
    """Return the turns of `manifest` and the states of the conversation after each that is known,
    once its tokens are those of `dialogues`.

    previous, states: what it follows. Where the template wrote the end of an earlier turn anew,
    that turn ends where the tokens still agree, so that going back to it gives its messages.
    """
    said = [sequence.tokens for sequence in manifest.sequences]
    newest = State.of(said, dialogues)
    assert newest.lengths is not None
    found: dict[Lengths, State] = {}
    if previous is not None and len(previous.sequences) == len(said):
        before = [sequence.tokens for sequence in previous.sequences]
        shared = tuple(common_prefix(a, b) for a, b in zip(before, said, strict=True))
        for state in _located(states, before, previous.turns):
            lengths = tuple(map(min, state.lengths or (), shared))
            if lengths != state.lengths:
                pairs = zip(dialogues, state.dialogues, strict=True)
                if not all(mine.continues(theirs) for mine, theirs in pairs):
                    continue
                ends = [tokens[:n] for tokens, n in zip(said, lengths, strict=True)]
                state = State.of(ends, [replace(d, answer=None) for d in state.dialogues])
            if any(lengths):
                found[lengths] = state
    found[newest.lengths] = newest
    turns = sorted({*manifest.turns, *found}, key=sum)
    return tuple(turns), [found[turn] for turn in turns if turn in found]


def _located(
    states: Sequence[State], tokens: Sequence[Sequence[int]], turns: Iterable[Lengths]
) -> list[State]:
    """Return the states that belong to a beginning of `tokens`, in their order."""
    located = []
    for state in states:
        if state.lengths is None:
            ends = (n for (n,) in turns if old_digest(tokens[0][:n]) == state.tokens[0])
            if (end := next(ends, None)) is not None:
                located.append(State.of([tokens[0][:end]], state.dialogues))
        elif len(state.lengths) == len(tokens):
            located.append(state)
    held = tuple(map(len, tokens))
    reached = [
        s for s in located if all(n <= h for n, h in zip(s.lengths or (), held, strict=True))
    ]
    known = digests(tokens, [s.lengths for s in reached if s.lengths is not None])
    return [s for s in reached if s.lengths is not None and known[s.lengths] == s.tokens]
