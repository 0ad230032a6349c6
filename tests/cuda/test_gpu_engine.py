"""The engine on a GPU: ranks that share it, decode in a graph, sessions.

`CPTOOL_GPU_TESTS_ON=cpu` runs the same tests on the CPU, so that they are known to be sound before
they meet a GPU.
"""

import os

import pytest
import torch
from test_static_decode import TURNS, prompt, say

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.shapes import find_shape
from cptool.distributed.group import Group
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.emulation.layer import Scenario
from cptool.emulation.projection import emulate
from cptool.engine import saving
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.graphs import Recorded
from cptool.engine.options import EngineOptions
from cptool.engine.weights import load_model
from cptool.host.pinned_copies import to_device, to_host
from cptool.ops.kernels import build_info
from cptool.planning.profiles import default_profile
from cptool.profiling.exposed_time import Exposure
from cptool.session.store import identity
from cptool.variants import names

DEVICE = os.environ.get("CPTOOL_GPU_TESTS_ON", "cuda")
ON_GPU = DEVICE == "cuda"

pytestmark = [
    pytest.mark.gpu,
    # Ranks are forked from a process that imports this: it must ask without starting CUDA.
    pytest.mark.skipif(ON_GPU and not torch.cuda.device_count(), reason="no CUDA device"),
    pytest.mark.skipif(
        ON_GPU and not build_info()["cuda_archs"], reason="built without CUDA kernels"
    ),
]


@pytest.fixture(autouse=True)
def through_the_host(monkeypatch):
    """Stage messages, the default where ranks share a GPU, on a machine with several GPUs too."""
    monkeypatch.setenv("CPTOOL_TRANSPORT", "staged")


@pytest.fixture(scope="module")
def one_rank(tiny_model):
    return run(say, tiny_model, False, TURNS, 7, ranks=RankOptions(cp=1, device=DEVICE, threads=1))


def engine_of(world, path, dtype=torch.float32, **options) -> Engine:
    shared = world if world.tp > 1 else None
    model = load_model(open_checkpoint(str(path)), dtype, world.device, shared)
    return Engine(model, world, **options)


def say_under(world, path, variant):
    assert world.device.type == DEVICE and world.group.staged
    engine = engine_of(world, path, batch=len(TURNS[0]), options=EngineOptions(variant=variant))
    answers = []
    for turn in TURNS:
        engine.extend(turn)
        answers.append(decode(engine, AnswerOptions(limit=7)).token_ids)
    return answers, engine.ring.exposed_s


@pytest.mark.parametrize("variant", names())
@pytest.mark.parametrize("n", [2, 4])
def test_ranks_that_share_a_device_say_what_one_says(tiny_model, one_rank, n, variant):
    answers, exposed = run(
        say_under, tiny_model, variant, ranks=RankOptions(cp=n, device=DEVICE, threads=1)
    )
    assert answers == one_rank[0] and exposed > 0


@pytest.mark.parametrize("layout", [(2, 1), (4, 1), (2, 2)])
def test_static_decode_on_ranks_that_share_a_device(tiny_model, one_rank, layout):
    cp, tp = layout
    answers, ways, _, _ = run(
        say, tiny_model, True, TURNS, 7, ranks=RankOptions(cp=cp, tp=tp, device=DEVICE, threads=1)
    )
    assert answers == one_rank[0] and ways == ["all-q"] * 2


def steps_in_a_graph(world, path, dtype):
    """Tokens with and without the graph; a second answer takes the same graph again."""
    said = []
    for static in (False, True):
        engine = engine_of(
            world, path, getattr(torch, dtype), batch=3, options=EngineOptions(static=static)
        )
        engine.extend([prompt(37), prompt(1), prompt(12)], reserve=64)
        answers = [decode(engine, AnswerOptions(limit=20)).token_ids]
        steps = engine._steps
        engine.extend([[5], [6, 7], []])
        answers.append(decode(engine, AnswerOptions(limit=20, stop_ids=(11, 12))).token_ids)
        said.append(answers)
    assert engine._steps is steps  # nothing moved, so nothing was recorded anew
    return said, steps.reason


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_decode_in_a_graph(tiny_model, dtype):
    (eager, graph), reason = run(
        steps_in_a_graph, tiny_model, dtype, ranks=RankOptions(cp=1, device=DEVICE)
    )
    if ON_GPU:
        assert reason is None
    if dtype == "float32":
        assert graph == eager
    else:  # sums of other shapes round otherwise, and a random model has ties
        assert [[len(a) > 0 for a in answers] for answers in graph] == [[True] * 3] * 2


