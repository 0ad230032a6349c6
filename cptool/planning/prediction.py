"""What a turn will take: the time to the first token, and of each further one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cptool.model.config import LlamaConfig
from cptool.planning.cost.estimate import decode_step, prefill
from cptool.planning.cost.exchange import ALL_Q
from cptool.planning.cost.forward import Forward
from cptool.planning.hardware import HardwareProfile
from cptool.planning.strategy import AUTO, STATIC_ROWS, Choice, choose


@dataclass(frozen=True, kw_only=True)
class Work:
    """A turn: `new[b]` tokens of sequence b over `cached[b]` ones, then up to `answer` tokens of
    each of its `samples` answers, which share the KV before them.

    The other fields are those of `cptool.planning.cost.forward.Forward`.
    """

    config: LlamaConfig
    dtype: str
    new: Sequence[int]
    cached: Sequence[int]
    answer: int
    ranks: int
    tp: int
    samples: int = 1
    partial_bytes: int = 4
    weight_size: float | None = None
    kv_dtype: str | None = None


def predicted_s(choice: Choice, forward: Forward, profile: HardwareProfile) -> float:
    """Return the seconds of `forward` under `choice` that the cost model predicts."""
    shared = replace(forward, active=choice.active)
    estimate = decode_step if shared.decoding else prefill
    return estimate(choice.variant, shared, profile).seconds


@dataclass(frozen=True)
class Prediction:
    """What a turn is predicted to take.

    ttft_s: seconds to the first token. ttit_s: seconds of each further step, which gives a token to
    every sequence. Each is None where there is none, or where the cost model does not cover the
    turn. source: where the profile's figures come from. calibrated: the day they were measured
    here, None for defaults.
    """

    ttft_s: float | None
    ttit_s: float | None
    source: str
    calibrated: str | None

    def fields(self, *, decoding: bool) -> dict[str, object]:
        """Return the fields for --json: `calibrated` is a date, or None for default figures."""
        step_ms = None if self.ttit_s is None else 1e3 * self.ttit_s
        steps = {"predicted_ttit_ms": step_ms} if decoding else {}
        return {"predicted_ttft_s": self.ttft_s, **steps, "calibrated": self.calibrated}


def predict_turn(work: Work, variant: str, profile: HardwareProfile) -> Prediction:
    """Return the prediction of a turn under `variant`, which may be "auto".

    The cost model covers sequences of the same length, in a dtype that the profile has rates for.
    """
    first, step = _predicted(work, variant, profile)
    measured = profile.measurement
    return Prediction(first, step, profile.source, measured.date if measured else None)


def _predicted(
    work: Work, variant: str, profile: HardwareProfile
) -> tuple[float | None, float | None]:
    rated = work.dtype in profile.linear_flops and work.dtype in profile.attention_flops
    if not rated or len(set(work.new)) != 1 or len(set(work.cached)) != 1:
        return None, None
    batch, new, cached = len(work.new), sum(work.new), sum(work.cached)
    forward = Forward(
        config=work.config,
        dtype=work.dtype,
        new=max(1, new),
        cached=cached,
        ranks=work.ranks,
        active=work.ranks,
        batch=batch,
        tp=work.tp,
        partial_bytes=work.partial_bytes,
        weight_size=work.weight_size,
        kv_dtype=work.kv_dtype,
    )
    first = predicted_s(choose(variant, forward, profile), forward, profile) if new else None
    if work.answer < 2:
        return first, None
    batch *= work.samples
    answers = batch * (work.answer // 2)  # half of what they will hold
    step = replace(forward, new=batch, batch=batch, cached=cached + new + answers)
    if profile.device != "cpu" and variant == AUTO and batch <= STATIC_ROWS:
        step = replace(step, graph=True)
        static = ALL_Q.name if work.ranks > 1 else choose(variant, step, profile).variant
        return first, decode_step(static, step, profile).seconds
    return first, predicted_s(choose(variant, step, profile), step, profile)
