"""SiLU attention, whose partials add up, against float64.

The tolerance is that of `reference`: twice the error of plain torch (matmul, SiLU, matmul, every
intermediate rounded) in the kernel's arithmetic, and the roundings that no algorithm avoids, here
of terms that do not add up to a mean of values but to at most `terms`, the sum of their sizes:

    2 * max|plain - exact| + 4 u terms + u_out max|out|        and u terms more for each partial
"""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BFLOAT16_ISAS, Case, make_case, unit_roundoff

import cptool
from cptool.errors import UserError
from cptool.ops.kernels import cpu_isa, cpu_isas, force_cpu_isa
from cptool.ops.silu_attention import silu_attention_partial

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MAX_LEN = 100


@pytest.fixture(params=cpu_isas())
def isa(request):
    with force_cpu_isa(request.param):
        yield request.param


def run(case: Case, **options) -> torch.Tensor:
    return silu_attention_partial(*case.arguments, MAX_LEN, window=case.window, **options)


def plain(case: Case, dtype: torch.dtype, sizes: bool = False) -> torch.Tensor:
    """The formula in `dtype`; with `sizes`, the sum of the sizes of its terms."""
    out = torch.zeros(case.q.shape, dtype=dtype)
    group = case.q.shape[1] // case.k.shape[1]
    for queries, keys, visible in case.sequences():
        q = case.q[queries].to(dtype).transpose(0, 1)
        k = case.k[keys].to(dtype).repeat_interleave(group, 1).permute(1, 2, 0)
        v = case.v[keys].to(dtype).repeat_interleave(group, 1).transpose(0, 1)
        weights = torch.nn.functional.silu(q @ k * case.scale) / MAX_LEN
        weights = weights.masked_fill(~visible, 0)
        if sizes:
            weights, v = weights.abs(), v.abs()
        out[queries] = (weights @ v).transpose(0, 1)
    return out


def check(
    case: Case, out: torch.Tensor, partials: int = 1, arithmetic: torch.dtype | None = None
) -> None:
    kernel = cpu_isa(case.q.dtype, case.q.shape[2], case.k.dtype)
    narrow = case.q.dtype == torch.bfloat16 and kernel in BFLOAT16_ISAS
    arithmetic = arithmetic or (torch.bfloat16 if narrow else torch.float32)
    exact = plain(case, torch.float64)
    assert out.shape == exact.shape
    if not out.numel():
        return
    allowed = (
        2 * (plain(case, arithmetic) - exact).abs().max()
        + (3 + partials) * unit_roundoff(arithmetic) * plain(case, torch.float64, sizes=True).max()
        + unit_roundoff(out.dtype) * exact.abs().max()
    )
    error = (out.double() - exact).abs().max()
    assert error <= allowed, f"errs by {error:.3g}, allowed {allowed:.3g}"


def ragged(**options) -> Case:
    """Every kind of sequence in one batch, no length a multiple of a tile."""
    near, far = [*range(33), *range(431, 464)], [*range(33, 66), *range(398, 431)]
    sequences = [
        (range(131), range(131)),
        (range(390, 427), range(427)),
        (near, far),
        (far, near),
        ([300], range(1, 301, 3)),
        ([], range(5)),
        (range(7), []),
        (range(3), range(2, 9)),
        ([2, 4, 4000], [3, 3990]),
    ]
    return make_case(sequences, slack=3, **options)


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (16, 1)], ids=str)
@pytest.mark.parametrize("window", [None, 1, 64, 100])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(isa, dtype, window, heads):
    case = replace(ragged(dtype=dtype, heads=heads), window=window)
    for out_dtype in {torch.float32, dtype}:
        out = run(case, out_dtype=out_dtype)
        assert out.dtype == out_dtype
        check(case, out)


@pytest.mark.parametrize("head_dim", [2, 8, 24, 72, 100, 128, 256])
def test_head_dimensions_and_mixed_types(isa, head_dim):
    for kv_dtype in DTYPES:
        case = ragged(head_dim=head_dim, kv_dtype=kv_dtype)
        check(case, run(case))


