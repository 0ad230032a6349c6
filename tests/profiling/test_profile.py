"""Where time goes: phases that add up to the wall, transfers beside compute, the trace's file."""

import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch
from click.testing import CliRunner

from cptool.cli.main import main
from cptool.model.linear import Linear
from cptool.profiling.device_trace import DEVICE_ROWS, DeviceProfiler, launch_times, phase_of
from cptool.profiling.intervals import overlap_s, subtract, union
from cptool.profiling.report import ROWS, Section, phases_of, write_trace
from cptool.profiling.trace import SILENT, Kernel, Recorder, Span, TransferSpan


def moved(name, begin, end):
    return TransferSpan(name=name, peer=1, bytes=8, begin=begin, end=end)


def test_intervals():
    assert union([(3, 4), (0, 1), (0.5, 2), (2, 2.5)]) == [(0, 2.5), (3, 4)]
    assert union([]) == []
    assert overlap_s([(0, 2), (1, 3), (5, 9)], [(2, 6), (8, 8.5)]) == 1 + 1 + 0.5
    assert overlap_s([(0, 1)], []) == 0


def test_a_moment_belongs_to_the_innermost_span():
    recorder = Recorder()
    recorder.spans = [
        Span(name="wait", phase="exposed", begin=2.0, end=3.0, own_s=1.0),
        Span(name="attention", phase="attention", begin=1.0, end=4.0, own_s=2.0),
        Span(name="model", phase="small ops", begin=0.5, end=6.0, own_s=2.5),
        Span(name="of another section", phase="linear", begin=20.0, end=21.0, own_s=1.0),
    ]
    recorder.transfers = [moved("send", 1.5, 2.5), moved("receive", 1.2, 3.0)]
    wall, phases, hidden = phases_of(recorder, Section("x", 0.0, 10.0, steps=2))
    assert wall == 5.0 and set(phases) == set(ROWS)
    expected = {"exposed": 0.5, "attention": 1.0, "small ops": 1.25, "host": 2.25}
    assert phases == {**dict.fromkeys(ROWS, 0.0), **expected}
    assert hidden == pytest.approx(0.8 / 2)


def test_spans_nest_and_sums_over_ranks_are_communication():
    recorder = Recorder()
    layer, gate = Linear(4, 4, "cpu"), Linear(4, 4, "cpu")
    layer.reduce = lambda partial: None  # where tensor parallelism has its all-reduce
    model = torch.nn.ModuleDict({"o_proj": layer, "gate": gate})
    recorder.attach(model)
    with recorder.span("model", "small ops"):
        model["gate"](layer(torch.ones(1, 4)))
    assert [(s.name, s.phase) for s in recorder.spans] == [
        ("o_proj", "linear"),
        ("all-reduce", "exposed"),
        ("gate", "linear"),
        ("model", "small ops"),
    ]
    inner, outer = recorder.spans[:3], recorder.spans[3]
    total = outer.own_s + sum(span.own_s for span in inner)
    assert total == pytest.approx(outer.end - outer.begin)
    with SILENT.span("nothing", "linear"), SILENT.span("is kept", "linear"):
        assert not SILENT.on


def test_transfers_at_the_same_time_lie_on_tracks_of_their_own(tmp_path):
    moves = [moved("send", t, t + 1.5) for t in (0.0, 1.0, 2.0)]
    write_trace(
        tmp_path / "t",
        [([], [], []), ([Span(name="a", phase="linear", begin=5, end=6, own_s=1)], moves, [])],
        [0, 2],
    )
    events = json.loads((tmp_path / "t").read_text())["traceEvents"]
    tracks = [e["tid"] for e in events if e.get("cat") == "transfer"]
    assert len(set(tracks)) == 2 and tracks[0] == tracks[2] and 0 not in tracks
    assert [e["ts"] for e in events if e.get("cat") == "linear"] == [0.0]  # the first span


def test_moments_without_a_kernel_are_idle():
    recorder = Recorder()
    recorder.spans = [Span(name="sampling", phase="sampling", begin=7.0, end=9.0, own_s=2.0)]
    recorder.kernels = [
        Kernel(
            name="sm90_xmma_gemm_bf16bf16", stream=7, begin=0.5, end=2.0
        ),  # began before the section
        Kernel(name="attention_sm90_kernel<128>", stream=7, begin=3.0, end=5.0),
        Kernel(
            name="ncclDevKernel_SendRecv", stream=13, begin=4.0, end=6.0
        ),  # half of it beside attention
        Kernel(name="rms_norm_kernel", stream=7, begin=6.5, end=7.0),
        Kernel(name="reduce_kernel argmax", stream=7, begin=8.0, end=8.5),
    ]
    wall, phases, hidden = phases_of(recorder, Section("x", 1.0, 11.0, steps=1))
    assert wall == 10 and tuple(phases) == DEVICE_ROWS and sum(phases.values()) == wall
    assert phases == {
        "linear": 1.0,
        "attention": 2.0,
        "exposed": 1.0,
        "sampling": 0.5,
        "small ops": 0.5,
        "idle": 5.0,
    }
    assert hidden == 1.0
    assert phase_of("Memcpy HtoD (Pinned -> Device)") == "small ops"
    assert subtract([(0, 4), (6, 9)], [(1, 2), (3, 7), (8, 8.5)]) == [
        (0, 1),
        (2, 3),
        (7, 8),
        (8.5, 9),
    ]


