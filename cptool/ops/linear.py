"""Products of rows with a weight matrix, by the extension where it is faster than oneDNN."""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional

from cptool.ops.checks import SCALAR_TYPES, check_tensor, dispatch, rows_of
from cptool.ops.encodings import FLOAT32
from cptool.ops.kernels import EXTENSION as _C
from cptool.ops.kernels import cpu_dense_isa, cpu_isas, cpu_linear_isa
from cptool.ops.stored import StoredWeight, product_arguments


def _few_rows(dtype: torch.dtype) -> int:
    isa, matrix_units = cpu_linear_isa(dtype), "amx" in cpu_isas()
    if dtype == torch.float16 and isa == "avx512" and not matrix_units:
        # Without units for float16 (processors with AMX have them) oneDNN takes four times as long.
        return sys.maxsize
    if dtype == torch.float32:
        return {"avx512": 24, "avx2": 16}.get(isa, 4)
    if isa == "avx512bf16" and not matrix_units:
        return 16
    return 4 if isa == "portable" else 8


FEW_ROWS = {dtype: _few_rows(dtype) for dtype in SCALAR_TYPES}
"""Rows up to which the extension's product of few rows is the faster one. Measured where there is
avx512_bf16 (benchmarks/few_rows.py), chosen low where there is AMX.
"""

# Many rows of float32 without a kernel of our own. torch gives them to MKL, which is 10 to 20%
# behind oneDNN on processors of AMD and level with it on Intel's. oneDNN takes the weights as they
# are, so they stay shared.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn else None


def linear(x: Tensor, weight: Tensor | StoredWeight) -> Tensor:
    """x W^T, [rows, columns], of x [rows, depth] and W [columns, depth]; summed in float32, rounded
    once.

    On a CPU a row's result for up to FEW_ROWS rows does not depend on the other rows, their number
    or the number of threads; nor does it for more rows than that where `cpu_dense_isa` or, if the
    weights are stored, `cpu_product_isa`. A product of bfloat16 takes subnormal values for 0 on
    processors that multiply pairs of them (avx512_bf16), and one of many rows of float32 with AMX
    takes terms below 2^-126 for 0.
    """
    if isinstance(weight, StoredWeight):
        return weight.linear(x)
    if x.is_cpu and x.shape[0] and x.dtype in SCALAR_TYPES:
        own = x.shape[0] <= FEW_ROWS[x.dtype] or _takes_many(x, weight)
        if own and x.dim() == 2:
            return dispatch(_linear, _linear_op, x, weight)
        if x.dtype == torch.float32 and weight.numel() and _onednn is not None:
            return _onednn(x, weight, None, "none", [], "")
    return functional.linear(x, weight)


def _takes_many(x: Tensor, weight: Tensor) -> bool:
    """Return whether many rows are left to `_linear`, which under torch's compiler chooses when it
    runs.
    """
    if x.dtype != torch.float32 or x.stride(-1) != 1 or weight.stride(-1) != 1:
        return False
    return torch.compiler.is_compiling() or bool(cpu_dense_isa())


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    (rows, depth), columns = rows_of(x), weight.shape[0]
    check_tensor("weight", weight, (columns, depth), x.dtype, device=x.device)
    out = torch.empty((rows, columns), dtype=x.dtype)
    if rows > FEW_ROWS[x.dtype] and x.dtype == torch.float32:
        if depth == 0:
            return out.zero_()
        if not cpu_dense_isa():
            return functional.linear(x, weight)
        place = weight.data_ptr(), 4 * weight.stride(0), columns, depth, 0, FLOAT32
        _C.product_cpu(*product_arguments(x, place, out))
        return out
    _C.linear_cpu(
        x.data_ptr(),
        x.stride(0),
        weight.data_ptr(),
        weight.stride(0),
        out.data_ptr(),
        rows,
        columns,
        depth,
        SCALAR_TYPES[x.dtype],
        torch.get_num_threads(),
    )
    return out


_library = torch.library.Library("cptool", "FRAGMENT")
_library.define("linear(Tensor x, Tensor weight) -> Tensor")
_library.impl("linear", _linear, "CPU")
torch.library.register_fake(
    "cptool::linear", lambda x, weight: x.new_empty((x.shape[0], weight.shape[0])), lib=_library
)
_linear_op = torch.ops.cptool.linear.default
