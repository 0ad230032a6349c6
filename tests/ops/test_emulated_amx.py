"""The AMX kernels against float64 on machines without AMX, their tile instructions emulated; and
on machines without AVX-512 its instructions too, for attention alone.
"""

import ctypes
import os
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from reference import check, make_case, tolerance
from test_stored import depth_of, matrix

from cptool.ops.encodings import FLOAT32 as FLOAT32_ENCODING
from cptool.ops.kernels import cpu_isas

ROOT = Path(__file__).resolve().parents[2]
AVX512 = "avx512" in cpu_isas()
FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mavx512bf16"]
EMULATED = ["-mavx2", "-mfma", "-mf16c", "-Wno-psabi", "-DCPTOOL_ATTENTION_ALONE"]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
TYPES = [torch.float32, torch.bfloat16, torch.float16]  # by number, as in ScalarType

pytestmark = [
    pytest.mark.skipif("avx2" not in cpu_isas(), reason="this machine has no AVX2"),
    pytest.mark.skipif(not COMPILER, reason="no C++ compiler"),
]


class Arguments(ctypes.Structure):
    """AttentionArgs of csrc/attention.h."""

    _fields_ = (
        [(name, ctypes.c_void_p) for name in ("q", "k", "v")]
        + [(f"{x}_{axis}_stride", ctypes.c_int64) for x in "qkv" for axis in ("token", "head")]
        + [(name, ctypes.c_void_p) for name in ("q_pos", "k_pos", "cu_q", "cu_k")]
        + [
            (name, ctypes.c_int64)
            for name in ("batch", "q_tokens", "k_tokens", "q_heads", "kv_heads", "head_dim")
        ]
        + [("scale", ctypes.c_float)]
        + [(name, ctypes.c_int32) for name in ("q_dtype", "dtype", "out_dtype")]
        + [("out", ctypes.c_void_p), ("lse", ctypes.c_void_p), ("accumulate", ctypes.c_bool)]
        + [("window", ctypes.c_int64), ("cap", ctypes.c_float)]
        + [("sm_margin", ctypes.c_int32), ("max_len", ctypes.c_float)]
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "emulated_amx.so"
    sources = [Path(__file__).with_name("emulated_amx.cpp")]
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("schedule", "thread_pool")]
    includes = ["-I", ROOT / "tests" / "emulated_tiles", "-I", ROOT / "csrc"]
    if not AVX512:
        includes = ["-I", ROOT / "tests" / "emulated_avx512", *includes]
    flags = FLAGS if AVX512 else EMULATED
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", *flags, *includes]
    done = subprocess.run([*command, *sources, "-o", path], capture_output=True, text=True)
    if done.returncode != 0 and "avx512bf16" in done.stderr:
        pytest.skip("the compiler doesn't know -mavx512bf16")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.fixture
def attention(library):
    """attention_partial of a case on emulated tiles."""

    def run(case, into=None, threads=1, kernels="attention_partial"):
        out, lse = into or (torch.full(case.q.shape, torch.nan), torch.empty(case.q.shape[:2]))
        keep = case.q, case.k, case.v, case.q_pos, case.k_pos, case.cu_q, case.cu_k
        args = Arguments(
            *[x.data_ptr() for x in keep[:3]],
            *[stride for x in keep[:3] for stride in x.stride()[:2]],
            *[x.data_ptr() for x in keep[3:]],
            len(case.cu_q) - 1,
            len(case.q),
            len(case.k),
            case.q.shape[1],
            *case.k.shape[1:],
            case.scale,
            TYPES.index(case.q.dtype),
            TYPES.index(case.k.dtype),
            TYPES.index(torch.float32),
            out.data_ptr(),
            lse.data_ptr(),
            into is not None,
            case.window or 0,
            case.cap or 0.0,
        )
        getattr(library, kernels)(ctypes.byref(args), threads)
        return out, lse

    return run


BFLOAT16 = {"dtype": torch.bfloat16}
FLOAT32 = {"dtype": torch.float32}
FLOAT16 = {"dtype": torch.float16}
STORED_BFLOAT16 = {"kv_dtype": torch.bfloat16}
STORED_FLOAT16 = {"kv_dtype": torch.float16}
EVERY_TYPE = pytest.mark.parametrize(
    "types", [BFLOAT16, FLOAT32, FLOAT16, STORED_BFLOAT16, STORED_FLOAT16], ids=str
)
TYPES_OF_TILES = pytest.mark.parametrize("types", [BFLOAT16, FLOAT32, STORED_BFLOAT16], ids=str)


def allowed(case, **options):
    """Only bfloat16 throughout is multiplied as it is, with rounded weights."""
    narrow = case.q.dtype == torch.bfloat16
    return tolerance(case, torch.bfloat16 if narrow else torch.float32, **options)


