"""The arguments of the cost model, and its result for one layer."""

from dataclasses import dataclass
from functools import cached_property

from cptool.model.config import LlamaConfig
from cptool.planning.cost import counts

ELEMENT_BYTES = {"float32": 4, "bfloat16": 2, "float16": 2, "float8": 1}


@dataclass(frozen=True, kw_only=True)
class Forward:
    """T = `new` tokens over P = `cached` ones, all sequences together, on N = `ranks` CP ranks.

    active: how many of the ranks share the new tokens; the cached ones lie on all. batch: the
    sequences, taken as equally long. tp: tensor-parallel ranks that divide each CP rank's heads and
    widths. feed_forward: dtype of gate, up and down where it is not `dtype` ("float8": row-wise,
    activations rounded on the way in). partial_bytes: of an element of a partial output that
    travels. graph: replayed as one CUDA graph, so that the host takes no time. weight_size: bytes
    of a weight in memory, on average, where weights stay as a file stores them; else those of the
    dtype. kv_dtype: type in which keys and values are stored and travel, None for `dtype`.
    kv_memory: bytes of them that stay in a rank's memory, None for all. local: ranks on each
    machine, None for all of them. window: of the layer that is described, None for none.
    """

    config: LlamaConfig
    dtype: str
    new: int
    cached: int
    ranks: int
    active: int
    batch: int = 1
    tp: int = 1
    feed_forward: str | None = None
    partial_bytes: int = 4
    graph: bool = False
    weight_size: float | None = None
    kv_dtype: str | None = None
    kv_memory: int | None = None
    local: int | None = None
    window: int | None = None

    # Below: what rank 0 of the active ones holds and computes, the most of any rank.

    @property
    def element(self) -> int:
        """Bytes of an element of activations."""
        return ELEMENT_BYTES[self.dtype]

    @property
    def kv_element(self) -> int:
        """Bytes of an element of keys and values, stored or on the way."""
        return ELEMENT_BYTES[self.kv_dtype or self.dtype]

    @property
    def decoding(self) -> bool:
        """Whether this is a decode step: one token per sequence, or a replayed graph."""
        return self.graph or self.new <= self.batch

    @cached_property
    def heads(self) -> int:
        """Query heads per rank."""
        return max(1, self.config.num_attention_heads // self.tp)

    @cached_property
    def query_width(self) -> int:
        """Elements of q of a token on a rank."""
        return self.heads * self.config.head_dim

    @cached_property
    def kv_width(self) -> int:
        """Elements of K and V of a token on a rank; heads are replicated where tp exceeds them."""
        return 2 * max(1, self.config.num_key_value_heads // self.tp) * self.config.head_dim

    @cached_property
    def queries(self) -> float:
        """New tokens of this rank, at least 1."""
        return self.new / self.active if self.new > self.active else 1

    @cached_property
    def cached_keys(self) -> float:
        """Cached tokens of each rank that some new token sees."""
        if self.window is None:
            return self.cached / self.ranks
        return min(self.cached, self.batch * (self.window - 1)) / self.ranks

    @cached_property
    def keys(self) -> float:
        """Tokens of this rank, cached and new, that some new token sees."""
        return self.cached_keys + self.queries

    @cached_property
    def sent_new_keys(self) -> float:
        """New tokens of this rank that travel: all or, with a window, the end of each of the two
        chunks of a sequence, which new tokens of other ranks see.
        """
        if self.window is None:
            return self.queries
        return min(self.queries, 2 * self.batch * (self.window - 1))

    @cached_property
    def sent_keys(self) -> float:
        """Tokens of this rank that travel, cached and new."""
        return self.cached_keys + self.sent_new_keys

    @property
    def queried_keys(self) -> float:
        """Keys of a rank in the sequences that another rank's queries belong to."""
        return self.keys * min(1.0, self.queries / self.batch)

    @cached_property
    def sources(self) -> int:
        """Ranks that have queries."""
        return min(self.active, self.new)

    @cached_property
    def cached_pairs(self) -> float:
        """Pairs (query, key) that this rank's queries see of one rank's cached keys."""
        if self.window is None:
            return self.queries * self.cached_keys / self.batch
        new, cached = self.new // self.batch, self.cached // self.batch
        pairs = counts.cached_pairs(max(1, new), cached, self.window)
        return self.batch * pairs / (self.sources * self.ranks)

    @cached_property
    def new_pairs(self) -> float:
        """Pairs that this rank's queries see of one active rank's new keys.

        Every rank has an early and a late chunk. Of another rank's two chunks, either both of this
        rank's see the early one or its late one sees both; in its own block, the late chunk sees
        the early one, and half of each chunk itself: always half of all pairs (paper, section 4.2
        and appendix A).
        With a window the pairs are fewer, and taken as spread likewise.
        """
        if self.window is None:
            return self.new * (self.new / self.batch + 1) / 2 / self.sources**2
        pairs = counts.new_pairs(max(1, self.new // self.batch), self.window)
        return self.batch * pairs / self.sources**2

    @property
    def pairs(self) -> float:
        """Pairs that this rank's queries see of all keys."""
        return self.ranks * self.cached_pairs + self.sources * self.new_pairs

    def partial(self, queries: float) -> float:
        """Return the bytes of outputs and float32 LSEs, one per head (paper, appendix C)."""
        return queries * (self.query_width * self.partial_bytes + self.heads * 4)

    def weight_bytes(self, parameters: float, dtype: str) -> float:
        """Return the bytes of that many weights in memory, for products in `dtype`."""
        return parameters * (self.weight_size or ELEMENT_BYTES[dtype])

    def linear_layers(self) -> tuple[tuple[float, str], tuple[float, str]]:
        """Return (parameters per rank, dtype) of attention's and the feed-forward's products."""
        return (
            (counts.attention_parameters(self.config) / self.tp, self.dtype),
            (
                counts.feed_forward_parameters(self.config) / self.tp,
                self.feed_forward or self.dtype,
            ),
        )


@dataclass(frozen=True, kw_only=True)
class Prediction:
    """Seconds of one layer on the busiest rank, by cause.

    linear_s, elementwise_s (norms, rotation, activation, residual), attention_s, merge_s (copies
    and merging of partials), tensor_parallel_s (all-reduces), exposed_s (transfers between CP ranks
    that compute does not hide), overhead_s (the host, waiting for other ranks).

    hidden_s: transfer time under compute. bytes: what the rank sends to CP ranks;
    tensor_parallel_bytes: to TP ranks.
    """

    linear_s: float = 0.0
    elementwise_s: float = 0.0
    attention_s: float = 0.0
    merge_s: float = 0.0
    tensor_parallel_s: float = 0.0
    exposed_s: float = 0.0
    overhead_s: float = 0.0
    hidden_s: float = 0.0
    bytes: float = 0.0
    tensor_parallel_bytes: float = 0.0

    @property
    def parts(self) -> dict[str, float]:
        """Seconds by part; they add up to `seconds`."""
        return {name: getattr(self, name) for name in PARTS}

    @property
    def seconds(self) -> float:
        """Seconds of the layer."""
        return sum(self.parts.values())

    @property
    def compute_s(self) -> float:
        """Seconds of all parts but exposed transfers."""
        return self.seconds - self.exposed_s


PARTS = (
    "linear_s",
    "elementwise_s",
    "attention_s",
    "merge_s",
    "tensor_parallel_s",
    "exposed_s",
    "overhead_s",
)
