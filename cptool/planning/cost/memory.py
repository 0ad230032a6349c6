"""The memory that a rank needs, so that what does not fit is rejected before anything starts."""

from cptool.model.row_limits import ROWS_AT_ONCE
from cptool.planning.cost.forward import Forward
from cptool.variants import MessageBytes, find

RESERVED = 0.04
"""Part of a device's memory taken by its context, fragmentation and the buffers of links."""


def memory_per_rank(variant: str, forward: Forward, room: int | None = None) -> dict[str, float]:
    """Return the bytes on the fullest rank by use: weights, kv, workspace, messages.

    Embedding and output head are replicated over tensor-parallel ranks, weights over CP ranks.

    room: tokens of all sequences and CP ranks that the cache has room for, by default those that
        the forward leaves in it.
    """
    config = forward.config
    layers = config.num_hidden_layers
    weights = sum(forward.weight_bytes(*matrix) for matrix in forward.linear_layers()) * layers
    tables = 1 if config.tie_word_embeddings else 2
    table = config.vocab_size * config.hidden_size
    weights += tables * forward.weight_bytes(table, forward.dtype)
    room = max(room or 0, forward.cached + forward.new)
    held = -(-room // forward.ranks)
    kv = layers * held * forward.kv_width * forward.kv_element + 4 * held
    return {
        "weights": weights,
        "kv": kv,
        "workspace": _workspace(forward),
        "messages": _messages(variant, forward),
    }


def _workspace(forward: Forward) -> float:
    """Return the bytes live at the same time: the residual stream, a normed copy of it, q, k and v,
    attention's result in float32 and in the working dtype, and a slice of the feed-forward network.
    """
    config, e = forward.config, forward.element
    rows = forward.queries
    streams = 3 * config.hidden_size * e
    projected = (forward.query_width + forward.kv_width) * e
    result = forward.query_width * (4 + e) + 4 * forward.heads
    rotary = 2 * config.head_dim * 4
    sliced = min(rows, ROWS_AT_ONCE) * 3 * config.intermediate_size / forward.tp * e
    logits = forward.batch * config.vocab_size * (4 + e)
    return rows * (streams + projected + result + rotary) + sliced + logits


def _messages(variant: str, forward: Forward) -> float:
    """Return the bytes of receive buffers and of partials under way."""
    if forward.ranks == 1:
        return 0.0
    block = forward.keys * forward.kv_width * forward.kv_element
    queries = forward.queries * forward.query_width * forward.element
    partial = forward.partial(forward.queries)
    sizes = MessageBytes(
        ranks=forward.ranks,
        block=block,
        everything=(forward.cached + forward.new) * forward.kv_width * forward.kv_element,
        queries=queries,
        partial=partial,
        all_queries=forward.sources * queries,
        all_partials=forward.sources * partial,
    )
    return find(variant).buffers(sizes)
