"""What the CUDA functions of the extension refuse, on machines with a GPU and without."""

import re

import pytest
import torch

from cptool.ops import extension
from cptool.ops.kernels import build_info

_C = extension.load()

pytestmark = pytest.mark.skipif(not build_info()["cuda_archs"], reason="built without CUDA kernels")


def attention(q_tokens=4, kv_heads=2, head_dim=64, batch=1):
    """The exported function with null pointers, for calls that must not reach a kernel."""
    _C.attention_partial_cuda(
        *(0, head_dim * kv_heads, head_dim) * 3,
        0,
        0,
        0,
        0,
        batch,
        q_tokens,
        0,
        kv_heads,
        kv_heads,
        head_dim,
        1.0,
        *(0, 0, 0),  # the types of q, of k and v, and of the output
        0,
        0,
        False,
        *(0, 0.0, 0, 0.0),  # neither window, cap nor margin; softmax
        0,
        0,
    )


def merge(rows=4):
    _C.merge_partials_cuda([0], [0], rows, 64, 0, 0, 0, 0, 0)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
@pytest.mark.parametrize("call", [attention, merge])
def test_without_a_device_the_runtime_says_so(call):
    with pytest.raises(RuntimeError, match=r"^CUDA error in (attention_partial|merge_partials): ."):
        call()


def test_no_work_needs_no_device():
    attention(q_tokens=0)
    merge(rows=0)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: attention(head_dim=13), "head_dim is 13; CUDA takes even ones from 2 to 256"),
        (lambda: attention(head_dim=264), "head_dim is 264; CUDA takes even ones from 2 to 256"),
        (lambda: attention(batch=0), "q has tokens, but cu_q has no sequence"),
        (lambda: attention(kv_heads=65536), "a grid of 1 x 65536 thread blocks; the limit is"),
        (lambda: attention(q_tokens=2**37), "a grid of 2147483649 x 2 thread blocks; the limit is"),
        (lambda: merge(rows=2**37), "would need 4294967296 thread blocks; the limit is 2147483647"),
    ],
)
def test_calls_beyond_the_limits_are_refused(call, message):
    with pytest.raises(ValueError, match=re.escape(message)):
        call()
