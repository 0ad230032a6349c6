"""The CUDA kernels against float64 on the CPU, and whether the emulation sees mistakes."""

import re
from dataclasses import replace

import cuda_emulator
import pytest
import test_silu_attention as silu
import torch
from reference import check, make_case, tolerance
from test_ops import exact_merge, merge_bound

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")

SIXTEEN_BITS = [torch.bfloat16, torch.float16]
EVERY_HEAD_DIM = list(zip((64, 80, 96, 128), [(2, 2), (9, 3), (5, 1), (4, 2)], strict=True))


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return cuda_emulator.build_kernels(tmp_path_factory.mktemp("emulated"))


def many_rows(dtype, head_dim, heads, **options):
    """Whole prompts, shards, empty ones: more rows than a block holds, no length a multiple of a
    tile.
    """
    return make_case(
        [
            (range(150), range(150)),
            ([*range(33), *range(231, 250)], [*range(33, 66), *range(198, 231)]),
            ([], range(5)),
            (range(7), []),
            (range(3), range(2, 9)),
        ],
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        slack=3,
        **options,
    )


def few_rows(dtype, head_dim, heads):
    """Decode: keys in pieces, of which the device finds the last ones empty, for half of the slots
    hold nothing.
    """
    return make_case(
        [([700], range(701)), ([250], range(0, 500, 2))],
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        slack=600,
    )


CASES = {"many rows": many_rows, "few rows": few_rows}


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("head_dim", [2, 24, 64, 100])
def test_simt_matches_float64(cuda, dtype, head_dim):
    case = make_case(
        [(range(70), range(70)), ([9], range(5)), ([], [3]), ([2, 4], [3])],
        heads=(3, 1),
        head_dim=head_dim,
        dtype=dtype,
        slack=3,
    )
    check(case, cuda.attention(*case.arguments, kernel="simt"), tolerance(case))


