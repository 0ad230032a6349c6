"""What attention reports of itself while it computes, and that it can be stopped."""

import ctypes

import pytest
import torch
from reference import make_case
from test_ops import HEADS, ragged_batch

from cptool.ops.attention import attention_partial
from cptool.ops.kernels import cpu_isas, force_cpu_isa
from cptool.ops.watch import watched_attention


def visible(case):
    return sum(int(mask.sum()) for _, _, mask in case.sequences()) * case.q.shape[1]


@pytest.mark.parametrize("isa", cpu_isas())
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_counter_is_the_number_of_visible_pairs(isa, dtype):
    cases = [ragged_batch(dtype, 64, heads) for heads in HEADS]
    # Few queries over many keys, whose keys are cut too.
    cases += [
        make_case([(range(4999, 5000 + n), range(5000 + n))], heads=(6, 2), dtype=dtype)
        for n in (0, 1, 8)
    ]
    pairs = ctypes.c_int64()
    with force_cpu_isa(isa):
        for case in cases:
            pairs.value = 0
            with watched_attention(ctypes.addressof(pairs)):
                attention_partial(*case.arguments)
            assert pairs.value == visible(case)
            attention_partial(*case.arguments)
            assert pairs.value == visible(case)  # nothing is reported outside of the context


@pytest.mark.parametrize("isa", cpu_isas())
def test_a_cancelled_call_computes_nothing_further(isa):
    case = make_case([(range(300), range(300))])
    pairs, cancelled = ctypes.c_int64(), ctypes.c_int64(1)
    with force_cpu_isa(isa):
        whole = attention_partial(*case.arguments)
        with watched_attention(ctypes.addressof(pairs), ctypes.addressof(cancelled)):
            attention_partial(*case.arguments)
            assert pairs.value == 0
            cancelled.value = 0
            again = attention_partial(*case.arguments)
        assert pairs.value == visible(case)
        cancelled.value = 1
        outside = attention_partial(*case.arguments)
    for result in (again, outside):
        assert all(map(torch.equal, whole, result))
