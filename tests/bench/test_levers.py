"""`cptool bench levers`: every row computes the same, but for its weights."""

import json
import math
import time
from contextlib import contextmanager
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from click.testing import CliRunner

from cptool.bench import levers as bench_levers
from cptool.bench.lever_rows import WIDE, Lever, Trial, levers
from cptool.bench.levers import compile_feed_forward, idle_share, measure
from cptool.bench.naive import NaiveEngine, naive_attention
from cptool.calibration.rig import smaller_worlds
from cptool.checkpoint import open_checkpoint
from cptool.cli.main import main
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import static_decode
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.graphs import Recorded
from cptool.engine.prefill import auto
from cptool.engine.weights import load_model
from cptool.exactness.reference import attention
from cptool.parallel.step import Scores
from cptool.profiling.trace import Kernel


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_naive_attention_is_that_of_float64(window, cap):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(n, h, 16, generator=generator) for n, h in ((5, 4), (9, 2), (9, 2)))
    q_pos, k_pos = torch.arange(4, 9, dtype=torch.int32), torch.arange(9, dtype=torch.int32)
    scores = Scores(0.25, window, cap)
    found = naive_attention(q, k, v, q_pos=q_pos, k_pos=k_pos, scores=scores)
    truth, _ = attention(
        *(x.double() for x in (q, k, v)),
        q_pos=q_pos,
        k_pos=k_pos,
        scale=0.25,
        window=window,
        cap=cap,
    )
    torch.testing.assert_close(found.double(), truth, rtol=0, atol=1e-6)


def answered(world, path, kind, compiled):
    model = load_model(open_checkpoint(str(path)), torch.float32, "cpu")
    if compiled:
        compile_feed_forward(model, backend="eager")
    engine = kind(model, world)
    engine.extend([[n % 290 for n in range(100)]])
    logits = engine.logits[0].clone()
    return logits, decode(engine, AnswerOptions(limit=6)).token_ids


@pytest.mark.parametrize(("kind", "compiled"), [(NaiveEngine, False), (Engine, True)])
def test_a_lever_changes_no_token(mqa_path, kind, compiled):
    one = RankOptions(device="cpu", threads=1)
    logits, tokens = run(answered, mqa_path, Engine, False, ranks=one)
    others, same = run(answered, mqa_path, kind, compiled, ranks=one)
    assert same == tokens
    torch.testing.assert_close(others, logits, rtol=1e-4, atol=1e-4)


def test_rows_of_each_device():
    cpu = levers("cpu", layers=30, stored=True, ranks=2)
    assert [lever.name for lever in cpu] == [
        "naive attention",
        "fused attention",
        "static memory",
        "weights file",
        "weights q8_0",
        "weights int8",
        "weights fp8-ffn",
        "lookup drafts",
        "layers:10 drafts",
        "cp 2",
        "file, drafts",
    ]
    assert len(levers("cpu", layers=1, stored=False, ranks=1)) == 7
    cuda = levers("cuda", layers=30, stored=False, ranks=4)
    assert [lever.name for lever in cuda if lever.static] == [
        "CUDA graph",
        "torch.compile",
        "fp8-ffn",
        "cp 4",
    ]
    assert sum(lever.compiled for lever in cuda) == 1
    assert not any(lever.draft != "off" for lever in cuda)


def test_the_share_of_time_without_kernels():
    times = ((0.0, 1.0), (0.5, 2.0), (3.0, 5.0))
    kernels = [Kernel(name="k", stream=0, begin=a, end=b, launched=None) for a, b in times]
    assert idle_share(kernels, 1.0, 5.0) == pytest.approx(0.25)
    assert idle_share(kernels, -1.0, 7.0) == pytest.approx(0.5)
    assert idle_share([], 0.0, 1.0) == 1.0


def trial_of(path, rows):
    return Trial(
        model=str(path),
        dtype="float32",
        levers=rows,
        prompt=tuple(range(40)),
        scored=tuple(range(100, 140)),
        answer=8,
        repeats=1,
    )


def test_ranks_and_weights_are_those_of_the_rows(mqa_path):
    rows = (
        Lever(name="a", naive=True),
        Lever(name="b", weights="q8_0"),
        Lever(name="c", ranks=2),
        Lever(name="d", draft="lookup"),
        Lever(name="e", draft="layers:1"),
    )
    assert {lever.model for lever in rows} == {
        (WIDE, False, False),
        ("q8_0", False, False),
        (WIDE, False, True),
    }
    ranks = RankOptions(cp=2, device="cpu", threads=1)
    fields = run(measure, trial_of(mqa_path, rows), ranks=ranks)
    found, ceilings = fields["results"], fields["ceilings"]
    assert [row["same_answer"] for row in found if row["weights"] == "float32"] == [True] * 4
    assert [row["ranks"] for row in found] == [1, 1, 2, 1, 1]
    plain, quantised, together, drafted, _ = found
    assert together["nll"] == pytest.approx(plain["nll"], rel=1e-5) == drafted["nll"]
    assert 0 < abs(quantised["nll"] - plain["nll"]) < 0.1
    assert quantised["memory_bytes"] < plain["memory_bytes"]
    for row in found:
        assert row["perplexity"] == math.exp(row["nll"])
        assert row["faster"] > 0 and 0 <= row["idle"] < 1
        drafted = row["lever"] == "e"
        assert (row["of_ceiling"] is None) == drafted and (drafted or row["bytes"] > 0)
    assert set(ceilings) == {"memory_of_a_rank", "memory_of_a_rank_of_2"}


