"""What a turn counts and predicts: operations, bytes, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cptool.engine.setup.types import mean_weight_size
from cptool.planning.cost.counts import attention_flops, kv_bytes, linear_flops
from cptool.planning.cost.forward import ELEMENT_BYTES
from cptool.planning.prediction import Prediction, Work, predict_turn
from cptool.session.unfinished import going_on

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.options import RankOptions
    from cptool.engine.engine import Engine
    from cptool.engine.turn import Turn
    from cptool.model.config import LlamaConfig
    from cptool.session.manifest import Manifest


def predicted(
    engine: Engine, turn: Turn, checkpoint: Checkpoint, *, new: list[int], cached: list[int]
) -> Prediction:
    """Return what the cost model predicts of a turn of `new[b]` tokens over `cached[b]`."""
    work = Work(
        config=engine.model.config,
        dtype=turn.dtype,
        new=new,
        cached=cached,
        answer=turn.max_new_tokens,
        samples=turn.samples,
        ranks=engine.world.cp,
        tp=engine.world.tp,
        partial_bytes=engine.partial_dtype.itemsize,
        weight_size=mean_weight_size(
            checkpoint, turn.dtype, engine.world.device.type, turn.weights
        ),
        kv_dtype=turn.kv_dtype,
    )
    return predict_turn(work, turn.options.variant, engine.profile)


def expected(
    turn: Turn, checkpoint: Checkpoint, ranks: RankOptions, manifest: Manifest | None
) -> Prediction:
    """Return the same for a turn whose ranks this process is about to start on this machine.

    manifest: of the session that it continues, before the turn goes back in it.
    """
    from cptool.engine.world_profile import local_profile

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
    work = Work(
        config=checkpoint.config,
        dtype=turn.dtype,
        new=new,
        cached=cached,
        answer=turn.max_new_tokens,
        samples=turn.samples,
        ranks=ranks.cp,
        tp=ranks.tp,
        partial_bytes=ELEMENT_BYTES[turn.dtype] if turn.options.partials == "working" else 4,
        weight_size=mean_weight_size(checkpoint, turn.dtype, ranks.device, turn.weights),
        kv_dtype=turn.kv_dtype,
    )
    return predict_turn(work, turn.options.variant, local_profile(ranks))


def prefill_flops(config: LlamaConfig, new: list[int], cached: list[int]) -> int:
    """Return the operations of a prefill of `new[b]` tokens over `cached[b]`, on all ranks."""
    pairs = zip(new, cached, strict=True)
    linear = linear_flops(config, sum(new), sum(map(bool, new)))
    return linear + sum(attention_flops(config, n, before) for n, before in pairs)


def what_a_step_reads(engine: Engine) -> dict[str, Any]:
    """Return as fields of a report the bytes of weights and KV that one rank reads for one step of
    decode, and how many of its KV's lie in a file.
    """
    size, world = engine.cache.dtype.itemsize, engine.world
    kv = kv_bytes(engine.model.config, -(-engine.held_tokens // world.cp), size)
    return {
        "decode_bytes": engine.model.step_bytes + kv // world.tp,
        "kv_in_file": engine.cache.nbytes_in_file,
    }
