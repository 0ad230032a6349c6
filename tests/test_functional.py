"""`cptool.ring_attention` in a program of one's own: any batch, any group, against float64."""

import functools
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from reference import make_case, tolerance

import cptool
from cptool import functional as public
from cptool.errors import UserError

HEADS, DIM = (4, 2), 64
BATCHES = [[37], [1], [0, 5, 0, 64, 1], [2, 0], [100, 3, 29]]
VARIANTS = ["auto", "pass-kv", "gather-kv", "pass-q", "gather-q"]


def case_of(lengths, dtype=torch.float32, causal=True):
    return _case_of(tuple(lengths), dtype, causal)


@functools.cache
def _case_of(lengths, dtype, causal):
    """The whole batch, as one call of `attention_partial` takes it."""
    case = make_case(
        [(range(n), range(n)) for n in lengths], heads=HEADS, head_dim=DIM, dtype=dtype
    )
    if not causal:
        last = [torch.full((n,), n - 1, dtype=torch.int32) for n in lengths]
        case = type(case)(**{**vars(case), "q_pos": torch.cat(last)})
    return case


ALONE = SimpleNamespace(size=1, rank=0, cp_group=SimpleNamespace(process_group=None))


def on_ranks(n, fn, *args, **options):
    """What `fn` returns on each of n ranks; one rank is this process, without a group."""
    return run_ranks(n, fn, *args, **options) if n > 1 else [fn(ALONE, *args, **options)]


def attended(world, causal=True):
    """The whole results on every rank, of every batch, dtype and variant."""
    group, results = world.cp_group.process_group, {}
    for dtype in (torch.float32, torch.bfloat16):
        for number, lengths in enumerate(BATCHES):
            case = case_of(lengths, dtype, causal)
            mine = [cptool.shard(x, lengths, group) for x in (case.q, case.k, case.v)]
            for variant in VARIANTS:
                out = cptool.ring_attention(*mine, lengths, group, causal=causal, variant=variant)
                assert out.shape == mine[0].shape and out.dtype == dtype
                whole = cptool.unshard(out, lengths, group)
                results[dtype, number, variant] = whole.view(torch.uint8).numpy()
    return results


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_it_is_the_attention_of_the_whole_sequences(n, causal):
    everyone = on_ranks(n, attended, causal=causal)
    for (dtype, number, variant), bits in everyone[0].items():
        case = case_of(BATCHES[number], dtype, causal)
        out = torch.from_numpy(bits).view(dtype)
        allowed = tolerance(case, dtype, dtype, merged=True)
        error = (out.double() - case.exact[0]).abs()
        assert (error <= allowed.out).all(), (dtype, BATCHES[number], variant, error.max())
        for other in everyone[1:]:
            assert (other[dtype, number, variant] == bits).all()


def test_it_is_torchs_own_attention():
    case = case_of([53])
    q, k, v = (x.transpose(0, 1)[None] for x in (case.q, case.k, case.v))
    for causal in (True, False):
        expected = torch.nn.functional.scaled_dot_product_attention(
            q, k, v, is_causal=causal, enable_gqa=True, scale=0.3
        )
        out = cptool.ring_attention(case.q, case.k, case.v, 53, causal=causal, scale=0.3)
        torch.testing.assert_close(out, expected[0].transpose(0, 1))


def dealt(world, lengths):
    group = world.cp_group.process_group
    whole = torch.arange(sum(lengths))
    mine = cptool.shard(whole, lengths, group)
    positions = cptool.shard_positions(torch.tensor(lengths), group)
    assert positions.dtype == torch.int64 and positions.shape == mine.shape
    first = torch.tensor([0, *lengths]).cumsum(0)
    sequence = torch.bucketize(mine, first[1:], right=True)
    assert torch.equal(first[sequence] + positions, mine)
    for x in (whole, whole[:, None].bool(), torch.randn(len(whole), 3, 2).double()):
        if world.size > 1:
            x = x.clone()
            dist.broadcast(x, 0, group=group)
        assert torch.equal(cptool.unshard(cptool.shard(x, lengths, group), lengths, group), x)
    return mine.tolist()


