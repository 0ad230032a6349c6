"""Prefill and extend: one forward of a batch of sequences, split over ranks by context.

Every rank runs the same program with the same arguments. A forward over T new tokens on top of P
cached ones is one method, `extend`: a full prefill is P = 0. New tokens are dealt to the CP ranks
in balance whatever the placement of the cached ones; positions are the mask.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace

import torch

from cptool.cache import KVCache
from cptool.distributed.world import World
from cptool.engine.drafts.begun import Begun
from cptool.engine.options import EngineOptions
from cptool.engine.prefill.course import Course
from cptool.engine.reading import Reading, Report, silent
from cptool.engine.setup import memory
from cptool.engine.setup.kv_memory import memory_of_kv
from cptool.engine.state import BatchState
from cptool.engine.static_decode import Observer, StaticDecode
from cptool.errors import Interrupted, OptionError
from cptool.model.llama import Llama
from cptool.parallel.attention import attend
from cptool.parallel.ring import Ring
from cptool.parallel.step import Scores, Step
from cptool.parallel.transport import ring_of
from cptool.planning.cost.forward import Forward
from cptool.planning.hardware import HardwareProfile
from cptool.planning.profiles import default_profile
from cptool.planning.strategy import Choice, choose
from cptool.profiling.trace import SILENT, Recorder, Silent
from cptool.sharding import Dealt, Layout, Placement, balanced
from cptool.variants import find

Seen = Callable[[torch.Tensor, Placement, Callable[[], bool]], None]
"""seen(hidden, placement, going) receives the residual stream after the last layer of this rank's
tokens, [tokens, hidden], and where they are; it may return early once going() is False."""


class Forwards(BatchState):
    """A model on this rank's devices and a batch of sequences that it reads.

    choice: the variant of the last forward, and why; None before the first.
    trace: records spans of this rank once a recorder is attached.
    peak_bytes: the most memory that this rank had held when it last read a prompt.
    """

    def __init__(
        self,
        model: Llama,
        world: World,
        *,
        batch: int = 1,
        options: EngineOptions | None = None,
        profile: HardwareProfile | None = None,
        progress: Report | None = None,
        ring: Ring | None = None,
    ) -> None:
        self.options = options = options or EngineOptions()
        self.model, self.world, self.variant = model, world, options.variant
        self.profile = profile or default_profile(world.device.type)
        self.dtype = model.norm.weight.dtype
        self.partial_dtype = self.dtype if options.partials == "working" else torch.float32
        self.static = world.device.type == "cuda" if options.static is None else options.static
        self.ring = ring or ring_of(world.cp_group)
        self.report = progress or silent
        self.choice: Choice | None = None
        self._weight_size, self._feed_forward = model.weight_size, model.feed_forward
        kv = options.kv_dtype
        if options.kv_memory is not None and (self.static or world.device.type != "cpu"):
            rule = "KV lies in a file on a CPU alone, where no step needs it at a fixed place"
            raise OptionError("kv_memory", options.kv_memory, rule, "leave it out")
        cache = KVCache(
            layers=model.config.num_hidden_layers,
            kv_heads=model.num_kv_heads,
            head_dim=model.config.head_dim,
            batch=batch,
            dtype=self.dtype if kv == "auto" else getattr(torch, kv),
            device=world.device,
            allocate=memory_of_kv(options.kv_memory),
        )
        super().__init__(cache, ranks=world.cp)
        self._steps: StaticDecode | None = None
        self.trace: Recorder | Silent = SILENT
        self._observer: Observer | None = None
        self.peak_bytes = 0.0

    def extend(
        self,
        new: list[list[int]],
        *,
        reserve: int = 0,
        variant: str | Choice | None = None,
        seen: Seen | None = None,
        until: Sequence[int] | None = None,
        course: Course | None = None,
    ) -> None:
        """Compute the pending tokens of each sequence and then `new[b]`, and leave what follows in
        `logits`.

        A sequence with nothing to compute keeps its logits.

        reserve: keep room in the cache for that many further tokens.
        until: compute only the first `until[b]` tokens of each sequence and leave the rest pending;
            none has logits then. `cptool.engine.prefill` reads a prompt in such chunks.
        course: of the prompt that this is a chunk of.
        variant: used for this forward instead of the engine's; a Choice is used as it is.
        seen: called with what this rank computed, if there was anything to compute.

        Raises Interrupted on all ranks, and leaves everything as it was, if the launching process
        requests a stop while a prompt is read (see `reading.LONG`).
        """
        said = zip(self.tokens, new, self.computed, strict=True)
        step = until is None and all(len(before) + len(more) - n <= 1 for before, more, n in said)
        with nullcontext() if step else self.undone_by(Interrupted):
            self.append(new)
            stops = [len(tokens) for tokens in self.tokens] if until is None else list(until)
            self._compute(stops, reserve=reserve, variant=variant, seen=seen, course=course)

    @torch.inference_mode()
    def _compute(
        self,
        stops: list[int],
        *,
        reserve: int,
        variant: str | Choice | None,
        seen: Seen | None,
        course: Course | None,
    ) -> None:
        """Compute the tokens of each sequence from where they are pending to `stops[b]`."""
        pending = zip(self.tokens, self.computed, stops, strict=True)
        todo = [said[done:stop] for said, done, stop in pending]
        lengths = [len(tokens) for tokens in todo]
        if not any(lengths):
            return
        rank = self.world.cp_rank
        self.choice = self._chosen(self.variant if variant is None else variant, lengths)
        layout = balanced(
            lengths,
            self.world.cp,
            starts=self.computed,
            held=self.holdings.counts,
            active=self.choice.active,
        )
        hidden, mine, reading = self._forward(todo, layout, reserve=reserve, course=course)
        if seen is not None:
            seen(hidden, mine, lambda: reading is None or not reading.stopped)
        if reading is not None:
            reading.end()
        ends = mine.cu_seqlens[1:].tolist()
        owned = [
            b
            for b, length in enumerate(lengths)
            if length and stops[b] == len(self.tokens[b]) and layout.owner(b, stops[b] - 1) == rank
        ]
        if sum(lengths) > len(lengths):
            self.peak_bytes = max(self.peak_bytes, memory.peak(self.world))
        if owned:
            with self.trace.span("logits", "linear"):
                rows = self.model.logits(hidden[[ends[b] - 1 for b in owned]])
            self.logits |= dict(zip(owned, rows, strict=True))
        self.computed = stops

    def _forward(
        self,
        todo: list[list[int]],
        layout: Layout | Dealt,
        *,
        reserve: int = 0,
        course: Course | None = None,
        layers: range | None = None,
        begun: Begun | None = None,
    ) -> tuple[torch.Tensor, Placement, Reading | None]:
        """Compute the new tokens `todo[b]` of each sequence, dealt by `layout`, under the choice
        that was made. Return the residual stream of this rank's, and where they are.

        layers: go through these layers alone. begun: what this rank's tokens have computed of the
        layers before.
        """
        assert self.choice is not None
        keys_travel = find(self.choice.variant).keys_travel
        step = self._placed(layout.placements(), reserve, keys_travel=keys_travel)
        mine = step.queries[step.rank]
        reading = None
        if isinstance(layout, Layout):
            reading = self._reading(list(map(len, todo)), layout, course)
        with self.trace.span("model", "small ops"):
            attention = self._attention(step, self.choice.variant, reading)
            passed = None if reading is None else reading.passed
            if begun is None:
                flat = torch.tensor([t for tokens in todo for t in tokens], dtype=torch.int64)
                local = flat[layout.indices(step.rank)].to(self.world.device)
                hidden = self.model.embedded(local)
            else:
                hidden = begun.stacked(mine)
            self.model.through(hidden, mine.positions, attention, layers=layers, passed=passed)
        return hidden, mine, reading

    def make_room(self, more: Sequence[int]) -> None:
        """Make room in this rank's cache for `more[b]` further tokens of each sequence."""
        held = self.holdings.counts[self.world.cp_rank]
        self.cache.reserve([n + slots for n, slots in zip(held, more, strict=True)])

    def _reading(self, lengths: list[int], layout: Layout, course: Course | None) -> Reading | None:
        """Return what reports a forward's progress; None for a step of decode."""
        if self.report is silent or (course is None and max(lengths) <= 1):
            return None
        assert self.choice is not None
        course = course or Course.of(self, lengths, sum(lengths))
        course.begin(lengths, self.computed)
        return Reading(
            self,
            course,
            replace(self.forward(lengths), active=self.choice.active),
            choice=self.choice,
            layout=layout,
        )

    def _chosen(self, variant: str | Choice, lengths: list[int]) -> Choice:
        if isinstance(variant, Choice):
            return variant
        return choose(variant, self.forward(lengths), self.profile)

    def forward(self, lengths: Sequence[int]) -> Forward:
        """Return `lengths[b]` new tokens over those computed, as the cost model describes them."""
        return Forward(
            config=self.model.config,
            dtype=str(self.dtype).removeprefix("torch."),
            kv_dtype=str(self.cache.dtype).removeprefix("torch."),
            new=sum(lengths),
            cached=sum(self.computed),
            ranks=self.world.cp,
            active=self.world.cp,
            batch=sum(map(bool, lengths)),
            tp=self.world.tp,
            partial_bytes=self.partial_dtype.itemsize,
            weight_size=self._weight_size,
            feed_forward=self._feed_forward,
            kv_memory=self.options.kv_memory,
            local=self.world.local_size,
        )

    def _placed(self, queries: tuple[Placement, ...], reserve: int, *, keys_travel: bool) -> Step:
        """Give each rank its new tokens and return the step in which they attend."""
        world = self.world
        self.holdings.append(queries)
        queries = tuple(placement.to(world.device) for placement in queries)
        if reserve:
            share = -(-reserve // world.cp) + 1
            self.cache.reserve([held + share for held in self.holdings.counts[world.cp_rank]])
        self.cache.extend(queries[world.cp_rank])
        if self._steps is not None and self._steps.moved:
            self._steps = None  # it keeps the memory that the cache has left
        keys = self.holdings.placements() if keys_travel and world.cp > 1 else ()
        return Step(
            rank=world.cp_rank,
            queries=queries,
            keys=tuple(placement.to(world.device) for placement in keys),
            partial_dtype=self.partial_dtype,
        )

    def _attention(self, step: Step, variant: str, reading: Reading | None) -> Callable:
        """Return the attention that the model calls in each layer of a forward."""
        config = self.model.config
        mine = step.queries[step.rank]

        def attention(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> torch.Tensor:
            self.cache.store(layer, k, v)
            seen = nullcontext() if reading is None else reading.attention(layer)
            with seen, self.trace.span("attention", "attention"):
                kv = self.cache.layer(layer)
                scores = Scores.of(config, layer)
                out = attend(variant, q, kv, step, ring=self.ring, scores=scores)
            if self._observer is not None:
                self._observer(layer, mine, q, out)
            return out

        return attention

    def attach_recorder(self, recorder: Recorder) -> None:
        """Record spans and transfers of this rank in `recorder` from now on."""
        self.trace = self.ring.trace = recorder
        recorder.attach(self.model)
