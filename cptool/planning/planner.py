"""Which layout and variant to run a prompt with, and why: the cost model evaluated on every layout.

Pure arithmetic, no torch: it takes milliseconds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from cptool.errors import UserError
from cptool.model import shares
from cptool.model.config import LlamaConfig
from cptool.planning.chunks import UNIT, Chunks, auto_chunk, plan_chunk, plan_chunks
from cptool.planning.cost.estimate import Estimate, decode_step, prefill
from cptool.planning.cost.exchange import ALL_Q, GATHER_Q, PASS_Q
from cptool.planning.cost.forward import Forward
from cptool.planning.cost.memory import RESERVED, in_words, remedies
from cptool.planning.hardware import HardwareProfile
from cptool.planning.strategy import AUTO, STATIC_ROWS, Choice, choose
from cptool.units import duration, size
from cptool.variants import find, names, records


@dataclass(frozen=True, kw_only=True)
class Workload:
    """`batch` sequences of `context` tokens each (T + P), `cached` of them held already (P), and
    `answer` tokens to decode after it. weights: what they are quantised to, or "file". chunk: new
    tokens that go through the model at a time, None for as many as `cptool.planning.chunks` finds.

    published: work as the paper's system does, which pads the queries of a decode step to a
    multiple of N, sends partials in 16 bits, and has two variants: pass-KV, and pass-Q with one
    exchange at its end. graphs: replay a decode step as one CUDA graph where the device has them.
    rule: how "auto" chooses a variant, see `cptool.planning.strategy.choose`. The other fields are
    those of `cptool.planning.cost.forward.Forward`.
    """

    config: LlamaConfig
    context: int
    cached: int = 0
    batch: int = 1
    answer: int = 0
    dtype: str = "bfloat16"
    feed_forward: str | None = None
    weight_size: float | None = None
    kv_dtype: str | None = None
    weights: str = "file"
    published: bool = False
    graphs: bool = True
    rule: str = "predicted"
    chunk: int | None = None

    @property
    def new(self) -> int:
        """New tokens, all sequences together (T)."""
        return self.batch * (self.context - self.cached)


@dataclass(frozen=True, kw_only=True)
class Plan:
    """A layout, the variants in it, what they are predicted to take and what a rank must hold.

    ttft, ttit: of the chosen variants. compared: variants, the chosen one first; under(variant):
    the prefill under one of them throughout. other_steps: decode step by variant, the chosen one
    included. capacity: bytes available on each rank. remedies: what makes less of it needed, beside
    other numbers of ranks; on a CPU, whose ranks share a machine's memory, in place of them.
    """

    cp: int
    tp: int
    hosts: int
    decode_choice: Choice
    ttft: Chunks
    ttit: Estimate
    compared: tuple[str, ...]
    under: Callable[[str], Chunks]
    other_steps: dict[str, Estimate]
    capacity: float
    remedies: tuple[str, ...] = ()

    @property
    def choice(self) -> Choice:
        """The variant of the last chunk, and why."""
        return self.ttft.last.choice

    @cached_property
    def others(self) -> dict[str, Chunks]:
        """Prefill by variant, the chosen one included."""
        return {name: self.under(name) for name in self.compared}

    @property
    def memory(self) -> dict[str, float]:
        """Bytes per rank by use, while the chunk that takes most of it runs."""
        return self.ttft.fullest.memory

    @property
    def ranks(self) -> int:
        """Ranks in all, CP times TP."""
        return self.cp * self.tp

    @property
    def memory_bytes(self) -> float:
        """Bytes needed on each rank."""
        return sum(self.memory.values())

    @property
    def excess_bytes(self) -> float:
        """Bytes by which a rank's memory is too small; 0 if it is not."""
        return max(0.0, self.memory_bytes - self.capacity)


