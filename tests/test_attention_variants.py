"""The variants on 1 to 4 ranks against float64: any batch, any placement of cached tokens."""

import random
import time
from dataclasses import dataclass

import pytest
import torch
from ranks import run_ranks

from cptool.attention import VARIANTS, Step, attend
from cptool.errors import UserError
from cptool.ring import Ring
from cptool.sharding import Placement, balanced, concat

NEVER = 2**31 - 1


@dataclass(frozen=True)
class Case:
    """New and cached tokens of each sequence; heads. `scatter`: cached tokens lie on any rank;
    `one_takes`: one rank takes all new tokens."""

    new: tuple[int, ...]
    cached: tuple[int, ...]
    heads: tuple[int, int] = (4, 2)
    head_dim: int = 64
    dtype: torch.dtype = torch.float32
    scatter: bool = False
    one_takes: bool = False

    def tensors(self):
        """q of all new tokens, K and V of all tokens, sequence after sequence."""
        generator = torch.Generator().manual_seed(sum(self.new) + 7 * sum(self.cached))
        total = sum(self.new) + sum(self.cached)
        shapes = [(sum(self.new), self.heads[0]), (total, self.heads[1]), (total, self.heads[1])]
        return [
            torch.randn(*shape, self.head_dim, generator=generator).to(self.dtype)
            for shape in shapes
        ]

    def layout(self, ranks):
        held = [p.cu_seqlens.diff().tolist() for p in self.cached_placements(ranks)]
        return balanced(self.new, ranks, self.cached, held, active=1 if self.one_takes else None)

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
]


class SlackKV:
    """One layer's KV as the cache gives it: slack after each sequence, full of NaN."""

    def __init__(self, placement, kv, starts):
        slots, positions, offsets, packed = [], [], [0], []
        for seq, held in enumerate(placement.sequences()):
            rows = kv[starts[seq] + held.long()]
            slack = 3 + seq
            slots += [rows, rows.new_full((slack, *rows.shape[1:]), float("nan"))]
            positions += [held, torch.full((slack,), NEVER, dtype=torch.int32)]
            offsets.append(offsets[-1] + len(held) + slack)
            packed.append(rows)
        slab = torch.cat(slots)
        cu_k = torch.tensor(offsets, dtype=torch.int32)
        self.local = (slab[:, 0], slab[:, 1], torch.cat(positions), cu_k)
        self._packed = torch.cat(packed)

    def packed(self):
        return self._packed


def reference(case):
    """float64 [new tokens, Hq, D], straight from the definition."""
    q, k, v = (t.double() for t in case.tensors())
    group = case.heads[0] // case.heads[1]
    outs, new_from, all_from = [], 0, 0
    for new, cached in zip(case.new, case.cached):
        keys = slice(all_from, all_from + cached + new)
        k_all = k[keys].repeat_interleave(group, 1)
        v_all = v[keys].repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", q[new_from : new_from + new], k_all)
        visible = torch.arange(cached + new) <= torch.arange(cached, cached + new)[:, None]
        scores = (scores * case.head_dim**-0.5).masked_fill(~visible, float("-inf"))
        outs.append(torch.einsum("hqk,khd->qhd", scores.softmax(-1), v_all))
        new_from, all_from = new_from + new, all_from + cached + new
    return torch.cat(outs)


def attend_all_cases(world, cases, variants, jitter=False):
    """This rank's (indices, out) for every case and variant, computed as the engine does."""
    ring = Ring(world.cp_group)
    answers = []
    for case in cases:
        q, k, v = case.tensors()
        kv = torch.stack([k, v], dim=1)
        starts = [sum(case.new[:b]) + sum(case.cached[:b]) for b in range(len(case.new))]
        layout = case.layout(ring.size)
        queries, cached = layout.placements(), case.cached_placements(ring.size)
        keys = tuple(concat(held, new) for held, new in zip(cached, queries))
        step = Step(rank=ring.rank, queries=queries, keys=keys)
        layer = SlackKV(keys[ring.rank], kv, starts)
        indices = layout.indices(ring.rank)
        for variant in variants:
            if jitter:
                time.sleep(random.random() / 100)
            out = attend(variant, q[indices], layer, step, ring, case.head_dim**-0.5)
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


@pytest.mark.parametrize("n", [2, 3, 4])
def test_splitting_adds_no_error(n, one_rank):
    """Error of N ranks <= 1.1 x error of one rank + one rounding of the output (the contract).

    As root mean square: the largest of a few hundred errors varies by more than that by chance.
    """
    for (index, variant), out in whole_outputs(n, CASES, list(VARIANTS)).items():
        expected, single = one_rank[index]
        if not expected.numel():
            assert not out.numel()
            continue
        error = (out.double() - expected).norm()
        own = (single.double() - expected).norm()
        rounding = torch.finfo(out.dtype).eps / 2 * expected.norm()
        assert error <= 1.1 * own + rounding, f"{variant} on {n} ranks, {CASES[index]}"


def bound(case, expected):
    """Largest error of attention with float32 sums over `keys` keys, and weights and output rounded
    to the case's dtype."""
    keys = max(new + cached for new, cached in zip(case.new, case.cached))
    largest = case.tensors()[2].abs().max().double()
    rounded = torch.finfo(case.dtype).eps * (largest + expected.abs().max())
    return torch.finfo(torch.float32).eps * keys * largest + rounded


def test_one_rank_agrees_with_the_definition(one_rank):
    for case, (expected, single) in zip(CASES, one_rank):
        if expected.numel():
            assert (single.double() - expected).abs().max() <= bound(case, expected), case


def test_one_rank_gives_the_same_for_every_variant():
    outputs = whole_outputs(1, CASES, list(VARIANTS))
    for (index, _), out in outputs.items():
        assert torch.equal(out, outputs[index, "pass-kv"])


def test_runs_are_bit_identical_whatever_the_arrival():
    cases = [CASES[1], CASES[5], CASES[7], CASES[10]]
    first = whole_outputs(4, cases, list(VARIANTS))
    for _ in range(2):
        again = whole_outputs(4, cases, list(VARIANTS), jitter=True)
        assert all(torch.equal(first[key], again[key]) for key in first)


def local_only(world):
    """Without keys of other ranks in the Step, for the variants that do not look at them."""
    ring, case = Ring(world.cp_group), CASES[7]
    q, k, v = case.tensors()
    starts = [sum(case.new[:b]) + sum(case.cached[:b]) for b in range(len(case.new))]
    layout = case.layout(ring.size)
    held = concat(case.cached_placements(ring.size)[ring.rank], layout.placement(ring.rank))
    step = Step(rank=ring.rank, queries=layout.placements(), keys=())
    layer = SlackKV(held, torch.stack([k, v], dim=1), starts)
    mine = q[layout.indices(ring.rank)]
    scale = case.head_dim**-0.5
    return [
        attend(variant, mine, layer, step, ring, scale).numpy()
        for variant in ("pass-q", "gather-q")
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
    with pytest.raises(UserError, match="--variant ring: it must be one of pass-kv, pass-q, gath"):
        attend("ring", torch.zeros(1, 1, 64), None, step, Ring(), 1.0)
