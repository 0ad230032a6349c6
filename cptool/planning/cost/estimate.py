"""The time of a whole forward: layers, embedding, logits, sampling, and fixed costs."""

from __future__ import annotations

from dataclasses import dataclass

from cptool.planning.cost.forward import Forward, Prediction
from cptool.planning.cost.layer import predict
from cptool.planning.cost.rates import Rates
from cptool.planning.hardware import HardwareProfile


@dataclass(frozen=True)
class Estimate:
    """Seconds of a forward on the busiest rank, by cause.

    layer: one decoder layer. layers: how many. logits_s: embedding, final norm and output head.
    once_s: fixed costs, whatever the size.
    """

    layer: Prediction
    layers: int
    logits_s: float
    once_s: float

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part; they add up to `seconds`."""
        parts = {name: self.layers * spent for name, spent in self.layer.parts.items()}
        return {**parts, "logits_s": self.logits_s, "once_s": self.once_s}

    @property
    def seconds(self) -> float:
        """Seconds of the whole forward."""
        return sum(self.parts.values())

    @property
    def exposed_s(self) -> float:
        """Seconds of transfers that compute does not hide."""
        return self.layers * self.layer.exposed_s

    @property
    def hidden_s(self) -> float:
        """Seconds of transfers under compute."""
        return self.layers * self.layer.hidden_s

    @property
    def wire_bytes(self) -> float:
        """Bytes that a rank sends to other CP ranks."""
        return self.layers * self.layer.bytes

    @property
    def tensor_parallel_bytes(self) -> float:
        """Bytes that a rank sends to other TP ranks."""
        return self.layers * self.layer.tensor_parallel_bytes


def prefill(variant: str, forward: Forward, profile: HardwareProfile) -> Estimate:
    """Predict the time to the first token (TTFT), without loading weights."""
    return _estimate(variant, forward, profile, profile.forward_overhead_s)


def decode_step(variant: str, forward: Forward, profile: HardwareProfile) -> Estimate:
    """Predict the time of one more token for each sequence (TTIT)."""
    once = profile.forward_overhead_s if profile.device == "cpu" else profile.step_overhead_s
    return _estimate(variant, forward, profile, once)


def _estimate(variant: str, forward: Forward, profile: HardwareProfile, once: float) -> Estimate:
    rates, config = Rates(forward, profile), forward.config
    # Rows of the rank that owns most of the last tokens; the head is replicated over TP ranks.
    rows = -(-forward.batch // forward.sources)
    head = config.hidden_size * config.vocab_size
    logits = rates.product(head, forward.dtype, rows, forward.sources)
    embedded = 2 * forward.queries * config.hidden_size * forward.element
    logits += rates.touch(embedded) + rates.touch(8 * rows * config.vocab_size, calls=3)
    if forward.ranks > 1:
        once += rates.link.collective_latency_s * rates.crowd(forward.ranks)
        once += profile.start(variant, forward.ranks, forward.sources)
    return Estimate(
        layer=predict(variant, forward, profile),
        layers=config.num_hidden_layers,
        logits_s=rates.crowd(forward.sources) * logits,
        once_s=once,
    )
