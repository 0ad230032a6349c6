"""Operations and bytes of a forward, counted from the shape of the model.

Floating-point operations count a multiply-add as two; bytes count each weight and each cached
element once.
"""

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
    those before it and itself (paper, table 3 and appendix A).
    """
    width = config.num_attention_heads * config.head_dim
    visible_pairs = new * cached + new * (new + 1) // 2
    return 4 * width * visible_pairs * config.num_hidden_layers


def kv_bytes(config: LlamaConfig, tokens: int, element_bytes: int) -> int:
    """Return the bytes of K and V of `tokens` tokens in all layers."""
    width = config.num_key_value_heads * config.head_dim
    return 2 * config.num_hidden_layers * width * tokens * element_bytes


def weight_bytes(config: LlamaConfig, element_bytes: int) -> int:
    """Return the bytes of weights that one decode step reads: linear layers and output head."""
    return (matrix_parameters(config) + config.hidden_size * config.vocab_size) * element_bytes
