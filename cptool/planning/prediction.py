"""What a turn will take: the time to the first token, and of each further one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from cptool.model.config import LlamaConfig
from cptool.planning.chunks import UNIT, auto_chunk, peak_memory
from cptool.planning.cost.estimate import decode_step, prefill
from cptool.planning.cost.exchange import ALL_Q, PASS_KV
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
    answer: int = 0
    ranks: int = 1
    tp: int = 1
    samples: int = 1
    partial_bytes: int = 4
    weight_size: float | None = None
    feed_forward: str | None = None
    kv_dtype: str | None = None
    kv_memory: int | None = None
    local: int | None = None

    @property
    def forward(self) -> Forward:
        """The forward over all new tokens, of which there is at least one, in one piece."""
        return Forward(
            config=self.config,
            dtype=self.dtype,
            new=max(1, sum(self.new)),
            cached=sum(self.cached),
            ranks=self.ranks,
            active=self.ranks,
            batch=max(1, len(self.new)),
            tp=self.tp,
            partial_bytes=self.partial_bytes,
            weight_size=self.weight_size,
            feed_forward=self.feed_forward,
            kv_dtype=self.kv_dtype,
            kv_memory=self.kv_memory,
            local=self.local,
        )

    @property
    def room(self) -> int:
        """Tokens of all sequences and their answers together."""
        return sum(self.new) + sum(self.cached) + len(self.new) * self.samples * self.answer

    def is_rated(self, profile: HardwareProfile) -> bool:
        """Return whether the profile has rates of the dtype."""
        return self.dtype in profile.linear_flops and self.dtype in profile.attention_flops


def memory_of(
    work: Work, variant: str, profile: HardwareProfile, *, chunk: int | None, limit: float
) -> dict[str, float]:
    """Return the bytes of a turn on the fullest rank at its peak, by use.

    chunk: tokens of the prompts that go through the model at a time, None for what fits into
        `limit` bytes per rank, or for the least if nothing does.
    """
    whole = work.forward
    if not work.is_rated(profile):
        variant = PASS_KV.name if variant == AUTO else variant
        chunk = chunk or whole.new
    if chunk is None:
        fitting = auto_chunk(whole, profile, limit, variant=variant, room=work.room)
        chunk = fitting or min(UNIT, whole.new)
    return peak_memory(whole, profile, chunk, variant=variant, room=work.room)


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

    The cost model covers sequences of the same length, in types that the profile has rates for.
    """
    first, step = _predicted(work, variant, profile)
    measured = profile.measurement
    return Prediction(first, step, profile.source, measured.date if measured else None)


def _predicted(
    work: Work, variant: str, profile: HardwareProfile
) -> tuple[float | None, float | None]:
    if not work.is_rated(profile) or len(set(work.new)) != 1 or len(set(work.cached)) != 1:
        return None, None
    if work.feed_forward not in (None, *profile.linear_flops):
        return None, None
    batch, new, cached = len(work.new), sum(work.new), sum(work.cached)
    forward = work.forward
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
