"""The CUDA kernels against float64 on the CPU, and whether the emulation sees mistakes."""

import ctypes
import re

import pytest
import torch

import cuda_emulator
from cuda_emulator import EMULATION
from reference import check, make_case, tolerance
from test_ops import exact_merge, merge_bound

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")


@pytest.fixture(scope="module")
def cuda(tmp_path_factory):
    return cuda_emulator.build_kernels(tmp_path_factory.mktemp("emulated"))


def small_batch(dtype, head_dim, heads, **options):
    """Whole prompt, shards, decode, empty ones; few tiles, no length a multiple of one."""
    return make_case(
        [
            (range(70), range(70)),
            ([*range(5), *range(231, 250)], [*range(33, 66), *range(198, 231)]),
            ([100], range(1, 101, 3)),
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


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("head_dim, heads", [(64, (4, 2)), (24, (3, 1))], ids=str)
def test_simt_matches_float64(cuda, dtype, head_dim, heads):
    case = small_batch(dtype, head_dim, heads)
    check(case, cuda.attention(*case.arguments, kernel="simt"), tolerance(case))


SIXTEEN_BITS = [torch.bfloat16, torch.float16]


def many_rows(dtype, head_dim, heads):
    """More rows than a block of many rows holds, and shards that see part of their keys."""
    return make_case(
        [
            (range(150), range(150)),
            ([*range(33), *range(231, 330)], [*range(33, 66), *range(198, 231)]),
            ([], range(5)),
            (range(7), []),
            (range(3), range(2, 9)),
        ],
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        slack=3,
    )


@pytest.mark.parametrize("heads", [(2, 2), (9, 3), (5, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_sm80_matches_float64(cuda, dtype, head_dim, heads):
    case = many_rows(dtype, head_dim, heads)
    check(case, cuda.attention(*case.arguments, kernel="sm80"), tolerance(case, dtype))


@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (16, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [64, 80, 96, 128])
@pytest.mark.parametrize("dtype", SIXTEEN_BITS, ids=str)
def test_few_queries_in_pieces(cuda, dtype, head_dim, heads):
    case = make_case(
        [([700], range(701)), ([], []), ([3], range(5)), ([250], range(0, 500))],
        heads=heads,
        head_dim=head_dim,
        dtype=dtype,
        slack=60,
    )
    check(
        case,
        cuda.attention(*case.arguments, kernel="sm80"),
        tolerance(case, dtype, merged=True),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("partials", [1, 3, 130])
def test_merge_matches_float64(cuda, partials, dtype):
    generator = torch.Generator().manual_seed(partials)
    outs = [torch.randn(5, 3, 72, generator=generator).to(dtype) for _ in range(partials)]
    lses = [torch.randn(5, 3, generator=generator) * 5 for _ in range(partials)]
    if partials > 1:
        lses[0][1] = -torch.inf
    out, lse = cuda.merge(outs, lses)
    exact_out, exact_lse = exact_merge(outs, lses)
    assert (out.double() - exact_out).abs().max() <= merge_bound(outs)
    roundings = (partials + 4) * torch.finfo(torch.float32).eps / 2
    assert (lse - exact_lse).abs().max() <= roundings * exact_lse.abs().max()


# The emulation itself: mistakes of tests/cuda_emulation/mistakes.cpp that it has to see.


@pytest.fixture(scope="module")
def mistakes(tmp_path_factory):
    directory = tmp_path_factory.mktemp("mistakes")
    library = ctypes.CDLL(cuda_emulator.build(directory, [EMULATION / "mistakes.cpp"], "mistakes"))

    def run(name: str, seed: int = 0) -> str | None:
        function = getattr(library, name)
        function.restype = ctypes.c_char_p
        message = function(ctypes.c_uint64(seed))
        return message and message.decode()

    return run


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