@pytest.mark.parametrize("lengths", BATCHES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_every_token_is_on_one_rank_and_comes_back(n, lengths):
    shares = on_ranks(n, dealt, lengths)
    assert sorted(token for share in shares for token in share) == list(range(sum(lengths)))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def test_a_shard_passes_gradients():
    x = torch.randn(9, 2, requires_grad=True)
    cptool.shard(x, [4, 5]).sum().backward()
    assert torch.equal(x.grad, torch.ones(9, 2))


def test_mistakes_are_one_line():
    case = case_of([8])
    q, k, v = case.q, case.k, case.v
    for call, rule in [
        (lambda: cptool.ring_attention(q[:7], k, v, 8), r"`q` of shape \[7, 4, 64\]: rank 0 of 1"),
        (lambda: cptool.ring_attention(q, k, v[0], 8), "`v` of shape"),
        (lambda: cptool.ring_attention(q, k, v, [-8, 16]), "`lengths`"),
        (lambda: cptool.ring_attention(q, k, v, [7.5, 0.5]), "`lengths`"),
        (lambda: cptool.ring_attention(q, k, v, 8, variant="fast"), "`variant` fast"),
        (lambda: cptool.shard(q, 9), "it must hold all 9 tokens"),
        (lambda: cptool.unshard(q, 9), "it must hold this rank's 9 of the 9 tokens"),
        (
            lambda: cptool.ring_attention(q.clone().requires_grad_(), k, v, 8),
            "q requires a gradient, and ring_attention has no backward; call it under torch.no_gr",
        ),
        (lambda: cptool.unshard(q.clone().requires_grad_(), 8), "unshard has no backward"),
        (lambda: cptool.shard(q, 8, object()), "not a member of `group`"),
    ]:
        with pytest.raises(UserError, match=rule) as told:
            call()
        assert "\n" not in str(told.value)
    with torch.no_grad():
        cptool.ring_attention(q.clone().requires_grad_(), k, v, 8)


def told(world, change):
    case, group = case_of([8]), world.cp_group.process_group
    lengths = [8 + 2 * (world.rank == 1)] if change == "lengths" else [8]
    rows = balanced_tokens(lengths, world)
    variant = "pass-q" if change == "variant" and world.rank == 1 else "pass-kv"
    try:
        cptool.ring_attention(
            case.q[:rows], case.k[:rows], case.v[:rows], lengths, group, variant=variant
        )
    except UserError as error:
        return str(error)
    return ""


def balanced_tokens(lengths, world):
    return len(cptool.shard_positions(lengths, world.cp_group.process_group))


@pytest.mark.parametrize("change", ["lengths", "variant"])
def test_ranks_that_disagree_are_told(change):
    for line in run_ranks(2, told, change):
        assert line.startswith("ranks 0 and 1 of the group were given different")
        assert change in line


EXAMPLE = public.__doc__.partition("\n\n")[2].partition("\n\n")[2]
SPAWNED = """
import os
import torch
import torch.multiprocessing as multiprocessing

def rank_main(rank, n):
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(n), LOCAL_RANK=str(rank))
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    import torch.distributed as dist
    started = dist.init_process_group
    store = "file://" + os.path.abspath("store")
    dist.init_process_group = lambda backend: started(
        backend, init_method=store, rank=rank, world_size=n
    )
    exec(open("example.py").read(), {})

if __name__ == "__main__":
    torch.set_num_threads(1)
    multiprocessing.spawn(rank_main, args=(3,), nprocs=3)
"""


@pytest.mark.parametrize("launcher", ["torchrun", "spawn"])
def test_the_example_runs(launcher, tmp_path):
    """Under torchrun, and by torch.multiprocessing: no world of cptool's is needed."""
    lines = [re.sub("^    ", "", line) for line in EXAMPLE.splitlines()]
    (tmp_path / "example.py").write_text(
        "\n".join([*lines[:-1], "assert whole.shape == (1037, 4, 64)", lines[-1], ""])
    )
    (tmp_path / "spawned.py").write_text(SPAWNED)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command = [*torchrun, "example.py"] if launcher == "torchrun" else ["spawned.py"]
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=tmp_path, timeout=300
    )
    assert done.returncode == 0, done.stderr
