"""The time of the pieces of a layer on a rank of given hardware."""

from __future__ import annotations

import math
from dataclasses import dataclass

from cptool.model.row_limits import ROWS_AT_ONCE_CPU
from cptool.planning.cost.forward import ELEMENT_BYTES, Forward
from cptool.planning.hardware import HardwareProfile, Link
from cptool.planning.linear_rates import RowRates, StoredRates, nearest

FEW_QUERIES = 8
"""Queries of a sequence for which a CPU that has a kernel for few rows uses it, whatever their rows
(`kStreamTokens` in csrc/cpu/stream_kernel.h)."""
IN_CACHES = 8 << 20
"""As many bytes as calibration reads and writes again and again to measure `touch_bandwidth`."""


@dataclass(frozen=True)
class Rates:
    """Times of one call, product, copy or transfer of a `forward` on a `profile`, in seconds."""

    forward: Forward
    profile: HardwareProfile

    @property
    def queued(self) -> bool:
        """Whether the host runs ahead of the device, so that its time hides under compute."""
        return self.profile.device != "cpu"

    @property
    def link(self) -> Link:
        """The link between neighbours of the context-parallel ring, which lie `tp` ranks apart."""
        return self.profile.link(self.forward.ranks * self.forward.tp)

    def crowd(self, ranks: int) -> float:
        """Return the factor on compute time when `ranks` ranks compute at the same time."""
        at_once = self.profile.ranks_at_once
        return 1.0 if at_once is None else max(1.0, ranks / at_once)

    def row_rates(self, dtype: str, ranks: int) -> RowRates | None:
        """Return the measured rates of linear layers while as many of `ranks` compute as can."""
        at_once = self.profile.ranks_at_once or ranks
        return nearest(self.profile.row_rates.get(dtype, ()), min(ranks, at_once))

    def product(self, parameters: float, dtype: str, rows: float, ranks: int) -> float:
        """Return the seconds of `rows` rows times a matrix, on each of `ranks` ranks.

        As measured; else a roofline whose two terms add: few rows wait for the matrix, and many
        rows still wait for the first part of it. Rates are measured with weights of the dtype: of
        weights that are stored in fewer bytes, the bytes that need not be read are taken off, and
        widening them is added; products with them are in float32.
        """
        size: float = ELEMENT_BYTES[dtype]
        if self._widens:
            assert self.forward.weight_size is not None
            dtype, size = "float32", self.forward.weight_size
        measured, bandwidth = self.row_rates(dtype, ranks), self.profile.memory_bandwidth
        read = parameters * size / bandwidth
        stored = self._stored
        if stored and rows <= stored.rows:
            return max(stored.few(parameters, rows), read)
        widening = parameters / stored.widened if stored else 0.0
        if measured:
            seconds = measured.product(parameters, rows)
            if not self._widens:
                return seconds
            saved = parameters * ELEMENT_BYTES[dtype] / bandwidth - read
            return max(seconds - saved, read) + widening
        rates = self.profile.linear_flops
        rate = rates.get(dtype) or rates[self.forward.dtype]
        return 2 * parameters * rows / rate + read + widening

    def in_panels(self, rows: float) -> float:
        """Return the seconds per layer that many rows lose to weights that stay as stored: those of
        the feed-forward are widened again for each further piece of the rows, and where a panel of
        them is multiplied at a time, each result is copied to its place; see `cptool.ops.stored`.
        """
        stored, forward = self._stored, self.forward
        if stored is None or rows <= stored.rows:
            return 0.0
        _, (feed_forward, _) = forward.linear_layers()
        again = (math.ceil(rows / ROWS_AT_ONCE_CPU) - 1) * feed_forward / stored.widened
        if not stored.panels:
            return again
        feed_width = forward.config.intermediate_size / forward.tp
        columns = (
            forward.query_width + forward.kv_width + 2 * (forward.config.hidden_size + feed_width)
        )
        copied = 2 * rows * columns * forward.element
        return again + self.tokenwise(copied)

    def tokenwise(self, count: float) -> float:
        """Return the seconds of norms, rotation, activation and sums that move `count` bytes."""
        found = self.profile.tokenwise_bandwidth.get(self.forward.dtype)
        return count / (found or self.profile.memory_bandwidth)

    def layer_overhead(self, rows: float, ranks: int) -> float:
        """Return the fixed seconds of a layer in which each of `ranks` ranks has `rows` rows."""
        stored, measured = self._stored, self.row_rates(self.forward.dtype, ranks)
        if stored is not None and (rows <= stored.rows or not measured):
            return stored.layer_s
        return measured.layer(rows) if measured else self.profile.layer_overhead_s

    @property
    def _widens(self) -> bool:
        """Whether products read weights in blocks, as a file stores them, and widen them: on a CPU
        alone, and not those of FP8, which has products of its own.
        """
        forward = self.forward
        plain = forward.weight_size is None or forward.feed_forward == "float8"
        return self.profile.device == "cpu" and not plain

    @property
    def _stored(self) -> StoredRates | None:
        """The rates of weights as they are stored, None where there are none."""
        return self.profile.stored if self._widens else None

    def attention(
        self, pairs: float, keys: float, queries: float, calls: int = 1, received: bool = False
    ) -> float:
        """Return the seconds of calls in which `queries` see `pairs` of `keys` keys in all.

        received: whether the keys have just come from other ranks, so that a cache may hold them.
        """
        profile, forward = self.profile, self.forward
        flops = 4 * forward.query_width * (pairs + profile.attention_ramp * queries * calls)
        group = 2 * forward.query_width / forward.kv_width
        few = profile.few_query_rows > 0 and (
            queries * group <= forward.batch * profile.few_query_rows
            or queries <= forward.batch * FEW_QUERIES
        )
        bandwidth = profile.cache_bandwidth
        if not few and queries > forward.batch and profile.block_bandwidth is not None:
            bandwidth = profile.block_bandwidth
        spent = flops / profile.attention_flops[forward.dtype]
        if few:
            spent /= profile.few_query_rate
        count = keys * forward.kv_width * forward.kv_element
        read = count / bandwidth
        if few and received:
            read = min(read, self.touch(count, calls=0))
        # A device reads the next tiles while it multiplies; a core stops at each.
        busy = max(spent, read) if self.queued else spent + read
        return calls * profile.call_overhead_s + busy

    def touch(self, count: float, calls: int = 1) -> float:
        """Return the seconds of calls that read or write `count` bytes which were just computed or
        received. On a CPU caches have kept `IN_CACHES` of them at most.
        """
        profile = self.profile
        near = profile.touch_bandwidth or profile.memory_bandwidth
        far = min(near, profile.moving_bandwidth or profile.memory_bandwidth)
        kept = count if self.queued else min(count, IN_CACHES)
        return calls * profile.op_overhead_s + kept / near + (count - kept) / far

    def message(
        self, count: float, messages: int = 1, receivers: int | None = None
    ) -> tuple[float, float]:
        """Return the seconds of latency and of transmission of a batch of `messages`, `count` bytes
        in all, one way, to each of `receivers`, by default all ranks.
        """
        link, crowd = self.link, self.crowd(self.forward.ranks)
        latency = link.latency_s + (messages - 1) * link.message_overhead_s
        bandwidth = link.bandwidth if messages == 1 else link.fan_out
        moving = self.crowd(self.forward.ranks if receivers is None else receivers)
        return latency * crowd, count / bandwidth * moving

    def exposed(self, cover: float, latency: float, moving: float) -> float:
        """Return the seconds that a transfer adds to the `cover` seconds of compute beside it.

        A part `spread` of its time varies, m on average: the wait for what cover leaves of it is
        E[max(0, X - cover)] = m exp(-cover / m), X distributed exponentially. So transfers are
        exposed at times, although on average they would fit.
        """
        varying = self.link.spread * moving
        left = cover - (moving - varying)  # of the cover, for the part that varies
        waited = varying * math.exp(-left / varying) if varying and left > 0 else moving - cover
        return latency + max(waited, self.profile.transfer_steals * moving)

    def collective(self, count: float, messages: int, receivers: int | None = None) -> float:
        """Return the seconds to exchange `count` bytes with several ranks; nothing hides them."""
        if not self.queued:
            return sum(self.message(count, messages, receivers))
        link = self.link
        skew = 0.0 if self.forward.decoding else self.profile.skew_s
        return link.collective_latency_s + skew + count / link.fan_out

    def all_reduce(self, count: float) -> tuple[float, float]:
        """Return seconds and bytes sent of `all_reduce` over the tensor-parallel ranks."""
        seconds, sent = all_reduce(count, self.forward.tp, self.profile)
        return seconds * self.crowd(self.forward.tp * self.forward.ranks), sent


def all_reduce(count: float, tp: int, profile: HardwareProfile) -> tuple[float, float]:
    """Return the seconds, and the bytes that each rank sends, to sum `count` bytes over `tp`
    neighbouring ranks.

    Over several hosts: a reduce-scatter in each, an all-reduce of each rank's part over its own
    network card, an all-gather in each.
    """
    if tp == 1:
        return 0.0, 0.0
    local = min(tp, profile.ranks_per_host or tp)
    hosts = -(-tp // local)
    sent = 2 * (local - 1) / local * count
    link = profile.host_link
    seconds = sent / link.fan_out + (link.collective_latency_s if local > 1 else 0.0)
    if hosts > 1:
        across = 2 * (hosts - 1) / hosts * count / local
        steps = (hosts - 1).bit_length()  # pairwise, in a hypercube
        seconds += across / profile.network.fan_out + steps * profile.network.latency_s
        sent += across
    return seconds, sent