@pytest.mark.parametrize("dtype", [torch.float32, *SIXTEEN_BITS], ids=str)
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("head_dim", [2, 24, 64, 100, 128, 256])
def test_silu_attention(cuda, dtype, window, head_dim):
    case = replace(many_rows(dtype, head_dim, (3, 1)), window=window)
    options = {"window": window, "max_len": silu.MAX_LEN}
    assert cuda.kernel(*case.arguments, **options) == "simt"
    for out_dtype in {torch.float32, dtype}:
        out, lse = cuda.attention(*case.arguments, out_dtype=out_dtype, **options)
        silu.check(case, out, arithmetic=torch.float32)
        assert lse.isnan().all()
    running = torch.zeros(case.q.shape)
    for part in (case.only_keys(case.k_pos % 3 == 0), case.only_keys(case.k_pos % 3 != 0)):
        cuda.attention(*part.arguments, into=(running, lse), **options)
    silu.check(case, running, partials=2, arithmetic=torch.float32)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("cap", [None, 2.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("window", [1, 37, 300, None])
def test_windows_and_caps(cuda, dtype, window, cap):
    """The kernel for every call takes them; test_sm80_windows.py is about the others."""
    case = replace(many_rows(dtype, 64, (3, 1)), window=window, cap=cap)
    taken = "sm80" if dtype == torch.bfloat16 else "simt"
    assert cuda.kernel(*case.arguments, **case.options) == taken
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    running = cuda.attention(*case.only_keys(keep).arguments, kernel="simt", **case.options)
    result = cuda.attention(
        *case.only_keys(~keep).arguments, kernel="simt", into=running, **case.options
    )
    check(case, result, tolerance(case, merged=True))


def test_keys_ahead_of_every_window_are_not_read(cuda):
    """But for those of a tile of 32 that holds others."""
    case = replace(make_case([(range(500, 520), range(520)), ([4], range(5))]), window=40)
    slab = torch.stack([case.k, case.v], 1)
    slab[: 461 - 32] = torch.nan
    hidden = replace(case, k=slab[:, 0], v=slab[:, 1])
    result = cuda.attention(*hidden.arguments, kernel="simt", **case.options)
    check(case, result, tolerance(case))


@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
@pytest.mark.parametrize("head_dim, heads", EVERY_HEAD_DIM, ids=str)
@pytest.mark.parametrize("rows", CASES)
def test_sm80_matches_float64(cuda, rows, dtype, head_dim, heads):
    case = CASES[rows](dtype, head_dim, heads)
    assert cuda.kernel(*case.arguments) == "sm80"
    cuda.counters()
    result = cuda.attention(*case.arguments, kernel="sm80", seed=head_dim)
    check(case, result, tolerance(case, dtype, merged=True))
    counters = cuda.counters()
    assert counters.collectives > 0 and counters.bank_conflicts == 0


@pytest.mark.parametrize("heads", [(16, 1), (12, 2), (40, 5)], ids=str)
def test_groups_of_query_heads(cuda, heads):
    """One token's rows fill a block, divide none, are cut by one."""
    sequences = [(range(60, 65), range(65)), ([7], range(9))]
    case = make_case(sequences, heads=heads, dtype=torch.float16)
    check(case, cuda.attention(*case.arguments), tolerance(case, torch.float16))


@pytest.mark.parametrize("rows", CASES)
def test_output_in_the_input_dtype(cuda, rows):
    case = CASES[rows](torch.bfloat16, 64, (4, 2))
    result = cuda.attention(*case.arguments, out_dtype=torch.bfloat16)
    check(case, result, tolerance(case, torch.bfloat16, torch.bfloat16, merged=True))


@pytest.mark.parametrize(
    "kernel, rows", [("simt", "many rows"), *[("sm80", rows) for rows in CASES]]
)
def test_into(cuda, kernel, rows):
    case = CASES[rows](torch.bfloat16, 64, (4, 2))
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    running = cuda.attention(*case.only_keys(keep).arguments, kernel=kernel)
    never = running[1] == -torch.inf
    running[0][never] = torch.nan  # is ignored
    result = cuda.attention(*case.only_keys(~keep).arguments, kernel=kernel, into=running)
    check(case, result, tolerance(case, torch.bfloat16, merged=True))


@pytest.mark.parametrize("rows", CASES)
def test_every_order_of_threads_gives_the_same_bits(cuda, rows):
    case = CASES[rows](torch.bfloat16, 80, (3, 1))
    expected = cuda.attention(*case.arguments)
    for seed in range(1, 6):
        assert_same(cuda.attention(*case.arguments, seed=seed), expected)


@pytest.mark.parametrize("rows", CASES)
def test_what_no_query_sees_is_never_read(cuda, rows):
    """Copies outside the visible slots fail in the emulation; NaN there would reach the result."""
    case = CASES[rows](torch.bfloat16, 64, (4, 2))
    slab = torch.stack([case.k, case.v], 1)
    case = replace(case, k=slab[:, 0], v=slab[:, 1])
    seen = [slab[keys] for _, keys, _ in case.sequences()]
    result = cuda.attention(*case.arguments, readable=[case.q, *seen])
    check(case, result, tolerance(case, torch.bfloat16, merged=True))
    with pytest.raises(RuntimeError, match="reads global memory that it must not read"):
        cuda.attention(*case.arguments, readable=[case.q, *seen[1:]])


@pytest.mark.parametrize("rows", CASES)
def test_offsets_without_sense_read_nothing_outside(cuda, rows):
    case = CASES[rows](torch.bfloat16, 64, (4, 2))
    slab = torch.stack([case.k, case.v], 1)
    case = replace(case, k=slab[:, 0], v=slab[:, 1])
    generator = torch.Generator().manual_seed(0)
    for bits in (31, 10, 8):
        cu_q, cu_k = (
            torch.randint(-(2**bits), 2**bits - 1, case.cu_q.shape, generator=generator).int()
            for _ in range(2)
        )
        wrong = replace(case, cu_q=cu_q, cu_k=cu_k)
        with cuda.unwatched():
            cuda.attention(*wrong.arguments, readable=[case.q, slab])


@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_large_scores(cuda, spread):
    case = many_rows(torch.bfloat16, 64, (2, 2), spread=spread)
    check(case, cuda.attention(*case.arguments), tolerance(case, torch.bfloat16))


@pytest.mark.parametrize("kernel, tokens", [("simt", 40), ("sm80", 40), ("sm80", 1)], ids=str)
def test_what_was_seen_first_keeps_its_weight(cuda, kernel, tokens):
    """Scores of hundreds, the same for all keys; the first half of the values is 1, the rest -1.
    A maximum that is rounded differently from tile to tile would let the first half grow or fade.
    """
    keys, batch = 2048, 24  # as many as the device runs at a time, twice or thrice: no pieces
    case = make_case([([keys] * tokens, range(keys))] * batch, heads=(1, 1), dtype=torch.bfloat16)
    levels = 8 + torch.arange(batch).repeat_interleave(tokens)[:, None, None] / 16
    signs = torch.ones(batch, keys, 1, 1)
    signs[:, keys // 2 :] = -1
    case = replace(
        case,
        q=levels.expand(case.q.shape).bfloat16().contiguous(),
        k=torch.full_like(case.k, 8).contiguous(),
        v=signs.expand(batch, keys, 1, 64).reshape(case.v.shape).bfloat16(),
    )
    out, lse = cuda.attention(*case.arguments, kernel=kernel)
    roundings = 8 * torch.finfo(torch.float32).eps
    assert out.abs().max() <= roundings
    exact = levels[:, 0].double() * 8 * 64 * case.scale + torch.tensor(keys).double().log()
    assert ((lse - exact).abs() <= roundings * exact).all()


def test_pieces_need_a_workspace(cuda):
    """One that is missing must not let every piece write to the result."""
    whole = make_case([([3], range(4))], dtype=torch.bfloat16)
    got = cuda.attention(*whole.arguments, workspace=False)
    check(whole, got, tolerance(whole, torch.bfloat16))
    case = few_rows(torch.bfloat16, 64, (4, 2))
    with pytest.raises(RuntimeError, match="needs a workspace"):
        cuda.attention(*case.arguments, workspace=False)


def test_calls_that_a_kernel_does_not_take_go_to_the_next(cuda):
    case = make_case([(range(5), range(5))], dtype=torch.bfloat16)
    shifted = torch.empty(case.q.numel() + 1, dtype=case.q.dtype)[1:].view(case.q.shape)
    narrow = case.k.new_empty(5, 2, 68)[..., :64]  # rows 136 bytes apart
    assert cuda.kernel(*case.arguments) == "sm80"
    for other in (
        dict(q=shifted.copy_(case.q)),
        dict(k=narrow.copy_(case.k)),
        dict(v=narrow.copy_(case.v)),
        dict(scale=-0.125),
        {name: getattr(case, name).float() for name in "qkv"},
        {name: getattr(case, name)[..., :56].contiguous() for name in "qkv"},
    ):
        changed = replace(case, **other)
        assert cuda.kernel(*changed.arguments) == "simt"
        check(changed, cuda.attention(*changed.arguments), tolerance(changed))


# Merging.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("partials", [1, 3, 13, 130])
@pytest.mark.parametrize(
    ("shift", "dim"), [(0, 72), (1, 72), (0, 50)], ids=["aligned", "unaligned", "in twos"]
)
def test_merge_matches_float64(cuda, partials, dtype, out_dtype, shift, dim):
    generator = torch.Generator().manual_seed(partials)
    outs = [
        torch.randn(7 * 3 * dim + shift, generator=generator).to(dtype)[shift:].view(7, 3, dim)
        for _ in range(partials)
    ]
    lses = [torch.randn(7, 3, generator=generator) * 5 for _ in range(partials)]
    exact_out, exact_lse = exact_merge(outs, lses)
    if partials > 1:  # one that saw nothing changes nothing, whatever its out
        outs.insert(1, torch.full_like(outs[0], torch.nan))
        lses.insert(1, torch.full_like(lses[0], -torch.inf))
    out, lse = cuda.merge(outs, lses, out_dtype)
    launches = -(-len(outs) // 128)
    bound = launches * merge_bound(outs[:1] + outs[2:], out_dtype)
    assert (out.double() - exact_out).abs().max() <= bound
    roundings = (partials + 4) * torch.finfo(torch.float32).eps / 2
    assert (lse - exact_lse).abs().max() <= roundings * exact_lse.abs().max()


@pytest.mark.parametrize("rows", [3, 4200], ids=["groups", "one by one"])
def test_merge_in_any_order_of_threads(cuda, rows):
    generator = torch.Generator().manual_seed(0)
    outs = list(torch.randn(20, rows, 2, 64, generator=generator))
    lses = list(torch.randn(20, rows, 2, generator=generator))
    expected = cuda.merge(outs, lses)
    for seed in range(1, 4):
        assert_same(cuda.merge(outs, lses, seed=seed), expected)


@pytest.mark.parametrize("partials", [2, 20])
def test_merge_of_nothing(cuda, partials):
    nothing = torch.full((2, 1, 8), torch.nan), torch.full((2, 1), -torch.inf)
    out, lse = cuda.merge(*([part] * partials for part in nothing))
    assert torch.all(out == 0) and torch.all(lse == -torch.inf)
    some = torch.randn(2, 1, 8), torch.randn(2, 1)
    tensors = ([*[none] * (partials - 1), part] for none, part in zip(nothing, some, strict=True))
    assert_same(cuda.merge(*tensors), some)


# The emulation itself: mistakes of tests/cuda_emulation/mistakes.cpp that it has to see.


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    return cuda_emulator.build_mistakes(tmp_path_factory.mktemp("mistakes"), "mistakes")


@pytest.mark.parametrize("name", ["reversed", "copied", "sums_of_warps", "multiplied"])
def test_correct_programs_pass_in_any_order(mistakes, name):
    assert [mistakes(name, seed) for seed in range(20)] == [None] * 20


@pytest.mark.parametrize(
    "name", ["without_a_barrier", "without_a_wait", "waits_for_too_few", "overwrites_too_early"]
)
def test_races_show(mistakes, name):
    """In some order; a right answer by luck is no rarity."""
    found = [mistakes(name, seed) for seed in range(20)]
    assert sum(message == "wrong result" for message in found) >= 5


@pytest.mark.parametrize(
    "name, message",
    [
        ("half_a_barrier", "deadlock: .*thread 32 waits for barrier 0;.*"),
        ("divergent_collectives", ".*: other lanes of the warp are at __s.*"),
        ("unaligned_row", ".*shared address 8 is not aligned to 16 bytes"),
        ("row_outside", ".*shared address 1024 . 16 is beyond the 1024 bytes of the block"),
        ("ends_with_copies", ".*a thread ends while its cp.async are under way"),
    ],
)
def test_mistakes_are_named(mistakes, name, message):
    assert re.fullmatch(message, mistakes(name, 1))
