"""Saving an engine's state as a session's next turn, and restoring it on any number of ranks."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from cptool import files
from cptool.distributed.status_board import SAVING
from cptool.errors import RunError, explain
from cptool.session import committing, restoring, segments, store, unfinished
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Damaged, Manifest, ModelIdentity, Segment
from cptool.session.manifest import Sequence as Saved

Written = tuple[Segment | None, list[int]]
"""The segment of a rank, if it wrote one, and the sequences whose logits it holds."""

if TYPE_CHECKING:
    import torch

    from cptool.cache import KVCache
    from cptool.distributed.world import World
    from cptool.engine.engine import Engine
    from cptool.engine.options import EngineOptions
    from cptool.engine.state import OnDisk
    from cptool.model.llama import Llama


class State(Protocol):
    """What is saved of an engine: its attributes of these names, at a moment."""

    world: World
    model: Llama
    dtype: torch.dtype
    options: EngineOptions
    cache: KVCache
    tokens: list[list[int]]
    computed: list[int]
    ended: list[bool]
    logits: dict[int, torch.Tensor]
    on_disk: OnDisk


def restore(
    engine: Engine, directory: Path, manifest: Manifest, *, reserve: Sequence[int] | None = None
) -> None:
    """Take over a session's state, with `reserve[b]` free slots for each sequence on every rank.

    Collective. Raises UserError on all ranks, before anything changes, if a segment is damaged.
    """
    world = engine.world
    _verify_segments(world, directory, manifest)
    rows = {}
    with store.while_read(directory, manifest):
        held = restoring.restore(
            directory,
            manifest,
            engine.cache,
            rank=world.cp_rank,
            ranks=world.cp,
            kv_heads=_kv_heads(engine),
            reserve=reserve,
        )
        if world.cp_rank == 0:
            rows = restoring.read_logits(directory, manifest)
    engine.adopt(
        [sequence.tokens for sequence in manifest.sequences],
        held,
        ended=[sequence.ended for sequence in manifest.sequences],
        logits={b: row.to(world.device) for b, row in rows.items()},
    )
    engine.on_disk.update(engine.cache.lengths, engine.computed)


def save(
    engine: Engine,
    directory: Path,
    previous: Manifest | None,
    model: ModelIdentity,
    *,
    chat: tuple[Dialogue, ...] | None = None,
) -> Manifest:
    """Write what was added since `previous` as the session's next turn and return its manifest.

    Collective. Every rank writes its segment; rank 0 then replaces the manifest, and nothing before
    that changes the session. Where no token was added, KV that was pending is saved, but no turn is
    counted.

    previous: the manifest that the engine was restored from or last saved as, cut back where the
        engine was; None saves everything as a new session.
    chat: the messages of each sequence after the turn, if they are conversations.

    Raises RunError or OSError on every rank if the turn cannot be saved, with what became of it in
    the message. The engine is then unchanged and can save elsewhere.
    """
    engine.report(SAVING, 0, 0)

    def made(addition: segments.Addition, written: list[Written]) -> Manifest:
        return _manifest(engine, previous, model, addition=addition, written=written)

    def commit(manifest: Manifest) -> Manifest:
        return committing.commit_or_keep(directory, manifest, chat)

    manifest = _committed(engine, directory, previous, made=made, commit=commit)
    engine.on_disk.update(engine.cache.lengths, engine.computed)
    return manifest


def save_unfinished(
    state: State,
    directory: Path,
    previous: Manifest | None,
    model: ModelIdentity,
    *,
    before: Sequence[Saved],
    keep: Sequence[int],
) -> Manifest:
    """Write what was computed since `previous` of a turn that is still being read, beside what the
    session holds, and return the manifest (`cptool.session.unfinished`).

    Collective; changes nothing in `state`, which may be a snapshot.

    previous: the manifest that the session has, None for a new one. before: its sequences before
        this turn. keep: how many of the tokens of each were said before it.

    Raises RunError or OSError on every rank if it cannot be saved; the session is then as it was.
    """

    def made(addition: segments.Addition, written: list[Written]) -> Manifest:
        whole = _manifest(state, previous, model, addition=addition, written=written)
        sequences = unfinished.interrupted(
            before,
            state.tokens,
            state.computed,
            keep=keep,
            logits={b: s.logits for b, s in enumerate(whole.sequences) if s.logits},
        )
        wanted = {sequence.logits for sequence in sequences}
        named = {segment.file for segment in whole.segments}
        for_logits = [
            replace(segment, until=tuple(map(min, segment.until, addition.start)))
            for segment in (previous.segments if previous else ())
            if segment.file in wanted - named
        ]
        return replace(
            whole,
            turns=previous.turns if previous else (),
            sequences=tuple(sequences),
            segments=(*for_logits, *whole.segments),
        )

    def commit(manifest: Manifest) -> Manifest:
        return committing.commit(directory, manifest)

    return _committed(state, directory, previous, made=made, commit=commit)


def _committed(
    state: State,
    directory: Path,
    previous: Manifest | None,
    *,
    made: Callable[[segments.Addition, list[Written]], Manifest],
    commit: Callable[[Manifest], Manifest],
) -> Manifest:
    """Write this rank's part, have rank 0 commit the manifest that `made` returns, and return it.
    Collective.
    """
    with ExitStack() as held:  # the lock of a running process, until the turn is committed
        addition = _addition(state, directory, previous)
        segment = _write(state, directory, addition, held)
        written = [
            (fields and Segment.of(fields), owned)
            for fields, owned in state.world.gather(
                [segment and asdict(segment), sorted(state.logits)]
            )
        ]
        manifest = made(addition, written)
        fault = None
        if state.world.rank == 0:
            try:
                manifest = commit(manifest)
            except (RunError, OSError) as error:
                fault = error
        raise_everywhere(state.world, fault)  # and no rank leaves before the turn is on disk
    return manifest


def _addition(state: State, directory: Path, previous: Manifest | None) -> segments.Addition:
    """Return what this rank writes: KV computed since `previous`, or more of it where segments have
    become many and the disk has room.
    """
    batch, until = len(state.tokens), state.computed
    revision, since, start = 1, [0] * batch, [0] * batch
    if previous is not None:
        revision = previous.revision + 1
        since, start = state.on_disk.rows, state.on_disk.positions
        first = previous.rewrite_from(start, until)
        needed = (sum(until) - sum(first)) * previous.row_bytes((0, previous.model.kv_heads))
        if first != start and all(
            state.world.gather(shutil.disk_usage(directory).free > 2 * needed)
        ):
            rows = zip(state.cache.held.sequences(), first, strict=True)
            since, start = [int((p < f).sum()) for p, f in rows], first
    return segments.Addition(
        revision=revision,
        rank=state.world.cp_rank,
        kv_heads=_kv_heads(state),
        since=tuple(since),
        start=tuple(start),
        until=tuple(until),
    )


def _write(
    state: State, directory: Path, addition: segments.Addition, held: ExitStack
) -> Segment | None:
    """Write this rank's segment; if a rank cannot, remove it again and raise on all of them."""
    world, segment, fault = state.world, None, None
    if not _is_replica(state):
        try:
            files.make_private(directory)
            logits = state.logits if world.tp_rank == 0 else {}
            segment = segments.write_segment(
                directory, state.cache, addition, logits=logits, held=held
            )
        except (RunError, OSError) as error:
            fault = error
    try:
        raise_everywhere(world, fault)
    except (RunError, OSError):
        if segment is not None:
            with suppress(OSError):
                (directory / segment.file).unlink()
        raise
    return segment


