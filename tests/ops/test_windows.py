"""Sliding windows and soft caps of attention against float64."""

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from reference import BFLOAT16_ISAS, Case, check, make_case, tolerance

from cptool.ops.attention import attention_partial, merge_partials
from cptool.ops.kernels import cpu_isa, cpu_isas, force_cpu_isa
from cptool.ops.watch import watched_attention

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WINDOWS = [1, 2, 31, 64, 100, 1000]


@pytest.fixture(params=cpu_isas())
def isa(request):
    with force_cpu_isa(request.param):
        yield request.param


def run(case: Case, **options) -> tuple[torch.Tensor, torch.Tensor]:
    return attention_partial(*case.arguments, **case.options, **options)


def allowed(case: Case, **options):
    kernel = cpu_isa(case.q.dtype, case.q.shape[2], case.k.dtype)
    narrow = case.q.dtype == torch.bfloat16 and kernel in BFLOAT16_ISAS
    return tolerance(case, torch.bfloat16 if narrow else torch.float32, **options)


def ragged(**options) -> Case:
    """Every kind of sequence in one batch, no length a multiple of a tile: whole prompts, new
    tokens over cached ones, shards of two chunks with a gap between them, empty shards, queries
    that see no key.
    """
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
        (range(700, 760), range(0, 800, 7)),
    ]
    return make_case(sequences, slack=3, **options)


@pytest.mark.parametrize("heads", [(3, 3), (4, 2), (5, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_windows_match_float64(isa, dtype, window, heads):
    case = replace(ragged(dtype=dtype, heads=heads), window=window)
    check(case, run(case), allowed(case))


@pytest.mark.parametrize("head_dim", [4, 8, 24, 72, 100, 128, 256])
@pytest.mark.parametrize("cap", [None, 0.5, 30.0], ids=str)
def test_head_dimensions_and_mixed_types(isa, head_dim, cap):
    for kv_dtype in DTYPES:
        case = ragged(head_dim=head_dim, kv_dtype=kv_dtype, heads=(4, 2))
        case = replace(case, window=50, cap=cap)
        check(case, run(case), allowed(case))


@pytest.mark.parametrize("scale", [0.3, -0.3, 0.0])
@pytest.mark.parametrize("cap", [0.1, 1.0, 50.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_caps_match_float64(isa, dtype, cap, scale):
    """Of scores far below the cap and far above."""
    for spread in (0.1, 1.0, 3.0):
        case = ragged(dtype=dtype, heads=(4, 2), spread=spread)
        for window in (None, 40):
            capped = replace(case, cap=cap, scale=scale, window=window)
            check(capped, run(capped), allowed(capped))


@pytest.mark.parametrize("queries", [1, 2, 3, 4, 7, 12, 31, 33])
@pytest.mark.parametrize("heads", [(1, 1), (4, 1), (16, 2), (16, 1)], ids=str)
@pytest.mark.parametrize("window", [1, 7, 33, 1500])
def test_few_queries_over_many_keys(isa, queries, heads, window):
    """Tiles of every size of the kernel that streams keys; items that are cut by keys."""
    sequences = [(range(5000 - queries, 5000), range(5003)), ([7], range(9))]
    case = replace(make_case(sequences, heads=heads, slack=1), window=window, cap=20.0)
    check(case, run(case), allowed(case, merged=True))


@pytest.mark.parametrize("queries, group", [(5, 13), (6, 11)])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_last_rows_of_a_head_in_a_block_of_their_own(isa, dtype, queries, group):
    """One row and two, of a group of more."""
    sequences = [(range(300 - queries, 300), range(300))]
    case = make_case(sequences, heads=(group, 1), dtype=dtype)
    check(case, run(case), allowed(case))


def test_the_error_of_a_cap(isa):
    """A query that sees one key has its capped score as lse: the hyperbolic tangent itself, which
    errs by at most three units in the last place, here with a rounding to base 2 and one back.
    """
    scores = torch.cat([torch.logspace(-6, 2, 4000), torch.linspace(0.5, 0.75, 2000)])
    scores = torch.cat([scores, -scores, torch.zeros(1)])
    count = len(scores)
    q, k = torch.zeros(count, 1, 8), torch.zeros(count, 1, 8)
    q[:, 0, 0], k[:, 0, 0] = scores, 1
    positions, ends = torch.zeros(count, dtype=torch.int32), torch.arange(count + 1).int()
    _, lse = attention_partial(q, k, k, positions, positions, ends, ends, 1.0, cap=1.0)
    exact = scores.double().tanh()
    error = (lse[:, 0] - exact).abs() / exact.abs().clamp(min=1e-30)
    assert error.max() <= 5 * 2**-23


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [None, 3.0], ids=["uncapped", "capped"])
def test_into_equals_merge(isa, dtype, cap):
    case = replace(ragged(dtype=dtype, heads=(4, 2)), window=60, cap=cap)
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    running = run(case.only_keys(keep))
    check(case, run(case.only_keys(~keep), into=running), allowed(case, merged=True))


@pytest.mark.parametrize("window", [1, 50, None])
def test_what_is_out_of_sight_does_not_count(isa, window):
    """Keys ahead of the window may hold anything finite, and keys beyond all queries anything."""
    case = replace(make_case([(range(300, 340), range(400))], slack=2), window=window, cap=5.0)
    expected = run(case)
    slab = case.k._base.clone()
    hidden = case.k_pos < (0 if window is None else 301 - window)
    slab[hidden] = 1e9
    slab[case.k_pos > 339] = torch.nan
    changed = replace(case, k=slab[:, 0], v=slab[:, 1])
    for a, b in zip(run(changed), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("threads", [2, 5])
def test_bits_do_not_depend_on_threads(isa, threads):
    case = replace(ragged(heads=(16, 2)), window=45, cap=2.0)
    before = torch.get_num_threads()
    expected = run(case)
    try:
        torch.set_num_threads(threads)
        result = run(case)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, result, expected))


def test_a_window_as_long_as_the_sequence_changes_no_bit(isa):
    for dtype in DTYPES:
        case = ragged(dtype=dtype, heads=(4, 2))
        assert all(map(torch.equal, run(replace(case, window=5000)), run(case)))


def test_visible_pairs_are_counted(isa):
    for window in (1, 37, None):
        case = replace(ragged(heads=(4, 2)), window=window)
        done = torch.zeros(1, dtype=torch.int64)
        with watched_attention(done.data_ptr()):
            run(case)
        seen = sum(int(visible.sum()) for _, _, visible in case.sequences())
        assert int(done) == 4 * seen


def test_skipped_tiles_take_no_time(isa):
    """A window of 64 over 32K keys multiplies a small part of what causal attention would."""
    tokens = 32768
    q = torch.randn(64, 1, 64)
    k = torch.randn(tokens, 1, 64)
    poison = k.clone()
    poison[: tokens - 64 - 64 - 128] = torch.nan  # what no query sees, but for a tile
    ends = [torch.tensor([0, n], dtype=torch.int32) for n in (64, tokens)]
    k_pos = torch.arange(tokens, dtype=torch.int32)
    out, _ = attention_partial(q, poison, poison, k_pos[-64:], k_pos, *ends, 0.125, window=64)
    assert out.isfinite().all()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 0}, "window is 0; it must be at least 1"),
        ({"window": -3}, "window is -3"),
        ({"cap": 0.0}, "cap is 0.0; it must be positive and finite"),
        ({"cap": float("inf")}, "cap is inf"),
        ({"cap": float("nan")}, "cap is nan"),
        ({"cap": 1e-50}, "from 1e-30 to 1e"),
        ({"cap": 2.5e38}, "from 1e-30 to 1e"),
    ],
)
def test_bad_arguments(options, message):
    case = make_case([(range(3), range(3))])
    with pytest.raises(ValueError, match=message):
        attention_partial(*case.arguments, **options)
    running = torch.zeros(case.q.shape), torch.zeros(case.q.shape[:2])
    with pytest.raises(ValueError, match=message):
        attention_partial(*case.arguments, into=running, **options)


