"""What each lever gives: naive attention, then each of what makes decode faster, on one model.

The waterfall is that of "Characterizing and Efficiently Accelerating Multimodal Generation Model
Inference" (Lee et al., arXiv:2410.00215): a prompt of one length and an answer of one length, the
time to the first token apart from that of further ones, and beside the speed whether the answer is
the same. Rounds are interleaved as in `cptool.bench.prefill`.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from cptool.bench.ceilings import memory_rate
from cptool.bench.naive import NaiveEngine
from cptool.bench.perplexity import Sums, Window, score
from cptool.bench.timing import summary
from cptool.calibration.rig import smaller_worlds
from cptool.checkpoint import open_checkpoint
from cptool.engine.answers.decode import decode, next_tokens
from cptool.engine.answers.records import AnswerOptions, Answers
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.setup.memory import limit
from cptool.engine.setup.types import mean_weight_size
from cptool.engine.weights import load_model
from cptool.engine.world_profile import world_profile
from cptool.errors import UserError
from cptool.host import large_pages, memory
from cptool.planning.cost.counts import kv_bytes_read, matrix_parameters
from cptool.profiling.device_trace import DeviceProfiler
from cptool.profiling.intervals import overlap_s
from cptool.quantisation import FP8_FEED_FORWARD, QUANTISED
from cptool.units import size

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.world import World
    from cptool.model.llama import Llama
    from cptool.profiling.trace import Kernel

PHASE = "levers, run"
WIDE = "dtype"
"""Weights in the dtype of the products, whatever the file has."""

_TRACED = 16
"""Tokens of an answer whose kernels are recorded."""


@dataclass(frozen=True, kw_only=True)
class Lever:
    """A row: what is switched on.

    weights: WIDE, "file", or what they are quantised to. compiled: the feed-forward layers by
    `torch.compile`. The others are options of the engine and of the answer.
    """

    name: str
    weights: str = WIDE
    naive: bool = False
    static: bool = False
    compiled: bool = False
    draft: str = "off"
    ranks: int = 1

    @property
    def model(self) -> tuple[str, bool, bool]:
        """What tells its model from those of other rows."""
        return self.weights, self.compiled, self.ranks > 1


def levers(device: str, *, layers: int, stored: bool, ranks: int) -> list[Lever]:
    """Return the rows for a device: naive attention, and what is switched on instead.

    layers: of the model, of which a third drafts. stored: whether the file has weights in fewer
    bits than the dtype of the products, in which they can be read. ranks: of the row on several
    ones, if there are several.
    """
    found = [Lever(name="naive attention", naive=True), Lever(name="fused attention")]
    together = []
    if device == "cuda":
        found += [
            Lever(name="CUDA graph", static=True),
            Lever(name="torch.compile", static=True, compiled=True),
            Lever(name=FP8_FEED_FORWARD, weights=FP8_FEED_FORWARD, static=True),
        ]
    else:
        found.append(Lever(name="static memory", static=True))
        kinds = [*(["file"] if stored else []), *QUANTISED, FP8_FEED_FORWARD]
        found += [Lever(name=f"weights {kind}", weights=kind) for kind in kinds]
        found.append(Lever(name="lookup drafts", draft="lookup"))
        if layers > 1:
            draft = f"layers:{max(1, layers // 3)}"
            found.append(Lever(name=f"{draft} drafts", draft=draft))
        if stored:
            together = [Lever(name="file, drafts", weights="file", draft="lookup")]
    if ranks > 1:
        found.append(Lever(name=f"cp {ranks}", static=device == "cuda", ranks=ranks))
    return [*found, *together]


@dataclass(frozen=True, kw_only=True)
class Trial:
    """What every row does: read `prompt`, append `answer` tokens, and score `scored`.

    repeats: rounds that count.
    """

    model: str
    dtype: str
    levers: tuple[Lever, ...]
    prompt: tuple[int, ...]
    scored: tuple[int, ...]
    answer: int
    repeats: int


@dataclass(kw_only=True)
class _Run:
    """A row on this rank, and what was measured of it; on rank 0, of all its ranks."""

    lever: Lever
    model: Llama | None
    world: World | None
    first_s: list[float] = field(default_factory=list)
    further_s: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)
    answers: Answers | None = None
    nll: float = math.nan

    def engine(self) -> Engine:
        """Return an engine without any token."""
        assert self.model is not None and self.world is not None
        kind = NaiveEngine if self.lever.naive else Engine
        options = EngineOptions(static=self.lever.static)
        return kind(self.model, self.world, options=options, profile=world_profile(self.world))


def measure(world: World, trial: Trial) -> dict[str, Any]:
    """Return the ceiling and one result per row. Collective.

    Raises UserError, before anything is loaded, if there is no room for the weights of all rows.
    """
    world.report("load the weights")
    checkpoint = open_checkpoint(trial.model)
    _check_room(world, checkpoint, trial)
    runs = _prepared(world, checkpoint, trial)
    ceiling: list[float] = []
    total = (trial.repeats + 1) * len(runs)
    for repeat in range(trial.repeats + 1):
        world.barrier()
        ceiling.append(max(world.gather(_ceiling(world, checkpoint, trial))))
        for number, run in enumerate(runs):
            world.report(PHASE, repeat * len(runs) + number, total)
            _round(world, run, trial, keep=repeat > 0)
    for run in runs:
        if run.world is not None:
            run.nll = _nll(run.engine(), trial.scored)
            if world.device.type == "cuda":
                run.idle = [_device_idle(run, trial)]
        world.barrier()
    rates = summary(ceiling[1:])
    results = [_result(run, runs[0], trial, rates["median"]) for run in runs]
    return {"ceilings": {"memory_of_a_rank": rates}, "results": results if world.rank == 0 else []}


def _ceiling(world: World, checkpoint: Checkpoint, trial: Trial) -> float:
    """Return the bytes/s at which rank 0 reads a matrix of the size of the output matrix, in large
    pages as weights are, while the others wait; 0 on those.
    """
    if world.rank:
        return 0.0
    shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
    matrix = large_pages.empty(shape, getattr(torch, trial.dtype), world.device)
    return memory_rate(matrix.fill_(1))


def _prepared(world: World, checkpoint: Checkpoint, trial: Trial) -> list[_Run]:
    """Load the model of each row, those of several ranks on all of them."""
    counts = sorted({lever.ranks for lever in trial.levers} | {world.cp})
    worlds = smaller_worlds(world, counts)
    models: dict[tuple[str, bool, bool], Llama | None] = {}
    for lever in trial.levers:
        if lever.model in models:
            continue
        part = worlds[lever.ranks]
        models[lever.model] = None
        if part is not None:
            models[lever.model] = load_model(
                checkpoint,
                getattr(torch, trial.dtype),
                world.device,
                part if lever.ranks > 1 else None,
                weights=None if lever.weights == WIDE else lever.weights,
                keep_stored=lever.weights != WIDE,
            )
            if lever.compiled:
                compile_feed_forward(models[lever.model])
    return [
        _Run(lever=lever, model=models[lever.model], world=worlds[lever.ranks])
        for lever in trial.levers
    ]


def compile_feed_forward(model: Llama | None, backend: str = "inductor") -> None:
    """Have the feed-forward layers of a model run as torch.compile has compiled them."""
    assert model is not None
    for layer in model.layers:
        layer.get_submodule("mlp").compile(backend=backend, dynamic=True)


def _check_room(world: World, checkpoint: Checkpoint, trial: Trial) -> None:
    """Raise UserError on all ranks if the weights of all rows do not fit in memory. Collective."""
    config, needed = checkpoint.config, 0.0
    tables = (2 - config.tie_word_embeddings) * config.hidden_size * config.vocab_size
    element = getattr(torch, trial.dtype).itemsize
    for weights in {lever.model: lever.weights for lever in trial.levers}.values():
        found = None
        if weights != WIDE:
            found = mean_weight_size(checkpoint, trial.dtype, world.device.type, weights)
        needed += (matrix_parameters(config) + tables) * (found or element)
    most = limit(world)
    if needed > most:
        raise UserError(
            f"the weights of {len(trial.levers)} rows take {size(needed)}, and a rank may take "
            f"{size(most)}; name fewer with `lever`"
        )


def _round(world: World, run: _Run, trial: Trial, *, keep: bool) -> None:
    """Run a row once. Collective."""
    world.barrier()
    found = (0.0, 0.0, 0.0, 0.0)
    if run.world is not None:
        found, run.answers = _once(run, trial)
    ranks = [values for values in world.gather(found) if values[0]]
    if keep:
        first, further, idle, held = zip(*ranks, strict=True)
        run.first_s.append(max(first))
        run.further_s.append(max(further))
        run.idle.append(sum(idle) / len(idle))
        run.memory.append(max(held))


def _once(run: _Run, trial: Trial) -> tuple[tuple[float, float, float, float], Answers]:
    """Return the seconds to the first token and of each further one, the share of them in which
    this rank's threads stood idle, the bytes that were allocated at most, and the answer.
    """
    engine = run.engine()
    allocated = _allocated(engine.world)
    began = time.perf_counter()
    engine.extend([list(trial.prompt)], reserve=trial.answer)
    next_tokens(engine, Sampling())
    read, busy = time.perf_counter(), time.process_time()
    options = AnswerOptions(limit=trial.answer, draft=run.lever.draft)
    answers = decode(engine, options)
    ended = time.perf_counter()
    threads = torch.get_num_threads()
    idle = max(0.0, 1 - (time.process_time() - busy) / (ended - read) / threads)
    further = (ended - read) / max(1, trial.answer - 1)
    return (read - began, further, idle, allocated()), answers


def _allocated(world: World) -> Callable[[], float]:
    """Return what to call for the most bytes that this rank has allocated since."""
    if world.device.type == "cuda":
        held = torch.cuda.memory_allocated(world.device)
        torch.cuda.reset_peak_memory_stats(world.device)
        return lambda: torch.cuda.max_memory_allocated(world.device) - held
    memory.forget_peak()
    resident = memory.resident()
    return lambda: max(0.0, memory.usage().peak - resident)


def _nll(engine: Engine, tokens: Sequence[int]) -> float:
    """Return the mean negative log-likelihood of a text, on rank 0. Collective."""
    sums = Sums(len(tokens))
    score(engine, tokens, [Window(0, len(tokens), 1)], sums)
    return sums.of(0, len(tokens))["nll"] if engine.world.rank == 0 else math.nan


def _device_idle(run: _Run, trial: Trial) -> float:
    """Return the share of an answer's time in which no kernel ran on this rank's device."""
    engine = run.engine()
    engine.extend([list(trial.prompt)], reserve=_TRACED)
    next_tokens(engine, Sampling())
    profiler = DeviceProfiler()
    profiler.start()
    began = time.perf_counter()
    decode(engine, AnswerOptions(limit=_TRACED, draft=run.lever.draft))
    kernels = profiler.stop()
    return idle_share(kernels, began, time.perf_counter())


def idle_share(kernels: Sequence[Kernel], began: float, ended: float) -> float:
    """Return the share of [began, ended) in which none of the kernels ran."""
    busy = [(kernel.begin, kernel.end) for kernel in kernels]
    return 1 - overlap_s([(began, ended)], busy) / (ended - began)


def _result(run: _Run, first: _Run, trial: Trial, ceiling: float) -> dict[str, Any]:
    """Return the fields of a row; nothing on ranks without a part in it."""
    if run.model is None or run.answers is None or first.answers is None:
        return {}
    lever, drafts = run.lever, run.answers.drafts
    further = summary(run.further_s)
    steps = drafts.steps if lever.draft != "off" else trial.answer - 1
    kv = kv_bytes_read(
        run.model.config,
        len(trial.prompt) + trial.answer // 2,
        batch=1,
        ranks=lever.ranks,
        element_bytes=getattr(torch, trial.dtype).itemsize,
    )
    seconds = further["median"] * max(1, trial.answer - 1)
    rate = (run.model.step_bytes + kv) * steps / seconds
    tokens, others = run.answers.token_ids[0], first.answers.token_ids[0]
    pairs = zip(tokens, others, strict=True)
    same = next((n for n, (ours, its) in enumerate(pairs) if ours != its), len(tokens))
    return {
        "lever": lever.name,
        "weights": trial.dtype if lever.weights == WIDE else lever.weights,
        "ranks": lever.ranks,
        "ttft_seconds": summary(run.first_s),
        "ttit_seconds": further,
        "tokens_per_s": 1 / further["median"],
        "faster": summary(first.further_s)["median"] / further["median"],
        "bytes": rate,
        "of_ceiling": rate / ceiling,
        "idle": summary(run.idle)["median"],
        "memory_bytes": run.model.step_bytes + max(run.memory),
        **{name: drafts.fields()[name] for name in ("drafted_tokens", "accepted_tokens")},
        "steps": steps,
        "nll": run.nll,
        "perplexity": math.exp(run.nll),
        "same_tokens": same,
        "same_answer": same == len(tokens),
    }
