"""How the answers of a turn are numbered: by prompt, and by sample where a prompt has several."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cptool.engine.turn import Turn


def places(turn: Turn) -> list[tuple[int, int]]:
    """Return the prompt and the sample of each answer, from 0."""
    return [(b, s) for b in range(len(turn.prompts)) for s in range(turn.samples)]


def number(turn: Turn, answer: int) -> str:
    """Return the number of an answer as users read it, from 1: "2", or "2.3" for a third sample."""
    b, s = places(turn)[answer]
    return f"{b + 1}" if turn.samples == 1 else f"{b + 1}.{s + 1}"
