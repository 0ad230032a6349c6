"""What `cptool plan` says of the chunks in which a prompt goes through."""

from __future__ import annotations

from typing import Any

from cptool import units
from cptool.cli.draw import Rows
from cptool.planning.chunks import Chunk, Chunks
from cptool.units import duration, size


def fields(prefill: Chunks) -> dict[str, Any]:
    """Return what JSON says of them."""
    first, last = prefill.chunks[0], prefill.last
    return {
        "chunk": first.new,
        "chunks": len(prefill.chunks),
        "first_chunk": _chunk_fields(first),
        "last_chunk": _chunk_fields(last),
        "switches": [
            {"cached": cached, "variant": variant} for cached, variant in prefill.switches
        ],
    }


def _chunk_fields(chunk: Chunk) -> dict[str, Any]:
    return {
        "new": chunk.new,
        "cached": chunk.cached,
        "variant": chunk.choice.variant,
        "reason": chunk.choice.reason,
        "forward_s": chunk.seconds,
        "exposed_s": chunk.estimate.exposed_s,
        "wire_bytes": chunk.estimate.wire_bytes,
        "memory_bytes_per_rank": round(chunk.memory_bytes),
    }


def rows(prefill: Chunks) -> Rows:
    """Return the rows of the table, none for a prompt that goes through in one piece."""
    first, last = prefill.chunks[0], prefill.last
    if first is last:
        return []
    return [
        ("chunks", f"{len(prefill.chunks):,} of up to {units.some(first.new, 'token')}"),
        ("", f"the first {_in_words(first)}"),
        ("", f"the last {_in_words(last)}"),
    ]


def _in_words(chunk: Chunk) -> str:
    sent = chunk.estimate.wire_bytes
    return (
        f"{duration(chunk.seconds)}, {size(chunk.memory_bytes)} per rank"
        f"{f', {size(sent)} sent' if sent else ''}"
    )


def variants(prefill: Chunks) -> str:
    """Return the variants in order, with the tokens cached when each begins, and why the last."""
    (_, first), *others = prefill.switches
    shown = first
    for cached, name in others:
        shown += f", {name} from {cached:,} cached tokens on"
    return f"{shown} ({prefill.last.choice.reason})"
