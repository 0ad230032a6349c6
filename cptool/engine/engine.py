"""Prefill, extend, decode: exact inference of a batch of sequences, split over ranks by context.

Every rank runs the same program with the same arguments. A forward over T new tokens on top of P
cached ones is one method, `extend`: a full prefill is P = 0, a decode step is T = 1 for every
sequence still talking. New tokens are dealt to the CP ranks in balance whatever the placement of
the cached ones; positions are the mask.
"""

import secrets
import shutil
from collections.abc import Callable
from contextlib import ExitStack, suppress
from dataclasses import asdict, replace
from pathlib import Path

import torch
import torch.distributed as dist

from cptool import files
from cptool.cache import KVCache, nothing_held, truncated
from cptool.distributed.world import World
from cptool.engine.sampling import Sampling
from cptool.engine.static_decode import StaticDecode
from cptool.errors import RunError, explain
from cptool.model.llama import Llama
from cptool.parallel.attention import attend
from cptool.parallel.step import Step
from cptool.parallel.transport import ring_of
from cptool.planning.cost.exchange import ALL_Q
from cptool.planning.hardware import HardwareProfile
from cptool.planning.profiles import default_profile
from cptool.planning.strategy import AUTO, STATIC_ROWS, Choice, choose
from cptool.profiling.trace import SILENT, Recorder, Silent
from cptool.session import segments, store
from cptool.session.manifest import Damaged, Manifest, ModelIdentity, Segment, Sequence
from cptool.sharding import Placement, balanced, concat
from cptool.variants import find

Progress = Callable[[str, int, int], None]

STATIC_STEPS = 1024
"""Decode steps that room is made for at once."""


