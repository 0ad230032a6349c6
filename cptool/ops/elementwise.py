"""RMSNorm, rotation and SwiGLU: the element-wise steps of a Llama forward.

On a CPU, and on CUDA where widths are multiples of 8, each is one pass of the extension
(`csrc/tokenwise.h`); otherwise they are torch's own operations. Both round to the tensors' dtype
where `transformers` does. They are torch custom ops with fake implementations and without
gradients; outside torch's compiler the functions are called directly, because a decode step makes
dozens of calls of a few microseconds each.

All of them raise ValueError for tensors that do not fit each other.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from cptool.ops.checks import SCALAR_TYPES, check_tensor, dispatch, rows_of
from cptool.ops.kernels import EXTENSION as _C


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) in float32, rounded to the type of x, then times the weight.

    x [rows, width], weight [width]. Returns [rows, width], contiguous.
    """
    if _has_kernel(x, x.shape[-1]):
        return dispatch(_rms_norm, _rms_norm_op, x, weight, eps)
    # Without a weight `rms_norm` rounds before it returns.
    return functional.rms_norm(x, x.shape[-1:], eps=eps).mul_(weight)


def add_rms_norm_(hidden: Tensor, added: Tensor, weight: Tensor, eps: float) -> Tensor:
    """Add `added` to `hidden` in place and return `rms_norm` of the sum."""
    if _has_kernel(hidden, hidden.shape[-1]):
        return dispatch(_norm, _add_rms_norm_op, hidden, added, weight, eps)
    hidden += added
    return rms_norm(hidden, weight, eps)


def rotate_(heads: Tensor, cos: Tensor, sin: Tensor) -> None:
    """Rotate `heads` [T, H, D] in place; pair j is the elements (j, j + D/2) of a head.

    (a, b) -> (a cos - b sin, b cos + a sin), in float32, rounded once to the type of `heads`.
    `cos` and `sin` are float32 [T, 1, D/2].
    """
    if _has_kernel(heads, heads.shape[-1]):
        return dispatch(_rotate_, _rotate_op, heads, cos, sin)
    first, second = heads.chunk(2, dim=-1)
    a, b = first.to(torch.float32), second.to(torch.float32)
    rotated = (a * cos).addcmul_(b, sin, value=-1)
    second.copy_((b * cos).addcmul_(a, sin))
    first.copy_(rotated)


def swiglu_(gate: Tensor, up: Tensor) -> Tensor:
    """Compute gate = silu(gate) * up in place, each factor rounded, and return it.

    Both are [rows, width].
    """
    if _has_kernel(gate, gate.shape[-1]):
        dispatch(_swiglu_, _swiglu_op, gate, up)
        return gate
    return functional.silu(gate, inplace=True).mul_(up)


def _has_kernel(x: Tensor, width: int) -> bool:
    if x.dtype not in SCALAR_TYPES:
        return False
    return x.is_cpu or (x.is_cuda and bool(_C.cuda_archs) and width % 8 == 0)


def _run(name: str, device: torch.device, *arguments: object) -> None:
    """Call the extension's function for the device, on its threads or its current stream."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            stream = torch.cuda.current_stream().cuda_stream
            getattr(_C, f"{name}_cuda")(*arguments, stream)
    else:
        getattr(_C, f"{name}_cpu")(*arguments, torch.get_num_threads())


def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _norm(x, None, weight, eps)


def _norm(hidden: Tensor, added: Tensor | None, weight: Tensor, eps: float) -> Tensor:
    (rows, width), dtype = rows_of(hidden, "hidden"), hidden.dtype
    check_tensor("weight", weight, (width,), dtype, device=hidden.device)
    if added is not None:
        check_tensor("added", added, (rows, width), dtype, device=hidden.device)
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
        check_tensor(name, table, (tokens, 1, head_dim // 2), torch.float32, device=heads.device)
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
    rows, width = rows_of(gate, "gate")
    check_tensor("up", up, (rows, width), gate.dtype, device=gate.device)
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
    _library.impl(_name, _function, "CUDA")
    torch.library.register_fake(f"cptool::{_name}", _fake, lib=_library)

_rms_norm_op = torch.ops.cptool.rms_norm.default
_add_rms_norm_op = torch.ops.cptool.add_rms_norm_.default
_rotate_op = torch.ops.cptool.rotate_.default
_swiglu_op = torch.ops.cptool.swiglu_.default
