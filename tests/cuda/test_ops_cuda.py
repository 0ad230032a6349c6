"""The matrix of tests/ops/test_ops.py on a CUDA device, for every attention kernel that it runs."""

from dataclasses import replace

import pytest
import torch
from reference import EMPTY_SLOT, Case, check, make_case, tolerance
from test_ops import (
    DTYPES,
    HEADS,
    exact_merge,
    merge_bound,
    ragged_batch,
    ragged_tolerance,
    unit_roundoff,
)

from cptool.exactness import selftest
from cptool.ops.attention import attention_partial, merge_partials
from cptool.ops.kernels import build_info, cuda_kernel, cuda_kernels, force_cuda_kernel

DEVICE = "cuda"

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(not build_info()["cuda_archs"], reason="built without CUDA kernels"),
]


@pytest.fixture(params=build_info()["cuda_kernels"] or ["none"])
def kernel(request):
    """The fastest kernel that may take a call; what it does not take goes to the next slower."""
    if request.param not in cuda_kernels():
        pytest.skip(f"this device does not run {request.param}")
    with force_cuda_kernel(request.param):
        yield request.param


def arithmetic(dtype, head_dim):
    """What the kernel computes in: tensor cores take weights rounded to the input's dtype."""
    return torch.float32 if cuda_kernel(dtype, head_dim) == "simt" else dtype


def on_device(case: Case, device=DEVICE) -> Case:
    """The same tensors on the device; K and V stay strided views of one slab."""
    slab = torch.stack([case.k, case.v], 1).to(device)
    others = ("q", "q_pos", "k_pos", "cu_q", "cu_k")
    moved = {name: getattr(case, name).to(device) for name in others}
    return replace(case, k=slab[:, 0], v=slab[:, 1], **moved)


def attention(case: Case, **options) -> tuple:
    """attention_partial on the device, its result on the host."""
    out, lse = attention_partial(*on_device(case).arguments, **options)
    return out.cpu(), lse.cpu()


def merge(outs, lses, out_dtype=None) -> tuple:
    moved = ([x.to(DEVICE) for x in tensors] for tensors in (outs, lses))
    out, lse = merge_partials(*moved, out_dtype=out_dtype)
    return out.cpu(), lse.cpu()


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


def test_the_self_test():
    for result in selftest.run(DEVICE):
        assert result.passed, result


@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_matches_float64(kernel, dtype, head_dim, heads):
    case = ragged_batch(dtype, head_dim, heads)
    allowed = ragged_tolerance(dtype, head_dim, heads, arithmetic(dtype, head_dim), torch.float32)
    check(case, attention(case), allowed)


