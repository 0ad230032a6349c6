"""Saving an engine's state as a session's next turn, and restoring it on any number of ranks."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

from cptool import files
from cptool.distributed.status_board import SAVING
from cptool.errors import RunError, explain
from cptool.session import committing, restoring, segments, store
from cptool.session.dialogue import Dialogue
from cptool.session.manifest import Damaged, Manifest, ModelIdentity, Segment
from cptool.session.manifest import Sequence as Saved

if TYPE_CHECKING:
    from cptool.distributed.world import World
    from cptool.engine.engine import Engine


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
    with ExitStack() as held:  # the lock of a running process, until the turn is committed
        addition = _addition(engine, directory, previous)
        segment = _write(engine, directory, addition, held)
        written = [
            (fields and Segment.of(fields), owned)
            for fields, owned in engine.world.gather(
                [segment and asdict(segment), sorted(engine.logits)]
            )
        ]
        manifest = _manifest(engine, previous, model, addition=addition, written=written)
        fault = None
        if engine.world.rank == 0:
            try:
                manifest = committing.commit_or_keep(directory, manifest, chat)
            except (RunError, OSError) as error:
                fault = error
        raise_everywhere(engine.world, fault)  # and no rank leaves before the turn is on disk
    engine.on_disk.update(engine.cache.lengths, engine.computed)
    return manifest


def _addition(engine: Engine, directory: Path, previous: Manifest | None) -> segments.Addition:
    """Return what this rank writes: KV computed since `previous`, or more of it where segments have
    become many and the disk has room.
    """
    batch, until = len(engine.tokens), engine.computed
    revision, since, start = 1, [0] * batch, [0] * batch
    if previous is not None:
        revision = previous.revision + 1
        since, start = engine.on_disk.rows, engine.on_disk.positions
        first = previous.rewrite_from(start, until)
        needed = (sum(until) - sum(first)) * previous.row_bytes((0, previous.model.kv_heads))
        if first != start and all(
            engine.world.gather(shutil.disk_usage(directory).free > 2 * needed)
        ):
            rows = zip(engine.cache.held.sequences(), first, strict=True)
            since, start = [int((p < f).sum()) for p, f in rows], first
    return segments.Addition(
        revision=revision,
        rank=engine.world.cp_rank,
        kv_heads=_kv_heads(engine),
        since=tuple(since),
        start=tuple(start),
        until=tuple(until),
    )


def _write(
    engine: Engine, directory: Path, addition: segments.Addition, held: ExitStack
) -> Segment | None:
    """Write this rank's segment; if a rank cannot, remove it again and raise on all of them."""
    world, segment, fault = engine.world, None, None
    if not _is_replica(engine):
        try:
            files.make_private(directory)
            logits = engine.logits if world.tp_rank == 0 else {}
            segment = segments.write_segment(
                directory, engine.cache, addition, logits=logits, held=held
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
    engine: Engine,
    previous: Manifest | None,
    model: ModelIdentity,
    *,
    addition: segments.Addition,
    written: list[tuple[Segment | None, list[int]]],
) -> Manifest:
    """Return the manifest of the engine's state; written[r]: the segment of rank r and the
    sequences whose logits it holds.
    """
    turns, lengths = previous.turns if previous else (), tuple(map(len, engine.tokens))
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
    state = zip(engine.tokens, engine.computed, engine.ended, strict=True)
    return Manifest(
        session=previous.session if previous else secrets.token_hex(8),
        model=model,
        dtype=str(engine.dtype).removeprefix("torch."),
        kv_dtype=str(engine.cache.dtype).removeprefix("torch."),
        weights=engine.options.weights or "file",
        cp=engine.world.cp,
        tp=engine.world.tp,
        revision=addition.revision,
        turns=turns if turns[-1:] == (lengths,) else (*turns, lengths),
        sequences=tuple(
            Saved(tuple(tokens), computed, logits_of.get(b), ended)
            for b, (tokens, computed, ended) in enumerate(state)
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


def _kv_heads(engine: Engine) -> tuple[int, int]:
    """Return the range of KV heads that this rank's tensor-parallel share covers."""
    heads = engine.model.config.num_key_value_heads
    first = engine.world.tp_rank * heads // engine.world.tp
    return first, first + engine.model.num_kv_heads


def _is_replica(engine: Engine) -> bool:
    """Return whether a lower tensor-parallel rank holds the same KV heads."""
    heads, tp = engine.model.config.num_key_value_heads, engine.world.tp
    rank = engine.world.tp_rank
    return rank > 0 and rank * heads // tp == (rank - 1) * heads // tp