def sizes_of_worlds(world):
    found = []
    for part in smaller_worlds(world, list(range(1, world.cp + 1))).values():
        if part is not None:
            assert part.group.sum_of([1]) == [part.size]
            groups = (part.group, part.cp_group, part.tp_group)
            found.append([part.size, *(group.size for group in groups)])
    return world.gather(found)


@pytest.mark.parametrize(("cp", "tp"), [(3, 1), (2, 2), (3, 2)])
def test_a_smaller_world_has_groups_of_its_own(cp, tp):
    ranks = RankOptions(cp=cp, tp=tp, device="cpu", threads=1, timeout=20)
    each = [[n * tp, n * tp, n, tp] for n in range(1, cp + 1)]
    found = run(sizes_of_worlds, ranks=ranks)
    assert found == [each[rank // tp :] for rank in range(cp * tp)]


@contextmanager
def counted_graphs():
    """Yield a list to which each recording of a step is added."""
    made = []

    class Counted(Recorded):
        def __init__(self, *arguments):
            made.append(self)
            super().__init__(*arguments)

    with patch.object(static_decode, "Recorded", Counted):
        yield made


def graphs_of_rounds(world, trial):
    rounds, once = [], bench_levers._once
    with counted_graphs() as made:

        def counted(*arguments):
            before = len(made)
            found = once(*arguments)
            rounds.append(len(made) - before)
            return found

        with patch.object(bench_levers, "_once", counted):
            measure(world, trial)
    return world.gather(rounds)


def test_steps_are_recorded_in_the_round_that_does_not_count(mqa_path):
    rows = (Lever(name="a", static=True), Lever(name="b", static=True, ranks=2))
    trial = replace(trial_of(mqa_path, rows), repeats=2)
    ranks = RankOptions(cp=2, device="cpu", threads=1)
    assert run(graphs_of_rounds, trial, ranks=ranks) == [[1, 1, 0, 0, 0, 0], [1, 0, 0]]


def idle_beside_a_slow_profiler(world, trial):
    with counted_graphs() as made:

        class Slow:
            def start(self):
                self.made, self.began = len(made), time.perf_counter()

            def stop(self):
                ended = time.perf_counter()
                time.sleep(0.5)
                assert self.made == len(made) == 1  # recorded before, and not again
                return [Kernel(name="k", stream=0, begin=self.began, end=ended, launched=None)]

        with patch.object(bench_levers, "DeviceProfiler", Slow):
            model = load_model(open_checkpoint(trial.model), torch.float32, "cpu")
            row = bench_levers._Run(lever=trial.levers[0], model=model, world=world)
            return bench_levers._device_idle(row, trial)


def test_collecting_what_ran_is_no_idle_time(mqa_path):
    trial = trial_of(mqa_path, (Lever(name="a", static=True),))
    one = RankOptions(device="cpu", threads=1)
    assert run(idle_beside_a_slow_profiler, trial, ranks=one) == pytest.approx(0, abs=1e-6)


def in_small_chunks(world, trial):
    with patch.multiple(auto, SMALL=16, MODEST=16, auto_chunk=lambda *_, **__: 16):
        return measure(world, trial)


def test_one_rank_reads_in_chunks_while_the_other_waits(mqa_path):
    rows = (Lever(name="a"), Lever(name="b", ranks=2))
    ranks = RankOptions(cp=2, device="cpu", threads=1, timeout=20)
    found = run(in_small_chunks, trial_of(mqa_path, rows), ranks=ranks)["results"]
    assert found[0]["nll"] == pytest.approx(found[1]["nll"], rel=1e-5)


def bench(*arguments, code=0):
    result = CliRunner().invoke(main, ["bench", "levers", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


SMALL = ("--prompt", 40, "-n", 4, "--scored", 20, "--repeats", 1, "--threads", 1)


def test_all_rows_of_a_stored_model(small_smollm2_path, tmp_path):
    plot = tmp_path / "levers.png"
    asked = (small_smollm2_path, *SMALL, "--device", "cpu", "--plot", plot)
    fields = json.loads(bench(*asked, "--json").stdout)
    rows = fields["results"]
    assert [row["lever"] for row in rows][:3] == [
        "naive attention",
        "fused attention",
        "static memory",
    ]
    assert {"weights q8_0", "weights fp8-ffn", "lookup drafts", "cp 2"} <= {
        row["lever"] for row in rows
    }
    assert all(row["same_answer"] for row in rows if row["weights"] in ("float32", "file"))
    assert fields["prompt_tokens"] == 40 and plot.read_bytes().startswith(b"\x89PNG")


def test_some_rows_as_a_table(tiny_model):
    asked = ("--lever", "fused attention", "--lever", "lookup drafts", "--cp", 1)
    shown = bench(tiny_model, *SMALL, *asked, "--device", "cpu").stdout.splitlines()
    assert [line.split("  ")[0] for line in shown[1:3]] == ["fused attention", "lookup drafts"]
    assert "of answer, threads per rank: 1" in shown[3]


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (("--lever", "magic"), "--lever 'magic': on cpu there are naive attention, fused"),
        (("--prompt", 600), "--prompt 600: the model's context is 512, of which the answer takes"),
        (("--prompt", 24, "--scored", "1K"), "--scored 1000: the model's context is 512"),
    ],
)
def test_mistakes(tiny_model, arguments, line):
    stderr = bench(tiny_model, "--device", "cpu", *arguments, code=2).stderr
    assert line in stderr and len(stderr.splitlines()) == 1