def test_what_runs_on_the_device_belongs_to_the_layer_that_launched_it():
    recorder = Recorder()
    kernel = Kernel(name="k", stream=7, begin=50.0, end=60.0)
    times = {}
    with recorder.span("model", "small ops"):
        times["before"] = time.perf_counter()
        for number in range(3):
            with recorder.layer(number), recorder.span("attention", "attention"):
                times[number] = time.perf_counter()
    times["after"] = time.perf_counter()
    launched = [dataclasses.replace(kernel, launched=at) for at in times.values()]
    recorder.keep([*launched, kernel])
    assert [k.layer for k in recorder.kernels] == [None, 0, 1, 2, None, None]
    assert [(s.name, s.layer) for s in recorder.spans if s.layer is not None] == [
        (name, number) for number in range(3) for name in ("attention", f"layer {number}")
    ]
    event, kind = SimpleNamespace, torch.autograd.DeviceType
    begun = SimpleNamespace(start=2.0)
    events = [
        event(id=3, name="cudaLaunchKernel", device_type=kind.CPU, time_range=begun),
        event(id=3, name="k", device_type=kind.CUDA, time_range=SimpleNamespace(start=9.0)),
        event(id=4, name="aten::mm", device_type=kind.CPU, time_range=begun),
    ]
    assert launch_times(events) == {3: 2e-6}


def test_the_profilers_clock_is_ours():
    """The profiler observes the operators of the CPU, which need no GPU."""
    profiler, x = DeviceProfiler("CPU"), torch.ones(300, 300)
    profiler.start()
    torch.mm(x, x)
    began = time.perf_counter()
    torch.mm(x, x)
    ended = time.perf_counter()
    products = [k for k in profiler.stop() if k.name == "aten::mm"]
    assert began - 0.002 < products[1].begin < products[1].end < ended + 0.002


def cptool(*arguments, code=0):
    result = CliRunner().invoke(main, [str(a) for a in arguments])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def adds_up(section, ranks):
    walls = section["wall_s"]
    assert len(walls) == ranks
    for rank, wall in enumerate(walls):
        parts = [values[rank] for values in section["phases_s"].values()]
        assert sum(parts) == pytest.approx(wall) and min(parts) > -1e-6
        assert 0 <= section["hidden_s"][rank] <= wall


def test_profile_of_prefill_and_decode(mqa_path, token_file, tmp_path):
    ids = [(7 * i * i + 3 * i) % 299 for i in range(900)]
    session, traces = tmp_path / "s", (tmp_path / "prefill.json", tmp_path / "decode.json")
    common = ("--cp", 2, "--variant", "pass-kv", "--json")
    plain = json.loads(cptool("prefill", mqa_path, "--token-ids", token_file(ids), *common).stdout)
    first = json.loads(
        cptool(
            "prefill",
            mqa_path,
            "--token-ids",
            token_file(ids),
            "--session",
            session,
            *common,
            "--profile",
            traces[0],
        ).stdout
    )
    assert "profile" not in plain and plain["first_token"] == first["first_token"]
    adds_up(first["profile"]["prefill"], 2)
    answer = cptool("decode", session, "-n", 5, *common, "--profile", traces[1])
    sections = json.loads(answer.stdout)["profile"]
    assert set(sections) == {"decode"} and sections["decode"]["steps"] == 4
    adds_up(sections["decode"], 2)

    events = json.loads(traces[0].read_text())["traceEvents"]
    assert {e["args"]["name"] for e in events if e["name"] == "process_name"} == {
        "rank 0",
        "rank 1",
    }
    for rank in (0, 1):
        mine = [e for e in events if e["pid"] == rank and e["ph"] == "X"]
        assert {e["cat"] for e in mine} == {
            "linear",
            "attention",
            "exposed",
            "sampling",
            "small ops",
            "transfer",
        }
        blocks = [e for e in mine if e["name"].startswith("block of rank")]
        received = [e for e in mine if e["name"] == f"receive, rank {1 - rank}"]
        assert len(blocks) == 2 * 3 and len(received) == 3  # three layers
        assert all(e["args"]["bytes"] == 450 * 2 * 64 * 4 for e in received)
        layers = [[e["args"]["layer"] for e in each] for each in (blocks, received)]
        assert layers[0] == [0, 0, 1, 1, 2, 2] and sorted(layers[1]) == [0, 1, 2]
        inside = [e for e in mine if "layer" in e.get("args", {})]
        last = {"logits"} if rank == 0 else set()  # which has the last token
        names = {e["name"] for e in mine if e not in inside}
        assert names == {"model", "sampling", "all-reduce", *last}
        # The block of the other rank is under way before attention over this rank's own begins.
        for own, arriving in zip(
            blocks[::2], sorted(received, key=lambda e: e["ts"]), strict=False
        ):
            assert own["name"] == f"block of rank {rank}"
            assert arriving["ts"] <= own["ts"]


def test_the_table_is_drawn(mqa_path, tmp_path):
    trace = tmp_path / "t.json"
    shown = cptool("prefill", mqa_path, "--synthetic", 40, "--profile", trace)
    for row in ("linear", "communication exposed", "host (no operation)", "wall", "100.0%"):
        assert row in shown.stdout
    assert str(trace) in shown.stderr and trace.exists()


def test_a_trace_that_could_not_be_written(mqa_path):
    told = cptool("prefill", mqa_path, "--synthetic", 4, "--profile", "/nowhere/t", code=2).stderr
    assert told == "cptool: --profile /nowhere/t: /nowhere is not a directory; create it first\n"
