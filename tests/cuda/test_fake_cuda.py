"""Commands on GPUs that are not there (tests/helpers/fake_cuda.py): every line that a command runs
on a GPU is run, and its answers are those of the CPU.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import fake_cuda
import pytest
import torch
from click.testing import CliRunner

from cptool.cache import LayerKV
from cptool.cli.main import main
from cptool.distributed.devices import nccl_blocks
from cptool.parallel import attention as variants
from cptool.parallel.step import Scores
from cptool.sharding import Placement

HELPERS = Path(fake_cuda.__file__).parent
pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is real here")


class Run:
    """What commands said, and what they asked of their GPUs, command by command."""

    def __init__(self, folder, gpus, *commands, **environment):
        log = folder / "log"
        words = [str(word) for command in commands for word in (*command, "+")]
        done = subprocess.run(
            [sys.executable, HELPERS / "fake_cuda.py", *words],
            env=os.environ
            | {"FAKE_GPUS": str(gpus), "FAKE_LOG": str(log)}
            | {"PYTHONPATH": os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])}
            | {"OMP_NUM_THREADS": "1"}
            | environment,
            capture_output=True,
            text=True,
        )
        self.err = done.stderr
        self.said = [json.loads(line) for line in done.stdout.splitlines()]
        self.events = [[] for _ in commands]
        events = [json.loads(line) for line in log.read_text().splitlines()]
        log.unlink()
        number = -1
        for event in events:
            number += event["event"] == "command"
            if number >= 0:
                self.events[number].append(event)
        self.codes = [e["code"] for e in events if e["event"] == "end"]

    def of(self, command, event):
        return [fields for fields in self.events[command] if fields["event"] == event]


@pytest.fixture(autouse=True, scope="module")
def cache(tmp_path_factory):
    """One for all tests, so that the first one's self-tests are kept."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CPTOOL_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield


def on_cpu(*command):
    done = CliRunner().invoke(main, [str(word) for word in command])
    assert done.exit_code == 0, done.stderr
    return json.loads(done.stdout)


def generate(model, *options, device="cuda", dtype="float32"):
    shared = ("--threads", 1, "--json", "--device", device, "--dtype", dtype)
    return ("generate", model, "--synthetic", 40, "-n", 6, *shared, *options)


@pytest.fixture(scope="module")
def expected(tiny_model):
    return on_cpu(*generate(tiny_model, device="cpu"))["token_ids"]


def test_one_gpu(tiny_model, tmp_path, expected):
    """Self-tests, then prefill, and decode in a graph; a session; ranks that share the GPU."""
    session = tmp_path / "session"
    prefill = ("prefill", tiny_model, "--synthetic", 40, "--device", "cuda", "--threads", 1)
    run = Run(
        tmp_path,
        1,
        generate(tiny_model),
        (*prefill, "--dtype", "float32", "--session", session, "--json"),
        ("decode", session, "-n", 6, "--device", "cuda", "--threads", 1, "--json"),
        generate(tiny_model, "--cp", 2, "--variant", "pass-kv"),
        generate(tiny_model, device="auto"),
        ("doctor", "--json"),
    )
    assert run.codes == [0] * 6, run.err
    assert [run.said[i]["token_ids"] for i in (0, 2, 3, 4)] == [expected] * 4
    assert all(said["device"].startswith("cuda") for said in run.said[:5])
    assert len(run.of(0, "capture")) == 1 and len(run.of(0, "replay")) == 5
    assert "in a CUDA graph" in run.said[0]["decode_reason"]
    # Ranks that share a GPU: through host memory, which takes no multiprocessors, without graphs.
    assert run.err.count("messages between ranks go through host memory") == 1
    assert {fields["backend"] for fields in run.of(3, "group")} == {"gloo"}
    assert {fields["sm_margin"] for fields in run.of(3, "attention")} == {0}
    assert not run.of(3, "capture")
    facts = run.said[5]
    assert facts["gpus"] == ["Fake GPU"] and facts["passed"]
    assert facts["cuda_kernels_failed"] == {} and len({c["name"] for c in facts["checks"]}) > 20


def test_two_gpus(tiny_model, tmp_path, expected):
    """A rank on each, and NCCL between them, whose transfers attention leaves room for."""
    run = Run(
        tmp_path,
        2,
        generate(tiny_model, "--cp", 2, "--variant", "pass-kv"),
        generate(tiny_model, "--cp", 2, "--variant", "pass-q"),
        generate(tiny_model, "--tp", 2),
        generate(tiny_model, "--cp", 2, dtype="bfloat16"),
        CPTOOL_TRACEBACK="1",
    )
    assert run.codes == [0] * 4, run.err
    assert [said["token_ids"] for said in run.said[:3]] == [expected] * 3
    assert len(run.said[3]["token_ids"][0]) == 6 and run.said[3]["dtype"] == "bfloat16"
    for command in range(4):
        groups = run.of(command, "group")
        assert len(groups) == 2 and all(g["backend"] == "cpu:gloo,cuda:nccl" for g in groups)
        # Of the groups of each rank, the one of its ring alone has few thread blocks.
        made = [(g["ranks"], g["blocks"], g["high"]) for g in run.of(command, "subgroup")]
        alone, both = [[0], [1]], [[0, 1]] * 2
        cp, tp = (alone, both) if command == 2 else (both, alone)
        assert sorted(made) == sorted(
            [(ranks, 8, True) for ranks in cp] + [(ranks, 0, False) for ranks in tp]
        )
        assert {fields["index"] for fields in run.of(command, "device")} == {0, 1}
        # Decode by the variant of the prompt is no graph's.
        graphs = (2, 10) if command > 1 else (0, 0)
        assert (len(run.of(command, "capture")), len(run.of(command, "replay"))) == graphs
    # Two layers: on each rank the first block of the ring beside a transfer, the second alone.
    for command in (0, 1):
        margins = [fields["sm_margin"] for fields in run.of(command, "attention")]
        assert margins.count(8) >= 4 and margins.count(0) >= 4
    assert {fields["sm_margin"] for fields in run.of(2, "attention")} == {0}


