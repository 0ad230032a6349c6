"""Tensor parallelism, applied to a Llama from outside (Shoeybi et al., Megatron-LM, 2019).

The rows of qkv and gate_up are divided over the ranks (column parallel in the paper's transposed
terms), the columns of o and down likewise (row parallel), so each block needs two all-reduces.
Embedding, norms and output matrix are replicated: every rank of the group has the same residual
stream and the same logits, bit by bit.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch.distributed

    from cptool.model.llama import Llama


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
