"""Looking after a session on disk: checking it, going back, rewriting it in few files."""

from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

from cptool.errors import OptionError, RunError
from cptool.session import chat_file, committing, restoring, segments, store
from cptool.session.manifest import REMEDY, Damaged, Manifest


def problems(directory: Path, manifest: Manifest) -> list[str]:
    """Read every byte of the session's files and return what is wrong with them, one line each with
    the remedy; nothing if they are sound.
    """
    found = []
    for segment in manifest.segments:
        try:
            segments.verify(directory, [segment])
        except Damaged as error:
            found.append(str(error))
    if not found:
        try:
            faults = restoring.position_faults(directory, manifest)
            found = [f"{fault}; {REMEDY}" for fault in faults]
            if not found:
                restoring.read_logits(directory, manifest)
        except Damaged as error:
            found = [str(error)]
    return found + chat_file.problems(directory, manifest.chat)


def roll_back(directory: Path, manifest: Manifest, turns: int) -> Manifest:
    """Go back by `turns` turns and commit that. Raises UserError if there are not as many before
    the last.
    """
    if turns >= len(manifest.turns):
        raise OptionError(
            "turns",
            turns,
            f"{directory} has {len(manifest.turns)} turns, and at least the first must stay",
            "remove the directory to give up all",
        )
    back = manifest.truncated(list(manifest.turns[-1 - turns]))
    back = replace(back, revision=manifest.revision + 1)
    return _committed(directory, back)


def compact(directory: Path, manifest: Manifest) -> Manifest:
    """Rewrite what counts as one segment per CP rank of the last turn, and commit that.

    The KV is read and checked rank by rank, so one rank's share must fit in memory. The old
    segments go once the new ones are committed.
    """
    import torch

    from cptool.cache import KVCache

    model, batch, revision = manifest.model, len(manifest.sequences), manifest.revision + 1
    heads, rewritten = (0, model.kv_heads), []
    cached = tuple(sequence.cached for sequence in manifest.sequences)
    with store.while_read(directory, manifest):
        segments.verify(directory, manifest.segments)
        logits = restoring.read_logits(directory, manifest)
    with ExitStack() as held:  # the lock of a living run, until it is committed
        for rank in range(manifest.cp):
            cache = KVCache(
                layers=model.layers,
                kv_heads=model.kv_heads,
                head_dim=model.head_dim,
                batch=batch,
                dtype=getattr(torch, manifest.kv_dtype),
                device="cpu",
            )
            with store.while_read(directory, manifest):
                restoring.restore(
                    directory, manifest, cache, rank=rank, ranks=manifest.cp, kv_heads=heads
                )
            rewritten.append(
                segments.write_segment(
                    directory,
                    cache,
                    segments.Addition(
                        revision=revision,
                        rank=rank,
                        kv_heads=heads,
                        since=(0,) * batch,
                        start=(0,) * batch,
                        until=cached,
                    ),
                    logits=logits if rank == 0 else {},
                    held=held,
                )
            )
        holder = rewritten[0]
        sequences = tuple(
            replace(s, logits=holder.file if holder is not None and b in logits else None)
            for b, s in enumerate(manifest.sequences)
        )
        written = tuple(segment for segment in rewritten if segment is not None)
        compacted = replace(manifest, revision=revision, sequences=sequences, segments=written)
        return _committed(directory, compacted)


def _committed(directory: Path, manifest: Manifest) -> Manifest:
    """Commit what can be computed again from the session, so that nothing need be kept if that is
    refused.
    """
    try:
        return committing.commit(directory, manifest)
    except committing.Refused as error:
        raise RunError(f"{error}; nothing was changed, give the command again") from None