def test_room_for_as_many_thread_blocks_as_the_user_allows(tiny_model, tmp_path):
    asked = generate(tiny_model, "--cp", 2, "--variant", "pass-kv")
    run = Run(tmp_path, 2, asked, NCCL_MAX_CTAS="3")
    assert run.codes == [0], run.err
    assert {fields["sm_margin"] for fields in run.of(0, "attention")} == {0, 3}


@pytest.mark.parametrize(
    "most, variable, blocks", [(16, None, 16), (-(2**31), None, 0), (16, "4", 4), (16, "0", 16)]
)
def test_how_many_thread_blocks_a_group_takes(monkeypatch, most, variable, blocks):
    """The environment goes before the group's options; a user's group may have no limit."""
    monkeypatch.delenv("NCCL_MAX_CTAS", raising=False)
    if variable is not None:
        monkeypatch.setenv("NCCL_MAX_CTAS", variable)
    options = SimpleNamespace(config=SimpleNamespace(max_ctas=most))
    group = SimpleNamespace(_get_backend=lambda device: SimpleNamespace(options=options))
    assert nccl_blocks(group) == blocks


@pytest.mark.parametrize("window", [None, 3])
def test_room_is_left_also_while_a_shared_prefix_is_read(monkeypatch, window):
    margins = []

    def attention(q, *others, margin, **options):
        margins.append(margin)
        return q.float(), torch.zeros(q.shape[:2])

    monkeypatch.setattr(variants, "attention", attention)
    positions, ends = torch.arange(4, dtype=torch.int32), torch.tensor([0, 4], dtype=torch.int32)
    prefix = LayerKV(slab=torch.zeros(4, 2, 1, 8), k_pos=positions, cu_k=ends)
    kv = LayerKV(slab=torch.zeros(4, 2, 1, 8), k_pos=positions + 4, cu_k=ends, prefix=prefix)
    queries = Placement(positions + 4, ends)
    scores = Scores(1.0, window)
    variants.over_local(torch.zeros(4, 1, 8), queries, kv, scores=scores, margin=8)
    assert margins == [8, 8]


def test_what_does_not_fit_is_refused_beforehand(tiny_model, tmp_path):
    run = Run(tmp_path, 1, generate(tiny_model), FAKE_FREE="1000")
    assert run.codes == [2] and not run.of(0, "attention")
    assert run.err.splitlines()[-1].startswith("cptool: 40 tokens: a rank needs "), run.err


def test_a_kernel_that_failed_is_not_used(tiny_model, tmp_path):
    """One line says so, and attention is limited."""
    own = str(tmp_path / "cache")
    run = Run(tmp_path, 1, generate(tiny_model), FAKE_WRONG="sm90", CPTOOL_CACHE=own)
    assert run.codes == [0], run.err
    lines = [line for line in run.err.splitlines() if "failed its self-test" in line]
    assert len(lines) == 1 and "sm80, which is slower, is used instead" in lines[0]
    assert {fields["limit"] for fields in run.of(0, "attention")} == {"sm80"}


def test_the_fake_is_as_strict_as_a_gpu():
    """In a process of its own, because it changes torch."""
    program = """
import fake_cuda, torch
fake_cuda.install(1)
x = torch.ones(3, device="cuda")
assert x.is_cuda and x.device == torch.device("cuda", 0) and not x.cpu().is_cuda
assert (x + 1).is_cuda and x[:2].is_cuda and (x * torch.tensor(2.0)).is_cuda
def refused(run, words):
    try:
        run()
    except (RuntimeError, TypeError) as error:
        assert words in str(error), error
        return
    raise AssertionError(words)
refused(lambda: x + torch.ones(3), "Expected all tensors to be on the same device")
refused(lambda: x.numpy(), "can't convert cuda:0")
held, graph = torch.zeros(3, device="cuda"), torch.cuda.CUDAGraph()
with torch.cuda.graph(graph):
    result = (held + x).relu()
    refused(lambda: result.sum().item(), "not permitted when stream is capturing")
    refused(lambda: bool(result[0]), "not permitted when stream is capturing")
held.fill_(5)
graph.replay()
assert result.cpu().tolist() == [6.0] * 3
copied = x.cpu()
copied.fill_(9)
assert x.cpu().tolist() == [1.0] * 3
"""
    path = os.pathsep.join([str(HELPERS.parents[1]), str(HELPERS)])
    subprocess.run(
        [sys.executable, "-c", program], env=os.environ | {"PYTHONPATH": path}, check=True
    )