def test_a_graph_reads_new_values():
    device = torch.device(DEVICE)
    x = torch.zeros(4, device=device)
    recorded = Recorded(lambda: x * 2 + 1, device)
    assert recorded.reason is None or not ON_GPU
    for value in (3.0, -5.0):
        x.fill_(value)
        assert torch.equal(recorded(), torch.full_like(x, 2 * value + 1))


@pytest.mark.skipif(not ON_GPU, reason="NCCL is for GPUs")
def test_an_all_gather_of_nccl_in_a_graph():
    import torch.distributed as dist

    from cptool.parallel.ring import Ring

    store = dist.HashStore()
    dist.init_process_group("cpu:gloo,cuda:nccl", store=store, rank=0, world_size=1)
    try:
        ring = Ring(Group(dist.new_group([0]), torch.device("cuda", 0)))
        x = torch.zeros(1000, device=DEVICE)
        recorded = Recorded(lambda: ring.all_gather(x + 1)[0] * 2, torch.device(DEVICE))
        assert recorded.reason is None
        x.fill_(20)
        assert torch.equal(recorded(), torch.full_like(x, 42))
    finally:
        dist.destroy_process_group()


def save(world, path, directory):
    checkpoint = open_checkpoint(str(path))
    engine = engine_of(world, path, batch=2)
    engine.extend([prompt(21), prompt(4)])
    said = decode(engine, AnswerOptions(limit=6)).token_ids
    saving.save(engine, directory, None, identity(checkpoint))
    return said


def resume(world, path, directory):
    from cptool.session import store as session

    engine = engine_of(world, path, batch=2)
    saving.restore(engine, directory, session.load(directory))
    return decode(engine, AnswerOptions(limit=6)).token_ids


@pytest.mark.parametrize(
    ("saving", "resuming"),
    [((DEVICE, 1), (DEVICE, 1)), ((DEVICE, 2), ("cpu", 1)), (("cpu", 1), (DEVICE, 3))],
    ids=str,
)
def test_a_session_from_device_to_device(tiny_model, tmp_path, saving, resuming):
    device, n = saving
    said = run(save, tiny_model, tmp_path / "s", ranks=RankOptions(cp=n, device=device, threads=1))
    assert said == run(
        save, tiny_model, tmp_path / "other", ranks=RankOptions(cp=1, device="cpu", threads=1)
    )
    expected = run(
        resume, tiny_model, tmp_path / "other", ranks=RankOptions(cp=1, device="cpu", threads=1)
    )
    device, n = resuming
    assert (
        run(resume, tiny_model, tmp_path / "s", ranks=RankOptions(cp=n, device=device, threads=1))
        == expected
    )


def test_to_the_host_and_back():
    tensors = [torch.randn(n, 2, 3, device=DEVICE) for n in (5, 0, 1000, 1)]
    there = list(to_host(iter(tensors)))
    assert all(x.device.type == "cpu" and not x.is_pinned() for x in there)
    back = list(to_device(iter(there), torch.device(DEVICE)))
    for ours, theirs in zip(tensors, back, strict=True):
        assert ours.device.type == theirs.device.type and torch.equal(ours, theirs)


def test_exposure_of_a_stream():
    """What another stream takes longer than ours is exposed, and nothing where it is done."""
    exposure, device = Exposure(), torch.device(DEVICE)
    exposure.end(exposure.begin(device))
    idle = exposure.seconds
    assert 0 <= idle < 0.01
    if ON_GPU:
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):
            torch.cuda._sleep(100_000_000)
        began = exposure.begin(device)
        torch.cuda.current_stream().wait_stream(side)
        exposure.end(began)
        assert exposure.seconds > idle + 0.02


@pytest.mark.parametrize("variant", names())
def test_emulation(tiny_model, variant):
    config = find_shape(str(tiny_model))
    scenario = Scenario(
        config=config,
        cp=4,
        tp=2,
        new=999,
        cached=100,
        variant=variant,
        dtype=torch.bfloat16,
        device=torch.device(DEVICE),
    )
    result = emulate(scenario, default_profile(DEVICE), repeats=2)
    assert all(part.seconds > 0 for part in result.parts) and result.ttft_s > 0
