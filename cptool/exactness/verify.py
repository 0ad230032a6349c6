"""Whether results are exact with a user's own checkpoint and devices: every variant on every
number of ranks.

Each run reads a prompt in two turns (so that the second meets cached keys) and then decodes. In
some layers and for some query rows the attention that came out is held against attention in float64
over the very q, k and v that went in, beside the error that one plain call of the op makes on the
same inputs. The greedy tokens are held against those of one rank.
"""

import hashlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch

from cptool.checkpoint import Checkpoint, open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.distributed.status_board import Board
from cptool.distributed.world import World
from cptool.engine.answers.decode import next_tokens
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.rank_modules import rank_modules
from cptool.engine.sampling import Sampling
from cptool.engine.setup.memory import check
from cptool.engine.setup.types import mean_weight_size
from cptool.engine.weights import load_model
from cptool.engine.world_profile import world_profile
from cptool.exactness.reference import attention
from cptool.model.llama import Llama
from cptool.ops.attention import attention_partial
from cptool.parallel.step import Scores
from cptool.planning.cost.exchange import ALL_Q, PASS_KV
from cptool.planning.prediction import Work
from cptool.planning.strategy import AUTO
from cptool.sharding import Placement
from cptool.variants import names

PHASE = "verify, run"
"""What the ranks' status board says while a run lasts."""

ROWS = 64
"""Query rows of the second turn that are checked, in each checked layer; rows of decode steps are
checked all.
"""

ALLOWED_GROWTH = 1.1
"""Factor by which merging may raise the error of one rank, beside one rounding of the result."""


