"""What each lever gives: naive attention, then each of what makes decode faster, on one model.

The waterfall is that of "Characterizing and Efficiently Accelerating Multimodal Generation Model
Inference" (Lee et al., arXiv:2410.00215): a prompt of one length and an answer of one length, the
time to the first token apart from that of further ones, and beside the speed whether the answer is
the same. Rounds are interleaved as in `cptool.bench.prefill`. A row has one engine for all of them,
which keeps what it makes in the first, such as a CUDA graph; that round does not count.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch

from cptool.bench.ceilings import memory_rate
from cptool.bench.lever_rows import WIDE, Lever, Trial
from cptool.bench.naive import NaiveEngine, naive_bytes
from cptool.bench.perplexity import Sums, Window, score
from cptool.bench.timing import summary
from cptool.calibration.rig import smaller_worlds
from cptool.checkpoint import open_checkpoint
from cptool.engine.answers.decode import decode, next_tokens
from cptool.engine.answers.records import AnswerOptions, Answers
from cptool.engine.drafts.names import layers_of
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.setup.memory import limit
from cptool.engine.setup.types import mean_weight_size
from cptool.engine.weights import load_model
from cptool.engine.world_profile import world_profile
from cptool.errors import UserError
from cptool.host import large_pages
from cptool.planning.cost.counts import kv_bytes_read, matrix_parameters
from cptool.planning.prediction import Work, memory_of
from cptool.profiling.device_trace import DeviceProfiler
from cptool.profiling.intervals import overlap_s
from cptool.quantisation import FP8_FEED_FORWARD
from cptool.units import size

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.world import World
    from cptool.model.llama import Llama
    from cptool.profiling.trace import Kernel

PHASE = "levers, run"
_TRACED = 16
"""Tokens of an answer whose kernels are recorded."""


@dataclass(kw_only=True)
class _Run:
    """A row on this rank, and what was measured of it; on rank 0, of all its ranks."""

    lever: Lever
    model: Llama | None
    world: World | None
    first_s: list[float] = field(default_factory=list)
    further_s: list[float] = field(default_factory=list)
    idle: list[float] = field(default_factory=list)
    answers: Answers | None = None
    nll: float = math.nan

    @cached_property
    def engine(self) -> Engine:
        """The engine of all rounds."""
        assert self.model is not None and self.world is not None
        kind = NaiveEngine if self.lever.naive else Engine
        options = EngineOptions(static=self.lever.static)
        return kind(self.model, self.world, options=options, profile=world_profile(self.world))


def measure(world: World, trial: Trial) -> dict[str, Any]:
    """Return the ceilings and one result per row. Collective.

    Raises UserError, before anything is loaded, if there is no room for the weights of all rows.
    """
    world.report("load the weights")
    checkpoint = open_checkpoint(trial.model)
    parts = [_memory(world, checkpoint, trial, lever) for lever in trial.levers]
    _check_room(world, checkpoint, trial, parts)
    runs = _prepared(world, checkpoint, trial)
    ceilings: dict[int, list[float]] = {lever.ranks: [] for lever in trial.levers}
    total = (trial.repeats + 1) * len(runs)
    for repeat in range(trial.repeats + 1):
        for ranks, rates in ceilings.items():
            rates.append(_ceiling(world, checkpoint, trial, ranks))
        for number, run in enumerate(runs):
            world.report(PHASE, repeat * len(runs) + number, total)
            _round(world, run, trial, keep=repeat > 0)
    for run in runs:
        if run.world is not None:
            if world.device.type == "cuda":
                run.idle = [_device_idle(run, trial)]
            run.nll = _nll(run.engine, trial.scored)
        world.barrier()
    found = {ranks: summary(rates[1:]) for ranks, rates in ceilings.items()}
    results = []
    for run, memory in zip(runs, parts, strict=True) if world.rank == 0 else ():
        ceiling = found[run.lever.ranks]["median"]
        result = _result(run, runs[0], trial, ceiling=ceiling)
        results.append(result | {"memory_bytes": sum(memory.values())})
    names = {ranks: "memory_of_a_rank" + f"_of_{ranks}" * (ranks > 1) for ranks in found}
    named = {names[ranks]: rates for ranks, rates in found.items()}
    return {"ceilings": named, "results": results}


def _ceiling(world: World, checkpoint: Checkpoint, trial: Trial, ranks: int) -> float:
    """Return the bytes/s at which each of the first `ranks` ranks reads a matrix of the size of the
    output matrix at the same time, in large pages as weights are: of the slowest, in wall time as
    answers are measured. Collective.
    """
    rate = 0.0
    if takes_part := world.rank < ranks:
        shape = (checkpoint.config.vocab_size, checkpoint.config.hidden_size)
        matrix = large_pages.empty(shape, getattr(torch, trial.dtype), world.device).fill_(1)
    world.barrier()
    if takes_part:
        rate = memory_rate(matrix, wall=True)
    return min(world.gather(rate)[:ranks])


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


def _memory(world: World, checkpoint: Checkpoint, trial: Trial, lever: Lever) -> dict[str, float]:
    """Return the bytes that a rank takes for a row alone, as predicted, by use. Collective."""
    wide = lever.weights == WIDE
    device = world.device.type
    work = Work(
        config=checkpoint.config,
        dtype=trial.dtype,
        new=[len(trial.prompt)],
        cached=[0],
        answer=trial.answer,
        ranks=lever.ranks,
        weight_size=(
            None if wide else mean_weight_size(checkpoint, trial.dtype, device, lever.weights)
        ),
        feed_forward="float8" if lever.weights == FP8_FEED_FORWARD else None,
        local=lever.ranks,
    )
    profile, chunk = world_profile(world), len(trial.prompt)
    found = memory_of(work, EngineOptions().variant, profile, chunk=chunk, limit=math.inf)
    if lever.naive:
        element = getattr(torch, trial.dtype).itemsize
        found["workspace"] += naive_bytes(checkpoint.config, chunk, element)
    return found


def _check_room(
    world: World, checkpoint: Checkpoint, trial: Trial, rows: Sequence[dict[str, float]]
) -> None:
    """Raise UserError on all ranks if the weights and KV of all rows, which stay, do not fit in
    memory with what one of them takes beside. Collective.

    rows: the memory of each.
    """
    config, beside, needed = checkpoint.config, 0.0, 0.0
    tables = (2 - config.tie_word_embeddings) * config.hidden_size * config.vocab_size
    element = getattr(torch, trial.dtype).itemsize
    for weights in {lever.model: lever.weights for lever in trial.levers}.values():
        found = None
        if weights != WIDE:
            found = mean_weight_size(checkpoint, trial.dtype, world.device.type, weights)
        needed += (matrix_parameters(config) + tables) * (found or element)
    for parts in rows:
        needed += parts["kv"]
        beside = max(beside, sum(parts.values()) - parts["kv"] - parts["weights"])
    most = limit(world)
    if needed + beside > most:
        raise UserError(
            f"the weights and KV of {len(trial.levers)} rows take {size(needed)}, beside "
            f"{size(beside)} of work, and a rank may take {size(most)}; name fewer with `lever`"
        )


def _round(world: World, run: _Run, trial: Trial, *, keep: bool) -> None:
    """Run a row once. Collective."""
    world.barrier()
    found = (0.0, 0.0, 0.0)
    if run.world is not None:
        found, run.answers = _once(run, trial)
    ranks = [values for values in world.gather(found) if values[0]]
    if keep:
        first, further, idle = zip(*ranks, strict=True)
        run.first_s.append(max(first))
        run.further_s.append(max(further))
        run.idle.append(sum(idle) / len(idle))


def _once(run: _Run, trial: Trial) -> tuple[tuple[float, float, float], Answers]:
    """Return the seconds to the first token and of each further one, the share of them in which
    this rank's threads stood idle, and the answer.
    """
    engine, began = run.engine, time.perf_counter()
    _read(engine, trial)
    read, busy = time.perf_counter(), time.process_time()
    answers = decode(engine, AnswerOptions(limit=trial.answer, draft=run.lever.draft))
    ended = time.perf_counter()
    threads = torch.get_num_threads()
    idle = max(0.0, 1 - (time.process_time() - busy) / (ended - read) / threads)
    further = (ended - read) / max(1, trial.answer - 1)
    return (read - began, further, idle), answers


def _read(engine: Engine, trial: Trial) -> None:
    """Have the engine hold the prompt alone, and know the token that follows."""
    engine.truncate([0])
    engine.extend([list(trial.prompt)], reserve=trial.answer)
    next_tokens(engine, Sampling())


def _nll(engine: Engine, tokens: Sequence[int]) -> float:
    """Return the mean negative log-likelihood of a text, on rank 0. Collective."""
    sums = Sums(len(tokens))
    score(engine, tokens, [Window(0, len(tokens), 1)], sums)
    return sums.of(0, len(tokens))["nll"] if engine.world.rank == 0 else math.nan


def _device_idle(run: _Run, trial: Trial) -> float:
    """Return the share of an answer's time in which no kernel ran on this rank's device."""
    options = AnswerOptions(limit=min(_TRACED, trial.answer), draft=run.lever.draft)
    _read(run.engine, trial)
    decode(run.engine, options)  # makes what later answers use again
    _read(run.engine, trial)
    profiler = DeviceProfiler()
    profiler.start()
    began = time.perf_counter()
    decode(run.engine, options)
    ended = time.perf_counter()  # collecting what was recorded takes long
    return idle_share(profiler.stop(), began, ended)


def idle_share(kernels: Sequence[Kernel], began: float, ended: float) -> float:
    """Return the share of [began, ended) in which none of the kernels ran."""
    busy = [(kernel.begin, kernel.end) for kernel in kernels]
    return 1 - overlap_s([(began, ended)], busy) / (ended - began)


def _result(run: _Run, first: _Run, trial: Trial, *, ceiling: float) -> dict[str, Any]:
    """Return the fields of a row, on rank 0. Drafts of the first layers read these once more for
    each, which the drafter does not count, so that row has no rate.
    """
    assert run.model is not None and run.answers is not None and first.answers is not None
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
    rate = None
    if layers_of(lever.draft) is None:
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
        "of_ceiling": None if rate is None else rate / ceiling,
        "idle": summary(run.idle)["median"],
        **{name: drafts.fields()[name] for name in ("drafted_tokens", "accepted_tokens")},
        "steps": steps,
        "nll": run.nll,
        "perplexity": math.exp(run.nll),
        "same_tokens": same,
        "same_answer": same == len(tokens),
    }
