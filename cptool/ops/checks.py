"""What the arguments of the ops must be.

Every failure is a ValueError that names the argument, what it is and what it must be.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from cptool.errors import UserError

MAX_HEAD_DIM = 256

# The dtypes of q, k, v and partials, with the values of csrc/attention.h's ScalarType.
SCALAR_TYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], meaning: str) -> None:
    if tensor.shape != shape:
        raise ValueError(
            f"{name} has shape {list(tensor.shape)}; it must be {list(shape)} ({meaning})"
        )


def _check_dtype(name: str, tensor: Tensor, dtype: torch.dtype, meaning: str = "") -> None:
    if tensor.dtype != dtype:
        raise ValueError(f"{name} is {tensor.dtype}; it must be {dtype}{meaning}")


def _check_head_dim(name: str, head_dim: int) -> None:
    if head_dim % 2 or not 2 <= head_dim <= MAX_HEAD_DIM:
        raise ValueError(
            f"{name} has head dimension {head_dim}; it must be even, from 2 to {MAX_HEAD_DIM}"
        )


def _check_float(name: str, tensor: Tensor) -> None:
    if tensor.dtype not in SCALAR_TYPES:
        raise ValueError(f"{name} is {tensor.dtype}; it must be float32, bfloat16 or float16")


def check_kernels(name: str, device: torch.device, cuda_archs: str) -> None:
    """`cuda_archs`: the CUDA architectures that the extension was built for, empty for none."""
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"{name} is on {device}; it must be on cpu or cuda")
    if device.type == "cuda" and not cuda_archs:
        raise ValueError(
            f"{name} is on {device}, but cptool was built without CUDA kernels; "
            "reinstall where nvcc is found"
        )


def _check_device(tensor: Tensor, device: torch.device, name: str, first: str) -> None:
    if tensor.device != device:
        raise ValueError(f"{name} is on {tensor.device}; it must be on {device} like {first}")


def check_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
) -> None:
    if q.dim() != 3:
        raise ValueError(f"q has shape {list(q.shape)}; it must be [tokens, heads, head_dim]")
    if k.dim() != 3:
        raise ValueError(f"k has shape {list(k.shape)}; it must be [tokens, kv_heads, head_dim]")
    q_tokens, q_heads, head_dim = q.shape
    k_tokens, kv_heads, k_head_dim = k.shape
    _check_float("q", q)
    _check_head_dim("q", head_dim)
    if k_head_dim != head_dim:
        raise ValueError(f"k has head dimension {k_head_dim}; it must be {head_dim} like q's")
    if kv_heads < 1 or q_heads < 1 or q_heads % kv_heads:
        raise ValueError(
            f"q has {q_heads} heads; they must be a positive multiple of the {kv_heads} heads of k"
        )
    _check_shape("v", v, k.shape, "the shape of k")
    _check_shape("q_pos", q_pos, (q_tokens,), "one position for each token of q")
    _check_shape("k_pos", k_pos, (k_tokens,), "one position for each token of k")
    if cu_q.dim() != 1 or cu_q.shape[0] < 1:
        raise ValueError(f"cu_q has shape {list(cu_q.shape)}; it must be [sequences + 1]")
    _check_shape("cu_k", cu_k, cu_q.shape, "[sequences + 1], like cu_q")
    if k.dtype != q.dtype:
        _check_kv_dtype(q, k)
    _check_dtype("v", v, k.dtype, " like k")
    device = q.device
    for name, tensor in (("q_pos", q_pos), ("k_pos", k_pos), ("cu_q", cu_q), ("cu_k", cu_k)):
        _check_dtype(name, tensor, torch.int32)
        if not tensor.is_contiguous():
            raise ValueError(f"{name} has stride {tensor.stride(0)}; it must be contiguous")
        _check_device(tensor, device, name, "q")
    for name, tensor in (("q", q), ("k", k), ("v", v)):
        if tensor.stride(2) != 1:
            raise ValueError(
                f"{name} has strides {tensor.stride()}; its innermost dimension must be contiguous"
            )
        _check_device(tensor, device, name, "q")
    check_scale(scale)


def check_scale(scale: float) -> None:
    if not math.isfinite(scale):
        raise ValueError(f"scale is {scale}; it must be finite")


_LEAST_CAP, _MOST_CAP = 1e-30, 1e30


def check_values(k: Tensor, v: Tensor) -> None:
    _check_shape("v", v, k.shape, "the shape of k")
    _check_dtype("v", v, k.dtype, " like k")


def check_scores(window: int | None, cap: float | None) -> None:
    if window is not None and (not _is_int(window) or window < 1):
        raise ValueError(f"window is {window}; it must be at least 1 position, or None for all")
    if cap is not None and not _LEAST_CAP <= cap <= _MOST_CAP:
        raise ValueError(
            f"cap is {cap}; it must be positive and finite in float32, from {_LEAST_CAP:g} to "
            f"{_MOST_CAP:g}, or None for no cap"
        )


def _is_int(value: object) -> bool:
    return isinstance(value, int | torch.SymInt) and type(value) is not bool


def check_max_len(max_len: int) -> None:
    if not _is_int(max_len) or not 1 <= max_len < 1 << 31:
        raise ValueError(
            f"max_len is {max_len}; it must be a number of tokens from 1 to {2**31 - 1}"
        )


def _check_kv_dtype(q: Tensor, k: Tensor) -> None:
    """Kernels on the CPU widen 16-bit keys and values under a float32 q; no other two types mix."""
    if q.dtype != torch.float32 or q.is_cuda:
        place = " on CUDA" if q.is_cuda else ""
        raise ValueError(f"k is {k.dtype}; it must be {q.dtype} like q{place}")
    _check_float("k", k)


def refuse_gradients(function: str, **tensors: Tensor) -> None:
    """Raise UserError if autograd would record a call of `function`, which has no backward: the
    gradient would be lost without a word.
    """
    if not torch.is_grad_enabled():
        return
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise UserError(
                f"{name} requires a gradient, and {function} has no backward; call it under "
                "torch.no_grad(), or give it detached tensors, as by .detach()"
            )


def check_new_dtype(out_dtype: torch.dtype | None, q: Tensor) -> torch.dtype:
    if out_dtype is None:
        return torch.float32
    if out_dtype != torch.float32 and out_dtype != q.dtype:
        raise ValueError(f"out_dtype is {out_dtype}; it must be float32 or q's dtype, {q.dtype}")
    return out_dtype


def check_into(q: Tensor, out: Tensor, lse: Tensor) -> None:
    _check_shape("into's out", out, q.shape, "the shape of q")
    _check_shape("into's lse", lse, q.shape[:2], "tokens and heads of q")
    _check_running("into's out", out, q)
    _check_running("into's lse", lse, q)


def _check_running(name: str, tensor: Tensor, q: Tensor) -> None:
    _check_dtype(name, tensor, torch.float32)
    if not tensor.is_contiguous():
        raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
    _check_device(tensor, q.device, name, "q")


def check_sum(q: Tensor, out: Tensor, /, **inputs: Tensor) -> None:
    """`check_into` and `check_apart` of SiLU attention, whose running result has no lse. Without
    inputs memory is not looked at.
    """
    _check_shape("into", out, q.shape, "the shape of q")
    _check_running("into", out, q)
    begin, end = (out.data_ptr(), out.data_ptr() + out.nbytes) if inputs else (0, 0)
    for name, tensor in inputs.items():
        first = tensor.data_ptr()
        if first < end and begin < first + _extent(tensor):
            raise ValueError(f"into overlaps {name} in memory; it must be its own tensor")


def check_apart(out: Tensor, lse: Tensor, **inputs: Tensor) -> None:
    """Refuse an `into` that a kernel would write while it reads the same memory as an input.

    Every call comes through here, so an input that begins behind both costs one look at its
    address. `out` and `lse` have passed `check_into`.
    """
    out_begin, lse_begin = out.data_ptr(), lse.data_ptr()
    out_end, lse_end = out_begin + out.nbytes, lse_begin + lse.nbytes
    if out_begin < lse_end and lse_begin < out_end:
        raise ValueError("into's out overlaps into's lse in memory; each must be its own tensor")
    last = out_end if out_end > lse_end else lse_end
    for name, tensor in inputs.items():
        begin = tensor.data_ptr()
        if begin >= last:
            continue
        end = begin + (tensor.nbytes if tensor.is_contiguous() else _extent(tensor))
        if begin < out_end and out_begin < end and begin < end:
            raise ValueError(f"into's out overlaps {name} in memory; it must be its own tensor")
        if begin < lse_end and lse_begin < end and begin < end:
            raise ValueError(f"into's lse overlaps {name} in memory; it must be its own tensor")


def _extent(tensor: Tensor) -> int:
    """Return the bytes from the first element of a strided tensor to the end of its last."""
    if not tensor.numel():
        return 0
    last = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride(), strict=True))
    return (1 + last) * tensor.element_size()


def check_merge(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out_dtype: torch.dtype | None
) -> torch.dtype:
    if len(lses) != len(outs):
        raise ValueError(
            f"lses holds {len(lses)} tensors; it must hold one for each of the {len(outs)} outs"
        )
    first = outs[0]
    if first.dim() != 3:
        raise ValueError(
            f"outs[0] has shape {list(first.shape)}; it must be [tokens, heads, head_dim]"
        )
    _check_float("outs[0]", first)
    _check_head_dim("outs[0]", first.shape[2])
    device = first.device
    for i, (out, lse) in enumerate(zip(outs, lses, strict=True)):
        _check_shape(f"outs[{i}]", out, first.shape, "the shape of outs[0]")
        _check_shape(f"lses[{i}]", lse, first.shape[:2], "tokens and heads of outs[0]")
        _check_dtype(f"outs[{i}]", out, first.dtype, " like outs[0]")
        _check_dtype(f"lses[{i}]", lse, torch.float32)
        for name, tensor in ((f"outs[{i}]", out), (f"lses[{i}]", lse)):
            if not tensor.is_contiguous():
                raise ValueError(f"{name} has strides {tensor.stride()}; it must be contiguous")
            _check_device(tensor, device, name, "outs[0]")
    if out_dtype is None:
        return torch.float32
    if out_dtype not in SCALAR_TYPES:
        raise ValueError(f"out_dtype is {out_dtype}; it must be float32, bfloat16 or float16")
    return out_dtype


def dispatch(function: Callable[..., Any], op: Callable[..., Any], *arguments: Any) -> Any:
    """Call `op` under torch's compiler and `function`, which costs less, everywhere else."""
    return (op if torch.compiler.is_compiling() else function)(*arguments)


def rows_of(x: Tensor, name: str = "x") -> torch.Size:
    """Return the shape [rows, width] of `x`; raise ValueError for any other."""
    if x.dim() != 2 or x.stride(1) != 1:
        raise ValueError(
            f"{name} has shape {list(x.shape)} and strides {x.stride()}; "
            "it must be [rows, width] with a contiguous innermost dimension"
        )
    return x.shape


def check_tensor(
    name: str, tensor: Tensor, shape: tuple[int, ...], dtype: torch.dtype, *, device: torch.device
) -> None:
    """Raise ValueError unless shape, dtype and device are these and the innermost stride is 1."""
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
    """`check_tensor` for a matrix on the CPU."""
    check_tensor(name, tensor, shape, dtype, device=torch.device("cpu"))
