"""A decoder layer of few rows on a CPU, in two calls of the extension: before and after attention.

The same steps in the same order as `cptool.model.layer.DecoderLayer` takes one by one, hence the
same bits. Between two of these a processor that streams weights has forgotten the interpreter: of
a decode step of a small model that cost a tenth.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptool.ops.checks import SCALAR_TYPES, check_matrix
from cptool.ops.kernels import EXTENSION as _C
from cptool.ops.linear import FEW_ROWS
from cptool.ops.stored import StoredWeight

Weight = Tensor | StoredWeight

_MOST_ROWS = 64
"""Rows up to which the fused layer is used; with more, the calls between the steps cost nothing and
the intermediates are large."""


def takes(hidden: Tensor, *weights: Weight) -> bool:
    """Return whether `hidden` [rows, width] is few rows on a CPU, of which the extension computes
    all products with `weights`.
    """
    rows, dtype = hidden.shape[0], hidden.dtype
    return (
        hidden.is_cpu
        and dtype in SCALAR_TYPES
        and rows <= min(_MOST_ROWS, FEW_ROWS[dtype])
        and not torch.compiler.is_compiling()
        and all(rows <= w.few_rows for w in weights if isinstance(w, StoredWeight))
    )


def _place(
    name: str, weight: Weight, shape: tuple[int, int], dtype: torch.dtype
) -> tuple[int, int, int]:
    """Return what the extension is told of a weight, checked."""
    if not isinstance(weight, StoredWeight):
        check_matrix(name, weight, shape, dtype)
        return weight.data_ptr(), weight.stride(0), 0
    if tuple(weight.shape) != shape or weight.dtype != dtype:
        raise ValueError(
            f"{name} is stored, for {weight.dtype}, and has shape {list(weight.shape)}; it must be "
            f"{list(shape)}, for {dtype}"
        )
    return weight.places.data_ptr(), 0, len(weight.parts)


def before_attention(
    hidden: Tensor, norm: Tensor, eps: float, qkv: Weight, cos: Tensor, sin: Tensor, rotated: int
) -> Tensor:
    """rms_norm(hidden) W^T, of whose heads the first `rotated` are rotated.

    hidden [rows, width]; norm [width], the norm's weight; qkv [heads * D, width]; cos and sin
    float32 [rows, 1, D/2]. Returns [rows, heads, D], contiguous. Raises ValueError for tensors that
    do not fit each other.
    """
    (rows, width), dtype, columns = hidden.shape, hidden.dtype, qkv.shape[0]
    head_dim = 2 * cos.shape[-1]
    if columns % head_dim or not 0 <= rotated * head_dim <= columns:
        raise ValueError(
            f"qkv has {columns} rows, of which {rotated} heads of {head_dim} are rotated; "
            "it must be whole heads, and as many"
        )
    check_matrix("hidden", hidden, (rows, width), dtype)
    check_matrix("norm", norm, (width,), dtype)
    place = _place("qkv", qkv, (columns, width), dtype)
    for name, table in (("cos", cos), ("sin", sin)):
        check_matrix(name, table, (rows, 1, head_dim // 2), torch.float32)
    cos, sin = cos.contiguous(), sin.contiguous()
    scratch = torch.empty((rows, width), dtype=dtype)
    out = torch.empty((rows, columns // head_dim, head_dim), dtype=dtype)
    _C.layer_input_cpu(
        hidden.data_ptr(),
        hidden.stride(0),
        rows,
        width,
        SCALAR_TYPES[dtype],
        norm.data_ptr(),
        eps,
        *place,
        columns,
        rotated,
        head_dim,
        cos.data_ptr(),
        sin.data_ptr(),
        scratch.data_ptr(),
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def after_attention_(
    hidden: Tensor,
    attended: Tensor,
    o: Weight,
    norm: Tensor,
    eps: float,
    gate_up: Weight,
    down: Weight,
) -> None:
    """hidden += o(attended); hidden += down(silu(gate) up) of gate and up of rms_norm(hidden).

    hidden [rows, width], in place; attended [rows, Hq, D]; o [width, Hq D]; norm [width], the
    norm's weight; gate_up [2 ffn, width]; down [width, ffn]. Raises ValueError for tensors that do
    not fit each other.
    """
    (rows, width), dtype, ffn = hidden.shape, hidden.dtype, down.shape[1]
    attended = attended.flatten(1).contiguous()
    depth = attended.shape[1]
    check_matrix("hidden", hidden, (rows, width), dtype)
    check_matrix("attended", attended, (rows, depth), dtype)
    check_matrix("norm", norm, (width,), dtype)
    o_place = _place("o", o, (width, depth), dtype)
    gate_up_place = _place("gate_up", gate_up, (2 * ffn, width), dtype)
    down_place = _place("down", down, (width, ffn), dtype)
    scratch = torch.empty((rows, 2 * (width + ffn)), dtype=dtype)
    _C.layer_output_cpu(
        hidden.data_ptr(),
        hidden.stride(0),
        rows,
        width,
        SCALAR_TYPES[dtype],
        attended.data_ptr(),
        depth,
        *o_place,
        norm.data_ptr(),
        eps,
        *gate_up_place,
        *down_place,
        ffn,
        scratch.data_ptr(),
        torch.get_num_threads(),
    )
