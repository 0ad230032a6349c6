"""Windows and soft caps in the kernels for compute capability 8.0, emulated, against float64; and
mistakes planted in them, each of which a test sees.
"""

import ctypes
from dataclasses import replace

import cuda_emulator
import planted_windows
import pytest
import torch
from cuda_emulator import Emulator
from reference import Case, check, make_case, tolerance

pytestmark = pytest.mark.skipif(cuda_emulator.compiler() is None, reason="no C++ compiler")

TILE = 64
"""Keys of a tile."""


class Windows(Emulator):
    entries = ("emulated_attention",)

    def device(self, multiprocessors: int) -> None:
        self._library.emulated_device(multiprocessors)

    def mistake(self, number: int) -> None:
        self._library.emulated_mistake(number)

    def pieces(self, case: Case) -> int:
        """In how many pieces the keys of a call are computed."""
        arguments = cuda_emulator._arguments(
            *case.arguments, torch.empty(case.q.shape), torch.empty(case.q.shape[:2]), False
        )
        arguments.window, arguments.cap = case.window or 0, case.cap or 0.0
        return self._library.emulated_pieces(ctypes.byref(arguments))


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    return Windows(planted_windows.build_planted(tmp_path_factory.mktemp("windows")))


@pytest.fixture
def cuda(library):
    library.device(108)
    library.mistake(0)
    return library


def run(cuda: Windows, case: Case, **options):
    return cuda.attention(*case.arguments, **case.options, **options)


def expect_exact(cuda: Windows, case: Case, **options) -> None:
    result = run(cuda, case, **options)
    check(case, result, tolerance(case, case.q.dtype, merged=True))


