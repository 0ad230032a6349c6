"""The variants on 1 to 8 ranks against float64: any batch, any placement of cached tokens."""

import random
import time
from dataclasses import dataclass, replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks

from cptool.cache import NEVER, KVCache
from cptool.errors import UserError
from cptool.parallel.attention import attend
from cptool.parallel.ring import Ring
from cptool.parallel.step import Scores, Step
from cptool.sharding import Placement, balanced, concat
from cptool.variants import find, names

ALL = list(names(baselines=True))
QUERIES_TRAVEL = [variant for variant in ALL if not find(variant).keys_travel]


@dataclass(frozen=True)
class Case:
    """New and cached tokens of each sequence; heads. `scatter`: cached tokens lie on any rank;
    `one_takes`: one rank takes all new tokens. `max_len`: of SiLU attention."""

    new: tuple[int, ...]
    cached: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    scatter: bool = False
    one_takes: bool = False
    kv_dtype: torch.dtype | None = None
    window: int | None = None
    cap: float | None = None
    max_len: int | None = None

    @property
    def scores(self):
        return Scores(self.head_dim**-0.5, self.window, self.cap, self.max_len)

    def tensors(self):
        """q of all new tokens, K and V of all tokens, sequence after sequence."""
        generator = torch.Generator().manual_seed(sum(self.new) + 7 * sum(self.cached))
        total = sum(self.new) + sum(self.cached)
        shapes = [(sum(self.new), self.heads[0]), (total, self.heads[1]), (total, self.heads[1])]
        kv = self.kv_dtype or self.dtype
        return [
            torch.randn(*shape, self.head_dim, generator=generator).to(dtype)
            for shape, dtype in zip(shapes, (self.dtype, kv, kv), strict=True)
        ]

    def layout(self, ranks):
        held = [p.cu_seqlens.diff().tolist() for p in self.cached_placements(ranks)]
        return balanced(
            self.new, ranks, starts=self.cached, held=held, active=1 if self.one_takes else None
        )

    def cached_placements(self, ranks):
        if not self.scatter:
            return balanced(self.cached, ranks).placements()
        draw = random.Random(str(self))
        owners = [[draw.randrange(ranks) for _ in range(length)] for length in self.cached]
        return tuple(
            Placement.of(
                [
                    torch.tensor([p for p, o in enumerate(own) if o == rank], dtype=torch.int32)
                    for own in owners
                ]
            )
            for rank in range(ranks)
        )


