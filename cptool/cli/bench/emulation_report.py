"""What `cptool bench emulate` prints of a projection."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from cptool.cli.draw import Rows
from cptool.emulation.layer import Scenario
from cptool.emulation.projection import Projection
from cptool.planning.cost.memory import in_words
from cptool.planning.hardware import HardwareProfile
from cptool.units import byte_rate, duration, flop_rate, percent, size
from cptool.variants import find


def _rate(flops: float, seconds: float) -> float | None:
    """TFLOP/s; None where nothing was computed or no time was taken."""
    return flops / seconds / 1e12 if flops and seconds else None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


@dataclass(frozen=True)
class Report:
    """A projection, and what it was made from."""

    shape: str
    scenario: Scenario
    profile: HardwareProfile
    result: Projection

    def fields(self) -> dict[str, Any]:
        """Return what --json prints; seconds and bytes as the names say."""
        scenario, result = self.scenario, self.result
        return {
            "shape": self.shape,
            "layers": scenario.config.num_hidden_layers,
            "cp": scenario.cp,
            "tp": scenario.tp,
            "tokens": scenario.new,
            "cached": scenario.cached,
            "variant": result.variant,
            "reason": result.reason,
            "device": str(scenario.device),
            "device_name": self._device_name(),
            "dtype": _name(scenario.dtype),
            "fp8_feed_forward": scenario.fp8,
            "hardware": self.profile.name,
            "rank": result.rank,
            "queries": result.queries,
            "keys": result.keys,
            "layer": self._layer(),
            "once_s": result.once,
            "ttft_s": result.ttft_s,
            "planned_ttft_s": result.planned_s,
            "flops": result.flops,
            "tflops_per_rank": result.flops_per_rank / 1e12,
            "memory_bytes_per_rank": {n: round(b) for n, b in result.memory.items()},
            "emulated_bytes": result.emulated_bytes,
            "assumptions": self._assumptions(),
        }

    def rows(self) -> Rows:
        """Return the rows of the table."""
        scenario, result = self.scenario, self.result
        return [
            ("model", self._run()),
            ("device", f"{self._device_name()}, as rank {result.rank} of the cp ranks"),
            ("variant", f"{result.variant} ({result.reason})"),
            (
                "holds",
                f"{result.queries:,} queries, {result.keys:,} keys of {scenario.kv_heads} heads",
            ),
            *self._part_rows(),
            *self._ring_rows(),
            *self._exchange_rows(),
            ("per layer", duration(result.layer_s)),
            ("per forward", ", ".join(f"{name} {duration(s)}" for name, s in result.once.items())),
            (
                "first token",
                f"{duration(result.ttft_s)} projected for {result.layers} layers, "
                f"{flop_rate(result.flops_per_rank)} per rank; cptool plan predicts "
                f"{duration(result.planned_s)} on {self.profile.name}",
            ),
            (
                "memory",
                f"a rank of the run takes {size(sum(result.memory.values()))}: "
                f"{in_words(result.memory)}; {size(result.emulated_bytes)} here",
            ),
            ("assumed", "; ".join(self._assumptions())),
        ]

    def _run(self) -> str:
        scenario = self.scenario
        cached = f", {scenario.cached:,} of them cached" if scenario.cached else ""
        return (
            f"{self.shape}, {scenario.new + scenario.cached:,} tokens{cached}, "
            f"{scenario.cp} cp x {scenario.tp} tp"
        )

    def _device_name(self) -> str:
        device = self.scenario.device
        if device.type == "cuda":
            return torch.cuda.get_device_name(device)
        return f"CPU, {torch.get_num_threads()} threads"

    def _attention_rate(self, pairs: int, seconds: float) -> float | None:
        """Return TFLOP/s of attention over `pairs` of queries and keys: 4 D per pair and head."""
        heads, head_dim = self.scenario.heads, self.scenario.config.head_dim
        return _rate(4 * heads * head_dim * pairs, seconds)

    def _layer(self) -> dict[str, Any]:
        result = self.result
        return {
            "parts": [
                {
                    "name": part.name,
                    "seconds": part.seconds,
                    "fastest_s": part.fastest_s,
                    "slowest_s": part.slowest_s,
                    "flops": part.flops,
                    "tflops": _rate(part.flops, part.seconds),
                }
                for part in result.parts
            ],
            "attention": [
                {
                    "source": block.source,
                    "pairs": block.pairs,
                    "seconds": block.seconds,
                    "tflops": self._attention_rate(block.pairs, block.seconds),
                }
                for block in result.blocks
            ],
            "compute_s": result.compute_s,
            "wire_bytes": result.sent_bytes,
            "transfer_s": result.transfer_s,
            "exposed_s": result.exposed_s,
            "waiting_s": result.waiting_s,
            "allreduce_bytes": result.allreduce_bytes,
            "allreduce_s": result.allreduce_s,
            "seconds": result.layer_s,
        }

    def _part_rows(self) -> Rows:
        rows = []
        for part in self.result.parts:
            spread = f"{duration(part.fastest_s)} to {duration(part.slowest_s)}"
            rows.append(
                (
                    part.name.partition(",")[0] if part.flops else "other",
                    f"{duration(part.seconds)} ({spread})"
                    + (
                        f", {flop_rate(part.flops / part.seconds)}"
                        if part.flops and part.seconds
                        else f": {part.name}"
                    ),
                )
            )
        return rows

    def _ring_rows(self) -> Rows:
        """Return the steps of the ring whose rates are the lowest and the highest."""
        ring = [block for block in self.result.blocks if block.source is not None]
        if len(ring) < 2:
            return []
        ring.sort(key=lambda s: s.pairs / s.seconds if s.seconds else 0.0)
        what = "keys" if find(self.result.variant).keys_travel else "queries"
        told = [
            f"{word} {duration(s.seconds)} over source {s.source}'s {what} "
            f"({flop_rate(1e12 * (self._attention_rate(s.pairs, s.seconds) or 0))})"
            for word, s in (("slowest rate", ring[0]), ("fastest", ring[-1]))
        ]
        return [("ring steps", f"{len(ring)}, {', '.join(told)}")]

    def _exchange_rows(self) -> Rows:
        scenario, result = self.scenario, self.result
        rows = []
        if scenario.cp > 1:
            rows.append(
                (
                    "exchange",
                    f"{size(result.sent_bytes)} sent, {duration(result.transfer_s)}, of which "
                    f"{duration(result.exposed_s)} exposed; ranks wait for each other "
                    f"{duration(result.waiting_s)}",
                )
            )
        if scenario.tp > 1:
            reduced = f"{size(result.allreduce_bytes)}, {duration(result.allreduce_s)}"
            rows.append(("all-reduce", reduced))
        return rows

    def _assumptions(self) -> list[str]:
        """Return what the projection assumes without measuring it here."""
        scenario, profile, result = self.scenario, self.profile, self.result
        told = [
            f"all {result.layers} layers take what this one took, and all ranks at most what rank "
            f"{result.rank} did",
        ]
        if scenario.cp > 1:
            link = profile.link(scenario.cp * scenario.tp)
            told.append(
                f"links of {profile.name}: {byte_rate(link.bandwidth)} one way, "
                f"{duration(link.latency_s)} per message"
            )
        if scenario.tp > 1:
            link = profile.link(scenario.tp)
            told.append(
                f"two all-reduces per layer in ring form at {byte_rate(link.bandwidth)}, not hidden"
            )
        told.append(
            "feed-forward in row-wise FP8, activations scaled as they come"
            if scenario.fp8
            else f"linear layers in {_name(scenario.dtype)}"
        )
        if scenario.cp > 1 and profile.transfer_steals:
            told.append(
                f"a transfer takes {percent(profile.transfer_steals)} of its time from compute"
            )
        return told
