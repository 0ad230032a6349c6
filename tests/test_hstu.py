"""`cptool.hstu_attention` and the block of examples/hstu.py over ranks, against float64."""

import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ranks import run_ranks

import cptool
from cptool.errors import UserError
from cptool.parallel import groups

ROOT = Path(__file__).resolve().parents[1]
EXAMPLE = ROOT / "examples" / "hstu.py"
HEADS, DIM, MAX_LEN = (4, 2), 64, 200
# Lengths, targets and a window: no history, nothing but targets, more ranks than tokens.
BATCHES = [
    ([37], None, None),
    ([150, 1, 37, 0], [20, 1, 0, 0], 90),
    ([1], [1], None),
    ([5, 64, 3], [5, 10, 1], 4),
    ([100, 3, 29], [0, 3, 28], 1),
]
VARIANTS = ["auto", "pass-kv", "gather-kv", "pass-q", "gather-q"]
ALONE = SimpleNamespace(size=1, rank=0, cp_group=SimpleNamespace(process_group=None))


@functools.cache
def example():
    spec = importlib.util.spec_from_file_location("hstu_example", EXAMPLE)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def on_ranks(n, fn, *args, **options):
    """What `fn` returns on each of n ranks; one rank is this process, without a group."""
    return run_ranks(n, fn, *args, **options) if n > 1 else [fn(ALONE, *args, **options)]


def tensors(lengths, dtype):
    generator = torch.manual_seed(len(lengths))
    return [
        torch.randn(sum(lengths), heads, DIM, generator=generator).to(dtype)
        for heads in (HEADS[0], HEADS[1], HEADS[1])
    ]


def formula(lengths, targets, window, dtype, compute=torch.float64, sizes=False):
    """The published mask, position by position; with `sizes`, the sum of the sizes of its terms."""
    q, k, v = (x.to(compute) for x in tensors(lengths, dtype))
    k, v = (x.repeat_interleave(HEADS[0] // HEADS[1], 1) for x in (k, v))
    out, first = torch.zeros_like(q), 0
    for length, own in zip(lengths, targets or [0] * len(lengths), strict=True):
        history = length - own
        sees = torch.zeros(length, length, dtype=torch.bool)
        for i in range(length):
            at = min(i, history)
            sees[i, i] = True
            sees[i, max(0, at - (window or length) + 1) : at] = True
        rows = slice(first, first + length)
        scores = torch.einsum("ihd,jhd->hij", q[rows], k[rows]) * DIM**-0.5
        weights = torch.nn.functional.silu(scores).masked_fill(~sees, 0) / MAX_LEN
        values = v[rows]
        if sizes:
            weights, values = weights.abs(), values.abs()
        out[rows] = torch.einsum("hij,jhd->ihd", weights, values)
        first += length
    return out


def attended(world):
    """The whole results on every rank, of every batch, dtype and variant."""
    group, results = world.cp_group.process_group, {}
    for dtype in (torch.float32, torch.bfloat16):
        for number, (lengths, targets, window) in enumerate(BATCHES):
            mine = [cptool.shard(x, lengths, group) for x in tensors(lengths, dtype)]
            for variant in VARIANTS:
                out = cptool.hstu_attention(
                    *mine,
                    lengths,
                    group,
                    max_len=MAX_LEN,
                    targets=targets,
                    window=window,
                    variant=variant,
                )
                assert out.shape == mine[0].shape and out.dtype == dtype
                whole = cptool.unshard(out, lengths, group)
                results[dtype, number, variant] = whole.view(torch.uint8).numpy()
    return results


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_attention_is_that_of_the_whole_sequences(n):
    everyone = on_ranks(n, attended)
    for (dtype, number, variant), bits in everyone[0].items():
        batch = BATCHES[number]
        out = torch.from_numpy(bits).view(dtype)
        exact = formula(*batch, dtype)
        plain = formula(*batch, dtype, dtype)
        u = torch.finfo(dtype).eps / 2
        # Two roundings of targets, and a few of every term.
        allowed = (
            2 * (plain - exact).abs().max()
            + 2 * u * exact.abs().max()
            + 4 * u * formula(*batch, dtype, sizes=True).max()
        )
        error = (out.double() - exact).abs().max()
        assert error <= allowed, (dtype, batch, variant, error, allowed)
        for other in everyone[1:]:
            assert (other[dtype, number, variant] == bits).all()


def compared(world):
    group = world.cp_group.process_group
    return [
        example().compare(lengths, targets or [0] * len(lengths), group, window=window)
        for lengths, targets, window in BATCHES
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 4])
def test_the_block_is_its_formula(n):
    for error, plain in on_ranks(n, compared)[0]:
        assert error <= 2 * plain


def test_the_example_runs_on_two_ranks():
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, "--nproc-per-node=2", EXAMPLE], capture_output=True, text=True, env=environment
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("2 blocks on 2 ranks:")


