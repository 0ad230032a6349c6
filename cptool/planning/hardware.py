"""What the ranks and the links between them can do: the numbers that the cost model reads."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass, field

from cptool.planning.linear_rates import RowRates

MEASURED = "measured on "
"""How the name of a profile of `cptool bench calibrate` begins."""


@dataclass(frozen=True, kw_only=True)
class Link:
    """What joins the ranks of one host, or those of different hosts; every rank uses it at once.

    bandwidth: B/s one way of a rank that sends to one other.
    fan_out: B/s one way of a rank that sends to several at once.
    latency_s: of a message, from the call to its end; compute does not hide it.
    message_overhead_s: of each further message of the same batch.
    collective_latency_s: of an all-reduce or an exchange of few bytes.
    """

    bandwidth: float
    fan_out: float
    latency_s: float
    message_overhead_s: float
    collective_latency_s: float


Beyond = dict[str, dict[str, tuple[float, float]]]
"""By number of ranks, then by variant: seconds for one new token, and for some on each rank."""


@dataclass(frozen=True, kw_only=True)
class HardwareProfile:
    """Rates of one rank, seconds and bytes; all that run at the same time reach them together.

    peak_flops: FLOP/s by dtype name that the maker states, where known; nothing depends on it.
    linear_flops, attention_flops: FLOP/s by dtype name, where rows are many; attention counts
        visible pairs only, `4 D_H` a pair and head. "float8" is for feed-forward layers alone.
    attention_ramp: keys that a query costs beyond those it sees, in each call: the tiles that the
        mask cuts, filling and draining the pipeline. Shorter blocks run slower by it.
    row_rates: by dtype name what linear layers reach from one row to many, alone and beside other
        ranks, where it was measured; else products reach `linear_flops` and read their weights at
        `memory_bandwidth`.
    memory_bytes: of a rank. memory_bandwidth: B/s at which linear layers read weights and small
        ops read and write. cache_bandwidth: B/s at which attention reads keys and values, as it
        does once a call.
    few_query_rows: rows of a KV head up to which a CPU reads keys and values while it computes, at
        `few_query_rate` times the FLOP/s of many.
    block_bandwidth: the rate of reading them for a block of more queries than one and than these
        rows, for which a CPU packs them first; None for that of one query.
    touch_bandwidth: B/s at which a step reads and writes what it has just made or been sent, a few
        megabytes; None for `memory_bandwidth`.
    host_link, network: between ranks of one host, and of different hosts.
    feed_forward: dtype in which the cluster runs gate, up and down, None for that of the rest.
    ranks_per_host: None where a host holds any number.
    call_overhead_s: of one call of attention. op_overhead_s: of a copy or another small op.
    layer_overhead_s: of what else a layer does whatever its tokens (projections, norms, the host's
        share): on a device with a queue, of the host alone, which runs ahead while the device
        computes. forward_overhead_s: of a prefill, once. step_overhead_s: of a decode step on a
        device with a queue, once. wait_s: of a layer of a prefill,
        for each CP rank, beside compute and transfers. skew_s: how far apart ranks come to an
        exchange in a prefill.
    position_s: of bringing the position of one key into sequence order among those of all ranks,
        once a forward.
    transfer_steals: of a transfer's time, the part that compute loses meanwhile: 0 where copy
        engines move it, up to 1 where the cores that compute do.
    ranks_at_once: how many ranks the processors serve at the full rate, None for one device a rank;
        beyond it, ranks take turns.
    threads: CPU threads of a rank that the rates hold for; 0 for another device.
    residual_s: by number of ranks, then by variant: what a layer costs beyond what all else here
        says where it has next to nothing to compute, for one new token and for some on each rank.
        Where it was measured it makes the small costs of messages and calls right for these ranks.
    start_s: likewise, what a forward costs once beyond `forward_overhead_s`: ranks do not come to
        the first layer together, and variants wait for each other differently.
    rule: (alpha, beta, gamma) of the fitted rule of `cptool.planning.strategy`, or None.
    notes: where each number comes from, by field.
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
    transfer_steals: float = 0.0
    block_bandwidth: float | None = None
    touch_bandwidth: float | None = None
    row_rates: dict[str, tuple[RowRates, ...]] = field(default_factory=dict, hash=False)
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

    def ceiling(self, dtype: str) -> float | None:
        """FLOP/s above which a rank did not do what it is said to have done; None where unknown.

        What the maker states; else half as much again as the best that was measured here, which
        another day's clock may reach.
        """
        if dtype in self.peak_flops:
            return self.peak_flops[dtype]
        if not self.name.startswith(MEASURED):
            return None
        return 1.5 * max(self.linear_flops[dtype], self.attention_flops[dtype])

    def link(self, span: int) -> Link:
        """What joins a group of ranks whose first and last lie `span` ranks apart, both counted."""
        inside = self.ranks_per_host is None or span <= self.ranks_per_host
        return self.host_link if inside else self.network

    def residual(self, variant: str, ranks: int, sources: int) -> float:
        """Of a layer on `ranks` ranks of which `sources` have queries."""
        return _beyond(self.residual_s, variant, ranks, sources)

    def start(self, variant: str, ranks: int, sources: int) -> float:
        """Of a forward, once."""
        return _beyond(self.start_s, variant, ranks, sources)

    def for_ranks(self, threads: int, processors: int) -> HardwareProfile:
        """The same processors with `threads` for each rank, of `processors` for all ranks."""
        if not self.threads:
            return self
        scale = threads / self.threads
        scaled = self.scaled(scale)
        # As many threads compute at the same time in fewer ranks.
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
        """With compute and memory that many times as fast."""
        names = [f.name for f in dataclasses.fields(self) if f.name.endswith("_bandwidth")]
        rates = {name: getattr(self, name) for name in names}
        return dataclasses.replace(
            self,
            linear_flops={name: factor * rate for name, rate in self.linear_flops.items()},
            attention_flops={name: factor * rate for name, rate in self.attention_flops.items()},
            row_rates={
                dtype: tuple(m.scaled(factor) for m in measured)
                for dtype, measured in self.row_rates.items()
            },
            **{name: rate and factor * rate for name, rate in rates.items()},
        )


PARTS = (HardwareProfile, Link, RowRates)
"""The dataclasses that a profile is made of."""


def _beyond(measured: Beyond, variant: str, ranks: int, sources: int) -> float:
    """As on the nearest number of ranks that was measured, in proportion to the other ranks."""
    if ranks == 1 or not measured:
        return 0.0
    nearest = min(map(int, measured), key=lambda n: abs(math.log(n / ranks)))
    one, each = measured[str(nearest)].get(variant, (0.0, 0.0))
    between = one + (each - one) * (sources - 1) / (ranks - 1)
    return between * (ranks - 1) / (nearest - 1)
