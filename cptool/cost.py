"""What a forward must compute and move, counted from the shape of the model, and how long it takes.

Floating-point operations count a multiply-add as two; bytes count each weight and each cached
element once. Times follow from a `cptool.hardware.HardwareProfile`.
"""

from dataclasses import dataclass

from cptool.hardware import HardwareProfile
from cptool.model.config import LlamaConfig


def matrix_parameters(config: LlamaConfig) -> int:
    """Parameters of the linear layers that every token passes: no embedding, no output head."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    attention = config.hidden_size * heads * config.head_dim
    feed_forward = 3 * config.hidden_size * config.intermediate_size
    return config.num_hidden_layers * (attention + feed_forward)


def linear_flops(config: LlamaConfig, tokens: int, logits: int = 0) -> int:
    """Operations of the linear layers for `tokens` tokens, of the output head for `logits`."""
    head = config.hidden_size * config.vocab_size
    return 2 * (matrix_parameters(config) * tokens + head * logits)


def attention_flops(config: LlamaConfig, new: int, cached: int = 0) -> int:
    """Operations of QK^T and PV for T new tokens over P cached ones.

    `4 D T (P + (T + 1) / 2)` a layer, D = N_H D_H. Causal: a new token sees the cached ones, those
    before it and itself (paper, table 3 and appendix A).
    """
    width = config.num_attention_heads * config.head_dim
    visible_pairs = new * cached + new * (new + 1) // 2
    return 4 * width * visible_pairs * config.num_hidden_layers


def kv_bytes(config: LlamaConfig, tokens: int, element_bytes: int) -> int:
    """Bytes of K and V of `tokens` tokens in all layers."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * tokens * element_bytes


def weight_bytes(config: LlamaConfig, element_bytes: int) -> int:
    """Bytes of the weights that one decode step reads: linear layers and output head."""
    return (matrix_parameters(config) + config.hidden_size * config.vocab_size) * element_bytes


VARIANTS = ("pass-kv", "gather-kv", "pass-q", "gather-q")
"""In the order that decides between equal predictions."""

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
_PARTIAL_BYTES = 4  # outputs and log-sum-exps of partials are float32


@dataclass(frozen=True)
class Forward:
    """T = `new` tokens over P = `cached` ones, all sequences together, on N = `ranks` CP ranks.

    active: how many of the ranks share the new tokens; the cached ones lie on all. batch: the
    sequences, taken as equally long. tp: tensor-parallel ranks that divide each CP rank's heads and
    widths.
    """

    config: LlamaConfig
    dtype: str
    new: int
    cached: int
    ranks: int
    active: int
    batch: int = 1
    tp: int = 1


@dataclass(frozen=True)
class Prediction:
    """One layer on the busiest rank.

    seconds = compute_s + exposed_s: what computes, and what transfers add to it. bytes: what the
    rank sends.
    """

    seconds: float
    compute_s: float
    exposed_s: float
    bytes: float


def predict(variant: str, forward: Forward, profile: HardwareProfile) -> Prediction:
    """Time of one layer under a variant of `cptool.attention`, on the busiest rank.

    Linear layers and attention are counted as `linear_flops` and `attention_flops` do, each plus
    its bytes at the memory's rate. Transfers are those of the variant's code, and hide where it
    hides them (paper, section 3.3): a step of a ring lasts as long as the longer of its compute and
    its transfer, where `transfer_steals` of the transfer counts as compute.
    """
    layer = _Layer(forward, profile)
    linear = layer.linear()
    if forward.ranks == 1:
        compute = linear + layer.attention(layer.pairs, layer.keys)
        return Prediction(compute, compute, 0.0, 0.0)
    attention = getattr(layer, variant.replace("-", "_"))()
    return Prediction(
        linear + attention.seconds,
        linear + attention.compute_s,
        attention.exposed_s,
        attention.bytes,
    )