@pytest.mark.parametrize("queries", [1, 3, 33])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (16, 2)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_queries_over_many_keys(isa, dtype, queries, heads):
    """Tiles of every size of the kernel that streams keys; items that are cut by keys."""
    sequences = [(range(2100 - queries, 2100), range(2103)), ([7], range(9))]
    case = make_case(sequences, heads=heads, slack=1, dtype=dtype)
    for window in (None, 33, 1300):
        check(replace(case, window=window), run(replace(case, window=window)), partials=8)


@pytest.mark.parametrize("scale", [0.0, -0.3, 30.0, 1e30])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_scores_of_every_size(isa, dtype, scale):
    """The exponential neither overflows nor leaves anything of very negative scores."""
    case = replace(ragged(dtype=dtype), scale=scale)
    assert run(case).isfinite().all()
    check(case, run(case))


def test_a_query_that_sees_no_key_is_zero(isa):
    case = make_case([([0, 5], [5, 6]), ([3], []), ([9], [1])], slack=2)
    for out_dtype in (torch.float32, case.q.dtype):
        out = run(case, out_dtype=out_dtype)
        assert (out[[0, 2]] == 0).all() and (out[[1, 3]] != 0).all()
    running = torch.ones(case.q.shape)
    run(case, into=running)
    assert (running[[0, 2]] == 1).all()


def test_bits_do_not_depend_on_threads(isa):
    case = replace(ragged(heads=(16, 2)), window=45)
    before = torch.get_num_threads()
    expected = run(case)
    try:
        torch.set_num_threads(3)
        assert torch.equal(run(case), expected)
    finally:
        torch.set_num_threads(before)


positions = st.lists(st.integers(0, 300), max_size=70).map(sorted)


@settings(deadline=None, derandomize=True, max_examples=60)
@given(
    st.lists(st.tuples(positions, positions), max_size=3),
    st.integers(1, 3),
    st.integers(1, 9),
    st.integers(1, 400) | st.none(),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_shards_add_up_to_the_whole(sequences, kv_heads, group, window, dtype, shards, seed):
    heads = (kv_heads * group, kv_heads)
    case = make_case(sequences, heads=heads, dtype=dtype, slack=seed % 2, seed=seed)
    case = replace(case, window=window)
    owner = torch.randint(shards, (len(case.k_pos),), generator=torch.manual_seed(seed))
    parts = [case.only_keys(owner == shard) for shard in range(shards)]
    check(case, sum(map(run, parts)), partials=shards)
    running = torch.zeros(case.q.shape)
    for part in parts:
        assert run(part, into=running) is running
    check(case, running, partials=shards)


def test_mistakes_are_named():
    case = make_case([(range(3), range(3))])
    for max_len in (0, -1, 2**31):
        with pytest.raises(ValueError, match=f"max_len is {max_len}; it must be a number"):
            silu_attention_partial(*case.arguments, max_len)
    for options, message in [
        ({"window": 0}, "window is 0"),
        ({"into": torch.zeros(3, 4, 8)}, r"into has shape \[3, 4, 8\]; it must be \[3, 4, 64\]"),
        ({"into": torch.zeros(case.q.shape).half()}, "into is torch.float16"),
        ({"into": case.q}, "into overlaps q in memory"),
        ({"out_dtype": torch.float16}, "out_dtype is torch.float16"),
        ({"into": torch.zeros(case.q.shape), "out_dtype": torch.bfloat16}, "with `into` it must"),
    ]:
        with pytest.raises(ValueError, match=message):
            silu_attention_partial(*case.arguments, 5, **options)
    with pytest.raises(UserError, match="silu_attention_partial has no backward"):
        silu_attention_partial(case.q.requires_grad_(), *case.arguments[1:], 5)


def test_the_custom_ops():
    case = replace(make_case([(range(30), range(30))]), window=7)
    meta = [x.to("meta") for x in case.arguments[:-1]]
    assert silu_attention_partial(*meta, case.scale, 9).shape == case.q.shape
    ops = torch.ops.cptool
    arguments = (*case.arguments, MAX_LEN)
    torch.library.opcheck(ops.silu_attention_partial.default, (*arguments, torch.float32, 7))
    into = torch.zeros(case.q.shape)
    torch.library.opcheck(ops.silu_attention_partial_.default, (*arguments, into, 7))
    assert torch.equal(ops.silu_attention_partial(*arguments, None, 7), run(case))
    assert torch.equal(cptool.silu_attention_partial(*arguments, window=7), run(case))