CASES = [
    Case((257,), (0,)),
    Case((64, 0, 1, 7, 13), (0, 0, 0, 0, 0)),
    Case((0, 0), (3, 0)),
    Case((1,), (0,)),
    Case((5,), (131,), scatter=True),
    Case((31, 0, 2), (1, 17, 90), (9, 3), scatter=True),
    Case((100, 3), (0, 211), (5, 1), 80, scatter=True),
    Case((1, 1, 1, 1, 1), (40, 0, 7, 128, 1), (9, 3), scatter=True),
    Case((1,), (300,), (5, 1), 128, scatter=True),
    Case((199, 58), (0, 0), (9, 3), 64, torch.bfloat16),
    Case((40, 0, 9), (77, 5, 200), (5, 1), 80, torch.bfloat16, scatter=True),
    Case((1, 1, 1), (500, 64, 3), (4, 2), 96, torch.bfloat16, scatter=True),
    Case((211,), (0,), (5, 1), 128, torch.float16),
    Case((17, 1, 30), (50, 333, 0), (9, 3), 64, torch.float16, scatter=True),
    Case((23, 5), (9, 60), scatter=True, one_takes=True),
    Case((3, 65), (6001, 1), (4, 1), 64, torch.float16, scatter=True),
    Case((129,), (4999,), (8, 1), 128, torch.bfloat16, scatter=True),
    Case((40, 0, 9), (77, 5, 200), (5, 1), 80, scatter=True, kv_dtype=torch.bfloat16),
    Case((199,), (33,), (9, 3), 64, scatter=True, kv_dtype=torch.float16),
    Case((257,), (0,), window=1),
    Case((257,), (0,), window=20, cap=2.0),
    Case((64, 0, 1, 7, 13), (0, 0, 0, 0, 0), window=5),
    Case((31, 0, 2), (1, 17, 90), (9, 3), scatter=True, window=12),
    Case((1, 1, 1, 1, 1), (40, 0, 7, 128, 1), (9, 3), scatter=True, window=33, cap=20.0),
    Case((40, 0, 9), (77, 5, 200), (5, 1), 80, torch.bfloat16, scatter=True, window=60),
    Case((17, 1, 30), (50, 333, 0), (9, 3), 64, torch.float16, scatter=True, cap=1.0),
    Case((23, 5), (9, 60), scatter=True, one_takes=True, window=9),
    Case((3, 65), (6001, 1), (4, 1), 64, torch.float16, scatter=True, window=4096),
    Case((129,), (4999,), (8, 1), 128, scatter=True, window=500, kv_dtype=torch.bfloat16),
    Case((31, 0, 2), (1, 17, 90), (9, 3), 100, scatter=True),
    Case((40, 0, 9), (77, 5, 200), (5, 1), 100, torch.bfloat16, scatter=True, window=60),
    Case((17, 1, 30), (50, 333, 0), (9, 3), 2, torch.float16, scatter=True),
    Case((1, 1, 1, 1, 1), (40, 0, 7, 128, 1), (9, 3), 6, torch.bfloat16, scatter=True),
    Case((23, 5), (9, 60), (4, 2), 98, scatter=True, max_len=80),
    Case((257,), (0,), max_len=300),
    Case((64, 0, 1, 7, 13), (0, 0, 0, 0, 0), window=5, max_len=64),
    Case((31, 0, 2), (1, 17, 90), (9, 3), scatter=True, window=12, max_len=128),
    Case((1, 1, 1, 1, 1), (40, 0, 7, 128, 1), (9, 3), scatter=True, max_len=200),
    Case((40, 0, 9), (77, 5, 200), (5, 1), 80, torch.bfloat16, scatter=True, max_len=256),
    Case((17, 1, 30), (50, 333, 0), (9, 3), 64, torch.float16, scatter=True, max_len=400),
    Case((23, 5), (9, 60), scatter=True, one_takes=True, window=9, max_len=80),
    Case((129,), (4999,), (8, 1), 128, scatter=True, max_len=8192, kv_dtype=torch.bfloat16),
]
WINDOWED = [case for case in CASES if case.window is not None]


def stored(case, cached, new):
    """A cache layer with this rank's KV, stored in two turns; slack after each sequence is NaN."""
    _, k, v = case.tensors()
    starts = [sum(case.new[:b]) + sum(case.cached[:b]) for b in range(len(case.new))]
    cache = KVCache(
        layers=1,
        kv_heads=case.heads[1],
        head_dim=case.head_dim,
        batch=len(starts),
        dtype=case.kv_dtype or case.dtype,
        device="cpu",
    )
    cache.reserve(
        [len(c) + len(n) + 3 for c, n in zip(cached.sequences(), new.sequences(), strict=True)]
    )
    for added in (cached, new):
        cache.extend(added)
        rows = [start + held.long() for start, held in zip(starts, added.sequences(), strict=True)]
        cache.store(0, k[torch.cat(rows)], v[torch.cat(rows)])
    layer = cache.layer(0)
    layer.slab[layer.k_pos == NEVER] = torch.nan
    return layer


