"""`bench emulate`: its counts are exact, transfers are exposed where they are, and it refuses what
does not fit.
"""

import dataclasses
import json
import math
import time

import pytest
import torch
from click.testing import CliRunner

from cptool.cli.main import main
from cptool.cli.options.types import TokenCount
from cptool.emulation.layer import OTHER, Scenario, shards
from cptool.emulation.projection import _blocks, emulate
from cptool.emulation.ring import Compute, EmulatedRing, Start, Timeline, Wait, replay
from cptool.errors import UserError
from cptool.model.shapes import SHAPES
from cptool.ops.fp8 import Fp8Weight, packed
from cptool.planning.cost.counts import attention_flops, kv_bytes, linear_flops
from cptool.planning.cost.rates import all_reduce
from cptool.planning.hardware import Link
from cptool.planning.profiles import default_profile

TINY = dataclasses.replace(
    SHAPES["llama3-8b"],
    vocab_size=64,
    hidden_size=96,
    intermediate_size=160,
    num_hidden_layers=3,
    num_attention_heads=8,
    num_key_value_heads=2,
    head_dim=16,
)
LINK = Link(
    bandwidth=1e9, fan_out=2e9, latency_s=1e-3, message_overhead_s=1e-4, collective_latency_s=2e-3
)
PROFILE = dataclasses.replace(
    default_profile("cpu"), host_link=LINK, network=LINK, transfer_steals=0.0, wait_s=1e-5
)


def scenario(**changes) -> Scenario:
    base = Scenario(
        config=TINY,
        cp=1,
        tp=1,
        new=301,
        cached=0,
        variant="pass-kv",
        dtype=torch.float32,
        device=torch.device("cpu"),
    )
    return dataclasses.replace(base, **changes)


def work(seconds):
    return Compute("attention", seconds)


def test_bytes_hide_under_compute_and_latency_does_not():
    trace = [Start(1, 3_000_000, 1), work(0.010), Wait((1,))]
    assert replay(trace, LINK) == pytest.approx(0.001)
    assert replay(trace, LINK, steals=0.5) == pytest.approx(0.0025)
    trace[1] = work(0.001)
    assert replay(trace, LINK) == pytest.approx(0.003)


def test_transfers_follow_each_other_on_a_link():
    trace = [Start(1, 1_000_000, 1), Start(2, 1_000_000, 3), work(0.0003), Wait((1, 2))]
    # The first flows while the second one's latency passes; three messages fan out.
    assert replay(trace, LINK) == pytest.approx(0.001 + 0.0012 + 0.0005 - 0.0003)
    assert replay([Start(1, 0, 0), Wait((1,))], LINK) == 0  # an empty batch is not sent


def test_compute_lies_before_the_wait_that_ends_it():
    timeline = Timeline(torch.device("cpu"))
    ring = EmulatedRing(1, 3, timeline)
    timeline.mark("attention")
    for source, block in ring.blocks(torch.zeros(5, 2), [4, 5, 6]):
        assert block.shape == ([4, 5, 6][source], 2)
        time.sleep(0.002 * (1 + source))
    timeline.mark("end")
    blocks = _blocks(timeline.trace(), "pass-kv", 1, [0, 0, 0])
    assert [block.source for block in blocks] == [1, 2, 0]
    slept = [block.seconds for block in blocks]
    assert slept[0] >= 0.004 and slept[1] >= 0.006 and slept[2] >= 0.002


@pytest.mark.parametrize("cached", [0, 77])
def test_one_rank_counts_the_whole_layer(cached):
    result = emulate(scenario(cached=cached), PROFILE, repeats=1)
    whole = linear_flops(TINY, 301) + attention_flops(TINY, 301, cached)
    assert sum(part.flops for part in result.parts) * TINY.num_hidden_layers == whole
    assert [part.name for part in result.parts if part.seconds > 0] == [
        "qkv_proj",
        "attention",
        "o_proj",
        "gate_up_proj",
        "down_proj",
        OTHER,
    ]
    assert {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"} < {
        part.name for part in result.parts
    }
    assert (result.exposed_s, result.waiting_s, result.sent_bytes, result.allreduce_s) == (0,) * 4
    assert result.ttft_s == pytest.approx(
        TINY.num_hidden_layers * result.compute_s + sum(result.once.values())
    )


@pytest.mark.parametrize("cached", [0, 77])
@pytest.mark.parametrize(
    "variant", ["pass-kv", "pass-q", "gather-kv", "gather-q", "pass-q-all2all"]
)
def test_a_rank_of_four(variant, cached):
    asked = scenario(cp=4, tp=2, cached=cached, variant=variant)
    held = shards(asked, 4)
    result = emulate(asked, PROFILE, repeats=2)
    rank = result.rank
    assert (result.queries, result.keys) == (held.queries[rank].tokens, held.keys[rank].tokens)
    queries, keys = held.queries, held.keys
    ours = (queries[rank], keys) if result.variant.endswith("kv") else (queries, keys[rank])
    asking, holding = ([x] * 4 if not isinstance(x, tuple) else x for x in ours)
    expected = [
        sum(int((k.positions <= p).sum()) for p in q.positions)
        for q, k in zip(asking, holding, strict=True)
    ]
    assert sum(block.pairs for block in result.blocks) == sum(expected)
    for block in result.blocks:
        if block.source is not None:
            assert block.pairs == expected[block.source] and block.seconds > 0
    attention = next(part for part in result.parts if part.name == "attention")
    assert attention.flops == 4 * 4 * 16 * sum(expected)
    assert sum(s.seconds for s in result.blocks) == pytest.approx(attention.seconds, rel=0.6)
    assert 0 < result.exposed_s <= result.transfer_s * 1.001
    assert result.allreduce_bytes == 2 * 4 * 96 * result.queries
    assert result.allreduce_s == pytest.approx(
        2 * all_reduce(result.allreduce_bytes / 2, 2, PROFILE)[0]
    )
    assert result.layer_s > result.compute_s