def _manifest(
    state: State,
    previous: Manifest | None,
    model: ModelIdentity,
    *,
    addition: segments.Addition,
    written: list[Written],
) -> Manifest:
    """Return the manifest of the engine's state; written[r]: the segment of rank r and the
    sequences whose logits it holds.
    """
    turns, lengths = previous.turns if previous else (), tuple(map(len, state.tokens))
    logits_of = {
        b: segment.file
        for segment, owned in written
        if segment is not None and segment.kv_heads[0] == 0
        for b in owned
    }
    # What was computed again since `previous` counts in the new segment alone.
    older = (
        replace(segment, until=tuple(map(min, segment.until, addition.start)))
        for segment in (previous.segments if previous else ())
    )
    each = zip(state.tokens, state.computed, state.ended, strict=True)
    return Manifest(
        session=previous.session if previous else secrets.token_hex(8),
        model=model,
        dtype=str(state.dtype).removeprefix("torch."),
        kv_dtype=str(state.cache.dtype).removeprefix("torch."),
        weights=state.options.weights or "file",
        cp=state.world.cp,
        tp=state.world.tp,
        revision=addition.revision,
        turns=turns if turns[-1:] == (lengths,) else (*turns, lengths),
        sequences=tuple(
            Saved(tokens=tuple(tokens), cached=computed, logits=logits_of.get(b), ended=ended)
            for b, (tokens, computed, ended) in enumerate(each)
        ),
        segments=(
            *(segment for segment in older if segment.live),
            *(segment for segment, _ in written if segment is not None),
        ),
        chat=previous.chat if previous else (),
    )


def _verify_segments(world: World, directory: Path, manifest: Manifest) -> None:
    """Verify that all ranks see one revision, and every segment, each on one rank; no rank opens
    one before the result of all is known.
    """
    damage, revisions = None, world.gather(manifest.revision)
    if revisions != revisions[:1] * len(revisions):
        raise RunError(store.changed(directory, max(revisions), min(revisions)))
    try:
        segments.verify(directory, manifest.segments[world.rank :: world.size])
    except Damaged as error:
        damage = str(error)
    for found in world.gather(damage):
        if found is not None:
            with store.while_read(directory, manifest):
                raise Damaged(found)


def raise_everywhere(world: World, fault: Exception | None) -> None:
    """Raise on every rank if one has a fault, so that none waits for it. Collective."""
    texts = world.gather(None if fault is None else explain(fault))
    if fault is not None:
        raise fault
    for text in texts:
        if text is not None:
            raise RunError(text)


def _kv_heads(state: State) -> tuple[int, int]:
    """Return the range of KV heads that this rank's tensor-parallel share covers."""
    heads = state.model.config.num_key_value_heads
    first = state.world.tp_rank * heads // state.world.tp
    return first, first + state.model.num_kv_heads


def _is_replica(state: State) -> bool:
    """Return whether a lower tensor-parallel rank holds the same KV heads."""
    heads, tp = state.model.config.num_key_value_heads, state.world.tp
    rank = state.world.tp_rank
    return rank > 0 and rank * heads // tp == (rank - 1) * heads // tp
