"""Tensor parallelism, applied to a Llama from outside (Shoeybi et al., Megatron-LM, 2019).

The rows of qkv and gate_up are divided over the ranks (column parallel in the paper's transposed
terms), the columns of o and down likewise (row parallel), so each block needs two all-reduces.
Embedding, norms and output matrix are replicated: every rank of the group has the same residual
stream and the same logits, bit by bit.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from cptool.model.norms import WidthRMSNorm
from cptool.model.product import Product

if TYPE_CHECKING:
    import torch

    from cptool.distributed.group import Group
    from cptool.model.llama import Llama


def apply(model: Llama, group: Group) -> None:
    """Make every o_proj and down_proj of `model`, this rank's part, sum its result over `group`,
    and norms of all heads of queries or keys together their squares.

    Sums are taken in the type of the weights, as Megatron-LM and vLLM do: the matmul has rounded
    each term to it already, so tp terms add at most tp - 1 roundings of the same size (one for
    tp = 2, which float32 would not save), and float32 would double the bytes of a step that costs
    little else.
    """
    if group.size == 1:
        return

    def reduce(partial: torch.Tensor) -> None:
        if partial.shape[0]:
            group.sum_(partial)

    for name, module in model.named_modules():
        if isinstance(module, Product) and name.endswith((".o_proj", ".down_proj")):
            module.reduce = reduce
        elif isinstance(module, WidthRMSNorm):
            module.reduce = reduce