def reference(case):
    """float64 [new tokens, Hq, D], straight from the definition."""
    q, k, v = (t.double() for t in case.tensors())
    group = case.heads[0] // case.heads[1]
    outs, new_from, all_from = [], 0, 0
    for new, cached in zip(case.new, case.cached, strict=True):
        keys = slice(all_from, all_from + cached + new)
        k_all = k[keys].repeat_interleave(group, 1)
        v_all = v[keys].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[new_from : new_from + new], k_all)
        visible = torch.arange(cached + new) <= torch.arange(cached, cached + new)[:, None]
        if case.window is not None:
            visible &= (
                torch.arange(cached, cached + new)[:, None]
                < torch.arange(cached + new) + case.window
            )
        scores = scores * case.head_dim**-0.5
        if case.cap is not None:
            scores = (scores / case.cap).tanh() * case.cap
        if case.max_len is None:
            weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        else:
            weights = (scores * scores.sigmoid() / case.max_len).masked_fill(~visible, 0)
        outs.append(torch.einsum("hqk,khd->qhd", weights, v_all))
        new_from, all_from = new_from + new, all_from + cached + new
    return torch.cat(outs)


def attend_all_cases(world, cases, variants, jitter=False, narrow=False):
    """This rank's (indices, out) for every case and variant, computed as the engine does."""
    ring = Ring(world.cp_group)
    answers = []
    for case in cases:
        q = case.tensors()[0]
        layout = case.layout(ring.size)
        queries, cached = layout.placements(), case.cached_placements(ring.size)
        keys = tuple(concat(held, new) for held, new in zip(cached, queries, strict=True))
        partial_dtype = case.dtype if narrow else torch.float32
        step = Step(ring.rank, queries, keys, partial_dtype)
        layer = stored(case, cached[ring.rank], queries[ring.rank])
        indices = layout.indices(ring.rank)
        for variant in variants:
            if jitter:
                time.sleep(random.random() / 100)
            out = attend(variant, q[indices], layer, step, ring=ring, scores=case.scores)
            assert out.dtype == case.dtype
            # Bits in bytes: tensors of another process are mapped files, one for each.
            answers.append((indices.numpy(), out.view(torch.uint8).numpy()))
    return answers


def whole_outputs(n, cases, variants, **options):
    """{(case index, variant): output of all new tokens} put together from n ranks."""
    per_rank = run_ranks(n, attend_all_cases, cases, variants, **options)
    wholes = {}
    for place, (index, variant) in enumerate(
        (index, variant) for index in range(len(cases)) for variant in variants
    ):
        case = cases[index]
        whole = torch.full((sum(case.new), case.heads[0], case.head_dim), float("nan"))
        whole = whole.to(case.dtype)
        for answers in per_rank:
            indices, bits = map(torch.from_numpy, answers[place])
            whole[indices] = bits.view(case.dtype)
        wholes[index, variant] = whole
    return wholes


@pytest.fixture(scope="module")
def one_rank():
    """Reference and 1-rank output of every case."""
    outputs = whole_outputs(1, CASES, ["pass-kv"])
    return [(reference(case), outputs[index, "pass-kv"]) for index, case in enumerate(CASES)]


def splitting_adds_no_error(n, cases, one_rank):
    """Error of N ranks <= 1.1 x error of one rank + one rounding of the output (the contract).

    As root mean square: the largest of a few hundred errors varies by more than that by chance.
    """
    for (index, variant), out in whole_outputs(n, cases, ALL).items():
        expected, single = one_rank[index]
        if not expected.numel():
            assert not out.numel()
            continue
        error = (out.double() - expected).norm()
        own = (single.double() - expected).norm()
        rounding = torch.finfo(out.dtype).eps / 2 * expected.norm()
        assert error <= 1.1 * own + rounding, f"{variant} on {n} ranks, {cases[index]}"


@pytest.mark.parametrize("n", range(2, 9))
def test_splitting_adds_no_error(n, one_rank):
    splitting_adds_no_error(n, CASES, one_rank)


SEQUENCES = st.tuples(st.sampled_from([0, 1, 2, 3, 5, 13, 31]), st.sampled_from([0, 1, 17, 101]))


@settings(deadline=None, max_examples=40)
@given(
    st.lists(SEQUENCES, min_size=1, max_size=5),
    st.sampled_from([(9, 3), (5, 1), (3, 3)]),
    st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    st.integers(2, 8),
)
def test_splitting_any_batch_adds_no_error(sequences, heads, dtype, n):
    new, cached = zip(*sequences, strict=True)
    cases = [Case(new, cached, heads, dtype=dtype, scatter=True)]
    single = whole_outputs(1, cases, ["pass-kv"])[0, "pass-kv"]
    splitting_adds_no_error(n, cases, [(reference(cases[0]), single)])


