"""A row's result has the same bits whatever other rows go with it, in every op of a layer."""

import itertools
from dataclasses import replace

import pytest
import torch
from reference import make_case

from cptool.model.rope import rotary_tables
from cptool.ops import attention
from cptool.ops.elementwise import add_rms_norm_, rms_norm, rotate_, swiglu_
from cptool.ops.encodings import BLOCKS
from cptool.ops.kernels import cpu_isas, force_cpu_isa
from cptool.ops.linear import linear
from cptool.ops.rows import MOST_ROWS, independent_queries, independent_rows
from cptool.ops.stored import Blocks, StoredWeight

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
TYPES = [
    *((dtype, dtype) for dtype in DTYPES),
    (torch.float32, torch.bfloat16),
    (torch.float32, torch.float16),
]
HEADS = [(2, 2), (4, 2), (9, 3), (8, 2), (8, 1), (12, 1)]


@pytest.fixture(params=cpu_isas())
def isa(request):
    with force_cpu_isa(request.param):
        yield request.param


def random(*shape, dtype=torch.float32, seed=0):
    return torch.randn(*shape, generator=torch.manual_seed(seed)).to(dtype)


def same(some, other):
    return torch.equal(some.view(torch.uint8), other.view(torch.uint8))


@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(map(str, types)))
@pytest.mark.parametrize("heads", HEADS, ids=str)
@pytest.mark.parametrize("head_dim", [4, 64, 80, 100, 128])
def test_queries(isa, types, heads, head_dim):
    """Drafts: the last positions of a sequence, of which one sees no key of the last range, and one
    the first key of a tile.
    """
    dtype, kv_dtype = types
    most = independent_queries(dtype, kv_dtype, head_dim=head_dim, group=heads[0] // heads[1])
    assert most >= (8 if isa != "amx" else 1)
    for keys in (most, 37, 1026, 2085):
        queries = min(most, 17)
        case = make_case(
            [(range(keys - queries, keys), range(keys))],
            heads=heads,
            head_dim=head_dim,
            dtype=dtype,
            kv_dtype=kv_dtype,
            spread=3.0,
        )
        alone = [one(case, query) for query in range(queries)]
        for count in {2, 3, 5, queries}:
            for first in (0, queries - count):
                out, lse = attend(part(case, slice(first, first + count)))
                for n in range(count):
                    assert same(out[n], alone[first + n][0][0]), (keys, count, n)
                    assert same(lse[n], alone[first + n][1][0]), (keys, count, n)


@pytest.mark.parametrize("types", TYPES, ids=lambda types: "-".join(map(str, types)))
@pytest.mark.parametrize("heads", [(3, 3), (9, 3), (8, 1)], ids=str)
@pytest.mark.parametrize(("window", "cap"), [(1, None), (30, 2.0), (1100, None), (None, 2.0)])
def test_queries_with_windows_and_caps(isa, types, heads, window, cap):
    """Windows begin in other tiles, and in other ranges of keys, than those of the rows that go
    along; and reach beyond the first key.
    """
    dtype, kv_dtype = types
    most = independent_queries(dtype, kv_dtype, head_dim=64, group=heads[0] // heads[1])
    for keys in (most, 157, 1026, 2085):
        queries = min(most, 17, keys)
        case = make_case(
            [(range(keys - queries, keys), range(keys))],
            heads=heads,
            dtype=dtype,
            kv_dtype=kv_dtype,
            spread=3.0,
        )
        case = replace(case, window=window, cap=cap)
        alone = [one(case, query) for query in range(queries)]
        for count in {2, 5, queries}:
            for first in (0, queries - count):
                if first < 0:
                    continue
                out, lse = attend(part(case, slice(first, first + count)))
                for n in range(count):
                    assert same(out[n], alone[first + n][0][0]), (keys, count, n)
                    assert same(lse[n], alone[first + n][1][0]), (keys, count, n)


@pytest.mark.parametrize(("window", "cap"), [(7, 3.0), (900, None), (1400, 3.0)])
@pytest.mark.parametrize("heads", [(3, 3), (9, 3)], ids=str)
def test_queries_of_windows_in_a_batch_and_into_a_result(isa, heads, window, cap):
    """As without windows: sequences of different lengths, and keys on two ranks, the second of
    which has keys that only some of the windows reach.
    """
    most = independent_queries(
        torch.float32, torch.float32, head_dim=64, group=heads[0] // heads[1]
    )
    lengths = [(3, 1500), (1, 7), (0, 40), (6, 1026), (2, 5000)]
    lengths = [(min(queries, most), keys) for queries, keys in lengths]
    sequences = [(range(keys - queries, keys), range(keys)) for queries, keys in lengths]
    case = replace(make_case(sequences, heads=heads, slack=3), window=window, cap=cap)
    check_parts(case, lengths, [case.k_pos % 1000 < 950, case.k_pos % 1000 >= 950])


@pytest.mark.parametrize("types", TYPES[:3], ids=lambda types: str(types[0]))
@pytest.mark.parametrize("heads", [(3, 3), (9, 3)], ids=str)
def test_queries_in_a_batch_and_into_a_result(isa, types, heads):
    """Sequences of different lengths, of which each has its own number of queries, and keys on two
    ranks, the second of which lacks some of the drafts'.
    """
    dtype, kv_dtype = types
    lengths = [(3, 1500), (1, 7), (0, 40), (6, 1026), (2, 5000)]
    most = independent_queries(dtype, kv_dtype, head_dim=64, group=heads[0] // heads[1])
    lengths = [(min(queries, most), keys) for queries, keys in lengths]
    sequences = [(range(keys - queries, keys), range(keys)) for queries, keys in lengths]
    made = {"heads": heads, "dtype": dtype, "kv_dtype": kv_dtype, "slack": 3}
    case = make_case(sequences, **made)
    check_parts(case, lengths, [case.k_pos % 2 == 0, case.k_pos % 2 == 1])


def check_parts(case, lengths, keys):
    """Each query alone is what it is in the batch: over all keys, and over two parts of them, one
    into the result of the other. lengths: queries and keys of each sequence.
    """
    halves = [case.only_keys(of) for of in keys]
    whole, merged = attend(case), attend(halves[0])
    attend(halves[1], into=merged)
    row = 0
    for b, (queries, _) in enumerate(lengths):
        for n in range(queries):
            query = slice(row, row + 1)
            for parts, expected in (((case,), whole), (halves, merged)):
                found = None
                for of in parts:
                    found = attend(one_sequence(of, b, query), into=found)
                assert same(found[0], expected[0][query]), (b, n)
                assert same(found[1], expected[1][query]), (b, n)
            row += 1


def test_places_where_keys_are_cut_do_not_depend_on_their_number(isa):
    """Beyond 128K keys ranges grow; the last query alone sees the last key."""
    keys = 128 * 1024 + 2
    case = make_case([(range(keys - 3, keys), range(keys))], heads=(2, 1), head_dim=8)
    together = attend(case)
    for query in range(3):
        out, lse = one(case, query)
        assert same(out[0], together[0][query]) and same(lse[0], together[1][query])


def attend(case, into=None):
    return attention.attention_partial(*case.arguments, into=into, **case.options)


def part(case, queries):
    offsets = torch.tensor([0, len(case.q[queries])], dtype=torch.int32)
    return replace(case, q=case.q[queries], q_pos=case.q_pos[queries], cu_q=offsets)


def one(case, query):
    return attend(part(case, slice(query, query + 1)))


def one_sequence(case, b, query):
    """A query of sequence b, with its keys alone."""
    return replace(part(case, query), cu_k=case.cu_k[b : b + 2].contiguous())


def counts(most):
    return [n for n in (1, 2, 3, 4, 5, 6, 7, 8, 11, 16, 33, 64) if n <= most]


def check_rows(compute, most):
    """compute(rows) -> the result of a slice of rows, which has as many."""
    alone = [compute(slice(row, row + 1)) for row in range(most)]
    for count, first in itertools.product(counts(most), (0, 1)):
        if first + count <= most:
            together = compute(slice(first, first + count))
            for n in range(count):
                assert same(together[n], alone[first + n][0]), (count, n)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("depth", "columns"), [(7, 5), (96, 163), (576, 64), (1030, 17)])
def test_products(isa, dtype, depth, columns):
    weight = random(columns, depth, dtype=dtype, seed=1)
    most = independent_rows(dtype, [weight])
    assert 4 <= most <= MOST_ROWS
    x = random(most, depth, dtype=dtype)
    check_rows(lambda rows: linear(x[rows], weight), most)


@pytest.mark.parametrize("encoding", BLOCKS)
def test_products_with_stored_weights(isa, encoding):
    weights, size = BLOCKS[encoding]
    data = (
        torch.randint(256, (131, 3 * size), dtype=torch.uint8, generator=torch.manual_seed(2))
        & 0xBB
    )
    weight = StoredWeight([Blocks(data, encoding)])
    most = independent_rows(torch.float32, [weight])
    x = random(most, 3 * weights)
    check_rows(lambda rows: weight.linear(x[rows]), most)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [72, 576, 1000])
def test_norm_rotation_and_swiglu(isa, dtype, width):
    x, added = random(64, width, dtype=dtype), random(64, width, dtype=dtype, seed=1)
    weight = random(width, dtype=dtype, seed=2)
    check_rows(lambda rows: rms_norm(x[rows], weight, 1e-5), 64)
    check_rows(lambda rows: add_rms_norm_(x[rows].clone(), added[rows], weight, 1e-5), 64)
    check_rows(lambda rows: swiglu_(x[rows].clone(), added[rows]), 64)
    frequencies = 1e4 ** -(torch.arange(width // 8) / (width // 8))
    positions = torch.arange(100_000, 100_064, dtype=torch.int32)

    def rotated(rows):
        heads = x[rows].clone().view(-1, 4, width // 4)
        rotate_(heads, *rotary_tables(positions[rows], frequencies))
        return heads

    check_rows(rotated, 64)