class _Layer:
    """Sizes of one layer of a forward, and the times of its parts.

    Each variant's method gives attention alone. Rank 0 of the active ones is looked at: what it
    holds and asks is the most that any rank does.
    """

    def __init__(self, forward: Forward, profile: HardwareProfile) -> None:
        config, ranks, active = forward.config, forward.ranks, forward.active
        self.forward, self.profile = forward, profile
        self.element = ELEMENT_BYTES[forward.dtype]
        self.heads = max(1, config.num_attention_heads // forward.tp)
        self.query_width = self.heads * config.head_dim
        self.kv_width = 2 * max(1, config.num_key_value_heads // forward.tp) * config.head_dim
        self.queries = forward.new / active if forward.new > active else 1
        self.cached = forward.cached / ranks
        self.keys = self.cached + self.queries
        self.sources = min(active, forward.new)  # ranks that have queries
        # Pairs (query, key) that this rank's queries see of one rank's cached keys, and of one
        # active rank's new keys, which the causal mask halves (paper, appendix A).
        self.cached_pairs = self.queries * self.cached
        per_sequence = forward.new / forward.batch
        new_pairs = forward.new * (per_sequence + 1) / 2
        self.new_pairs = new_pairs / self.sources**2
        self.cached_pairs /= forward.batch

    @property
    def pairs(self) -> float:
        """Of this rank's queries over everything."""
        return self.forward.ranks * self.cached_pairs + self.sources * self.new_pairs

    def crowd(self, ranks: int) -> float:
        """How much longer compute takes when `ranks` ranks compute at the same time."""
        at_once = self.profile.ranks_at_once
        return 1.0 if at_once is None else max(1.0, ranks / at_once)

    def linear(self) -> float:
        config, forward, profile = self.forward.config, self.forward, self.profile
        parameters = matrix_parameters(config) / config.num_hidden_layers / forward.tp
        flops = 2 * parameters * self.queries
        compute = flops / profile.linear_flops[forward.dtype]
        weights = parameters * self.element / profile.memory_bandwidth
        return self.crowd(self.sources) * (compute + weights + profile.layer_overhead_s)

    def attention(self, pairs: float, keys: float, calls: int = 1) -> float:
        """Calls over `keys` keys in all, of which queries see `pairs`."""
        profile = self.profile
        flops = 4 * self.query_width * pairs
        return (
            calls * profile.call_overhead_s
            + flops / profile.attention_flops[self.forward.dtype]
            + keys * self.kv_width * self.element / profile.cache_bandwidth
        )

    def touch(self, count: float, calls: int = 1) -> float:
        """Calls that read or write `count` bytes of memory."""
        return calls * self.profile.op_overhead_s + count / self.profile.memory_bandwidth

    def transfer(self, count: float, messages: int = 1) -> float:
        """One batch of messages of `count` bytes in all, one way."""
        link = self.profile.link(self.forward.ranks * self.forward.tp)
        overhead = link.latency_s + (messages - 1) * link.message_overhead_s
        return (overhead + count / link.bandwidth) * self.crowd(self.forward.ranks)

    def hidden(self, compute: float, transfer: float) -> float:
        """What a transfer under `compute` adds to it."""
        stolen = self.profile.transfer_steals * transfer
        return max(transfer - compute, stolen)

    def partial_bytes(self, queries: float) -> float:
        """Outputs and log-sum-exps (paper, appendix C, with one of the latter a head)."""
        return queries * (self.query_width + self.heads) * _PARTIAL_BYTES

    def merged(self, partials: int) -> float:
        """Merging partials of this rank's queries: all are read, the result is written."""
        written = self.queries * self.query_width * self.element
        return self.touch(partials * self.partial_bytes(self.queries) + written)

    def pass_kv(self) -> Prediction:
        ranks, crowd = self.forward.ranks, self.crowd(self.sources)
        block = self.keys * self.kv_width * self.element
        compute = exposed = 0.0
        for step in range(ranks):
            fresh = step < self.sources
            pairs = self.cached_pairs + fresh * self.new_pairs
            keys = self.cached + fresh * self.queries
            running = 2 * self.partial_bytes(self.queries) if step else 0.0
            spent = crowd * (self.attention(pairs, keys) + running / self.profile.memory_bandwidth)
            compute += spent
            if step < ranks - 1:
                exposed += self.hidden(spent, self.transfer(block))
        compute += crowd * self.merged(2)
        return Prediction(compute + exposed, compute, exposed, (ranks - 1) * block)

    def gather_kv(self) -> Prediction:
        forward, width = self.forward, self.kv_width * self.element
        everything = (forward.cached + forward.new) * width
        received = everything - self.keys * width
        # The own block is copied in, and every rank, idle or not, brings all into order.
        ordering = self.touch(2 * self.keys * width + 2 * everything, calls=2)
        # Their positions are put in order once for all layers.
        tokens = forward.cached + forward.new
        ordering += tokens * self.profile.position_s / forward.config.num_hidden_layers
        whole = self.attention(self.pairs, forward.cached + forward.new)
        compute = self.crowd(forward.ranks) * ordering + self.crowd(self.sources) * whole
        exposed = self.transfer(received, forward.ranks - 1)
        sent = (forward.ranks - 1) * self.keys * width
        return Prediction(compute + exposed, compute, exposed, sent)

    def pass_q(self) -> Prediction:
        return self._ring_of_queries(early=True)

    def pass_q_all2all(self) -> Prediction:
        return self._ring_of_queries(early=False)

    def _ring_of_queries(self, early: bool) -> Prediction:
        """early: partials return as the ring goes, not all at its end."""
        ranks, sources = self.forward.ranks, self.sources
        crowd = self.crowd(ranks if self.forward.cached else sources)
        block = self.queries * self.query_width * self.element
        partial = self.partial_bytes(self.queries)
        compute = exposed = 0.0
        link_free = 0.0  # when the partials that left so far have arrived
        for step in range(ranks):
            asked = step < sources  # other ranks have nothing to ask, but pass queries on
            pairs, keys = (self.cached_pairs + self.new_pairs, self.keys) if asked else (0.0, 0.0)
            packed = 2 * partial if asked else 0.0
            spent = crowd * (self.attention(pairs, keys) + self.touch(packed))
            compute += spent
            if step < ranks - 1:
                # A rank without queries of its own has nothing to do until some arrive.
                cover = spent if sources == ranks else 0.0
                exposed += self.hidden(cover, self.transfer(block))
            if step:
                link_free = max(compute + exposed, link_free) + self.transfer(partial)
        if early:
            late = max(0.0, link_free - compute - exposed)
            back = (ranks - 1) * self.transfer(partial)
            exposed += max(late, self.profile.transfer_steals * back)
        else:
            exposed += self.transfer((ranks - 1) * partial, ranks - 1)
        compute += crowd * self.merged(ranks)
        sent = (ranks - 1) * block + (sources - 1) * partial
        return Prediction(compute + exposed, compute, exposed, sent)

    def gather_q(self) -> Prediction:
        forward, ranks, sources = self.forward, self.forward.ranks, self.sources
        crowd = self.crowd(ranks if forward.cached else sources)
        asked = sources * self.queries * self.query_width * self.element
        partials = self.partial_bytes(sources * self.queries)
        pairs = sources * (self.cached_pairs + self.new_pairs)
        compute = crowd * (
            self.touch(4 * asked, calls=2)
            + self.attention(pairs, self.keys)
            + self.touch(4 * partials, calls=3 * ranks)
            + self.merged(ranks)
        )
        mine = asked / sources
        queries_out = (ranks - 1) * mine
        # Idle ranks answer for all queries, and each active one hears from all others.
        answers = max((ranks - 1) * partials / sources, partials if ranks > sources else 0.0)
        exposed = self.transfer(max(queries_out, asked - mine), ranks - 1)
        exposed += self.transfer(answers, ranks - 1)
        sent = queries_out + (sources - 1) * partials / sources
        return Prediction(compute + exposed, compute, exposed, sent)