class Engine:
    """A model, `batch` sequences and their KV on this rank.

    `tokens[b]` is everything said so far, `computed[b]` how many of them have KV (the last token of
    a decode may be pending), `logits[b]` float32 [vocabulary] what follows, on the rank that owns
    the sequence's last token, `ended[b]` whether an answer ended with that token.

    partials: "float32", or "working" to let partial outputs travel in the model's dtype
    (`cptool.parallel.step.Step` tells what that costs in error). static: whether `decode` under the
    variant "auto" takes the steps of `cptool.engine.static_decode`; by default on CUDA.
    """

    def __init__(
        self,
        model: Llama,
        world: World,
        *,
        batch: int = 1,
        variant: str = AUTO,
        partials: str = "float32",
        static: bool | None = None,
        profile: HardwareProfile | None = None,
        progress: Progress | None = None,
    ):
        self.model, self.world, self.variant = model, world, variant
        self.profile = profile or default_profile(world.device.type)
        self.dtype = model.norm.weight.dtype
        self.partial_dtype = self.dtype if partials == "working" else torch.float32
        self.ring = ring_of(world)
        self.tokens: list[list[int]] = [[] for _ in range(batch)]
        self.computed = [0] * batch
        self.ended = [False] * batch
        self.logits: dict[int, torch.Tensor] = {}
        self.choice: Choice | None = None
        self.static = world.device.type == "cuda" if static is None else static
        self._steps: StaticDecode | None = None
        self._stepping = False
        self._progress = progress or (lambda phase, done, total: None)
        self.saved = [0] * batch
        self._on_disk = [0] * batch
        self.cache = KVCache(
            layers=model.config.num_hidden_layers,
            kv_heads=model.num_kv_heads,
            head_dim=model.config.head_dim,
            batch=batch,
            dtype=self.dtype,
            device=world.device,
        )
        self.trace: Recorder | Silent = SILENT
        self.observe: Callable[[int, Placement, torch.Tensor, torch.Tensor], None] | None = None
        self._take_over((nothing_held(batch, "cpu"),) * world.cp)

    @torch.inference_mode()
    def extend(self, new: list[list[int]], *, reserve: int = 0) -> None:
        """Computes the pending tokens of each sequence and then `new[b]`, and leaves what follows
        in `logits`.

        A sequence with nothing to compute keeps its logits. `reserve` keeps room in the cache for
        that many more tokens.
        """
        world, config = self.world, self.model.config
        for b, (said, added) in enumerate(zip(self.tokens, new, strict=True)):
            said.extend(added)
            self.ended[b] = self.ended[b] and not added
        todo = [said[done:] for said, done in zip(self.tokens, self.computed, strict=True)]
        lengths = [len(tokens) for tokens in todo]
        if not any(lengths):
            return
        self.choice = choose(
            self.variant,
            new=sum(lengths),
            cached=sum(self.computed),
            ranks=world.cp,
            config=config,
            dtype=str(self.dtype).removeprefix("torch."),
            profile=self.profile,
            batch=sum(map(bool, lengths)),
            tp=world.tp,
            partial_bytes=self.partial_dtype.itemsize,
        )
        layout = balanced(
            lengths, world.cp, starts=self.computed, held=self._held, active=self.choice.active
        )
        queries = layout.placements()
        for rank, added in enumerate(queries):
            self._keys[rank].append(added)
            self._held[rank] = [
                h + a
                for h, a in zip(self._held[rank], added.cu_seqlens.diff().tolist(), strict=True)
            ]
        queries = tuple(placement.to(world.device) for placement in queries)
        mine = queries[world.cp_rank]
        if reserve:
            share = -(-reserve // world.cp) + 1
            self.cache.reserve([held + share for held in self._held[world.cp_rank]])
        self.cache.extend(mine)
        if self._steps is not None and self._steps.moved:
            self._steps = None  # it keeps the memory that the cache has left
        travels = world.cp > 1 and find(self.choice.variant).keys_travel
        step = Step(
            rank=world.cp_rank,
            queries=queries,
            keys=self._all_keys() if travels else (),
            partial_dtype=self.partial_dtype,
        )
        scale, prefilling = config.head_dim**-0.5, max(lengths) > 1

        def attention(
            layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor
        ) -> torch.Tensor:
            if prefilling:
                self._progress("prefill, layer", layer, config.num_hidden_layers)
            self.cache.store(layer, k, v)
            with self.trace.span("attention", "attention"):
                kv = self.cache.layer(layer)
                out = attend(self.choice.variant, q, kv, step, self.ring, scale)
            if self.observe is not None:
                self.observe(layer, mine, q, out)
            return out

        flat = torch.tensor([token for tokens in todo for token in tokens], dtype=torch.int64)
        local = flat[layout.indices(world.cp_rank)].to(world.device)
        with self.trace.span("model", "small ops"):
            hidden = self.model(local, mine.positions, attention)
        ends = mine.cu_seqlens[1:].tolist()
        owned = [
            b
            for b, length in enumerate(lengths)
            if length and layout.owner(b, self.computed[b] + length - 1) == world.cp_rank
        ]
        kept = {b: row for b, row in self.logits.items() if not lengths[b]}
        with self.trace.span("logits", "linear"):
            rows = self.model.logits(hidden[[ends[b] - 1 for b in owned]])
        self.logits = {**kept, **dict(zip(owned, rows, strict=True))}
        self.computed = [len(said) for said in self.tokens]

    def next_tokens(self, sampling: Sampling) -> list[int]:
        """The token that follows each sequence, the same on every rank; nothing is appended.

        Each is picked by the rank that holds its logits and summed over the CP ranks with zeros
        from the others.
        """
        picks = [0] * len(self.tokens)
        with self.trace.span("sampling", "sampling"):
            for b, pick in sampling.picks(self.logits, list(map(len, self.tokens))).items():
                picks[b] = pick
        if self.world.cp_group is None:
            return picks
        told = torch.tensor(picks, device=self.world.wire)
        with self.trace.span("all-reduce", "exposed"):
            dist.all_reduce(told, group=self.world.cp_group)
        return told.tolist()

    def decode(
        self,
        limit: int,
        sampling: Sampling,
        stop: tuple[int, ...] = (),
        emit: Callable[[int, int], None] | None = None,
        interrupted: Callable[[], bool] | None = None,
    ) -> list[list[int]]:
        """Appends up to `limit` tokens to each sequence and returns them.

        A sequence that says a token of `stop` keeps it and leaves the batch, until it is given new
        tokens; an empty one, which nothing follows, has no part in it. `emit(sequence, token)` is
        called for each token as it is known. The KV of a sequence's last token stays pending.
        `interrupted` is asked at each token; once it says so on any rank, that token is the last
        one of every sequence, on all ranks.
        """
        answers: list[list[int]] = [[] for _ in self.tokens]
        talking = {b for b, said in enumerate(self.tokens) if said and limit and not self.ended[b]}
        if talking and self.computed != [len(said) for said in self.tokens]:
            self.extend([[] for _ in self.tokens])
        while talking:
            self._progress("decode, token", max(map(len, answers)), limit)
            picks = self.next_tokens(sampling)
            over = interrupted is not None and self._any_rank(interrupted())
            for b in sorted(talking):
                answers[b].append(picks[b])
                if emit is not None:
                    emit(b, picks[b])
                if over or picks[b] in stop or len(answers[b]) == limit:
                    talking.remove(b)
                    self.logits.pop(b, None)
                    self.ended[b] = picks[b] in stop
            self.advance({b: picks[b] for b in sorted(talking)}, limit - max(map(len, answers)))
        self.settle()
        for said, answer in zip(self.tokens, answers, strict=True):
            # Said, but left without KV until somebody needs what follows it.
            said.extend(answer[-1:])
        return answers

    @torch.inference_mode()
    def advance(self, picks: dict[int, int], left: int) -> None:
        """Computes one more token of the sequences in `picks`, `left` of these steps at most.

        `settle` must follow the last one before anything else is asked of the engine.
        """
        if not picks:
            return
        if not self._goes_static(len(picks)):
            self.extend([[picks[b]] if b in picks else [] for b in range(len(self.tokens))])
            return
        steps = self._steps
        if not self._stepping or not steps.remaining or 2 * len(picks) <= len(steps.sequences):
            self._open_steps(sorted(picks), min(left, STATIC_STEPS))
        rows = self._steps.step(picks, {b: self.computed[b] for b in picks})
        for b, pick in picks.items():
            self.tokens[b].append(pick)
            self.computed[b] += 1
        self.logits = {b: row for b, row in self.logits.items() if b not in picks}
        if self.world.cp_rank == 0:  # one that counts, should ranks differ in a bit
            self.logits |= rows

    def _goes_static(self, rows: int) -> bool:
        """Whether a step takes static memory: nobody asked for a variant or for times."""
        return self.static and self.variant == AUTO and not self.trace.on and rows <= STATIC_ROWS

    def _open_steps(self, sequences: list[int], steps: int) -> None:
        self.settle()
        if self._steps is None or not self._steps.reopen(sequences, self._held, steps):
            self._steps = None  # its memory first
            self._steps = StaticDecode(
                self.model,
                self.ring,
                self.cache,
                sequences,
                self._held,
                steps,
                self.partial_dtype,
                no_graph="messages go through host memory" if self.world.staged else None,
                observe=self.observe,
            )
        how = self._steps.reason
        reason = "in a CUDA graph" if how is None else f"kernel by kernel: {how}"
        reason = f"all new tokens on every rank, {reason}"
        self.choice = Choice(ALL_Q.name, self.world.cp, reason, 0.0)
        self._stepping = True

    def settle(self) -> None:
        """Notes what the ranks were given in static steps, as `extend` does for its tokens."""
        if not self._stepping:
            return
        self._stepping = False
        given = self._steps.taken()
        for keys, placement in zip(self._keys, given, strict=True):
            keys.append(placement)
        self._held = self._steps.held
        self.cache.extend(given[self.world.cp_rank].to(self.world.device))

    def truncate(self, lengths: list[int]) -> None:
        """Goes back to the first `lengths[b]` tokens of each sequence; costs no computation.

        Where a sequence gets shorter, what follows its new end is not known any more: the KV of its
        last token is given up, so that the next `extend` computes it again, as in
        `Manifest.truncated`.
        """
        for b, length in enumerate(lengths):
            if length < len(self.tokens[b]):
                del self.tokens[b][length:]
                self.computed[b] = min(self.computed[b], max(length - 1, 0))
                self.ended[b] = False
                self.logits.pop(b, None)
        self.cache.truncate(self.computed)
        self._take_over(tuple(truncated(concat(*parts), self.computed) for parts in self._keys))
        self.saved = list(map(min, self.saved, self.cache.lengths))
        self._on_disk = list(map(min, self._on_disk, self.computed))

    def record(self, recorder: Recorder) -> None:
        """From now on, notes spans and transfers of this rank in `recorder`."""
        self.trace = self.ring.trace = recorder
        recorder.attach(self.model)

    def assume(self, tokens: list[list[int]], held: tuple[Placement, ...]) -> None:
        """Takes it that rank r holds the KV of `held[r]`, which the caller has put into each rank's
        cache, and that `tokens` were said; those without KV are pending.
        """
        self.tokens = tokens
        self.computed = sum(placement.cu_seqlens.diff() for placement in held).tolist()
        self._take_over(held)

    def restore(self, directory: Path, manifest: Manifest, *, reserve: int = 0) -> None:
        """Takes over a session's state; `reserve` keeps room for that many more tokens of each
        sequence.

        Collective. Raises UserError on all ranks, before anything changes, if a segment is damaged.
        """
        self._check(directory, manifest)
        rows = {}
        with store.while_read(directory, manifest):
            held = segments.restore(
                directory,
                manifest,
                self.cache,
                rank=self.world.cp_rank,
                ranks=self.world.cp,
                kv_heads=self._kv_heads,
                reserve=-(-reserve // self.world.cp) + 1,
            )
            if self.world.cp_rank == 0:
                rows = segments.read_logits(directory, manifest)
        logits = {b: row.to(self.world.device) for b, row in rows.items()}
        self.tokens = [list(sequence.tokens) for sequence in manifest.sequences]
        self.computed = [sequence.cached for sequence in manifest.sequences]
        self.ended = [sequence.ended for sequence in manifest.sequences]
        self._take_over(held)
        self.saved, self._on_disk = self.cache.lengths, list(self.computed)
        self.logits = logits

    def save(
        self,
        directory: Path,
        previous: Manifest | None,
        model: ModelIdentity,
        chat: dict | None = None,
    ) -> Manifest:
        """Writes what came since `previous` as the session's next turn and returns its manifest.

        Where nothing was said since, KV that was pending is kept, but no turn is counted. Every
        rank writes its segment; the first then replaces the manifest, and nothing before that
        changes the session. `chat` is the state of the conversation that the turn belongs to.

        Raises RunError or OSError, on every rank, where that cannot be; the line says what became
        of the turn. The engine is then as it was, and can save elsewhere.
        """
        world, revision = self.world, 1 if previous is None else previous.revision + 1
        self._progress("save the session", 0, 0)
        # What was computed anew since `previous` counts in the new segment alone.
        start = self._on_disk if previous else [0] * len(self.tokens)
        since, start = self._since(directory, previous, start)
        turns, said = previous.turns if previous else (), tuple(map(len, self.tokens))
        older = previous.segments if previous else ()
        with ExitStack() as held:  # the lock of a living run, until the turn is committed
            segment = fault = None
            if not self._replica:
                try:
                    files.make_private(directory)
                    segment = segments.write_segment(
                        directory,
                        self.cache,
                        since,
                        revision=revision,
                        rank=world.cp_rank,
                        kv_heads=self._kv_heads,
                        start=start,
                        until=self.computed,
                        logits=self.logits if world.tp_rank == 0 else {},
                        held=held,
                    )
                except (RunError, OSError) as error:
                    fault = error
            try:
                self._agree(fault)
            except (RunError, OSError):
                if segment is not None:
                    with suppress(OSError):
                        (directory / segment.file).unlink()
                raise
            told = world.gather([segment and asdict(segment), sorted(self.logits)])
            written = [(fields and Segment.of(fields), owned) for fields, owned in told]
            logits_of = {
                b: s.file
                for s, owned in written
                if s is not None and s.kv_heads[0] == 0
                for b in owned
            }
            older = (replace(s, until=tuple(map(min, s.until, start))) for s in older)
            manifest = Manifest(
                session=previous.session if previous else secrets.token_hex(8),
                model=model,
                dtype=str(self.dtype).removeprefix("torch."),
                cp=world.cp,
                tp=world.tp,
                revision=revision,
                turns=turns if turns[-1:] == (said,) else (*turns, said),
                sequences=tuple(
                    Sequence(tuple(tokens), computed, logits_of.get(b), ended)
                    for b, (tokens, computed, ended) in enumerate(
                        zip(self.tokens, self.computed, self.ended, strict=True)
                    )
                ),
                segments=tuple(s for s in older if s.live)
                + tuple(s for s, _ in written if s is not None),
                chat=previous.chat if previous else (),
            )
            if world.rank == 0:
                try:
                    manifest = store.commit_or_keep(directory, manifest, chat)
                except (RunError, OSError) as error:
                    fault = error
            self._agree(fault)  # and no rank leaves before the turn is on disk
        self.saved, self._on_disk = self.cache.lengths, list(self.computed)
        return manifest

    def _agree(self, fault: RunError | OSError | None) -> None:
        """Raises on every rank where one has a fault, so that none waits for it. Collective."""
        told = self.world.gather(None if fault is None else explain(fault))
        if fault is not None:
            raise fault
        for text in told:
            if text is not None:
                raise RunError(text)

    def _since(
        self, directory: Path, previous: Manifest | None, start: list[int]
    ) -> tuple[list[int], list[int]]:
        """How many tokens of each sequence on this rank need no writing, and the positions from
        which on all are written: those of the turn, or more where segments have become many and
        the disk has room.
        """
        first = start if previous is None else previous.rewrite_from(start, self.computed)
        if first == start:
            return self.saved, start
        rows = [int((p < f).sum()) for p, f in zip(self.cache.held.sequences(), first, strict=True)]
        anew = sum(self.computed) - sum(first)
        needed = anew * previous.row_bytes((0, previous.model.kv_heads))
        if all(self.world.gather(shutil.disk_usage(directory).free > 2 * needed)):
            return rows, first
        return self.saved, start

    def _check(self, directory: Path, manifest: Manifest) -> None:
        """Verifies that all ranks see one revision, and every segment, each on one rank; nobody
        opens one before all are known.
        """
        damage, here = None, self.world.gather(manifest.revision)
        if here != here[:1] * len(here):
            raise RunError(store.changed(directory, max(here), min(here)))
        try:
            segments.check(directory, manifest.segments[self.world.rank :: self.world.size])
        except Damaged as error:
            damage = str(error)
        for found in self.world.gather(damage):
            if found is not None:
                with store.while_read(directory, manifest):
                    raise Damaged(found)

    def _any_rank(self, value: bool) -> bool:
        """Whether `value` holds on any rank."""
        if self.world.size == 1:
            return value
        told = torch.tensor(int(value), device=self.world.wire)
        dist.all_reduce(told)
        return bool(told)

    def _take_over(self, held: tuple[Placement, ...]) -> None:
        """Notes what every CP rank holds: by count for dealing tokens, by position for variants in
        which keys travel.
        """
        self._held = [placement.cu_seqlens.diff().tolist() for placement in held]
        self._keys = [[placement] for placement in held]

    def _all_keys(self) -> tuple[Placement, ...]:
        """What every CP rank holds now. Put together only where it is needed: a decode step is too
        short for it.
        """
        self._keys = [[concat(*parts)] for parts in self._keys]
        return tuple(parts[0].to(self.world.device) for parts in self._keys)

    @property
    def _kv_heads(self) -> tuple[int, int]:
        """The range of KV heads that this rank's tensor-parallel share covers."""
        first = self.world.tp_rank * self.model.config.num_key_value_heads // self.world.tp
        return first, first + self.model.num_kv_heads

    @property
    def _replica(self) -> bool:
        """Whether a lower tensor-parallel rank holds the same KV heads."""
        heads, tp, rank = self.model.config.num_key_value_heads, self.world.tp, self.world.tp_rank
        return rank > 0 and rank * heads // tp == (rank - 1) * heads // tp
