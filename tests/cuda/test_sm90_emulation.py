"""The kernel for compute capability 9.0 against float64 on the CPU: its pipelines, its layouts and
its schedule, as tests/cuda_emulation carries out TMA and wgmma."""

import ctypes
import re
from dataclasses import replace

import cuda_emulator
import pytest
import torch
from cuda_emulator import EMULATION, ROOT, Emulator, _arguments, build
from reference import check, make_case, tolerance
from test_windows import ragged

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")

DTYPES = [torch.bfloat16, torch.float16]


class Sm90(Emulator):
    entries = ("emulated_attention",)

    def device(self, multiprocessors=4, l2_bytes=1 << 20):
        self._library.emulated_device(multiprocessors, l2_bytes)

    def pieces(self, *arguments, window=0) -> int:
        """In how many pieces the keys of such a call of `attention` are computed."""
        q = arguments[0]
        call = _arguments(*arguments, torch.empty(q.shape), torch.empty(q.shape[:2]), False)
        call.window = window
        return self._library.emulated_pieces(ctypes.byref(call))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    cuda = ROOT / "csrc" / "cuda"
    sources = [cuda / "sm90" / "attention.cu", cuda / "merge.cu", EMULATION / "sm90_driver.cpp"]
    return Sm90(build(tmp_path_factory.mktemp("sm90"), sources, "sm90"))


@pytest.fixture
def cuda(library):
    library.device()
    return library


