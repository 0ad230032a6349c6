"""What a turn counts and predicts: operations, bytes, seconds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from cptool.engine.options import mean_weight_size
from cptool.planning.cost.counts import attention_flops, kv_bytes, linear_flops
from cptool.planning.cost.forward import ELEMENT_BYTES
from cptool.planning.prediction import Prediction, Work, predict_turn

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.options import RankOptions
    from cptool.engine.engine import Engine
    from cptool.engine.turn import Turn
    from cptool.model.config import LlamaConfig


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
    turn: Turn, checkpoint: Checkpoint, ranks: RankOptions, cached: Sequence[int]
) -> Prediction:
    """Return the same for a turn whose ranks this process is about to start on this machine."""
    from cptool.engine.world_profile import local_profile

    work = Work(
        config=checkpoint.config,
        dtype=turn.dtype,
        new=[len(prompt) for prompt in turn.prompts],
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


def decode_bytes(engine: Engine) -> int:
    """Return the bytes of weights and KV that one rank reads for one step of decode."""
    size, world = engine.cache.dtype.itemsize, engine.world
    kv = kv_bytes(engine.model.config, -(-engine.held_tokens // world.cp), size)
    return engine.model.step_bytes + kv // world.tp