def plan(work: Workload, cp: int, tp: int, variant: str, profile: HardwareProfile) -> Plan:
    """Plan one layout; `variant` is one of `cptool.parallel.attention` or "auto".

    Raises UserError if the model does not divide into `tp` parts.
    """
    shares.check(work.config, tp)
    room = profile.memory_bytes * _memory_part(profile, cp * tp)
    profile = _for_ranks(profile, cp, tp)
    cached = work.batch * work.cached
    held = work.batch * (work.context + work.answer // 2)
    step = -(-work.batch // cp) * cp if work.published else work.batch
    everywhere = _forward(work, new=work.new, cached=cached, cp=cp, tp=tp)
    capacity = (1 - RESERVED) * room
    ttft = _prefill(variant, work, everywhere, profile, capacity=capacity)
    chosen = ttft.last.choice
    listed = dict.fromkeys((chosen.variant, *(_published() if work.published else names())))
    compared = tuple(listed) if cp > 1 else (chosen.variant,)

    def under(name: str) -> Chunks:
        """Return the same chunks under one variant, on as many ranks if there is but one chunk."""
        active = chosen.active if len(ttft.chunks) == 1 else cp
        asked = Choice(name, active, "as asked", 0.0)
        chunk = ttft.chunks[0].new
        return plan_chunks(everywhere, profile, chunk, chooser=lambda *_: asked)

    queued = profile.device != "cpu"
    static = queued and work.batch <= STATIC_ROWS and not work.published
    step_forward = _forward(work, new=step, cached=held, cp=cp, tp=tp)
    one = replace(step_forward, graph=work.graphs and queued)
    if work.published or (variant != AUTO and not find(variant).keys_travel):
        asked = _published()[-1] if work.published else variant
        decoding = Choice(asked, cp, "as asked", 0.0)
    elif static and cp > 1:
        reason = "every rank has all new tokens, one all-gather per layer"
        decoding = Choice(ALL_Q.name, cp, reason, 0.0)
    else:
        decoding = replace(_choose(AUTO, work, step_forward, profile), active=cp)
    listed = dict.fromkeys((decoding.variant, PASS_Q.name, GATHER_Q.name, *[ALL_Q.name] * static))
    timed = listed if cp > 1 else [*listed][:1]
    steps = {name: decode_step(name, one, profile) for name in timed}
    return Plan(
        cp=cp,
        tp=tp,
        hosts=-(-cp * tp // profile.ranks_per_host) if profile.ranks_per_host else 1,
        decode_choice=decoding,
        ttft=ttft,
        ttit=steps[decoding.variant],
        compared=compared,
        under=under,
        other_steps=steps,
        capacity=capacity,
        remedies=(
            *remedies(
                ttft.fullest.memory,
                capacity,
                chunks=work.chunk is not None,
                wide=not queued and everywhere.kv_element == 4,
            ),
            *["the `hardware` of machines with more memory"] * (not queued),
        ),
    )


def _prefill(
    variant: str, work: Workload, whole: Forward, profile: HardwareProfile, *, capacity: float
) -> Chunks:
    """Return the prefill in the chunks that are requested, or that fit. If none do, return one
    piece with the memory of the last of the smallest chunks.
    """

    def chooser(variant: str, forward: Forward, profile: HardwareProfile) -> Choice:
        return _choose(variant, work, forward, profile)

    given: Any = {"variant": variant, "chooser": chooser}
    given["room"] = work.batch * (work.context + work.answer)
    chunk = work.chunk or auto_chunk(whole, profile, capacity, **given)
    if chunk:
        return plan_chunks(whole, profile, chunk, **given)
    least = min(UNIT, whole.new)
    last = replace(whole, cached=whole.cached + whole.new - least, new=least)
    memory = plan_chunk(last, profile, **given).memory
    return Chunks((replace(plan_chunk(whole, profile, **given), memory=memory),))


def layouts(
    config: LlamaConfig, cp: int | None, tp: int | None, max_ranks: int
) -> list[tuple[int, int]]:
    """Return the (cp, tp) to predict: those given, else powers of two up to `max_ranks` in all."""
    powers = [1 << n for n in range(max_ranks.bit_length()) if 1 << n <= max_ranks]
    pairs = [(c, t) for t in ([tp] if tp else powers) for c in ([cp] if cp else powers)]
    if cp and tp:
        return pairs
    return [(c, t) for c, t in pairs if c * t <= max_ranks and _divides(config, t)]


@dataclass(frozen=True)
class Answer:
    """The layout to use, and the others with the reason against each."""

    best: Plan
    rejected: list[tuple[Plan, str]]
    misses_target: bool = False


def best(
    plans: Iterable[Plan],
    ttft_below: float | None = None,
    fixed: Collection[str] = (),
    fp8: bool = False,
) -> Answer:
    """Choose among the plans that fit in memory.

    Of the plans that reach the target `ttft_below`, in seconds, take the one on the fewest ranks,
    and of these the fastest. Without a target, or if no plan reaches it, take the fastest plan.

    fixed: which of "cp" and "tp" the user has fixed. fp8: whether the hardware has FP8 that the
    plans do not use.

    Raises UserError if nothing fits, with the bytes missing and a remedy that `fixed` and `fp8`
    allow.
    """
    plans = list(plans)
    fitting = [p for p in plans if not p.excess_bytes]
    if not fitting:
        closest = min(plans, key=lambda p: p.excess_bytes)
        raise UserError(f"{misfit(closest)}; {_remedy(closest, fixed, fp8)}")
    reaching = [p for p in fitting if ttft_below is not None and p.ttft.seconds <= ttft_below]

    def time(p: Plan) -> float:
        return p.ttft.seconds

    if reaching:
        chosen = min(reaching, key=lambda p: (p.ranks, time(p)))
    else:
        chosen = min(fitting, key=lambda p: (time(p), p.ranks))

    def against(p: Plan) -> str:
        if p.excess_bytes:
            return f"needs {size(p.memory_bytes)} per rank, {size(p.excess_bytes)} too much"
        if ttft_below is not None and time(p) > ttft_below:
            return f"misses the target by {duration(time(p) - ttft_below)}"
        if reaching and p.ranks > chosen.ranks:
            return f"{p.ranks} ranks where {chosen.ranks} reach the target"
        return f"{duration(time(p) - time(chosen))} slower"

    rejected = [(p, against(p)) for p in plans if p is not chosen]
    return Answer(chosen, rejected, misses_target=ttft_below is not None and not reaching)


def misfit(p: Plan) -> str:
    """Return why a layout cannot run, in one line."""
    return (
        f"`cp` {p.cp}, `tp` {p.tp}: a rank needs {size(p.memory_bytes)} ({in_words(p.memory)}), "
        f"{size(p.excess_bytes)} more than the {size(p.capacity)} that it has"
    )


def _remedy(p: Plan, fixed: Collection[str], fp8: bool) -> str:
    """Return what makes a layout fit. Every number of ranks that is not fixed was tried."""
    if p.remedies:
        *others, last = p.remedies
        return f"give {', '.join(others)} or {last}" if others else f"give {last}"
    heavy = p.memory["weights"] > p.capacity / 2
    raised = "tp" if heavy else "cp"
    remedy = f"raise `{raised}`" if raised in fixed else "raise `max_gpus`"
    return remedy + ", or give `fp8`" * (heavy and fp8)


def _forward(work: Workload, *, new: int, cached: int, cp: int, tp: int) -> Forward:
    """Return a forward of `work` in which all ranks share the new tokens."""
    return Forward(
        config=work.config,
        dtype=work.dtype,
        new=new,
        cached=cached,
        ranks=cp,
        active=cp,
        batch=work.batch,
        tp=tp,
        feed_forward=work.feed_forward,
        weight_size=work.weight_size,
        kv_dtype=work.kv_dtype,
        partial_bytes=2 if work.published else 4,
    )


def _choose(variant: str, work: Workload, forward: Forward, profile: HardwareProfile) -> Choice:
    if variant == AUTO and work.published and forward.ranks > 1:
        times = {name: prefill(name, forward, profile).seconds for name in _published()}
        variant, other = sorted(times, key=times.__getitem__)
        reason = f"{duration(times[variant])}, next {other} {duration(times[other])}"
        return Choice(variant, forward.ranks, reason, 0.0)
    plain = replace(forward, feed_forward=None, partial_bytes=4)
    return choose(variant, plain, profile, work.rule)


def as_published(variant: str) -> str:
    """Return what the paper's own system runs for `variant`: its published form, or the same."""
    return AUTO if variant == AUTO else find(variant).published_form or variant


def _published() -> tuple[str, ...]:
    """Return the variants of the paper's own system, the one in which queries travel last."""
    return tuple(record.name for record in records() if record.published)


def _for_ranks(profile: HardwareProfile, cp: int, tp: int) -> HardwareProfile:
    """Return the profile with a CPU's processors divided as `cptool` divides them among ranks.

    `ranks_at_once` then counts CP ranks. If one CP rank has more TP ranks than there are
    processors, these take turns too.
    """
    if not profile.threads or profile.ranks_at_once is None:
        return profile
    processors = profile.threads * profile.ranks_at_once
    threads = max(1, processors // (cp * tp))
    shared = profile.for_ranks(threads, processors // tp)
    turns = tp * threads / processors
    return shared if turns <= 1 else shared.scaled(1 / turns)


def _memory_part(profile: HardwareProfile, ranks: int) -> float:
    """Return the fraction of the profile's memory that each of `ranks` on one machine has."""
    return profile.ranks_at_once / ranks if profile.ranks_at_once else 1.0


def _divides(config: LlamaConfig, tp: int) -> bool:
    try:
        shares.check(config, tp)
    except UserError:
        return False
    return True