def test_custom_ops_take_them():
    case = replace(make_case([(range(30), range(30))]), window=7, cap=2.0)
    meta = Case(*(x.to("meta") for x in case.arguments[:-1]), case.scale, case.window, case.cap)
    assert run(meta)[0].shape == case.q.shape
    arguments = (*case.arguments, None, 7, 2.0)
    torch.library.opcheck(torch.ops.cptool.attention_partial.default, arguments)
    found = torch.ops.cptool.attention_partial(*arguments)
    assert all(map(torch.equal, found, run(case)))


positions = st.lists(st.integers(0, 400), max_size=90).map(sorted)


@settings(deadline=None, derandomize=True, max_examples=150)
@given(
    st.lists(st.tuples(positions, positions), max_size=4),
    st.integers(1, 3),
    st.integers(1, 16),
    st.integers(1, 500) | st.none(),
    st.sampled_from([None, 0.3, 4.0, 50.0]),
    st.sampled_from(DTYPES),
    st.integers(1, 5),
    st.integers(0, 2**16),
)
def test_merged_shards_are_the_whole(sequences, kv_heads, group, window, cap, dtype, shards, seed):
    """Any split of the keys into shards, merged, is the whole."""
    heads = (kv_heads * group, kv_heads)
    case = make_case(sequences, heads=heads, dtype=dtype, slack=seed % 2, seed=seed)
    case = replace(case, window=window, cap=cap)
    owner = torch.randint(shards, (len(case.k_pos),), generator=torch.manual_seed(seed))
    parts = [case.only_keys(owner == shard) for shard in range(shards)]
    outs, lses = zip(*map(run, parts), strict=True)
    limit = allowed(case, merged=True)
    check(case, merge_partials(outs, lses), limit)
    running = torch.zeros(case.q.shape), torch.full(case.q.shape[:2], -torch.inf)
    for part in parts:
        run(part, into=running)
    check(case, running, limit)
