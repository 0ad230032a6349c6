"""How a Llama divides over tensor-parallel ranks."""

from dataclasses import dataclass

from cptool.errors import UserError
from cptool.model.config import LlamaConfig


@dataclass(frozen=True)
class Share:
    """What one rank computes: [start, stop) of the rows of q, of those of k and v, of the FFN."""

    q: tuple[int, int]
    kv: tuple[int, int]
    ffn: tuple[int, int]


def check(config: LlamaConfig, tp: int) -> None:
    """Raises UserError unless the model divides into `tp` equal parts.

    Query heads and feed-forward width must be multiples of `tp`. Key-value heads must be too, or
    divide it: each is then replicated on tp / Hkv ranks, so that every rank's queries find theirs.
    """
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    possible = [
        n
        for n in range(1, heads + 1)
        if heads % n == 0
        and config.intermediate_size % n == 0
        and (kv_heads % n == 0 or n % kv_heads == 0)
    ]
    if tp not in possible:
        raise UserError(
            f"--tp {tp}: this model's {heads} query heads, {kv_heads} key-value heads and "
            f"feed-forward width {config.intermediate_size} do not divide into {tp} equal parts; "
            f"use --tp {' or '.join(map(str, possible))}"
        )


def share(config: LlamaConfig, tp_rank: int, tp: int) -> Share:
    """The part of rank `tp_rank` of `tp`, for a pair that `check` accepts."""
    kv_heads = max(1, config.num_key_value_heads // tp)
    first_kv_head = tp_rank * config.num_key_value_heads // tp
    q_rows = config.num_attention_heads * config.head_dim // tp
    ffn = config.intermediate_size // tp
    return Share(
        q=(tp_rank * q_rows, (tp_rank + 1) * q_rows),
        kv=(first_kv_head * config.head_dim, (first_kv_head + kv_heads) * config.head_dim),
        ffn=(tp_rank * ffn, (tp_rank + 1) * ffn),
    )