@pytest.mark.parametrize("head_dim", [8, 24, 72, 192, 256])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_other_head_dimensions(kernel, dtype, head_dim):
    sequences = [(range(60, 79), range(79)), ([100], range(90))]
    case = make_case(sequences, head_dim=head_dim, dtype=dtype)
    check(case, attention(case), tolerance(case, arithmetic(dtype, head_dim)))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_output_in_the_input_dtype(kernel, dtype):
    case = ragged_batch(dtype, 64, (9, 3))
    result = attention(case, out_dtype=dtype)
    assert result[0].dtype == dtype
    check(case, result, ragged_tolerance(dtype, 64, (9, 3), arithmetic(dtype, 64), dtype))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "queries", [[5000], range(4990, 5001), range(0, 5001, 61)], ids=["1", "11", "82"]
)
def test_few_queries_over_many_keys(kernel, dtype, queries):
    case = make_case([(queries, range(0, 5001)), ([7], range(9))], dtype=dtype, slack=1)
    check(case, attention(case), tolerance(case, arithmetic(dtype, 64), merged=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("cap", [None, 3.0])
@pytest.mark.parametrize("window", [None, 1, 70, 1000])
def test_windows_and_soft_caps(kernel, window, cap, dtype):
    """Prompts, shards and decoding in pieces."""
    few = make_case([([5000], range(5001)), ([7], range(9))], head_dim=128, dtype=dtype, slack=1)
    for case in (ragged_batch(dtype, 128, (4, 2)), few):
        case = replace(case, window=window, cap=cap)
        taken = cuda_kernel(dtype, 128, len(case.q), **case.options)
        allowed = tolerance(case, torch.float32 if taken == "simt" else dtype, merged=True)
        check(case, attention(case, **case.options), allowed)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_large_scores(kernel, spread, dtype):
    case = make_case([(range(150), range(150))], spread=spread, dtype=dtype)
    check(case, attention(case), tolerance(case, arithmetic(dtype, 64)))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_many_short_sequences(kernel, dtype):
    """Decode steps of a batch, some sequences idle: more sequences than blocks of rows."""
    sequences = [([n] if n % 3 else [], range(n % 7, n + 1, 2)) for n in range(150)]
    case = make_case(sequences, heads=(14, 2), dtype=dtype, slack=2)
    check(case, attention(case), tolerance(case, arithmetic(dtype, 64), merged=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_contiguous_and_strided_inputs_agree(kernel, dtype):
    case = on_device(ragged_batch(dtype, 64, (4, 2)))
    packed = replace(case, k=case.k.contiguous(), v=case.v.contiguous())
    by_head = case.q.transpose(0, 1).contiguous().transpose(0, 1)  # [heads, tokens] in memory
    expected = attention_partial(*case.arguments)
    for other in (packed, replace(packed, q=by_head)):
        assert_same(expected, attention_partial(*other.arguments))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_slots_that_no_query_sees_are_never_read(kernel, dtype):
    case = make_case([(range(40, 77), range(200)), ([3], range(50))], dtype=dtype)
    poisoned = replace(case, k=case.k.clone(), v=case.v.clone())
    poisoned.k[77:200], poisoned.v[77:200] = torch.nan, torch.nan
    poisoned.k[204:], poisoned.v[204:] = torch.inf, torch.nan
    assert_same(attention(case), attention(poisoned))


@pytest.mark.parametrize("sequences", [[], [([], [])], [([], range(3))], [(range(3), [])]], ids=str)
def test_empty(kernel, sequences):
    case = make_case(sequences)
    out, lse = attention(case)
    assert out.shape == case.q.shape and torch.all(out == 0) and torch.all(lse == -torch.inf)


def test_bit_identical_from_run_to_run(kernel):
    case = on_device(ragged_batch(torch.bfloat16, 80, (5, 1)))
    few = on_device(make_case([([5000], range(5001))], heads=(5, 1), dtype=torch.bfloat16))
    expected = attention_partial(*few.arguments)
    out, lse = attention_partial(*case.arguments)
    merged = merge_partials([out, out], [lse, lse])
    for _ in range(3):
        again = attention_partial(*case.arguments)
        assert_same((out, lse), again)
        assert_same(expected, attention_partial(*few.arguments))
        assert_same(merged, merge_partials([again[0], out], [again[1], lse]))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_offsets_without_sense_read_nothing_outside(kernel, dtype):
    """Nothing checks offsets on the device; the kernel keeps to the tensors all the same."""
    case = on_device(ragged_batch(dtype, 64, (4, 2)))
    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        shape = (len(case.cu_q),)
        cu_q, cu_k = (
            torch.randint(-(2**31), 2**31 - 1, shape, generator=generator).int().to(DEVICE)
            for _ in range(2)
        )
        attention_partial(*replace(case, cu_q=cu_q, cu_k=cu_k).arguments)
    torch.cuda.synchronize()


# Merging into a running result.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into(kernel, dtype):
    case = ragged_batch(dtype, 64, (4, 2))
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    first, second = (on_device(case.only_keys(kept)) for kept in (keep, ~keep))
    running = attention_partial(*first.arguments)
    result = attention_partial(*second.arguments, into=running)
    assert result[0] is running[0] and result[1] is running[1]
    check(
        case,
        (result[0].cpu(), result[1].cpu()),
        tolerance(case, arithmetic(dtype, 64), merged=True),
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_of_few_queries(kernel, dtype):
    """The merge of the pieces takes the running result in."""
    case = make_case([([5000], range(5001)), ([7], range(3, 9))], dtype=dtype, slack=1)
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    first, second = (on_device(case.only_keys(kept)) for kept in (keep, ~keep))
    out, lse = attention_partial(*second.arguments, into=attention_partial(*first.arguments))
    check(case, (out.cpu(), lse.cpu()), tolerance(case, arithmetic(dtype, 64), merged=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_nothing_yet(kernel, dtype):
    """Where the running lse is -inf the running out is ignored, even NaN: a query that still sees
    no key has 0.
    """
    case = on_device(ragged_batch(dtype, 64, (4, 2)))
    out, lse = attention_partial(*case.arguments)
    running = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    attention_partial(*case.arguments, into=running)
    assert_same(running, (out, lse))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_into_with_no_keys_changes_nothing(kernel, dtype):
    case = on_device(make_case([(range(5), []), (range(3), range(3, 6))], dtype=dtype))
    running = torch.randn(8, 4, 64, device=DEVICE), torch.randn(8, 4, device=DEVICE)
    before = running[0].clone(), running[1].clone()
    attention_partial(*case.arguments, into=running)
    assert_same(running, before)


# Merging partials.


@pytest.mark.parametrize("out_dtype", DTYPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("head_dim", [64, 72, 80, 128, 256])
@pytest.mark.parametrize("partials", [1, 2, 5])
def test_merge_matches_float64(partials, head_dim, dtype, out_dtype):
    generator = torch.Generator().manual_seed(partials)
    outs = [torch.randn(67, 3, head_dim, generator=generator).to(dtype) for _ in range(partials)]
    lses = [torch.randn(67, 3, generator=generator) * 5 for _ in range(partials)]
    out, lse = merge(outs, lses, out_dtype)
    exact_out, exact_lse = exact_merge(outs, lses)
    assert out.dtype == out_dtype and lse.dtype == torch.float32
    assert (out.double() - exact_out).abs().max() <= merge_bound(outs, out_dtype)
    roundings = (partials + 4) * torch.finfo(torch.float32).eps / 2
    assert (lse - exact_lse).abs().max() <= roundings * exact_lse.abs().max()


def test_merge_of_more_partials_than_a_launch_takes():
    generator = torch.Generator().manual_seed(0)
    outs = list(torch.randn(300, 9, 3, 64, generator=generator))
    lses = list(torch.randn(300, 9, 3, generator=generator))
    lses[0][:] = lses[200][:] = -torch.inf
    exact_out, exact_lse = exact_merge(outs, lses)
    out, lse = merge(outs, lses)
    assert (out.double() - exact_out).abs().max() <= merge_bound(outs)
    roundings = (len(outs) + 4) * torch.finfo(torch.float32).eps / 2
    assert (lse - exact_lse).abs().max() <= roundings * exact_lse.abs().max()


def test_merge_of_distant_lses():
    a, b = torch.randn(5, 2, 64), torch.randn(5, 2, 64)
    high, low = torch.full((5, 2), 5e3), torch.full((5, 2), -5e3)
    for outs, lses in (([a, b], [high, low]), ([b, a], [low, high])):
        assert_same(merge(outs, lses), (a, high))


def test_merge_identity():
    """(0, -inf) is the identity, bit for bit, whatever its out holds; two of them make another."""
    out, lse = torch.randn(9, 2, 64), torch.randn(9, 2) * 10
    none = torch.full_like(out, torch.nan), torch.full_like(lse, -torch.inf)
    for outs, lses in (
        ([out], [lse]),
        ([none[0], out], [none[1], lse]),
        ([out, none[0]], [lse, none[1]]),
    ):
        assert_same(merge(outs, lses), (out, lse))
    merged = merge([none[0], none[0]], [none[1], none[1]])
    assert torch.all(merged[0] == 0) and torch.all(merged[1] == -torch.inf)


def test_merge_of_unaligned_rows():
    outs = [torch.randn(6 * 3 * 72 + 1)[1:].view(6, 3, 72) for _ in range(3)]
    lses = [torch.randn(6, 3) for _ in range(3)]
    expected = merge([out.clone() for out in outs], lses)
    moved = []
    for out in outs:
        moved.append(torch.empty(out.numel() + 1, device=DEVICE)[1:].view(out.shape).copy_(out))
    out, lse = merge_partials(moved, [x.to(DEVICE) for x in lses])
    assert_same((out.cpu(), lse.cpu()), expected)


# Kernels against each other, at sizes whose float64 reference would not fit the tests.


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize(
    "queries, keys", [(4096, 4096), (1000, 9001), (1, 30001), (3, 12345)], ids=str
)
def test_kernels_agree(kernel, dtype, head_dim, queries, keys):
    """Compare with the reference kernel, whose weights are not rounded: rounding each to u changes
    a result by at most u max|v|, and the two kernels' float32 sums differ far less. Twice that is
    allowed.
    """
    generator = torch.Generator(DEVICE).manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, device=DEVICE).to(dtype)

    q, k, v = random(queries, 16, head_dim), random(keys, 2, head_dim), random(keys, 2, head_dim)
    k_pos = torch.arange(keys, device=DEVICE).int()
    offsets = (torch.tensor([0, n], device=DEVICE).int() for n in (queries, keys))
    arguments = (q, k, v, k_pos[keys - queries :], k_pos, *offsets, head_dim**-0.5)
    out, lse = attention_partial(*arguments)
    with force_cuda_kernel("simt"):
        expected, expected_lse = attention_partial(*arguments)
    assert (out - expected).abs().max() <= 2 * unit_roundoff(dtype) * v.abs().max()
    assert (lse - expected_lse).abs().max() <= 1e-5 * expected_lse.abs().max()


# Graphs.


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("batch, heads", [(1, (8, 2)), (3, (9, 3))], ids=str)
def test_a_captured_decode_step_replays_for_any_length(kernel, dtype, batch, heads):
    """One graph, captured over a cache of 3000 slots a sequence, as tokens fill it; bit for bit
    what an eager call gives.
    """
    slots, head_dim = 3000, 128
    generator = torch.Generator(DEVICE).manual_seed(0)
    slab = torch.full((batch * slots, 2, heads[1], head_dim), torch.nan, device=DEVICE).to(dtype)
    k_pos = torch.full((batch, slots), EMPTY_SLOT, device=DEVICE, dtype=torch.int32)
    q = torch.zeros(batch, heads[0], head_dim, device=DEVICE, dtype=dtype)
    q_pos = torch.zeros(batch, device=DEVICE, dtype=torch.int32)
    cu_q = torch.arange(batch + 1, device=DEVICE).int()
    cu_k = cu_q * slots
    arguments = (q, slab[:, 0], slab[:, 1], q_pos, k_pos.view(-1), cu_q, cu_k, head_dim**-0.5)
    running = (
        torch.zeros_like(q, dtype=torch.float32),
        torch.zeros(batch, heads[0], device=DEVICE),
    )

    attention_partial(*arguments)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out, lse = attention_partial(*arguments)
        attention_partial(*arguments, into=running)

    filled = [0] * batch
    for length in (1, 2, 63, 64, 65, 500, 501, 1777, 3000):
        for b in range(batch):
            new = range(filled[b], max(filled[b], length - b))
            start = b * slots
            tokens = torch.randn(
                (len(new), 2, heads[1], head_dim), generator=generator, device=DEVICE
            )
            slab[start + new.start : start + new.stop] = tokens.to(dtype)
            k_pos[b, new.start : new.stop] = torch.arange(new.start, new.stop, device=DEVICE).int()
            filled[b] = new.stop
            q_pos[b] = new.stop - 1
        q.copy_(torch.randn(q.shape, generator=generator, device=DEVICE))
        running[0].normal_(generator=generator)
        running[1].normal_(generator=generator)
        expected_running = attention_partial(*arguments, into=tuple(x.clone() for x in running))
        expected = attention_partial(*arguments)
        graph.replay()
        assert_same((out, lse), expected)
        assert_same(running, expected_running)


# Streams and devices.


def test_runs_on_the_current_stream_and_waits_for_nothing():
    case = on_device(ragged_batch(torch.bfloat16, 128, (16, 2)))
    expected = attention_partial(*case.arguments)
    busy = torch.randn(2048, 2048, device=DEVICE)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    torch.cuda.set_sync_debug_mode("error")
    try:
        with torch.cuda.stream(stream):
            late = torch.zeros_like(case.q)
            for _ in range(20):
                busy = busy @ busy * 1e-3
            late += case.q  # queued behind the products: a kernel on another stream reads zeros
            out, lse = attention_partial(*replace(case, q=late).arguments)
            merged = merge_partials([out], [lse])
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.synchronize()
    assert_same((out, lse), expected)
    assert_same(merged, expected)


def test_long_sums_of_products(kernel):
    """Tensor cores do not round sums to nearest, as the emulation does: over many keys of even
    weights, out may be pulled towards zero, by less than bfloat16's own rounding.
    """
    keys = 1 << 18
    case = make_case([([keys], range(keys))], heads=(1, 1), head_dim=64, dtype=torch.bfloat16)
    case = replace(case, q=torch.zeros_like(case.q), v=torch.ones_like(case.v))
    out, lse = attention(case)
    assert (out - 1).abs().max() < 1e-3
    assert (lse - torch.tensor(keys).log()).abs().max() < 1e-3


def test_every_device():
    case = ragged_batch(torch.float32, 64, (4, 2))
    for index in range(torch.cuda.device_count()):
        out, lse = attention_partial(*on_device(case, f"cuda:{index}").arguments)
        assert out.device.index == index
        check(case, (out.cpu(), lse.cpu()), tolerance(case))


def test_tensors_on_other_devices_are_refused():
    case = on_device(make_case([(range(3), range(3))]))
    with pytest.raises(ValueError, match="cu_q is on cpu; it must be on cuda:0 like q"):
        attention_partial(*replace(case, cu_q=case.cu_q.cpu()).arguments)


def test_opcheck():
    case = on_device(make_case([(range(3, 9), range(9)), ([4], range(3))], dtype=torch.bfloat16))
    running = torch.randn(7, 4, 64, device=DEVICE), torch.randn(7, 4, device=DEVICE)
    torch.library.opcheck(torch.ops.cptool.attention_partial, case.arguments)
    torch.library.opcheck(torch.ops.cptool.attention_partial_, (*case.arguments, *running))
    torch.library.opcheck(torch.ops.cptool.merge_partials, ([running[0]] * 2, [running[1]] * 2))