def test_what_pass_kv_sends():
    asked = scenario(cp=4)
    held = shards(asked, 4)
    result = emulate(asked, PROFILE, repeats=1)
    # All blocks but the one that the predecessor has already are passed on.
    kept = held.keys[(result.rank - 1) % 4].tokens
    assert result.sent_bytes == kv_bytes(TINY, 301 - kept, 4) // TINY.num_hidden_layers


@pytest.mark.parametrize("variant", ["pass-kv", "gather-kv", "pass-q", "gather-q"])
def test_layers_in_windows(variant):
    """Their pairs and bytes are those of the window; layers that differ are refused."""
    windowed = dataclasses.replace(TINY, windows=(40,) * 3)
    full, less = (
        emulate(scenario(config=config, cp=4, cached=900, variant=variant), PROFILE, repeats=1)
        for config in (TINY, windowed)
    )
    assert less.flops == linear_flops(TINY, 301, 1) + attention_flops(windowed, 301, 900)
    held = shards(scenario(cp=4, cached=900), 4)
    seen = sum(held.pairs(q, k, 40) for q in range(4) for k in range(4))
    assert 3 * 4 * 8 * 16 * seen == attention_flops(windowed, 301, 900)
    attention = [part.flops for part in less.parts if part.name == "attention"]
    assert attention == [4 * 8 * 16 * sum(block.pairs for block in less.blocks)]
    if variant.endswith("kv"):
        assert less.sent_bytes < full.sent_bytes / 2
    mixed = dataclasses.replace(TINY, windows=(40, None, 40))
    with pytest.raises(UserError, match="different windows"):
        emulate(scenario(config=mixed, variant=variant), PROFILE, repeats=1)


def test_ranks_share_the_work_in_balance():
    held = shards(scenario(cp=4, new=4096), 4)
    work = [sum(held.pairs(rank, source) for source in range(4)) for rank in range(4)]
    assert sum(work) == 4096 * 4097 // 2
    assert work[held.busiest] == max(work) and max(work) - min(work) < 0.001 * max(work)


def test_allreduce_in_ring_form():
    assert all_reduce(1e9, 1, PROFILE) == (0, 0)
    assert all_reduce(8e6, 8, PROFILE)[0] == pytest.approx(2e-3 + 2 * 7 / 8 * 4e-3)


def test_rowwise_fp8_is_a_product():
    torch.manual_seed(0)
    weight, x = torch.randn(48, 64).bfloat16(), torch.randn(10, 64).bfloat16()
    got = Fp8Weight(packed(weight), torch.bfloat16).linear(x).float()
    exact = x.float() @ weight.float().T
    # e4m3 has 3 bits of mantissa: each factor errs by 2^-4 at most, independently over 64 terms.
    assert (got - exact).abs().max() <= 4 * math.sqrt(64) * 2 * 2**-4


@pytest.mark.parametrize(
    ("text", "count"), [("1M", 10**6), ("128k", 128_000), ("1.5K", 1500), ("2Ki", 2048), ("7", 7)]
)
def test_token_counts(text, count):
    assert TokenCount().convert(text, None, None) == count


def run(*options):
    return CliRunner().invoke(main, ["bench", "emulate", "--device", "cpu", *options])


@pytest.fixture
def tiny_file(tmp_path):
    names = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "head_dim",
        "num_attention_heads",
        "num_key_value_heads",
        "rms_norm_eps",
        "rope_theta",
    )
    path = tmp_path / "config.json"
    path.write_text(json.dumps({name: getattr(TINY, name) for name in names}))
    return str(path)


def test_the_command(tiny_file):
    options = (
        "--shape",
        tiny_file,
        "--cp",
        "2",
        "--tp",
        "2",
        "--context",
        "0.4K",
        "--repeats",
        "1",
        "--dtype",
        "float32",
    )
    result = run(*options, "--json", "--cached", "100")
    assert result.exit_code == 0, result.output
    told = json.loads(result.stdout)
    assert (told["tokens"], told["cached"], told["layers"]) == (300, 100, 3)
    layer = told["layer"]
    assert layer["seconds"] == pytest.approx(
        sum(part["seconds"] for part in layer["parts"])
        + sum(layer[name] for name in ("exposed_s", "waiting_s", "allreduce_s"))
    )
    assert told["ttft_s"] == pytest.approx(3 * layer["seconds"] + sum(told["once_s"].values()))
    assert any("links of cpu-" in line for line in told["assumptions"])
    assert told["planned_ttft_s"] > 0
    drawn = run(*options, "--variant", "auto")
    assert drawn.exit_code == 0 and "projected for 3 layers" in " ".join(drawn.stdout.split())


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (("--shape", "llama3-405b", "--context", "4M"), "GB too few; use more --cp or --tp"),
        (("--shape", "llama3-405b", "--tp", "3", "--context", "1K"), "--tp 3"),
        (("--shape", "llama9", "--context", "1K"), "no such model"),
        (("--shape", "llama3-1b", "--context", "many"), "'many' must be a whole number"),
        (("--shape", "llama3-1b", "--context", "1K", "--cached", "1K"), "less than --context"),
        (("--shape", "llama3-1b", "--context", "1K", "--hardware", "gone"), "no such profile"),
    ],
)
def test_what_is_refused(options, told):
    result = run(*options)
    assert result.exit_code == 2 and told in result.stderr
    assert result.stderr.count("\n") == 1 and not result.stdout
