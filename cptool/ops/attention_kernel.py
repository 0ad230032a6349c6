"""The call of the extension's attention kernels, of both kinds of partials."""

from __future__ import annotations

import torch
from torch import Tensor

from cptool.ops.checks import SCALAR_TYPES, check_kernels
from cptool.ops.kernels import EXTENSION as _C


def run_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    q_pos: Tensor,
    k_pos: Tensor,
    cu_q: Tensor,
    cu_k: Tensor,
    scores: tuple[float, int | None, float | None],
    out: Tensor,
    lse: Tensor | None,
    *,
    accumulate: bool,
    sm_margin: int = 0,
    max_len: int = 0,
) -> None:
    """Call the kernel with checked tensors. scores: scale, window and cap. max_len: that of SiLU
    attention, which has no lse; 0 for softmax attention.
    """
    check_kernels("q", q.device, _C.cuda_archs)
    q_tokens, q_heads, head_dim = q.shape
    k_tokens, kv_heads, _ = k.shape
    scale, window, cap = scores
    arguments = (
        q.data_ptr(),
        *q.stride()[:2],
        k.data_ptr(),
        *k.stride()[:2],
        v.data_ptr(),
        *v.stride()[:2],
        q_pos.data_ptr(),
        k_pos.data_ptr(),
        cu_q.data_ptr(),
        cu_k.data_ptr(),
        cu_q.shape[0] - 1,
        q_tokens,
        k_tokens,
        q_heads,
        kv_heads,
        head_dim,
        scale,
        SCALAR_TYPES[q.dtype],
        SCALAR_TYPES[k.dtype],
        SCALAR_TYPES[out.dtype],
        out.data_ptr(),
        0 if lse is None else lse.data_ptr(),
        accumulate,
        window or 0,
        cap or 0.0,
        sm_margin,
        max_len,
    )
    if q.is_cuda:
        with torch.cuda.device(q.device):
            # From torch's allocator: a graph that is being captured keeps it for its replays.
            size = _C.attention_workspace_cuda(*arguments)
            workspace = torch.empty(size, dtype=torch.uint8, device=q.device) if size else None
            address = 0 if workspace is None else workspace.data_ptr()
            stream = torch.cuda.current_stream().cuda_stream
            _C.attention_partial_cuda(*arguments, address, stream)
    else:
        _C.attention_partial_cpu(*arguments, torch.get_num_threads())
