"""Tensor parallelism, applied to a Llama from outside (Shoeybi et al., Megatron-LM, 2019).

The rows of qkv and gate_up are divided over the ranks (column parallel in the paper's transposed
terms), the columns of o and down likewise (row parallel), so each block needs two all-reduces.
Embedding, norms and output matrix are replicated: every rank of the group has the same residual
stream and the same logits, bit by bit.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptool.errors import UserError
from cptool.model.config import LlamaConfig

if TYPE_CHECKING:
    import torch.distributed

    from cptool.model.llama import Llama


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


def apply(model: "Llama", group: "torch.distributed.ProcessGroup", staged: bool = False) -> None:
    """Makes every o_proj and down_proj of a rank's share sum its result over `group`, in place.

    staged: the group takes tensors of the CPU alone, so results go there and back.

    Sums are taken in the type of the weights, as Megatron-LM and vLLM do: the matmul has rounded
    each term to it already, so tp terms add at most tp - 1 roundings of the same size (one for
    tp = 2, which float32 would not save), and float32 would double the bytes of a step that costs
    little else.
    """
    import torch.distributed as dist

    def reduce(module: object, inputs: object, output: "torch.Tensor") -> None:
        if not output.shape[0]:
            return
        wire = output.cpu() if staged else output
        dist.all_reduce(wire, group=group)
        if wire is not output:  # as it is for a tensor of the CPU
            output.copy_(wire)

    for layer in model.layers:
        layer.self_attn.o_proj.register_forward_hook(reduce)
        layer.mlp.down_proj.register_forward_hook(reduce)