def different(world):
    q, k, v = (cptool.shard(x, [40], world.cp_group.process_group) for x in tensors([40], q_type))
    try:
        cptool.hstu_attention(
            q, k, v, 40, world.cp_group.process_group, max_len=50, targets=world.rank
        )
    except UserError as error:
        return str(error)


q_type = torch.float32


def test_ranks_must_agree():
    for message in run_ranks(2, different):
        assert "ranks 0 and 1 of the group were given different `targets`, `window`" in message


def refused(world):
    """What two ranks say to the same mistake, of which one has no tokens."""
    groups._agreed.clear()  # an earlier test may have called with the same arguments
    q, k, v = (cptool.shard(x, 1, world.cp_group.process_group) for x in tensors([1], q_type))
    said = []
    for more in ({"window": 0}, {"window": True}, {"scale": float("nan")}, {"max_len": 8.0}):
        with pytest.raises(ValueError) as told:
            cptool.hstu_attention(q, k, v, 1, world.cp_group.process_group, **{"max_len": 8} | more)
        said.append(str(told.value))
    for function, more in ((cptool.hstu_attention, {"max_len": 8}), (cptool.ring_attention, {})):
        with pytest.raises(ValueError) as told:
            function(q, k, v[..., :32], 1, world.cp_group.process_group, **more)
        said.append(str(told.value).replace("[0, ", "[1, "))
        with pytest.raises(UserError) as told:
            wide = k.to(q_type if world.rank else torch.bfloat16)
            function(q, wide, wide, 1, world.cp_group.process_group, **more)
        said.append(str(told.value))
    return [world.rank, len(q), said]


def test_ranks_without_tokens_refuse_the_same():
    (_, one, told), (_, none, same) = run_ranks(2, refused)
    assert (one, none) == (1, 0) and told == same
    rules = ["window is 0", "window is True", "scale is nan", "max_len is 8.0"]
    rules += ["v has shape [1, 2, 32]", "were given different dtypes"] * 2
    for rule, message in zip(rules, told, strict=True):
        assert rule in message and "\n" not in message


def test_mistakes_are_one_line():
    q, k, v = tensors([8], torch.float32)
    for lengths, options, rule in [
        (8, {"targets": 9}, r"`targets` \[9\]: each must be at most that of `lengths` \[8\]"),
        (8, {"targets": [1, 1]}, r"`targets` \[1, 1\]: each must be at most that of"),
        (8, {"targets": -1}, r"`targets` \[-1\]: they must be numbers of tokens"),
        (8, {"variant": "fast"}, "`variant` fast"),
        (9, {}, r"`q` of shape \[8, 4, 64\]: rank 0 of 1 has 9 of the 9"),
    ]:
        with pytest.raises(UserError, match=rule) as told:
            cptool.hstu_attention(q, k, v, lengths, max_len=8, **options)
        assert "\n" not in str(told.value)
    with pytest.raises(UserError, match="hstu_attention has no backward"):
        cptool.hstu_attention(q.clone().requires_grad_(), k, v, 8, max_len=8)
    with pytest.raises(ValueError, match="max_len is 0"):
        cptool.hstu_attention(q, k, v, 8, max_len=0)
    with pytest.raises(ValueError, match="window is 0"):
        cptool.hstu_attention(q, k, v, 8, max_len=8, window=0)