@dataclass(frozen=True, kw_only=True)
class Trial:
    """The work of every run: two turns of tokens, then greedy decode steps; `kv_dtype` is the type
    in which KV is stored, `weights` what float weights are quantised to, or "file".
    """

    model: str
    dtype: str
    kv_dtype: str
    weights: str
    turns: tuple[tuple[int, ...], tuple[int, ...]]
    steps: int


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The runs of a trial on one number of ranks: one of each of `variants`, after `done` of the
    `total` runs.
    """

    variants: tuple[str, ...]
    done: int
    total: int


@dataclass(frozen=True, kw_only=True)
class Measurement:
    """One variant on one number of ranks.

    `error` and `one_call_error` are root mean square errors against float64 of what the ranks
    computed and of a single call on the same inputs, in the layer where they are worst against the
    bound; `rounding` is that of rounding the result once. `margins[i]` is the distance of the two
    best logits where `tokens[i]` was chosen, `logits` what the prefill ended with. `repeated`: a
    second run gave the same bits; under "all-q", which is decode alone, on top of a prefill under
    pass-kv, also the same tokens, from a CUDA graph where there is one.
    """

    variant: str
    ranks: int
    error: float
    one_call_error: float
    rounding: float
    tokens: tuple[int, ...]
    margins: tuple[float, ...]
    logits: torch.Tensor
    repeated: bool

    @property
    def allowed(self) -> float:
        return ALLOWED_GROWTH * self.one_call_error + self.rounding

    @property
    def within_bound(self) -> bool:
        return self.error <= self.allowed  # false for NaN


@dataclass(frozen=True)
class Verdict:
    """A measurement compared with one rank.

    tokens: "same", "tie at token I", or "differ at token I".
    """

    measurement: Measurement
    tokens: str

    @property
    def passed(self) -> bool:
        return (
            self.measurement.within_bound
            and self.measurement.repeated
            and not self.tokens.startswith("differ")
        )


def verify(
    trial: Trial,
    counts: list[int],
    ranks: RankOptions,
    watch: Callable[[Board], None] | None = None,
) -> Iterator[Verdict]:
    """Run `trial` on one rank and then on each of `counts`, every variant.

    ranks: as `cptool.distributed.launch.run` takes it, as is `watch`; each count replaces its `cp`.
    """
    alone, together = (PASS_KV.name, ALL_Q.name), (*names(), ALL_Q.name)
    total = run_count(len(counts))
    first = Batch(variants=alone, done=0, total=total)
    reference, steps = run(measure, trial, first, ranks=replace(ranks, cp=1), watch=watch)
    yield Verdict(reference, "same")
    yield Verdict(steps, compare(steps, reference))
    for number, count in enumerate(counts):
        batch = Batch(variants=together, done=len(alone) + number * len(together), total=total)
        of_count = replace(ranks, cp=count)
        for measurement in run(
            measure, trial, batch, ranks=of_count, watch=watch, preload=rank_modules()
        ):
            yield Verdict(measurement, compare(measurement, reference))


def run_count(counts: int) -> int:
    """Return how many runs `verify` makes for so many numbers of ranks beside one."""
    return 2 + counts * (len(names()) + 1)


def compare(measurement: Measurement, reference: Measurement) -> str:
    """Return where the tokens part, and whether rounding alone explains it.

    Logits that differ by d can only exchange two tokens whose distance is at most 2 d. What follows
    such a tie has no meaning for the comparison, for the two runs read different texts from there
    on.
    """
    for i, (ours, theirs) in enumerate(zip(measurement.tokens, reference.tokens, strict=True)):
        if ours != theirs:
            difference = (measurement.logits - reference.logits).abs().max().item()
            tie = reference.margins[i] <= 2 * difference
            return (
                f"{'tie' if tie else 'differ'} at token {i} "
                f"(margin {reference.margins[i]:.2g}, logits differ by {difference:.2g})"
            )
    return "same"


def measure(world: World, trial: Trial, batch: Batch) -> list[Measurement]:
    """Run the trial under each variant on this rank; the measurements are those of rank 0."""
    world.report("load the weights")
    checkpoint, dtype = open_checkpoint(trial.model), getattr(torch, trial.dtype)
    _check_room(world, trial, checkpoint)
    model = load_model(checkpoint, dtype, world.device, world, weights=trial.weights)
    measurements = []
    for number, variant in enumerate(batch.variants):
        world.report(PHASE, batch.done + number, batch.total)
        measurements.append(_measure(world, model, trial, variant))
    return measurements


def _check_room(world: World, trial: Trial, checkpoint: Checkpoint) -> None:
    """Raise UserError on all ranks if one would take more memory than it may. Collective."""
    first, second = map(len, trial.turns)
    device = world.device.type
    work = Work(
        config=checkpoint.config,
        dtype=trial.dtype,
        kv_dtype=trial.kv_dtype,
        new=[first],
        cached=[0],
        answer=second + trial.steps,
        ranks=world.cp,
        weight_size=mean_weight_size(checkpoint, trial.dtype, device, trial.weights),
        local=world.local_size,
    )
    options = EngineOptions(chunk=first)
    check(world, work, world_profile(world), options=options, offers=("kv_dtype",))


@torch.inference_mode()
def _measure(world: World, model: Llama, trial: Trial, variant: str) -> Measurement:
    layers = sorted({0, model.config.num_hidden_layers // 2, model.config.num_hidden_layers - 1})
    first = len(trial.turns[0])
    second = len(trial.turns[1])
    positions = {first + i * (second - 1) // (ROWS - 1) for i in range(ROWS)}
    positions |= set(range(first + second, first + second + trial.steps))
    static = variant == ALL_Q.name
    runs = []
    for first_run in (True, False):
        prefill = PASS_KV.name if static else variant
        options = EngineOptions(variant=prefill, static=static, kv_dtype=trial.kv_dtype)
        engine = Engine(model, world, options=options)
        observed = _Observed(layers, positions)
        engine.extend([list(trial.turns[0])])
        engine.attach_observer(observed)
        engine.extend([list(trial.turns[1])], reserve=trial.steps)
        facts: list = [_digest(engine, observed)]
        if static and not first_run:
            engine.attach_observer(None)  # so that steps can be replayed from a graph
        if first_run:
            logits, margins = _everywhere(world, engine), []
        if first_run or static:
            tokens = []
            for left in range(trial.steps, 0, -1):
                if first_run:
                    best = _everywhere(world, engine).topk(2).values
                    margins.append(float(best[0] - best[1]))
                tokens += next_tokens(engine, Sampling())
                engine.advance({0: tokens[-1]}, left, variant=AUTO if static else None)
            engine.settle()
        if static:
            facts.append(tokens)
        if first_run:
            errors = [_errors(world, engine, observed, layer) for layer in layers]
        runs.append(facts)
    error, one_call, rounding = max(errors, key=_over_bound)
    repeated = all(a == b for a, b in world.gather(tuple(runs)))
    return Measurement(
        variant=variant,
        ranks=world.cp,
        error=error,
        one_call_error=one_call,
        rounding=rounding,
        tokens=tuple(tokens),
        margins=tuple(margins),
        logits=logits,
        repeated=repeated,
    )


class _Observed:
    """Queries and attention outputs of some layers and positions, as an engine computes them."""

    def __init__(self, layers: list[int], positions: set[int]) -> None:
        self.positions = torch.tensor(sorted(positions), dtype=torch.int32)
        self.rows: dict[int, list[tuple[torch.Tensor, ...]]] = {layer: [] for layer in layers}

    def __call__(
        self, layer: int, placement: Placement, q: torch.Tensor, out: torch.Tensor
    ) -> None:
        if layer in self.rows:
            chosen = torch.isin(placement.positions.cpu(), self.positions).nonzero().flatten()
            found = (placement.positions[chosen], q[chosen], out[chosen])
            self.rows[layer].append(tuple(tensor.cpu().clone() for tensor in found))

    def of(self, layer: int) -> tuple[torch.Tensor, ...]:
        """Return positions, queries and outputs seen in the layer."""
        return tuple(map(torch.cat, zip(*self.rows[layer], strict=True)))


def _errors(
    world: World, engine: Engine, observed: _Observed, layer: int
) -> tuple[float, float, float]:
    """Return the error of what the ranks computed, that of one call on the same inputs, and that of
    rounding the result once.
    """
    kv = engine.cache.tokens_from(layer, 0, 0).cpu()
    gathered = world.gather((*observed.of(layer), engine.cache.held.positions.cpu(), kv))
    q_pos, q, out, k_pos, kv = map(torch.cat, zip(*gathered, strict=True))
    (q_pos, q_order), (k_pos, k_order) = q_pos.sort(), k_pos.sort()
    q, out, (k, v) = q[q_order], out[q_order], kv[k_order].unbind(1)
    of_layer = Scores.of(engine.model.config, layer)
    scores: Any = {"scale": of_layer.scale, "window": of_layer.window, "cap": of_layer.cap}
    exact = (q.double(), k.double(), v.double())
    truth, _ = attention(*exact, q_pos=q_pos, k_pos=k_pos, **scores)
    device = world.device
    one_call, _ = attention_partial(
        q.to(device),
        k.to(device),
        v.to(device),
        q_pos=q_pos.to(device),
        k_pos=k_pos.to(device),
        cu_q=torch.tensor([0, len(q_pos)], dtype=torch.int32, device=device),
        cu_k=torch.tensor([0, len(k_pos)], dtype=torch.int32, device=device),
        out_dtype=q.dtype,
        **scores,
    )
    unit_roundoff = torch.finfo(q.dtype).eps / 2
    return _rms(out - truth), _rms(one_call.cpu() - truth), unit_roundoff * _rms(truth)


def _rms(x: torch.Tensor) -> float:
    """Return the root mean square. The largest error depends on a few rows and varies by more than
    the bound allows; the mean does not.
    """
    return x.square().mean().sqrt().item()


def _everywhere(world: World, engine: Engine) -> torch.Tensor:
    """Return the next-token logits of the one sequence, on every rank."""
    return next(
        row
        for row in world.gather(engine.logits[0].cpu() if engine.logits else None)
        if row is not None
    )


def _digest(engine: Engine, observed: _Observed) -> str:
    """Return a digest of every bit that this rank computed in the observed layers, and of its
    logits.
    """
    digest = hashlib.sha256()
    tensors = [
        tensor
        for layer in observed.rows
        for tensor in (*observed.of(layer), engine.cache.tokens_from(layer, 0, 0))
    ]
    for tensor in [*tensors, *engine.logits.values()]:
        digest.update(tensor.cpu().contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _over_bound(errors: tuple[float, float, float]) -> float:
    error, one_call, rounding = errors
    ratio = error / (ALLOWED_GROWTH * one_call + rounding)
    return ratio if ratio == ratio else float("inf")
