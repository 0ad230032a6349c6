"""The token-wise steps of a Llama forward: few-row products, RMSNorm, rotation, SwiGLU.

On a CPU each is one pass of the extension's (`csrc/tokenwise.h`), and on CUDA too, but for products
and for widths that are no multiple of 8; else they are torch's own operations. Both round to the
type of the tensors where `transformers` does. Like those of `cptool.ops` they are torch custom ops
with fake implementations and without gradients; outside of torch's compiler they are called
directly, for a decode step makes dozens of calls of microseconds.

Raises, all of them: ValueError for tensors that do not fit each other.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor
from torch.nn import functional

from cptool import _extension, ops
from cptool._op_checks import SCALAR_TYPES

_C = _extension.load()


def _few_rows(dtype: torch.dtype) -> int:
    isa, matrix_units = ops.cpu_linear_isa(dtype), "amx" in ops.cpu_isas()
    if dtype == torch.float16 and isa == "avx512" and not matrix_units:
        # Without units for float16 (processors with AMX have them) oneDNN takes four times as long.
        return sys.maxsize
    if dtype == torch.float32:
        return {"avx512": 24, "avx2": 16}.get(isa, 4)
    if isa == "avx512bf16" and not matrix_units:
        return 16
    return 4 if isa == "portable" else 8


FEW_ROWS = {dtype: _few_rows(dtype) for dtype in SCALAR_TYPES}
"""Rows up to which the extension's product is the faster one; beyond it, oneDNN's. Measured where
there is avx512_bf16 (benchmarks/few_rows.py), chosen low where there is AMX.
"""

# torch gives float32 products to MKL, which is 10 to 20% behind oneDNN on processors of AMD and
# level with it on Intel's. oneDNN takes the weights as they are, so they stay shared.
_onednn = getattr(torch.ops.mkldnn, "_linear_pointwise", None) if torch.backends.mkldnn else None


def linear(x: Tensor, weight: Tensor) -> Tensor:
    """x W^T, [rows, columns], of x [rows, depth] and W [columns, depth]; summed in float32, rounded
    once.

    On a CPU a row's result for up to FEW_ROWS rows does not depend on the other rows, their number
    or the number of threads. There a product of bfloat16 takes subnormal values for 0 on processors
    that multiply pairs of them (avx512_bf16).
    """
    if x.is_cpu and x.shape[0] and x.dtype in SCALAR_TYPES:
        if x.shape[0] <= FEW_ROWS[x.dtype] and x.dim() == 2:
            return _call(_linear, _linear_op, x, weight)
        if x.dtype == torch.float32 and _onednn is not None:
            return _onednn(x, weight, None, "none", [], "")
    return functional.linear(x, weight)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, rounded to the type of x, then times the weight.

    x [rows, width], weight [width]. Returns [rows, width], contiguous.
    """
    if _has_kernel(x, x.shape[-1]):
        return _call(_rms_norm, _rms_norm_op, x, weight, eps)
    # Without a weight `rms_norm` rounds before it returns.
    return functional.rms_norm(x, x.shape[-1:], eps=eps).mul_(weight)


def add_rms_norm_(hidden: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
    """hidden += added, in place; returns `rms_norm` of the sum."""
    if _has_kernel(hidden, hidden.shape[-1]):
        return _call(_norm, _add_rms_norm_op, hidden, added, weight, eps)
    hidden += added
    return rms_norm(hidden, weight, eps)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotates `heads` [T, H, D] in place; pair j is the elements (j, j + D/2) of a head.

    (a, b) -> (a cos - b sin, b cos + a sin), in float32, rounded once to the type of `heads`.
    `cos` and `sin` are float32 [T, 1, D/2].
    """
    if _has_kernel(heads, heads.shape[-1]):
        return _call(_rotate_, _rotate_op, heads, cos, sin)
    first, second = heads.chunk(2, dim=-1)
    a, b = first.to(torch.float32), second.to(torch.float32)
    rotated = (a * cos).addcmul_(b, sin, value=-1)
    second.copy_((b * cos).addcmul_(a, sin))
    first.copy_(rotated)


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """gate = silu(gate) * up, in place, each factor rounded; both [rows, width]. Returns gate."""
    if _has_kernel(gate, gate.shape[-1]):
        _call(_swiglu_, _swiglu_op, gate, up)
        return gate
    return functional.silu(gate, inplace=True).mul_(up)


_CPU = torch.device("cpu")


def _has_kernel(x: Tensor, width: int) -> bool:
    if x.dtype not in SCALAR_TYPES:
        return False
    return x.is_cpu or (x.is_cuda and bool(_C.cuda_archs) and width % 8 == 0)


def _run(name: str, device: torch.device, *arguments: object) -> None:
    """The extension's function for the device, on its threads or its current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(_C, f"{name}_cuda")(*arguments, stream)
    else:
        getattr(_C, f"{name}_cpu")(*arguments, torch.get_num_threads())


def _call(function, op, *arguments):
    return (op if torch.compiler.is_compiling() else function)(*arguments)


def _rows_of(x: Tensor, name: str = "x") -> torch.Size:
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"{name} has shape {list(x.shape)} and strides {x.stride()}; "
            "it must be [rows, width] with a contiguous innermost dimension"
        )
    return x.shape