def bound(case, expected):
    """Largest error of attention with float32 sums over `keys` keys, and weights and output rounded
    to the case's dtype."""
    keys = max(new + cached for new, cached in zip(case.new, case.cached, strict=True))
    largest = case.tensors()[2].abs().max().double()
    rounded = torch.finfo(case.dtype).eps * (largest + expected.abs().max())
    return torch.finfo(torch.float32).eps * keys * largest + rounded


def test_one_rank_agrees_with_the_definition(one_rank):
    for case, (expected, single) in zip(CASES, one_rank, strict=True):
        if expected.numel():
            assert (single.double() - expected).abs().max() <= bound(case, expected), case


def test_one_rank_gives_the_same_for_every_variant():
    outputs = whole_outputs(1, CASES, ALL)
    for (index, _), out in outputs.items():
        assert torch.equal(out, outputs[index, "pass-kv"])


def test_runs_are_bit_identical_whatever_the_arrival():
    cases = [CASES[1], CASES[5], CASES[7], CASES[10], WINDOWED[1], WINDOWED[5]]
    first = whole_outputs(4, cases, ALL)
    for _ in range(2):
        again = whole_outputs(4, cases, ALL, jitter=True)
        assert all(torch.equal(first[key], again[key]) for key in first)


def test_pass_q_returns_the_same_partials_early_or_late():
    outputs = whole_outputs(3, CASES, ["pass-q", "pass-q-all2all"])
    for index in range(len(CASES)):
        assert torch.equal(outputs[index, "pass-q"], outputs[index, "pass-q-all2all"])


@pytest.mark.parametrize("variant", QUERIES_TRAVEL)
def test_partials_in_the_working_dtype_err_by_one_more_rounding(variant):
    """Outputs of partials are off by u |out_i| <= u max|v|, and are merged with weights of sum 1;
    then both results are rounded to the dtype."""
    cases = [case for case in CASES if case.dtype != torch.float32]
    wide = whole_outputs(3, cases, [variant])
    narrow = whole_outputs(3, cases, [variant], narrow=True)
    errors = torch.zeros(2)
    for index, case in enumerate(cases):
        results = [outputs[index, variant].double() for outputs in (wide, narrow)]
        largest = case.tensors()[2].abs().max().double()
        u = torch.finfo(case.dtype).eps / 2
        assert ((results[1] - results[0]).abs() <= u * (largest + 2 * results[0].abs())).all()
        errors += torch.tensor([(result - reference(case)).norm() / u for result in results])
    assert errors[1] > errors[0]


def bytes_sent(world, case, variant, narrow):
    ring = Ring(world.cp_group)
    layout, cached = case.layout(ring.size), case.cached_placements(ring.size)
    queries = layout.placements()
    keys = tuple(concat(held, new) for held, new in zip(cached, queries, strict=True))
    step = Step(ring.rank, queries, keys, case.dtype if narrow else torch.float32)
    layer = stored(case, cached[ring.rank], queries[ring.rank])
    mine = case.tensors()[0][layout.indices(ring.rank)]
    attend(variant, mine, layer, step, ring=ring, scores=case.scores)
    return ring.sent_bytes


@pytest.mark.parametrize("narrow", [False, True])
@pytest.mark.parametrize("variant", ALL)
def test_nothing_but_tokens_travels(variant, narrow):
    """All messages of all ranks together: no padding, K and V or queries and partials only."""
    case, n = CASES[10], 4
    new, total, element = sum(case.new), sum(case.new) + sum(case.cached), case.dtype.itemsize
    width = element if narrow else 4
    partial = case.heads[0] * (case.head_dim * width + 4)
    expected = new * (case.heads[0] * case.head_dim * element + partial)
    if find(variant).keys_travel:
        expected = total * 2 * case.heads[1] * case.head_dim * element
    assert sum(run_ranks(n, bytes_sent, case, variant, narrow)) == (n - 1) * expected