def ragged(**options):
    """Every kind of sequence in one batch, no length a multiple of a tile."""
    return make_case(
        [
            (range(131), range(131)),
            (range(90, 127), range(127)),
            ([*range(33), *range(231, 264)], [*range(33, 66), *range(198, 231)]),
            ([300], range(1, 301, 3)),
            ([], range(5)),
            (range(7), []),
            (range(3), range(2, 9)),  # the first queries see nothing
            ([2, 4], [3]),
        ],
        slack=3,
        **options,
    )


def few(**options):
    return make_case([([2500], range(2501)), ([7], range(9)), ([], [1])], slack=1, **options)


@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (5, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_matches_float64(attention, head_dim, heads):
    case = ragged(head_dim=head_dim, heads=heads, **BFLOAT16)
    check(case, attention(case), allowed(case))


@pytest.mark.parametrize("heads", [(3, 3), (16, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 80, 128, 256])
@EVERY_TYPE
def test_types_match_float64(attention, types, head_dim, heads):
    case = ragged(head_dim=head_dim, heads=heads, **types)
    check(case, attention(case), allowed(case))


@pytest.mark.parametrize("spread", [30.0, 1000.0])
@TYPES_OF_TILES
def test_large_scores(attention, types, spread):
    """Weights that underflow, maxima that rise from strip to strip of a tile."""
    case = make_case([(range(300), range(300))], spread=spread, **types)
    check(case, attention(case), allowed(case))


def test_large_scores_err_like_plain_float32(attention):
    """As in test_ops.py: the mean tells more than the largest error of one case."""
    ours = plain = 0.0
    for seed in range(6):
        case = make_case([(range(150), range(150))], spread=30.0, seed=seed)
        ours += float((attention(case)[0] - case.exact[0]).square().sum())
        plain += float((case.plain(torch.float32)[0] - case.exact[0]).square().sum())
    assert ours <= 1.5 * plain


@TYPES_OF_TILES
def test_rising_scores(attention, types):
    """Every strip of 32 keys exceeds the last one's maximum by more than the slack."""
    case = make_case([(range(255, 265), range(265))], head_dim=32, **types)
    case.q[:] = 1
    case.k[:] = torch.arange(265)[:, None, None] / 8
    check(case, attention(case), allowed(case))


@pytest.mark.parametrize("queries", [[5000], range(4990, 5001), range(0, 5001, 61)], ids=len)
@TYPES_OF_TILES
def test_few_queries_over_many_keys(attention, types, queries):
    case = make_case([(queries, range(5001)), ([7], range(9))], slack=1, **types)
    check(case, attention(case), allowed(case, merged=True))


@EVERY_TYPE
def test_negative_scale(attention, types):
    case = ragged(heads=(4, 2), **types)
    object.__setattr__(case, "scale", -case.scale)
    check(case, attention(case), allowed(case))


@pytest.mark.parametrize("cap", [None, 2.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("window", [1, 37, 200, None])
@EVERY_TYPE
def test_windows_and_caps(attention, types, window, cap):
    case = replace(ragged(heads=(4, 2), **types), window=window, cap=cap)
    check(case, attention(case), allowed(case))


@pytest.mark.parametrize("window", [8, 512])
@EVERY_TYPE
def test_panels_between_others_that_see_nothing(attention, types, window):
    """Keys on both sides of a gap that is wider than the window."""
    few, many = (128, [*range(16), *range(112, 128)]), (1000, [*range(125), *range(875, 1000)])
    count, keys = few if window == 8 else many
    case = make_case([(range(count), keys)], heads=(1, 1), **types)
    case = replace(case, window=window)
    check(case, attention(case), allowed(case))


@pytest.mark.parametrize("cap", [None, 2.0], ids=["uncapped", "capped"])
@pytest.mark.parametrize("window", [1, 37, 200, None])
@pytest.mark.parametrize("heads", [(4, 2), (16, 1)], ids=str)
@pytest.mark.parametrize("types", [FLOAT32, FLOAT16, STORED_BFLOAT16], ids=str)
def test_windows_and_caps_in_vectors(attention, types, heads, window, cap):
    """AVX-512 without tiles: many rows in panels, few of them streaming keys."""
    for case in (ragged(heads=heads, **types), few(heads=heads, **types)):
        case = replace(case, window=window, cap=cap)
        result = attention(case, kernels="attention_partial_avx512")
        check(case, result, tolerance(case, merged=True))


@EVERY_TYPE
def test_into(attention, types):
    case = ragged(heads=(4, 2), **types)
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    running = attention(case.only_keys(keep))
    result = attention(case.only_keys(~keep), into=running)
    check(case, result, allowed(case, merged=True))


@EVERY_TYPE
def test_bit_identical_for_any_number_of_threads(attention, types):
    case = ragged(head_dim=80, heads=(16, 2), **types)
    expected = attention(case)
    for a, b in zip(expected, attention(case, threads=3), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf, 3.4e38])
@pytest.mark.parametrize("name", ["q", "k", "v"])
@TYPES_OF_TILES
def test_what_float32_cannot_hold_ends_as_no_number(attention, types, name, value):
    """Where the value has an effect the result is right (a key of score -inf) or not finite."""
    sequences = [(range(40, 110), range(110))]
    case = make_case(sequences, heads=(2, 2), **types)
    limit = allowed(case)
    clean = attention(case)
    case = make_case(sequences, heads=(2, 2), **types)
    getattr(case, name)[50, 1, 7] = value
    out, lse = attention(case)
    assert torch.equal(out[:, 0], clean[0][:, 0]) and torch.equal(lse[:, 0], clean[1][:, 0])
    finite = out.isfinite()
    sees = case.q_pos == 90 if name == "q" else case.q_pos >= 50
    assert name == "k" or not finite[sees, 1, 7].any()
    assert name == "v" or finite[~sees].all()
    assert ((out - case.exact[0])[finite].abs() <= limit.out).all()


@pytest.mark.parametrize(
    ("types", "pieces"), [(BFLOAT16, 1), (FLOAT32, 6), (STORED_BFLOAT16, 3), (FLOAT16, 5)], ids=str
)
def test_tile_loads_per_product(library, attention, types, pieces):
    """2 x 2 tiles of results in registers: one load a product or, of several products of pieces,
    14 loads for 24; and one more of an accumulator, and one store, for every eight: four strips of
    keys and their two tiles of dimensions.
    """
    counts = [ctypes.c_int64() for _ in range(3)]
    case = make_case([(range(1024, 1280), range(1280))], heads=(4, 2), head_dim=128, **types)
    library.tile_counts(*map(ctypes.byref, counts))
    attention(case)
    library.tile_counts(*map(ctypes.byref, counts))
    loads, stores, products = (count.value for count in counts)
    assert products > pieces * 1024 * 256 * 4 * 128 * 2 / (16 * 16 * 32)
    assert products < 1.15 * pieces * 1152 * 256 * 4 * 128 * 2 / (16 * 16 * 32)
    per_product = {1: 1, 3: 8 / 12, 5: 12 / 20, 6: 14 / 24}[pieces]
    assert loads <= (per_product + 0.15 / pieces) * products
    assert stores <= 0.26 / pieces * products


class Product(ctypes.Structure):
    """StoredLinearArgs of csrc/stored.h."""

    _fields_ = (
        [("at", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("stride", "columns", "depth", "head_dim")]
        + [("encoding", ctypes.c_int32)]
        + [("x", ctypes.c_void_p), ("out", ctypes.c_void_p)]
        + [(name, ctypes.c_int64) for name in ("x_stride", "out_stride", "rows")]
    )


def product(library, x, place, *, piece_columns=10_000):
    """x W^T on emulated tiles, in pieces of so many columns."""
    out = torch.full((len(x), place[2]), torch.nan)
    args = Product(*place, x.data_ptr(), out.data_ptr(), x.stride(0), out.stride(0), len(x))
    library.product(ctypes.byref(args), piece_columns)
    return out


def check_product(out, x, weight):
    """Six roundings to float32 per term, and one that is lacking (amx_product.h)."""
    exact = x.double() @ weight.double().T
    magnitude = x.double().abs() @ weight.double().abs().T
    assert ((out.double() - exact).abs() <= (6 * x.shape[1] + 1) * 2**-24 * magnitude).all()


PRODUCTS = pytest.mark.skipif(not AVX512, reason="this machine has no AVX-512")


@PRODUCTS
@pytest.mark.parametrize("rows", [1, 16, 17, 33, 70])
@pytest.mark.parametrize(("depth", "columns"), [(1, 1), (31, 17), (64, 32), (577, 49), (1100, 400)])
def test_product_of_float32(library, rows, depth, columns):
    x = torch.randn(rows, depth + 3, generator=torch.manual_seed(0))[:, 1 : depth + 1]
    weight = torch.randn(columns, depth, generator=torch.manual_seed(1))
    place = (weight.data_ptr(), 4 * depth, columns, depth, 0, FLOAT32_ENCODING)
    out = product(library, x, place)
    check_product(out, x, weight)
    assert torch.equal(out, product(library, x, place, piece_columns=32))
    assert torch.equal(out[-1:], product(library, x[-1:], place))


@PRODUCTS
@pytest.mark.parametrize("encoding", ["BF16", "F16", "Q4_0", "Q5_0", "Q8_0", "Q4_K", "IQ4_NL"])
def test_product_of_stored_types(library, encoding):
    """Fewer pieces of a weight are the whole weight."""
    part, values = matrix(encoding, 48, depth_of(encoding, 3), head_dim=24)
    x = torch.randn(35, part.shape[1], generator=torch.manual_seed(0))
    out = product(library, x, part.place)
    check_product(out, x, values)
    place = (values.data_ptr(), 4 * values.shape[1], 48, values.shape[1], 0, FLOAT32_ENCODING)
    assert torch.equal(out, product(library, x, place))
