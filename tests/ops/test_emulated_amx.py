"""The AMX kernels against float64 on machines without AMX, their tile instructions emulated."""

import ctypes
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from reference import check, make_case, tolerance
from test_stored import depth_of, matrix

from cptool.ops.encodings import FLOAT32 as FLOAT32_ENCODING
from cptool.ops.kernels import cpu_isas

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mf16c", "-mavx512bf16"]
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
BFLOAT16 = 1  # ScalarType::kBFloat16
FLOAT32 = 0

pytestmark = [
    pytest.mark.skipif("avx512" not in cpu_isas(), reason="this machine has no AVX-512"),
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
    )


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    path = tmp_path_factory.mktemp("emulated") / "emulated_amx.so"
    sources = [Path(__file__).with_name("emulated_amx.cpp")]
    sources += [ROOT / "csrc" / "cpu" / f"{name}.cpp" for name in ("schedule", "thread_pool")]
    includes = ["-I", ROOT / "tests" / "emulated_tiles", "-I", ROOT / "csrc"]
    command = [COMPILER, "-std=c++17", "-O1", "-shared", "-fPIC", "-pthread", *FLAGS, *includes]
    done = subprocess.run([*command, *sources, "-o", path], capture_output=True, text=True)
    if done.returncode != 0 and "avx512bf16" in done.stderr:
        pytest.skip("the compiler doesn't know -mavx512bf16")
    assert done.returncode == 0, done.stderr
    return ctypes.CDLL(str(path))


@pytest.fixture
def attention(library):
    """attention_partial of a case on emulated tiles."""

    def run(case, into=None, threads=1):
        out, lse = into or (torch.full(case.q.shape, torch.nan), torch.empty(case.q.shape[:2]))
        keep = case.q, case.k, case.v, case.q_pos, case.k_pos, case.cu_q, case.cu_k
        assert case.q.dtype == torch.bfloat16
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
            BFLOAT16,
            BFLOAT16,
            FLOAT32,
            out.data_ptr(),
            lse.data_ptr(),
            into is not None,
        )
        library.attention_partial(ctypes.byref(args), threads)
        return out, lse

    return run


def bfloat16_case(sequences, **options):
    return make_case(sequences, dtype=torch.bfloat16, **options)


def ragged(**options):
    """Every kind of sequence in one batch, no length a multiple of a tile."""
    return bfloat16_case(
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


@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (5, 1), (16, 1)], ids=str)
@pytest.mark.parametrize("head_dim", [16, 64, 80, 96, 128, 256])
def test_matches_float64(attention, head_dim, heads):
    case = ragged(head_dim=head_dim, heads=heads)
    check(case, attention(case), tolerance(case, torch.bfloat16))


@pytest.mark.parametrize("spread", [30.0, 1000.0])
def test_large_scores(attention, spread):
    """Weights that underflow, maxima that rise from strip to strip of a tile."""
    case = bfloat16_case([(range(300), range(300))], spread=spread)
    check(case, attention(case), tolerance(case, torch.bfloat16))


def test_rising_scores(attention):
    """Every strip of 32 keys exceeds the last one's maximum by more than the slack."""
    case = bfloat16_case([(range(255, 265), range(265))], head_dim=32)
    case.q[:] = 1
    case.k[:] = torch.arange(265)[:, None, None] / 8
    check(case, attention(case), tolerance(case, torch.bfloat16))


@pytest.mark.parametrize("queries", [[5000], range(4990, 5001), range(0, 5001, 61)], ids=len)
def test_few_queries_over_many_keys(attention, queries):
    case = bfloat16_case([(queries, range(5001)), ([7], range(9))], slack=1)
    check(case, attention(case), tolerance(case, torch.bfloat16, merged=True))


def test_negative_scale(attention):
    case = ragged(heads=(4, 2))
    object.__setattr__(case, "scale", -case.scale)
    check(case, attention(case), tolerance(case, torch.bfloat16))


def test_into(attention):
    case = ragged(heads=(4, 2))
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    running = attention(case.only_keys(keep))
    check(
        case,
        attention(case.only_keys(~keep), into=running),
        tolerance(case, torch.bfloat16, merged=True),
    )


def test_bit_identical_for_any_number_of_threads(attention):
    case = ragged(head_dim=80, heads=(16, 2))
    expected = attention(case)
    for a, b in zip(expected, attention(case, threads=3), strict=True):
        assert torch.equal(a, b)


def test_tile_loads_per_product(library, attention):
    """2 x 2 tiles of results in registers: one load a product, and one more of an accumulator, and
    one store, for every eight: four strips of keys and their two tiles of dimensions.
    """
    counts = [ctypes.c_int64() for _ in range(3)]
    case = bfloat16_case([(range(1024, 1280), range(1280))], heads=(4, 2), head_dim=128)
    library.tile_counts(*map(ctypes.byref, counts))
    attention(case)
    library.tile_counts(*map(ctypes.byref, counts))
    loads, stores, products = (count.value for count in counts)
    assert products > 1024 * 256 * 4 * 128 * 2 / (16 * 16 * 32)
    assert loads <= 1.15 * products
    assert stores <= 0.26 * products


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


@pytest.mark.parametrize("encoding", ["BF16", "F16", "Q4_0", "Q5_0", "Q8_0", "Q4_K", "IQ4_NL"])
def test_product_of_stored_types(library, encoding):
    """Fewer pieces of a weight are the whole weight."""
    part, values = matrix(encoding, 48, depth_of(encoding, 3), head_dim=24)
    x = torch.randn(35, part.shape[1], generator=torch.manual_seed(0))
    out = product(library, x, part.place)
    check_product(out, x, values)
    place = (values.data_ptr(), 4 * values.shape[1], 48, values.shape[1], 0, FLOAT32_ENCODING)
    assert torch.equal(out, product(library, x, place))
