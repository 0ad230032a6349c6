"""Looking after a session on disk: checking it, going back, rewriting it in few files."""

from dataclasses import replace
from pathlib import Path

from cptool import segments, session
from cptool.errors import UserError
from cptool.session import REMEDY, Damaged, Manifest


def problems(directory: Path, manifest: Manifest) -> list[str]:
    """What is wrong with the session's files, a line each with the remedy: every byte is read.
    Nothing where it is sound.
    """
    from safetensors import safe_open

    found = []
    positions: list[list] = [[] for _ in manifest.sequences]
    for segment in manifest.segments:
        try:
            segments.check(directory, [segment])
        except Damaged as error:
            found.append(str(error))
            continue
        with safe_open(directory / segment.file, framework="pt") as file:
            rows = file.get_tensor("positions").split(list(segment.tokens))
        for b, row in enumerate(rows):
            if (row.diff() <= 0).any():
                found.append(
                    f"{segment.file}: the positions of sequence {b + 1} do not ascend; {REMEDY}"
                )
            if segment.kv_heads[0] == 0:
                positions[b].append(row[row < segment.until[b]])
    if found:
        return found
    for b, (rows, sequence) in enumerate(zip(positions, manifest.sequences), 1):
        held = sorted(position for row in rows for position in row.tolist())
        if held != list(range(sequence.cached)):
            found.append(
                f"sequence {b}: the segments hold {len(held)} positions, they must be 0 to "
                f"{sequence.cached - 1}, each once; {REMEDY}"
            )
        if not sequence.cached <= len(sequence.tokens):
            found.append(
                f"sequence {b}: KV of {sequence.cached} tokens, but only {len(sequence.tokens)} "
                f"were said; {REMEDY}"
            )
    covered = {(s.revision, s.rank): 0 for s in manifest.segments if s.live}
    for segment in manifest.segments:
        if segment.live:
            covered[segment.revision, segment.rank] += segment.kv_heads[1] - segment.kv_heads[0]
    for (revision, rank), heads in covered.items():
        if heads != manifest.model.kv_heads:
            found.append(
                f"revision {revision}, rank {rank}: KV of {heads} heads, the model has "
                f"{manifest.model.kv_heads}; {REMEDY}"
            )
    return found


def roll_back(directory: Path, manifest: Manifest, turns: int) -> Manifest:
    """Goes back by `turns` turns and commits that; UserError if there are not so many before the
    first.
    """
    if turns >= len(manifest.turns):
        raise UserError(
            f"--turns {turns}: {directory} has {len(manifest.turns)} turns, and at least the first "
            "must stay; "
            "remove the directory to give up all"
        )
    back = manifest.truncated(list(manifest.turns[-1 - turns]))
    back = replace(back, revision=manifest.revision + 1)
    session.commit(directory, back)
    return back


def compact(directory: Path, manifest: Manifest) -> Manifest:
    """Rewrites what counts as one segment for each CP rank of the last turn, and commits that.

    The KV is read and checked rank by rank, so one rank's share must fit in memory. The old
    segments go once the new ones are committed.
    """
    import torch

    from cptool.cache import KVCache

    model, batch, revision = manifest.model, len(manifest.sequences), manifest.revision + 1
    heads, rewritten = (0, model.kv_heads), []
    segments.check(directory, manifest.segments)
    logits = segments.read_logits(directory, manifest)
    cached = [sequence.cached for sequence in manifest.sequences]
    for rank in range(manifest.cp):
        cache = KVCache(
            layers=model.layers,
            kv_heads=model.kv_heads,
            head_dim=model.head_dim,
            batch=batch,
            dtype=getattr(torch, manifest.dtype),
            device="cpu",
        )
        segments.restore(directory, manifest, cache, rank=rank, ranks=manifest.cp, kv_heads=heads)
        rewritten.append(
            segments.write_segment(
                directory,
                cache,
                [0] * batch,
                revision=revision,
                rank=rank,
                kv_heads=heads,
                start=[0] * batch,
                until=cached,
                logits=logits if rank == 0 else {},
            )
        )
    sequences = tuple(
        replace(s, logits=rewritten[0].file if b in logits else None)
        for b, s in enumerate(manifest.sequences)
    )
    written = tuple(segment for segment in rewritten if segment is not None)
    compacted = replace(manifest, revision=revision, sequences=sequences, segments=written)
    session.commit(directory, compacted)
    return compacted
