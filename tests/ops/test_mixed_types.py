"""Attention of float32 queries over keys and values of 16 bits, which the kernels widen."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from reference import BFLOAT16_ISAS, check, make_case, tolerance

from cptool.ops.attention import attention_partial
from cptool.ops.kernels import cpu_isa, cpu_isas, cpu_stream_rows, force_cpu_isa

STORED = [torch.bfloat16, torch.float16]


@pytest.fixture(params=cpu_isas())
def isa(request):
    with force_cpu_isa(request.param):
        yield request.param


@cache
def case_and_tolerance(kv_dtype, head_dim, heads, sequences):
    case = make_case(list(sequences), heads=heads, head_dim=head_dim, kv_dtype=kv_dtype, slack=2)
    assert case.q.dtype == torch.float32 and case.k.dtype == kv_dtype
    return case, tolerance(case, merged=True)


MANY = ((range(131), range(131)), (range(90, 127), range(127)), ((300,), range(1, 301, 3)))
FEW = (((200,), range(77)), (range(40, 43), range(45)), ((), range(9)), ((5,), ()))


@pytest.mark.parametrize("sequences", [MANY, FEW], ids=["many rows", "few rows"])
@pytest.mark.parametrize("heads", [(3, 3), (16, 2)], ids=str)
@pytest.mark.parametrize("head_dim", [2, 8, 64, 72, 100])
@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
def test_matches_float64_of_the_stored_keys(isa, kv_dtype, head_dim, heads, sequences):
    case, allowed = case_and_tolerance(kv_dtype, head_dim, heads, sequences)
    check(case, attention_partial(*case.arguments), allowed)


@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
def test_queries_are_not_rounded(isa, kv_dtype):
    """The error is that of float32, far below that of one rounding of q to 16 bits."""
    case, _ = case_and_tolerance(kv_dtype, 64, (16, 2), MANY)
    rounded = replace(case, q=case.q.to(kv_dtype).float())
    off = (rounded.exact[0] - case.exact[0]).abs().max()
    assert off > 50 * (attention_partial(*case.arguments)[0] - case.exact[0]).abs().max()


@pytest.mark.parametrize("sequences", [MANY, FEW], ids=["many rows", "few rows"])
@pytest.mark.parametrize("kv_dtype", STORED, ids=str)
def test_queries_that_16_bits_hold_give_the_bits_of_one_type(isa, kv_dtype, sequences):
    case, _ = case_and_tolerance(kv_dtype, 64, (16, 2), sequences)
    narrow = replace(case, q=case.q.to(kv_dtype))
    if kv_dtype == torch.bfloat16 and cpu_isa(kv_dtype, 64) in BFLOAT16_ISAS:
        pytest.skip("the kernel of one type multiplies it as it is")
    wide = replace(narrow, q=narrow.q.float())
    for a, b in zip(
        attention_partial(*wide.arguments), attention_partial(*narrow.arguments), strict=True
    ):
        assert torch.equal(a, b)


def test_mixed_types_go_to_a_kernel_of_float32_arithmetic(isa):
    kernel = cpu_isa(torch.float32, 64, torch.bfloat16)
    assert kernel == cpu_isa(torch.float32, 64)
    streams = {"portable": 0, "amx": 16}.get(kernel, 32)
    assert cpu_stream_rows(torch.float32, 64, torch.bfloat16) == streams


def test_no_other_types_mix():
    case = make_case([(range(4), range(4))])
    for q, kv in [
        (torch.bfloat16, torch.float32),
        (torch.bfloat16, torch.float16),
        (torch.float16, torch.bfloat16),
    ]:
        mixed = replace(case, q=case.q.to(q), k=case.k.to(kv), v=case.v.to(kv))
        with pytest.raises(ValueError, match=rf"k is {kv}; it must be {q} like q"):
            attention_partial(*mixed.arguments)
    with pytest.raises(ValueError, match=r"k is torch.float64; it must be float32, bfloat16"):
        attention_partial(*replace(case, k=case.k.double(), v=case.v.double()).arguments)
    with pytest.raises(ValueError, match=r"v is torch.float16; it must be torch.bfloat16 like k"):
        attention_partial(*replace(case, k=case.k.bfloat16(), v=case.v.half()).arguments)