def kept(positions, ranks: int, rank: int) -> list[int]:
    """The tokens of a rank in a load-balanced sharding: of 2 N chunks the i-th from either end."""
    chunk = -(-len(positions) // (2 * ranks))
    chunks = [positions[i * chunk : (i + 1) * chunk] for i in range(2 * ranks)]
    return [*chunks[rank], *chunks[2 * ranks - 1 - rank]]


PROMPT = range(420)
SEQUENCES = {
    "prompts": [
        (range(150), range(150)),
        ([*range(33), *range(231, 250)], [*range(33, 66), *range(198, 231)]),
        ([], range(5)),
        (range(7), []),
        (range(3), range(2, 9)),
    ],
    "shard on shard": [
        (kept(PROMPT, 2, q_rank), kept(PROMPT, 2, k_rank)) for q_rank in (0, 1) for k_rank in (0, 1)
    ],
    "shard on all": [(kept(PROMPT, 2, 0), PROMPT), (kept(PROMPT, 3, 1), range(0, 420, 3))],
    "gaps": [
        (
            [*range(5), *range(300, 320), *range(700, 705)],
            [*range(2), *range(290, 301), *range(306, 720, 2)],
        ),
        (range(600, 640, 7), range(640)),
        ([9, 500], range(100, 480)),
    ],
    "one token": [([700], range(701)), ([250], range(0, 500, 2)), ([0], [0]), ([3], range(4, 9))],
}
WINDOWS = [1, 17, 64, 65, 200, 2**31 - 1]


@pytest.mark.parametrize("window", WINDOWS)
@pytest.mark.parametrize("sequences", SEQUENCES.values(), ids=SEQUENCES)
def test_windows(cuda, sequences, window):
    head_dim = {1: 80, 17: 64, 64: 96, 65: 128}.get(window, 64)
    dtype = torch.float16 if window % 2 else torch.bfloat16
    case = make_case(sequences, heads=(3, 1), head_dim=head_dim, dtype=dtype, slack=70)
    cuda.counters()
    expect_exact(cuda, replace(case, window=window), seed=window % 100)
    counters = cuda.counters()
    assert counters.collectives > 0 and counters.bank_conflicts == 0


@pytest.mark.parametrize("window", [None, 40])
@pytest.mark.parametrize("cap, spread", [(0.5, 1.0), (2.0, 30.0), (30.0, 10.0), (1e30, 1.0)])
@pytest.mark.parametrize("name", ["prompts", "one token"])
def test_soft_caps(cuda, name, cap, spread, window):
    case = make_case(
        SEQUENCES[name], head_dim=96, dtype=torch.float16, slack=3, spread=spread, seed=1
    )
    expect_exact(cuda, replace(case, window=window, cap=cap))


@pytest.mark.parametrize("group", range(1, 17))
def test_groups_of_query_heads(cuda, group):
    """Of rows that fill a block, are cut by one, and of few tokens."""
    case = make_case(
        [(range(100, 145), range(60, 150)), ([7, 90], range(0, 100, 3))],
        heads=(group, 1),
        dtype=torch.bfloat16,
    )
    expect_exact(cuda, replace(case, window=30, cap=4.0 if group % 2 else None))
    case = make_case([([300], range(301))], heads=(2 * group, 2), dtype=torch.bfloat16)
    expect_exact(cuda, replace(case, window=130, cap=None if group % 2 else 4.0))


PIECES = {
    "one token": ([([4000], range(4001))], 1500),
    "tokens of a turn": ([(range(4000, 4009), range(4100))], 1500),
    "behind the window of another sequence": ([([4000], range(4001)), ([90], range(4001))], 1100),
    "every other key": ([(range(3000, 3004), range(0, 4001, 2))], 1500),
}


@pytest.mark.parametrize("sequences, window", PIECES.values(), ids=PIECES)
def test_pieces_are_of_the_keys_in_the_window(cuda, sequences, window):
    case = make_case(sequences, heads=(4, 2), dtype=torch.bfloat16, slack=30)
    windowed = replace(case, window=window, cap=3.0)
    assert 1 < cuda.pieces(windowed) <= (window + 8) // (4 * TILE) < cuda.pieces(case)
    expect_exact(cuda, windowed)


def test_pieces_of_queries_with_a_gap(cuda):
    """A piece may lie in the gap and then holds nothing."""
    case = make_case([([2000, 2001, 9000], range(9100))], heads=(2, 1), dtype=torch.bfloat16)
    case = replace(case, window=1500)
    assert cuda.pieces(case) > 3
    expect_exact(cuda, case)


@pytest.mark.parametrize("name", SEQUENCES)
def test_into(cuda, name):
    case = make_case(SEQUENCES[name], heads=(4, 2), dtype=torch.bfloat16, slack=3)
    case = replace(case, window=50, cap=5.0)
    keep = torch.arange(len(case.k_pos)) % 3 == 0
    running = run(cuda, case.only_keys(keep))
    running[0][running[1] == -torch.inf] = torch.nan  # is ignored
    result = run(cuda, case.only_keys(~keep), into=running)
    check(case, result, tolerance(case, torch.bfloat16, merged=True))


def test_output_in_the_input_dtype(cuda):
    case = make_case(SEQUENCES["shard on all"], dtype=torch.float16)
    case = replace(case, window=100)
    allowed = tolerance(case, torch.float16, torch.float16, merged=True)
    check(case, run(cuda, case, out_dtype=torch.float16), allowed)


@pytest.mark.parametrize("name", ["shard on all", "one token"])
def test_every_order_of_threads_gives_the_same_bits(cuda, name):
    case = make_case(SEQUENCES[name], heads=(3, 1), dtype=torch.bfloat16)
    case = replace(case, window=100, cap=5.0)
    expected = run(cuda, case)
    for seed in range(1, 4):
        for got, same in zip(run(cuda, case, seed=seed), expected, strict=True):
            assert torch.equal(got, same)


ONE_BLOCK = {
    # Sequences whose queries are one block of rows.
    "one token": ([1000], range(1100)),
    "a turn": (range(1000, 1012), range(1100)),
    "two chunks": ([*range(100, 115), *range(900, 915)], range(1000)),
    "three chunks": ([*range(100, 110), *range(500, 510), *range(900, 910)], range(1000)),
    "queries that see nothing": ([5, 300, 301, 700], [*range(100), *range(600, 800)]),
    "no keys in any window": (range(500, 510), range(300)),
}


def tiles_read(case: Case) -> torch.Tensor:
    """The keys that a block may read: those of tiles of which some query sees a key, up to the
    last visible one.
    """
    keys = torch.zeros(len(case.k), dtype=torch.bool)
    for _, part, visible in case.sequences():
        seen = visible.any(0)
        for first in range(0, len(seen), TILE):
            tile = slice(part.start + first, part.start + min(first + TILE, len(seen)))
            keys[tile] = seen[first : first + TILE].any()
    return keys


def ranges(keys: torch.Tensor, slab: torch.Tensor) -> list[torch.Tensor]:
    """The rows of the slab where `keys` holds, in contiguous parts."""
    edges = keys.int().diff(prepend=torch.tensor([0]), append=torch.tensor([0])).nonzero()[:, 0]
    return [slab[begin:end] for begin, end in edges.view(-1, 2).tolist()]


@pytest.mark.parametrize("window", [1, 40, 130])
@pytest.mark.parametrize("heads", [(2, 1), (8, 1)], ids=["many rows or few", "many rows"])
@pytest.mark.parametrize("sequence", ONE_BLOCK.values(), ids=ONE_BLOCK)
def test_tiles_that_no_query_sees_are_not_read(cuda, sequence, heads, window):
    """Copies from there fail in the emulation, and NaN would reach the result."""
    if len(sequence[0]) * heads[0] > 128:
        heads = (4, 1)
    case = make_case([sequence], heads=heads, dtype=torch.bfloat16)
    slab = torch.stack([case.k, case.v], 1)
    case = replace(case, window=window, k=slab[:, 0], v=slab[:, 1])
    cuda.device(1)  # in one piece
    allowed, keys = tolerance(case, torch.bfloat16), tiles_read(case)
    assert cuda.pieces(case) == 1
    slab[~keys] = torch.nan
    readable = [case.q, *ranges(keys, slab)]
    out, lse = run(cuda, case, readable=readable)
    assert not out.isnan().any()
    slab[~keys] = 0.0  # for the reference
    check(case, (out, lse), allowed)
    for part in range(1, len(readable)):
        fewer = [*readable[:part], readable[part][TILE:], *readable[part + 1 :]]
        with pytest.raises(RuntimeError, match="reads global memory that it must not read"):
            run(cuda, case, readable=fewer)


def test_offsets_and_positions_without_sense_read_nothing_outside(cuda):
    case = make_case(SEQUENCES["shard on all"], dtype=torch.bfloat16, slack=5)
    slab = torch.stack([case.k, case.v], 1)
    case = replace(case, k=slab[:, 0], v=slab[:, 1])
    generator = torch.Generator().manual_seed(0)

    def random(like, bits):
        return torch.randint(-(2**bits), 2**bits - 1, like.shape, generator=generator).int()

    for bits, window in ((31, 1), (10, 100), (8, 40), (31, 2**40)):
        offsets = {name: random(getattr(case, name), bits) for name in ("cu_q", "cu_k")}
        positions = {name: random(getattr(case, name), bits) for name in ("q_pos", "k_pos")}
        for change in (offsets, positions, offsets | positions):
            run(cuda, replace(case, window=window, **change), readable=[case.q, slab])


def test_calls_that_it_leaves_to_others(cuda):
    """A cap by which the scale cannot be divided in float32."""
    case = make_case([([5], range(5))], dtype=torch.bfloat16)
    for scale, cap in ((1e-20, 1e30), (1e30, 1e-30)):
        with pytest.raises(RuntimeError, match="does not take this call"):
            run(cuda, replace(case, scale=scale, cap=cap))


# Planted mistakes.

MISTAKE_CASES = {
    "shards": (SEQUENCES["shard on all"], (2, 1), 100, 108),
    "prompt": ([(range(300), range(300))], (2, 1), 64, 108),
    "gap": ([ONE_BLOCK["three chunks"]], (2, 1), 40, 1),
    "decode": ([([700], range(701))], (2, 1), 130, 1),
    "pieces": (PIECES["tokens of a turn"][0], (2, 1), 1500, 108),
}


@pytest.mark.parametrize("name", ["", *planted_windows.MISTAKES])
def test_each_mistake_is_seen(cuda, name):
    """In the result, or by a read of what no query sees; without one, all is right."""
    said = []
    for sequences, heads, window, multiprocessors in MISTAKE_CASES.values():
        case = make_case(sequences, heads=heads, dtype=torch.float16, spread=8.0)
        slab = torch.stack([case.k, case.v], 1)
        case = replace(case, k=slab[:, 0], v=slab[:, 1], window=window, cap=10.0)
        cuda.device(multiprocessors)
        cuda.mistake(planted_windows.NUMBERS.get(name, 0))
        keys = tiles_read(case) if len(sequences) == 1 else slab.new_ones(len(slab)) > 0
        try:
            result = run(cuda, case, readable=[case.q, *ranges(keys, slab)])
            check(case, result, tolerance(case, torch.float16, merged=True))
        except (RuntimeError, AssertionError) as error:
            said.append(str(error) or "wrong result")
            if name:
                return
    assert not name and not said, said