def _check(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> None:
    """Shape, type and device, with an innermost stride of 1."""
    if tensor.shape != shape or tensor.dtype != dtype or tensor.device != device:
        raise ValueError(
            f"{name} is {tensor.dtype} {list(tensor.shape)} on {tensor.device}; "
            f"it must be {dtype} {list(shape)} on {device}"
        )
    if tensor.stride(-1) != 1:
        raise ValueError(
            f"{name} has strides {tensor.stride()}; its innermost dimension must be contiguous"
        )


def check_matrix(name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raises ValueError unless `tensor` is that on the CPU, with an innermost stride of 1."""
    _check(name, tensor, shape, dtype, _CPU)


def _linear(x: Tensor, weight: Tensor) -> Tensor:
    (rows, depth), columns = _rows_of(x), weight.shape[0]
    _check("weight", weight, (columns, depth), x.dtype, x.device)
    out = torch.empty((rows, columns), dtype=x.dtype)
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


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, None, weight, eps)


def _norm(hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    (rows, width), dtype = _rows_of(hidden, "hidden"), hidden.dtype
    _check("weight", weight, (width,), dtype, hidden.device)
    if added is not None:
        _check("added", added, (rows, width), dtype, hidden.device)
        added = added.contiguous()
    out = torch.empty((rows, width), dtype=dtype, device=hidden.device)
    _run(
        "rms_norm",
        hidden.device,
        hidden.data_ptr(),
        hidden.stride(0),
        0 if added is None else added.data_ptr(),
        weight.data_ptr(),
        out.data_ptr(),
        rows,
        width,
        eps,
        SCALAR_TYPES[dtype],
    )
    return out


def _rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    if heads.dim() != 3 or heads.stride(2) != 1 or heads.shape[2] % 2:
        raise ValueError(
            f"heads has shape {list(heads.shape)} and strides {heads.stride()}; it must be "
            "[tokens, heads, head_dim], head_dim even and contiguous"
        )
    tokens, count, head_dim = heads.shape
    for name, table in (("cos", cos), ("sin", sin)):
        _check(name, table, (tokens, 1, head_dim // 2), torch.float32, heads.device)
    cos, sin = cos.contiguous(), sin.contiguous()
    _run(
        "rotate",
        heads.device,
        heads.data_ptr(),
        heads.stride(0),
        heads.stride(1),
        cos.data_ptr(),
        sin.data_ptr(),
        tokens,
        count,
        head_dim,
        SCALAR_TYPES[heads.dtype],
    )


def _swiglu_(gate: Tensor, up: Tensor) -> None:
    rows, width = _rows_of(gate, "gate")
    _check("up", up, (rows, width), gate.dtype, gate.device)
    _run(
        "swiglu",
        gate.device,
        gate.data_ptr(),
        gate.stride(0),
        up.data_ptr(),
        up.stride(0),
        rows,
        width,
        SCALAR_TYPES[gate.dtype],
    )


_library = torch.library.Library("cptool", "FRAGMENT")
for _schema, _function, _fake in (
    (
        "linear(Tensor x, Tensor weight) -> Tensor",
        _linear,
        lambda x, weight: x.new_empty((x.shape[0], weight.shape[0])),
    ),
    (
        "rms_norm(Tensor x, Tensor weight, float eps) -> Tensor",
        _rms_norm,
        lambda x, weight, eps: x.new_empty(x.shape),
    ),
    (
        "add_rms_norm_(Tensor(a!) hidden, Tensor added, Tensor weight, float eps) -> Tensor",
        _norm,
        lambda hidden, added, weight, eps: hidden.new_empty(hidden.shape),
    ),
    (
        "rotate_(Tensor(a!) heads, Tensor cos, Tensor sin) -> ()",
        _rotate_,
        lambda heads, cos, sin: None,
    ),
    ("swiglu_(Tensor(a!) gate, Tensor up) -> ()", _swiglu_, lambda gate, up: None),
):
    _name = _schema[: _schema.index("(")]
    _library.define(_schema)
    _library.impl(_name, _function, "CPU")
    if _name != "linear":
        _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"cptool::{_name}", _fake, lib=_library)

_linear_op = torch.ops.cptool.linear.default
_rms_norm_op = torch.ops.cptool.rms_norm.default
_add_rms_norm_op = torch.ops.cptool.add_rms_norm_.default
_rotate_op = torch.ops.cptool.rotate_.default
_swiglu_op = torch.ops.cptool.swiglu_.default
