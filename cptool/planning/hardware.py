"""The rates of ranks and of the links between them, which the cost model reads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field
from typing import Any

from cptool.planning.linear_rates import RowRates, StoredRates

MEASURED = "measured on "
"""Prefix of the names of profiles from `cptool bench calibrate`."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """The link between ranks of one host, or of different hosts, while all ranks use it at once.

    bandwidth: B/s one way, per rank that sends to one other.
    fan_out: B/s one way, per rank that sends to several at once.
    latency_s: seconds of a message, from the call to its end, which compute does not hide.
    message_overhead_s: seconds of each further message of the same batch.
    collective_latency_s: seconds of an all-reduce or an exchange of few bytes.
    spread: how far transfer times lie apart, from 0, all the same, to 1, distributed exponentially
        about the mean, as where other traffic shares the links.
    """

    bandwidth: float
    fan_out: float
    latency_s: float
    message_overhead_s: float
    collective_latency_s: float
    spread: float = 0.0


QUIET = 0.15
"""Load per processor, and spread of repeats, up to which a measurement is good."""


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """When, where and how steadily a profile was measured.

    date: as 2026-11-29. machine: the name of the processor or of the GPU, "" if unknown. load: the
    load average per processor just before. spread: over all timings, the median of the range of
    the middle half of their repeats, over their median. dtypes: those that were measured; rates of
    others are in the defaults' ratio to the first of them.
    """

    date: str
    machine: str = ""
    load: float | None = None
    spread: float | None = None
    dtypes: tuple[str, ...] = ()

    @property
    def noise(self) -> float:
        """The larger of load and spread: above QUIET, the figures are rough."""
        return max(self.load or 0.0, self.spread or 0.0)

    def is_worse_than(self, other: Measurement) -> bool:
        """Return whether this one is rough, and clearly rougher than `other` is known to be."""
        known = other.load is not None and other.spread is not None
        return known and self.noise > max(QUIET, 1.5 * other.noise)


Beyond = dict[str, dict[str, tuple[float, float]]]
"""By number of ranks, then by variant: seconds for one new token, and for some on each rank."""


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Rates, times and memory of one rank while all ranks run at the same time.

    peak_flops: FLOP/s by dtype name that the manufacturer states, if known; predictions do not use
        it.
    linear_flops, attention_flops: FLOP/s by dtype name, where rows are many; attention counts
        visible pairs only, `4 D_H` per pair and head. "float8" is for feed-forward layers alone.
    attention_ramp: keys that a query costs beyond those it sees, in each call: tiles that the mask
        cuts, filling and draining the pipeline. It makes shorter blocks slower.
    row_rates: measured rates of linear layers by dtype name, from one row to many, alone and beside
        other ranks; without them, products reach `linear_flops` and read their weights at
        `memory_bandwidth`.
    stored: rates of weights that stay as a file stores them, on a CPU; None to count their bytes
        alone.
    memory_bytes: memory per rank. memory_bandwidth: B/s at which linear layers read weights.
    tokenwise_bandwidth: B/s by dtype name at which norms, rotation, activation and residual sums
        read and write; on a CPU arithmetic and conversions bound them. `memory_bandwidth` for
        dtypes that are not there.
    cache_bandwidth: B/s at which attention reads keys and values, once per call; on a CPU, of the
        time that this adds to computing.
    few_query_rows: rows of a KV head up to which a CPU does not pack keys and values; it then
        computes at `few_query_rate` times the FLOP/s of many.
    block_bandwidth: B/s of reading them for more than one query and more than these rows, for which
        a CPU packs them first; None for `cache_bandwidth`.
    touch_bandwidth: B/s at which a step reads and writes what it has just computed or received, a
        few megabytes; None for `memory_bandwidth`. moving_bandwidth: likewise of more than caches
        keep.
    host_link, network: the links between ranks of one host, and of different hosts.
    feed_forward: dtype in which the cluster runs gate, up and down, None for that of the rest.
    ranks_per_host: None where a host holds any number.
    call_overhead_s: seconds per call of attention. op_overhead_s: seconds of a copy or another
        small op. layer_overhead_s: fixed seconds per layer (projections, norms, the host's part);
        on a device with a queue, of the host alone, which runs ahead while the device computes.
        forward_overhead_s: seconds of a prefill, once. step_overhead_s: seconds of a decode step on
        a device with a queue, once. wait_s: seconds per layer of a prefill and CP rank, beside
        compute and transfers. skew_s: seconds by which ranks arrive at an exchange apart, in a
        prefill. cached_key_s: seconds per layer of a prefill and cached key of a rank, whatever the
        number of new tokens: what it takes to have the KV of earlier turns where attention reads
        it.
    position_s: seconds per key to sort the positions of all ranks into sequence order, once per
        forward.
    transfer_steals: the part of a transfer's time that compute loses meanwhile: 0 where copy
        engines move it, up to 1 where the cores that compute do.
    ranks_at_once: how many ranks the processors serve at the full rate, None for one device per
        rank; beyond it, ranks take turns.
    threads: CPU threads per rank that the rates hold for; 0 for another device.
    residual_s: by number of ranks, then by variant: seconds of a layer with next to nothing to
        compute beyond what the other fields predict, for one new token and for some on each rank.
        If measured, it corrects the small costs of messages and calls for these ranks.
    start_s: likewise, seconds of a forward once beyond `forward_overhead_s`: ranks do not reach the
        first layer together, and variants wait for each other differently.
    rule: (alpha, beta, gamma) of the fitted rule of `cptool.planning.strategy`, or None.
    notes: where each number comes from, by field.
    measurement: None for a profile that was not measured here.
    """

    name: str
    device: str
    linear_flops: dict[str, float] = field(hash=False)
    attention_flops: dict[str, float] = field(hash=False)
    attention_ramp: float
    memory_bytes: float
    memory_bandwidth: float
    cache_bandwidth: float
    host_link: Link
    network: Link
    call_overhead_s: float
    op_overhead_s: float
    layer_overhead_s: float
    forward_overhead_s: float
    step_overhead_s: float
    position_s: float
    wait_s: float = 0.0
    skew_s: float = 0.0
    cached_key_s: float = 0.0
    transfer_steals: float = 0.0
    block_bandwidth: float | None = None
    touch_bandwidth: float | None = None
    moving_bandwidth: float | None = None
    row_rates: dict[str, tuple[RowRates, ...]] = field(default_factory=dict, hash=False)
    stored: StoredRates | None = None
    tokenwise_bandwidth: dict[str, float] = field(default_factory=dict, hash=False)
    few_query_rows: int = 0
    few_query_rate: float = 1.0
    feed_forward: str | None = None
    ranks_per_host: int | None = None
    ranks_at_once: int | None = None
    threads: int = 0
    residual_s: Beyond = field(default_factory=dict, hash=False)
    start_s: Beyond = field(default_factory=dict, hash=False)
    rule: tuple[float, float, float] | None = None
    peak_flops: dict[str, float] = field(default_factory=dict, hash=False)
    notes: dict[str, str] = field(default_factory=dict, hash=False, compare=False)
    measurement: Measurement | None = field(default=None, hash=False, compare=False)

    @property
    def source(self) -> str:
        """Where the figures come from: "calibrated 2026-11-29", or that they are defaults."""
        if self.measurement is not None:
            return f"calibrated {self.measurement.date}"
        return "defaults, not calibrated here"

    def ceiling(self, dtype: str) -> float | None:
        """Return the FLOP/s that a rank cannot exceed; None if unknown, as for a dtype that was not
        measured.

        What the manufacturer states; else 1.5 times the best rate measured here, since another
        day's clock may be faster.
        """
        if dtype in self.peak_flops:
            return self.peak_flops[dtype]
        measured = self.measurement.dtypes if self.measurement is not None else ()
        if not self.name.startswith(MEASURED) or (measured and dtype not in measured):
            return None
        return 1.5 * max(self.linear_flops[dtype], self.attention_flops[dtype])

    def link(self, span: int) -> Link:
        """Return the link of a group of ranks that spans `span` ranks, first and last included."""
        inside = self.ranks_per_host is None or span <= self.ranks_per_host
        return self.host_link if inside else self.network

    def residual(self, variant: str, ranks: int, sources: int) -> float:
        """Return `residual_s` per layer on `ranks` ranks of which `sources` have queries."""
        return _beyond(self.residual_s, variant, ranks, sources)

    def start(self, variant: str, ranks: int, sources: int) -> float:
        """Return `start_s` per forward on `ranks` ranks of which `sources` have queries."""
        return _beyond(self.start_s, variant, ranks, sources)

    def for_ranks(self, threads: int, processors: int) -> HardwareProfile:
        """Return the profile with `threads` for each rank, of `processors` for all ranks."""
        if not self.threads:
            return self
        scale = threads / self.threads
        scaled = self.scaled(scale)
        # The same number of threads compute at the same time, in fewer ranks.
        row_rates = {
            dtype: tuple(dataclasses.replace(m, ranks=m.ranks / scale) for m in measured)
            for dtype, measured in scaled.row_rates.items()
        }
        return dataclasses.replace(
            scaled,
            row_rates=row_rates,
            memory_bytes=scale * self.memory_bytes,
            ranks_at_once=max(1, processors // threads),
            threads=threads,
        )

    def scaled(self, factor: float) -> HardwareProfile:
        """Return the profile with compute and memory `factor` times as fast."""
        names = [
            f.name for f in dataclasses.fields(self) if f.name.endswith(("_bandwidth", "_flops"))
        ]
        rates: dict[str, Any] = {name: _scaled(getattr(self, name), factor) for name in names}
        return dataclasses.replace(
            self,
            stored=self.stored and self.stored.scaled(factor),
            row_rates={
                dtype: tuple(m.scaled(factor) for m in measured)
                for dtype, measured in self.row_rates.items()
            },
            **{**rates, "peak_flops": self.peak_flops},
        )


PARTS = (HardwareProfile, Link, RowRates, StoredRates, Measurement)
"""The dataclasses that a profile is made of."""


def _scaled(rate: float | dict[str, float] | None, factor: float) -> object:
    """Return a rate, or the rates by dtype, times `factor`; None stays."""
    if isinstance(rate, dict):
        return {dtype: factor * value for dtype, value in rate.items()}
    return rate and factor * rate


def _beyond(measured: Beyond, variant: str, ranks: int, sources: int) -> float:
    """Scale what was measured on the nearest number of ranks by the number of other ranks."""
    if ranks == 1 or not measured:
        return 0.0
    nearest = min(map(int, measured), key=lambda n: abs(math.log(n / ranks)))
    one, each = measured[str(nearest)].get(variant, (0.0, 0.0))
    between = one + (each - one) * (sources - 1) / (ranks - 1)
    return between * (ranks - 1) / (nearest - 1)
