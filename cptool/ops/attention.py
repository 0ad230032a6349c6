"""Partial attention over positions, and the merge of partials: what context parallelism is made of.

A partial is a pair ``(out, lse)`` over some of a query's keys: ``out = softmax(scale * q k^T) v``,
and ``lse``, the natural logarithm of the softmax's denominator, in float32; a query that saw no key
has ``out = 0`` and ``lse = -inf``. Partials over disjoint keys merge to the one over their union::

    lse = log(sum_i exp(lse_i))        out = sum_i exp(lse_i - lse) * out_i

Positions are the mask: a key is visible to the queries of its sequence whose position is at least
its own and, with a window, less than its own plus the window. So whole prompts, shards of any
layout, cached prefixes, decode steps and empty shards are one call.

Both operations are torch custom ops (``torch.ops.cptool``) with fake implementations. They have no
backward, and raise where a gradient would be lost. `attention_partial` calls its own only where
torch's compiler or another kind of tensor asks for it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from cptool.ops.attention_kernel import run_attention
from cptool.ops.checks import (
    SCALAR_TYPES,
    check_apart,
    check_attention,
    check_into,
    check_kernels,
    check_merge,
    check_new_dtype,
    check_scores,
    refuse_gradients,
)
from cptool.ops.kernels import EXTENSION as _C


def attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    into: tuple[Tensor, Tensor] | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    window: int | None = None,
    cap: float | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    """Compute the attention of packed sequences over the keys at hand, as a partial result.

    Args:
        q: ``[Tq, Hq, D]``, float32, bfloat16 or float16; D even, at most 256.
        k, v: ``[Tk, Hkv, D]`` in q's dtype or, on the CPU where q is float32, both in bfloat16 or
            both in float16; they are widened and everything is computed in float32.
            ``Hq % Hkv == 0``; query head h reads KV head ``h // (Hq // Hkv)``. Tokens and heads may
            have any strides; the innermost dimension of q, k and v is contiguous.
        q_pos, k_pos: int32 ``[Tq]`` and ``[Tk]``, absolute positions, ascending within each
            sequence. Keys at positions beyond all queries are never read, so slots there may be
            uninitialised.
        cu_q, cu_k: int32 ``[B + 1]``, token offsets of the B sequences; cu_q runs from 0 to Tq,
            cu_k lies within 0 and Tk. Any sequence may be empty on either side.
        scale: factor of the scores, usually ``D ** -0.5``.
        into: a running float32 result ``(out, lse)`` to merge into, in place, as part of the same
            pass; it must share no memory with the inputs. Where its lse is -inf its out is ignored,
            and becomes 0 if the query sees no key.
        out_dtype: dtype of a new out: float32 (the default) or q's dtype.
        window: how many positions a query sees: one at p sees keys at p - window + 1 to p. None for
            all up to p. Keys ahead of every window are not computed with. Their memory may be read
            and must then hold finite numbers.
        cap: soft cap of the scaled scores s, which become ``cap * tanh(s / cap)``; lse is that of
            the capped ones. None for no cap.
        sm_margin: on CUDA, multiprocessors to leave to transfers under way.

    Returns:
        out ``[Tq, Hq, D]`` and lse float32 ``[Tq, Hq]``; the tensors of `into` if given.

    Raises:
        ValueError: an argument breaks the contract. Offsets and positions are checked on the CPU
            only, where that costs no synchronisation.
        UserError: q, k, v or `into` requires a gradient while gradients are recorded.

    On CUDA the work is queued on the current stream of q's device, and nothing waits for it. On the
    CPU it is spread over ``torch.get_num_threads()`` threads; the result does not depend on their
    number.
    """
    if torch.is_grad_enabled():
        given = {"q": q, "k": k, "v": v}
        if into is not None:
            given.update(zip(("into's out", "into's lse"), into, strict=True))
        refuse_gradients("attention_partial", **given)
    # A plain call passes the op by, whose dispatch is a fifth of a short one.
    plain = type(q) is Tensor and not q.is_meta and not torch.compiler.is_compiling()
    if into is None:
        new = _attention_partial if plain else _attention_partial_op
        return new(q, k, v, q_pos, k_pos, cu_q, cu_k, scale, out_dtype, window, cap, sm_margin)
    if out_dtype is not None and out_dtype != torch.float32:
        raise ValueError(f"out_dtype is {out_dtype}; with `into` it must be float32")
    out, lse = into
    merge = _attention_partial_into if plain else _attention_partial_into_op
    merge(q, k, v, q_pos, k_pos, cu_q, cu_k, scale, out, lse, window, cap, sm_margin)
    return out, lse


def merge_partials(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    """Merge partials over disjoint sets of keys, in the order given.

    Args:
        outs: S >= 1 tensors ``[T, H, D]``, contiguous, of one dtype; D even, at most 256.
        lses: S tensors float32 ``[T, H]``, contiguous. Where one is -inf its out is ignored.
        out_dtype: float32 (the default), bfloat16 or float16.

    Returns:
        out ``[T, H, D]`` and lse float32 ``[T, H]`` of the union; ``(0, -inf)`` where no partial
        saw a key.

    Raises:
        ValueError: an argument breaks the contract.
        UserError: a partial requires a gradient while gradients are recorded.
    """
    if not outs:  # torch would find no device to dispatch on
        raise ValueError("outs is empty; it must hold at least one partial")
    if torch.is_grad_enabled():
        given = {f"outs[{i}]": out for i, out in enumerate(outs)}
        given.update((f"lses[{i}]", lse) for i, lse in enumerate(lses))
        refuse_gradients("merge_partials", **given)
    return _merge_partials_op(outs, lses, out_dtype)


def _attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out_dtype: torch.dtype | None = None,
    window: int | None = None,
    cap: float | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, q_pos, k_pos, cu_q, cu_k, scale)
    check_scores(window, cap)
    out = torch.empty(q.shape, dtype=check_new_dtype(out_dtype, q), device=q.device)
    lse = torch.empty(q.shape[:2], dtype=torch.float32, device=q.device)
    scores = (scale, window, cap)
    tensors = (q, k, v, q_pos, k_pos, cu_q, cu_k)
    run_attention(*tensors, scores, out, lse, accumulate=False, sm_margin=sm_margin)
    return out, lse


def _attention_partial_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out_dtype: torch.dtype | None = None,
    window: int | None = None,
    cap: float | None = None,
    sm_margin: int = 0,
) -> tuple[Tensor, Tensor]:
    check_attention(q, k, v, q_pos, k_pos, cu_q, cu_k, scale)
    check_scores(window, cap)
    out = q.new_empty(q.shape, dtype=check_new_dtype(out_dtype, q))
    return out, q.new_empty(q.shape[:2], dtype=torch.float32)


def _attention_partial_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    window: int | None = None,
    cap: float | None = None,
    sm_margin: int = 0,
) -> None:
    check_attention(q, k, v, q_pos, k_pos, cu_q, cu_k, scale)
    check_scores(window, cap)
    check_into(q, out, lse)
    check_apart(out, lse, q=q, k=k, v=v, q_pos=q_pos, k_pos=k_pos, cu_q=cu_q, cu_k=cu_k)
    scores = (scale, window, cap)
    tensors = (q, k, v, q_pos, k_pos, cu_q, cu_k)
    run_attention(*tensors, scores, out, lse, accumulate=True, sm_margin=sm_margin)


def _attention_partial_into_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    out: Tensor,
    lse: Tensor,
    window: int | None = None,
    cap: float | None = None,
    sm_margin: int = 0,
) -> None:
    check_attention(q, k, v, q_pos, k_pos, cu_q, cu_k, scale)
    check_scores(window, cap)
    check_into(q, out, lse)


def _merge_partials(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    dtype = check_merge(outs, lses, out_dtype)
    check_kernels("outs[0]", outs[0].device, _C.cuda_archs)
    tokens, heads, head_dim = outs[0].shape
    out = torch.empty((tokens, heads, head_dim), dtype=dtype, device=outs[0].device)
    lse = torch.empty((tokens, heads), dtype=torch.float32, device=outs[0].device)
    arguments = (
        [o.data_ptr() for o in outs],
        [x.data_ptr() for x in lses],
        tokens * heads,
        head_dim,
        SCALAR_TYPES[outs[0].dtype],
        SCALAR_TYPES[dtype],
        out.data_ptr(),
        lse.data_ptr(),
    )
    if out.is_cuda:
        with torch.cuda.device(out.device):
            _C.merge_partials_cuda(*arguments, torch.cuda.current_stream().cuda_stream)
    else:
        _C.merge_partials_cpu(*arguments, torch.get_num_threads())
    return out, lse


def _merge_partials_fake(
    outs: Sequence[Tensor], lses: Sequence[Tensor], out_dtype: torch.dtype | None = None
) -> tuple[Tensor, Tensor]:
    dtype = check_merge(outs, lses, out_dtype)
    return outs[0].new_empty(outs[0].shape, dtype=dtype), lses[0].new_empty(lses[0].shape)


_TENSORS = "Tensor q, Tensor k, Tensor v, Tensor q_pos, Tensor k_pos, Tensor cu_q, Tensor cu_k"
_SCORES = "int? window=None, float? cap=None, int sm_margin=0"
_library = torch.library.Library("cptool", "DEF")
for _name, _schema, _function, _fake in (
    (
        "attention_partial",
        f"({_TENSORS}, float scale, ScalarType? out_dtype=None, {_SCORES}) -> (Tensor, Tensor)",
        _attention_partial,
        _attention_partial_fake,
    ),
    (
        "attention_partial_",
        f"({_TENSORS}, float scale, Tensor(a!) out, Tensor(b!) lse, {_SCORES}) -> ()",
        _attention_partial_into,
        _attention_partial_into_fake,
    ),
    (
        "merge_partials",
        "(Tensor[] outs, Tensor[] lses, ScalarType? out_dtype=None) -> (Tensor, Tensor)",
        _merge_partials,
        _merge_partials_fake,
    ),
):
    _library.define(_name + _schema)
    # For every device, CPU and CUDA among them, so that those without kernels are refused in our
    # words.
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cptool::{_name}", _fake, lib=_library)

# The resolved overloads: calling them skips the search by name and signature.
_attention_partial_op = torch.ops.cptool.attention_partial.default
_attention_partial_into_op = torch.ops.cptool.attention_partial_.default
_merge_partials_op = torch.ops.cptool.merge_partials.default