def batch(dtype, head_dim, heads, **options):
    """Whole prompt, shards of two chunks, decode, empty ones; no length a multiple of a tile."""
    return make_case(
        [
            (range(300), range(300)),
            ([*range(5), *range(531, 550)], [*range(233), *range(498, 531)]),
            ([400], range(1, 401, 3)),
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


# Weights are rounded to the dtype of V: hence the tolerance of arithmetic in it.
@pytest.mark.parametrize(
    "dtype, head_dim, heads",
    [
        (torch.bfloat16, 64, (2, 2)),
        (torch.float16, 64, (6, 1)),
        (torch.bfloat16, 128, (4, 1)),
        (torch.float16, 128, (2, 2)),
        (torch.bfloat16, 96, (3, 1)),
        (torch.float16, 80, (10, 2)),
        (torch.bfloat16, 24, (7, 1)),
    ],
    ids=str,
)
def test_matches_float64(cuda, dtype, head_dim, heads):
    case = batch(dtype, head_dim, heads)
    check(case, cuda.attention(*case.arguments), tolerance(case, dtype))


def test_one_token_a_job(cuda):
    """So many query heads share a KV head that no second token's fit."""
    case = make_case(
        [(range(141, 144), range(150))], heads=(100, 1), head_dim=128, dtype=torch.float16
    )
    check(case, cuda.attention(*case.arguments), tolerance(case, torch.float16))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_any_order_gives_the_same_bits(cuda, dtype, seed):
    """Threads, copies and products in other orders, and jobs on more and fewer multiprocessors."""
    case = batch(dtype, 128, (3, 1))
    expected = cuda.attention(*case.arguments)
    cuda.device(multiprocessors=1 + 6 * seed)
    again = cuda.attention(*case.arguments, seed=seed + 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))


@pytest.mark.parametrize("head_dim", [64, 104])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_output_in_the_input_dtype(cuda, dtype, head_dim):
    case = batch(dtype, head_dim, (3, 1))
    result = cuda.attention(*case.arguments, out_dtype=dtype)
    assert result[0].dtype == dtype
    check(case, result, tolerance(case, dtype, dtype))


@pytest.mark.parametrize("dtype, head_dim", [(torch.bfloat16, 128), (torch.float16, 64)], ids=str)
def test_into(cuda, dtype, head_dim):
    """Where the running lse is -inf its out is ignored; other rows that see nothing new stay."""
    case = batch(dtype, head_dim, (2, 1))
    keep = torch.arange(len(case.k_pos)) % 5 < 2
    keep[int(case.cu_k[2]) :] = False
    first, second = (case.only_keys(kept) for kept in (keep, ~keep))
    running = cuda.attention(*first.arguments)
    never = running[1] == -torch.inf
    running[0][never] = torch.nan
    unseen = (cuda.attention(*second.arguments)[1] == -torch.inf) & ~never
    before = running[0][unseen].clone()
    cuda.attention(*second.arguments, into=running)
    assert torch.equal(running[0][unseen], before)
    check(case, running, tolerance(case, dtype, merged=True))


def test_more_jobs_than_are_placed(cuda):
    """On one multiprocessor, with heads in groups of one: all but two jobs come off the counter."""
    cuda.device(multiprocessors=1, l2_bytes=0)
    case = make_case(
        [(range(200, 260), range(260)), (range(40), range(40))],
        heads=(6, 3),
        head_dim=128,
        dtype=torch.bfloat16,
    )
    check(case, cuda.attention(*case.arguments), tolerance(case, torch.bfloat16))


PIECES = [
    ([*range(2000, 2031)], range(2031)),
    ([*range(5), *range(1000, 1010)], [*range(0, 900, 2), *range(980, 1010)]),
    ([], range(5)),
    (range(3), []),
]


@pytest.mark.parametrize(
    "dtype, head_dim, heads",
    [(torch.bfloat16, 128, (2, 1)), (torch.float16, 64, (6, 2)), (torch.bfloat16, 96, (3, 1))],
    ids=str,
)
def test_pieces_of_keys(cuda, dtype, head_dim, heads):
    """Fewer jobs than multiprocessors: their keys are divided, some pieces are empty or hidden from
    the first rows, and a running result is merged in.
    """
    cuda.device(multiprocessors=40)
    case = make_case(PIECES, heads=heads, head_dim=head_dim, dtype=dtype, slack=1200)
    assert cuda.pieces(*case.arguments) > 2
    result = cuda.attention(*case.arguments)
    check(case, result, tolerance(case, dtype, merged=True))
    again = cuda.attention(*case.arguments, seed=7)
    assert all(torch.equal(a, b) for a, b in zip(result, again, strict=True))
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    first, second = (case.only_keys(kept) for kept in (keep, ~keep))
    running = cuda.attention(*first.arguments)
    cuda.attention(*second.arguments, into=running)
    check(case, running, tolerance(case, dtype, merged=True))
    own = cuda.attention(*case.arguments, out_dtype=dtype)
    check(case, own, tolerance(case, dtype, dtype, merged=True))


@pytest.mark.parametrize("window, cap", [(1, None), (37, 0.5), (128, None), (300, 30), (None, 2)])
@pytest.mark.parametrize("head_dim, heads", [(128, (4, 2)), (64, (16, 1)), (72, (3, 3))], ids=str)
def test_windows_and_caps(cuda, head_dim, heads, window, cap):
    dtype = torch.float16 if head_dim == 64 else torch.bfloat16
    case = ragged(dtype=dtype, head_dim=head_dim, heads=heads, spread=3.0 if cap else 1.0)
    case = replace(case, window=window, cap=cap)
    result = cuda.attention(*case.arguments, **case.options, seed=head_dim)
    check(case, result, tolerance(case, dtype))


@pytest.mark.parametrize("window", [500, 1800])
def test_pieces_of_windows(cuda, window):
    cuda.device(multiprocessors=40)
    case = make_case(PIECES[:2], heads=(6, 2), head_dim=96, dtype=torch.float16, slack=1200)
    case = replace(case, window=window, cap=9.0)
    assert (cuda.pieces(*case.arguments, window=window) > 1) == (window > 500)
    running, keep = None, torch.arange(len(case.k_pos)) % 3 == 0
    for part in (case.only_keys(keep), case.only_keys(~keep)):
        running = cuda.attention(*part.arguments, **case.options, into=running)
    check(case, running, tolerance(case, torch.float16, merged=True))


def test_tiles_that_no_window_reaches_are_not_read(cuda):
    """Ahead of all, and between queries that are further apart than the window."""
    case = make_case([([*range(600, 620), *range(1500, 1520)], range(1600))], dtype=torch.bfloat16)
    case, slab = replace(case, window=100), torch.stack([case.k, case.v], 1)
    for unread in (slice(0, 384), slice(640, 1280), slice(1520, 1600)):
        slab[unread] = torch.nan
    hidden = replace(case, k=slab[:, 0], v=slab[:, 1])
    check(case, cuda.attention(*hidden.arguments, window=100), tolerance(case, torch.bfloat16))


def test_multiprocessors_that_are_left_to_transfers(cuda):
    """Fewer blocks, none with a job of its own: the bits are those of any other order."""
    case = batch(torch.bfloat16, 128, (3, 1))
    expected = cuda.attention(*case.arguments)
    cuda.counters()
    for margin, blocks in ((1, 3), (3, 1), (9, 1)):
        again = cuda.attention(*case.arguments, sm_margin=margin)
        assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
        assert cuda.counters().blocks == blocks


def test_rows_that_no_token_fills_do_not_rescale(cuda):
    """Three heads fill 126 of 128 rows. All scores are 0, so nothing but the empty rows, which see
    a first key in their second tile, may need a change of scale, once.
    """
    sequences = [(range(560, 602), range(602))]
    case = make_case(sequences, heads=(3, 1), head_dim=128, dtype=torch.bfloat16)
    case = replace(case, q=torch.zeros_like(case.q))
    cuda.counters()
    check(case, cuda.attention(*case.arguments), tolerance(case, torch.bfloat16))
    assert cuda.counters().votes_won <= 32


def test_one_token_of_many_small_heads(cuda):
    """The stride of one token means nothing, but a tensor map has rules for it."""
    case = make_case([([5], range(9))], heads=(20, 20), head_dim=8, dtype=torch.bfloat16)
    check(case, cuda.attention(*case.arguments), tolerance(case, torch.bfloat16))


@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_large_scores(cuda, spread):
    """Weights that underflow, maxima that jump from tile to tile."""
    case = make_case([(range(290), range(290))], heads=(2, 1), dtype=torch.bfloat16, spread=spread)
    check(case, cuda.attention(*case.arguments), tolerance(case, torch.bfloat16))


def test_strides(cuda):
    """Heads before tokens in memory, and sizes of 1 whose strides mean nothing."""
    case = batch(torch.bfloat16, 64, (2, 2))
    expected = cuda.attention(*case.arguments)
    moved = {
        name: getattr(case, name).transpose(0, 1).contiguous().transpose(0, 1) for name in "qkv"
    }
    again = cuda.attention(*replace(case, **moved).arguments)
    assert all(torch.equal(a, b) for a, b in zip(expected, again, strict=True))
    case = make_case([([5], range(9))], heads=(1, 1), dtype=torch.bfloat16)
    odd = replace(case, q=case.q.as_strided(case.q.shape, (3, 5, 1)))
    check(odd, cuda.attention(*odd.arguments), tolerance(odd, torch.bfloat16))


@pytest.mark.parametrize("sequences", [[([], [])], [([], range(3))], [(range(3), [])]], ids=str)
def test_empty(cuda, sequences):
    case = make_case(sequences, dtype=torch.bfloat16)
    out, lse = cuda.attention(*case.arguments)
    assert out.shape == case.q.shape and torch.all(out == 0) and torch.all(lse == -torch.inf)


def test_offsets_without_sense_stay_within_the_tensors(cuda):
    case = batch(torch.bfloat16, 64, (2, 1))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        cu_q, cu_k = (
            torch.randint(-(2**31), 2**31 - 1, (len(case.cu_q),), generator=generator).int()
            for _ in range(2)
        )
        with cuda.unwatched():
            cuda.attention(*replace(case, cu_q=cu_q, cu_k=cu_k).arguments)


def test_what_the_kernel_leaves_to_others(cuda):
    case = batch(torch.bfloat16, 64, (2, 1))
    slab = torch.zeros(len(case.k_pos), 2, 1, 72, dtype=torch.bfloat16)
    by_head = make_case([(range(2), range(2))], heads=(20, 20), head_dim=8, dtype=torch.bfloat16)
    # More heads than a token's stride has bytes.
    by_head = [
        replace(by_head, **{name: tensor.transpose(0, 1).contiguous().transpose(0, 1)})
        for name, tensor in (("q", by_head.q), ("k", by_head.k), ("v", by_head.v))
    ]
    with pytest.raises(RuntimeError, match="does not take this call"):
        cuda.attention(*case.arguments, max_len=9)
    refused = [
        replace(case, cap=1e-40),
        replace(case, q=case.q.float(), k=case.k.float(), v=case.v.float()),
        replace(case, scale=-1.0),
        replace(case, scale=float("nan")),
        replace(case, k=slab[:, 0, :, 1:65]),  # no multiple of 16 bytes
        replace(case, k=case.k.expand(-1, 2, -1).as_strided((len(case.k), 2, 64), (64, 0, 1))),
        make_case([(range(2), range(2))], heads=(129, 1), dtype=torch.bfloat16),
        make_case([(range(2), range(2))], head_dim=136, dtype=torch.bfloat16),
        *by_head,
    ]
    for other in refused:
        with pytest.raises(RuntimeError, match="does not take this call"):
            cuda.attention(*other.arguments, **other.options)


def test_many_short_sequences(cuda):
    """One tile each, its end to be cleared: all buffers are in use at a time."""
    sequences = [(range(n % 5), range(n % 7)) for n in range(60)]
    cuda.device(multiprocessors=1)
    case = make_case(sequences, heads=(2, 1), dtype=torch.bfloat16, slack=2)
    for seed in range(2):
        check(case, cuda.attention(*case.arguments, seed=seed), tolerance(case, torch.bfloat16))


# The emulation itself: mistakes of tests/cuda_emulation/sm90_mistakes.cpp that it has to see.


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    say = cuda_emulator.build_mistakes(tmp_path_factory.mktemp("mistakes"), "sm90_mistakes")

    def run(name: str) -> set[str | None]:
        """What 20 orders bring to light."""
        messages = [say(name, seed) for seed in range(20)]
        return {message and re.sub(r"^block .*?: ", "", message) for message in messages}

    return run


def test_a_correct_product(mistakes):
    assert mistakes("none") == {None}


def test_writes_of_threads_reach_wgmma_by_a_fence_alone(mistakes):
    """The kernel writes without one; the product is that of what TMA had brought."""
    assert mistakes("no_proxy_fence") == {None}


@pytest.mark.parametrize(
    "name, message",
    [
        ("no_expected_bytes", "TMA: more bytes than the mbarrier expects"),
        ("no_init_fence", "TMA: no fence since its mbarrier was initialised"),
        ("no_wait_for_the_load", "wrong result"),
        ("no_register_fence", "wgmma.mma_async: no wgmma.fence since the registers were last free"),
        ("no_wait_for_the_product", "wrong result"),
        ("no_commit", "wgmma.wait_group: products were not committed"),
        ("load_while_in_flight", "TMA: overwrites what a product in flight has yet to read"),
        ("other_swizzle", "wgmma: the emulation knows the 128-byte swizzle alone"),
    ],
)
def test_mistakes_are_seen(mistakes, name, message):
    assert message in mistakes(name)
