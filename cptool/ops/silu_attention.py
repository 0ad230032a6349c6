"""SiLU attention over positions: a second kind of partial, whose merge is a sum.

    out = sum_j silu(scale * q k_j) v_j / max_len        silu(s) = s / (1 + exp(-s))

over the keys j that a query sees: the pointwise attention of HSTU ("Actions Speak Louder than
Words", Zhai et al., 2024). Weights are not normalised, so a partial is `out` alone, and partials
over disjoint keys add up to the one over their union. A query that sees no key has ``out = 0``.

Positions are the mask as in `cptool.ops.attention`, and the ops are torch custom ops likewise.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cptool.ops.attention_kernel import run_attention
from cptool.ops.checks import (
    check_attention,
    check_max_len,
    check_new_dtype,
    check_scores,
    check_sum,
    refuse_gradients,
)


def silu_attention_partial(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    max_len: int,
    into: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    *,
    window: int | None = None,
) -> Tensor:
    """Compute the SiLU attention of packed sequences over the keys at hand, as a partial result.

    Args:
        q, k, v, q_pos, k_pos, cu_q, cu_k: as in `cptool.attention_partial`.
        scale: factor of the scores, usually ``D ** -0.5``.
        max_len: what the weights are divided by, usually the length of the longest sequence; the
            same for all partials of a result.
        into: a running float32 result ``[Tq, Hq, D]`` to add to, in place; it must share no memory
            with the inputs.
        out_dtype: dtype of a new result: float32 (the default) or q's dtype.
        window: how many positions a query sees: one at p sees keys at p - window + 1 to p. None for
            all up to p.

    Returns:
        out ``[Tq, Hq, D]``; `into` if given.

    Raises:
        ValueError: an argument breaks the contract.
        UserError: q, k, v or `into` requires a gradient while gradients are recorded.

    On CUDA it is computed by the kernel for every call ("simt"), without tensor cores.
    """
    if torch.is_grad_enabled():
        given = {"q": q, "k": k, "v": v}
        if into is not None:
            given["into"] = into
        refuse_gradients("silu_attention_partial", **given)
    call = (q, k, v, q_pos, k_pos, cu_q, cu_k, scale, max_len)
    if into is None:
        return _silu_attention_op(*call, out_dtype, window)
    if out_dtype is not None and out_dtype != torch.float32:
        raise ValueError(f"out_dtype is {out_dtype}; with `into` it must be float32")
    _silu_attention_into_op(*call, into, window)
    return into


def _check(call: tuple, max_len: int, window: int | None) -> None:
    check_attention(*call)
    check_scores(window, None)
    check_max_len(max_len)


def _silu_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    max_len: int,
    out_dtype: torch.dtype | None = None,
    window: int | None = None,
) -> Tensor:
    tensors = (q, k, v, q_pos, k_pos, cu_q, cu_k)
    out = _silu_attention_fake(*tensors, scale, max_len, out_dtype=out_dtype, window=window)
    scores = (scale, window, None)
    run_attention(*tensors, scores, out, None, accumulate=False, max_len=max_len)
    return out


def _silu_attention_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    max_len: int,
    out_dtype: torch.dtype | None = None,
    window: int | None = None,
) -> Tensor:
    _check((q, k, v, q_pos, k_pos, cu_q, cu_k, scale), max_len, window)
    return q.new_empty(q.shape, dtype=check_new_dtype(out_dtype, q))


def _silu_attention_into(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    max_len: int,
    out: Tensor,
    window: int | None = None,
) -> None:
    tensors = (q, k, v, q_pos, k_pos, cu_q, cu_k)
    _check((*tensors, scale), max_len, window)
    check_sum(q, out, q=q, k=k, v=v, q_pos=q_pos, k_pos=k_pos, cu_q=cu_q, cu_k=cu_k)
    scores = (scale, window, None)
    run_attention(*tensors, scores, out, None, accumulate=True, max_len=max_len)


def _silu_attention_into_fake(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scale: float,
    max_len: int,
    out: Tensor,
    window: int | None = None,
) -> None:
    _check((q, k, v, q_pos, k_pos, cu_q, cu_k, scale), max_len, window)
    check_sum(q, out)


_CALL = (
    "Tensor q, Tensor k, Tensor v, Tensor q_pos, Tensor k_pos, Tensor cu_q, Tensor cu_k, "
    "float scale, int max_len"
)
_library = torch.library.Library("cptool", "FRAGMENT")
for _name, _schema, _function, _fake in (
    (
        "silu_attention_partial",
        f"({_CALL}, ScalarType? out_dtype=None, int? window=None) -> Tensor",
        _silu_attention,
        _silu_attention_fake,
    ),
    (
        "silu_attention_partial_",
        f"({_CALL}, Tensor(a!) out, int? window=None) -> ()",
        _silu_attention_into,
        _silu_attention_into_fake,
    ),
):
    _library.define(_name + _schema)
    _library.impl(_name, _function, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cptool::{_name}", _fake, lib=_library)

_silu_attention_op = torch.ops.cptool.silu_attention_partial.default
_silu_attention_into_op = torch.ops.cptool.silu_attention_partial_.default