@pytest.mark.parametrize("n", [2, 3, 4])
def test_keys_that_nobody_else_sees_stay(n):
    """What leaves a rank is what some query of another rank sees, in both variants."""
    for case in WINDOWED:
        layout, cached = case.layout(n), case.cached_placements(n)
        queries = layout.placements()
        keys = tuple(concat(held, new) for held, new in zip(cached, queries, strict=True))
        leaving = [0] * n
        for rank in range(n):
            for b, held in enumerate(keys[rank].sequences()):
                others = [q.sequences()[b] for r, q in enumerate(queries) if r != rank]
                ahead = torch.cat(others)[None, :] - held[:, None]
                leaving[rank] += int(((ahead >= 0) & (ahead < case.window)).any(1).sum())
        width = 2 * case.heads[1] * case.head_dim * (case.kv_dtype or case.dtype).itemsize
        sent = run_ranks(n, bytes_sent, case, "pass-kv", False)
        assert sum(sent) == (n - 1) * sum(leaving) * width
        readers = [q.tokens > 0 for q in queries]
        expected = [
            left * sum(reads for r, reads in enumerate(readers) if r != rank) * width
            for rank, left in enumerate(leaving)
        ]
        assert run_ranks(n, bytes_sent, case, "gather-kv", False) == expected


def test_a_window_bounds_what_travels():
    """Of a prompt of 2N chunks, only the last positions of each leave their rank."""
    n, window = 4, 10
    case = Case((8 * 200,), (0,), window=window)
    sent = run_ranks(n, bytes_sent, case, "pass-kv", False)
    token = 2 * case.heads[1] * case.head_dim * 4
    assert max(sent) <= (n - 1) * 2 * (window - 1) * token
    assert sum(sent) < sum(run_ranks(n, bytes_sent, replace(case, window=None), "pass-kv", False))


@pytest.mark.parametrize("case", [CASES[3], CASES[14]], ids=["one token", "one takes all"])
def test_ranks_that_ask_nothing_are_given_no_keys(case):
    n = 4
    queries, cached = case.layout(n).placements(), case.cached_placements(n)
    held = [old.tokens + new.tokens for old, new in zip(cached, queries, strict=True)]
    expected = sum(sum(held) - own for own, new in zip(held, queries, strict=True) if new.tokens)
    sent = sum(run_ranks(n, bytes_sent, case, "gather-kv", False))
    assert sent == expected * 2 * case.heads[1] * case.head_dim * case.dtype.itemsize


def local_only(world):
    """Without keys of other ranks in the Step, for the variants that do not look at them."""
    ring, case = Ring(world.cp_group), CASES[7]
    layout = case.layout(ring.size)
    step = Step(rank=ring.rank, queries=layout.placements(), keys=())
    cached = case.cached_placements(ring.size)[ring.rank]
    layer = stored(case, cached, layout.placement(ring.rank))
    mine = case.tensors()[0][layout.indices(ring.rank)]
    return [
        attend(variant, mine, layer, step, ring=ring, scores=case.scores).numpy()
        for variant in QUERIES_TRAVEL
    ]


def test_variants_that_move_queries_need_no_other_ranks_keys():
    case = CASES[7]
    expected = reference(case)
    layout = case.layout(3)
    for rank, outs in enumerate(run_ranks(3, local_only)):
        for out in outs:
            error = (torch.from_numpy(out).double() - expected[layout.indices(rank)]).abs()
            assert (error <= bound(case, expected)).all()


def test_unknown_variant_names_the_known_ones():
    step = Step(0, balanced([1], 1).placements(), ())
    with pytest.raises(UserError, match="`variant` ring: it must be one of pass-kv, gather-kv, pa"):
        attend("ring", torch.zeros(1, 1, 64), None, step, ring=Ring(), scores=Scores(1.0))
