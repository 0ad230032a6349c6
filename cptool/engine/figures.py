"""What a turn counts and predicts: operations, bytes, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cptool.engine.setup.drafting import bytes_of
from cptool.engine.setup.memory import used
from cptool.planning.cost.counts import attention_flops, kv_bytes_read, linear_flops
from cptool.planning.prediction import Prediction, Work, predict_turn
from cptool.session.unfinished import going_on

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.options import RankOptions
    from cptool.engine.engine import Engine
    from cptool.engine.turn import Turn
    from cptool.model.config import LlamaConfig
    from cptool.session.manifest import Manifest


def what_was_expected(
    engine: Engine,
    turn: Turn,
    checkpoint: Checkpoint,
    *,
    new: list[int],
    cached: list[int],
    chunk: int,
) -> dict[str, Any]:
    """Return the fields of a `Report` on what the cost model predicts of a turn of `new[b]` tokens
    over `cached[b]`, read in chunks of `chunk`, and on its memory. Collective.
    """
    work = with_answers(turn, turn.on(engine.world, checkpoint, new=new, cached=cached))
    predicted = predict_turn(work, turn.options.variant, engine.profile)
    drafts = bytes_of(turn, turn.draft, work, engine.profile)
    return {"predicted": predicted, "memory": used(engine, work, chunk, drafts=drafts)}


def with_answers(turn: Turn, work: Work) -> Work:
    """Return the work with the answers that the turn requests."""
    return replace(work, answer=turn.max_new_tokens, samples=turn.samples)


def expected(
    turn: Turn, checkpoint: Checkpoint, ranks: RankOptions, manifest: Manifest | None
) -> Prediction:
    """Return the same for a turn whose ranks this process is about to start on this machine.

    manifest: of the session that it continues, before the turn goes back in it.
    """
    from cptool.engine.world_profile import local_profile

    new, cached = lengths(turn, manifest)
    work = turn.work(
        checkpoint,
        ranks.device,
        cp=ranks.cp,
        tp=ranks.tp,
        local=ranks.count,
        new=new,
        cached=cached,
    )
    return predict_turn(with_answers(turn, work), turn.options.variant, local_profile(ranks))


def lengths(turn: Turn, manifest: Manifest | None) -> tuple[list[int], list[int]]:
    """Return how many tokens of each sequence the turn computes, and over how many cached ones.

    manifest: of the session that it continues, before the turn goes back in it.
    """
    said, cached = [0] * len(turn.prompts), [0] * len(turn.prompts)
    prompts: Sequence[Sequence[int]] = turn.prompts
    if manifest is not None:
        kept, prompts = going_on(manifest, turn.keep, turn.prompts)
        said = [len(sequence.tokens) for sequence in kept.sequences]
        cached = [sequence.cached for sequence in kept.sequences]
    # Tokens whose KV is pending are computed with the prompts.
    new = [
        held - done + len(prompt) for held, done, prompt in zip(said, cached, prompts, strict=True)
    ]
    return new, cached


def prefill_flops(config: LlamaConfig, new: list[int], cached: list[int]) -> int:
    """Return the operations of a prefill of `new[b]` tokens over `cached[b]`, on all ranks."""
    pairs = zip(new, cached, strict=True)
    linear = linear_flops(config, sum(new), sum(map(bool, new)))
    return linear + sum(attention_flops(config, n, before) for n, before in pairs)


def what_a_step_reads(engine: Engine) -> dict[str, Any]:
    """Return as fields of a report the bytes of weights and KV that one rank reads for one step of
    decode, and how many of its KV bytes lie in a file.
    """
    size, world = engine.cache.dtype.itemsize, engine.world
    kv = kv_bytes_read(
        engine.model.config,
        engine.held_tokens,
        batch=engine.cache.batch,
        ranks=world.cp,
        element_bytes=size,
    )
    return {
        "decode_bytes": engine.model.step_bytes + kv // world.tp,
        "kv_in_file": engine.cache.nbytes_in_file,
    }
