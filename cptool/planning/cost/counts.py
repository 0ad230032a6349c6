"""Operations and bytes of a forward, counted from the shape of the model.

Floating-point operations count a multiply-add as two; bytes count each weight and each cached
element once.
"""

from collections import Counter

from cptool.model.config import LlamaConfig


def attention_parameters(config: LlamaConfig) -> int:
    """Return the parameters of q, k, v and o of one layer."""
    heads = 2 * config.num_attention_heads + 2 * config.num_key_value_heads
    return config.hidden_size * heads * config.head_dim


def feed_forward_parameters(config: LlamaConfig) -> int:
    """Return the parameters of gate, up and down of one layer."""
    return 3 * config.hidden_size * config.intermediate_size


def matrix_parameters(config: LlamaConfig) -> int:
    """Return the parameters of all decoder layers' products, without embedding and output head."""
    layer = attention_parameters(config) + feed_forward_parameters(config)
    return config.num_hidden_layers * layer


def linear_flops(config: LlamaConfig, tokens: int, logits: int = 0) -> int:
    """Return the operations of linear layers for `tokens` tokens and of the head for `logits`."""
    head = config.hidden_size * config.vocab_size
    return 2 * (matrix_parameters(config) * tokens + head * logits)


def attention_flops(config: LlamaConfig, new: int, cached: int = 0) -> int:
    """Return the operations of QK^T and PV for T new tokens over P cached ones.

    `4 D T (P + (T + 1) / 2)` per layer, D = N_H D_H. Causal: a new token sees the cached ones,
    those before it and itself (paper, table 3 and appendix A), or as many of them as the layer's
    window holds.
    """
    width = config.num_attention_heads * config.head_dim
    return 4 * width * visible_pairs(config, new, cached)


def visible_pairs(config: LlamaConfig, new: int, cached: int) -> int:
    """Return the pairs of a new token of a sequence and one that it sees, in all layers."""
    return sum(
        count * (new_pairs(new, window) + cached_pairs(new, cached, window))
        for window, count in layers_by_window(config).items()
    )


def layers_by_window(config: LlamaConfig) -> dict[int | None, int]:
    """Return the windows of the layers, None among them, and how many layers have each."""
    layers = config.num_hidden_layers
    return Counter(config.windows) if config.windows else {None: layers}


def new_pairs(new: int, window: int | None) -> int:
    """Return the pairs of a new token of a sequence and one that it sees of the new ones."""
    full = new if window is None else min(new, window)  # tokens that see all before them
    return full * (full + 1) // 2 + (new - full) * full


def cached_pairs(new: int, cached: int, window: int | None) -> int:
    """Return the pairs of a new token of a sequence and one that it sees of the cached ones."""
    if window is None:
        return new * cached
    # New token i, from 0 on, sees min(cached, window - 1 - i) of them, at least 0.
    some = min(new, window - 1)
    every = min(some, max(0, window - 1 - cached))
    others = some - every
    return every * cached + others * (window - 1) - (every + some - 1) * others // 2


def kv_bytes(config: LlamaConfig, tokens: int, element_bytes: int) -> int:
    """Return the bytes of K and V of `tokens` tokens in all layers."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * tokens * element_bytes


def kv_bytes_read(
    config: LlamaConfig, tokens: int, *, batch: int, ranks: int, element_bytes: int
) -> int:
    """Return the bytes of K and V of all layers that each of `ranks` ranks reads for the next token
    of `batch` sequences, which see `tokens` in all where there is no window.
    """
    width = config.num_key_value_heads * config.head_dim
    seen = 0
    for window, layers in layers_by_window(config).items():
        visible = tokens if window is None else min(tokens, batch * window)
        seen += layers * -(-visible // ranks)
    return 2 * width * seen * element_bytes


def weight_bytes(config: LlamaConfig, element_bytes: int) -> int:
    """Return the bytes of weights that one decode step reads: linear layers and output head."""
    return (matrix_parameters(config) + config.hidden_size * config.vocab_size) * element_bytes
