"""One turn of a conversation with a model: what every rank runs when a command is given.

A turn takes new tokens for each sequence of a batch, on top of a session or of nothing, answers
with up to `max_new_tokens` tokens each, and may leave a session behind.
"""

import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.engine.answers.records import AnswerOptions, Drafted, Emit, Logprobs
from cptool.engine.figures import (
    lengths,
    prefill_flops,
    what_a_step_reads,
    what_was_expected,
    with_answers,
)
from cptool.engine.options import SAVE_EVERY_S
from cptool.engine.sampling import Sampling
from cptool.engine.setup import drafting
from cptool.engine.setup.loading import Setup, check_memory, load_for, make_engine
from cptool.engine.setup.memory import Used
from cptool.errors import Interrupted
from cptool.host import contention
from cptool.planning.prediction import Prediction
from cptool.profiling.report import Phases, Section, collect
from cptool.profiling.trace import Recorder
from cptool.session.dialogue import Dialogue

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint
    from cptool.distributed.world import World
    from cptool.engine.engine import Engine
    from cptool.engine.prefill.prompt import Read
    from cptool.engine.prefill.session import TurnSession
    from cptool.planning.strategy import Choice
    from cptool.profiling.device_trace import DeviceProfiler


@dataclass(frozen=True, kw_only=True)
class Turn(Setup):
    """What a command requests.

    prompts[b]: the new tokens of sequence b; they follow what the session holds.
    keep[b]: go back to this many tokens of sequence b first.
    max_new_tokens: append up to this many tokens to each sequence.
    sampling, stop_ids, stop_texts, stop_tokens, after, logprobs, draft: those of `AnswerOptions`.
    prompt_logprobs: report as many of each token of the prompts as `logprobs` does of an answer's.
    samples: answers to each prompt, one after another, which share its KV; 1 with a session.
    profile: file to write a trace of all ranks to.
    save_every: seconds after which a session has what was computed of a prompt.
    chat: the messages of each sequence, if they are conversations: those that are answered, or
        whose last answer goes on.
    """

    prompts: tuple[tuple[int, ...], ...]
    keep: tuple[int, ...] | None = None
    max_new_tokens: int = 0
    sampling: Sampling = Sampling()
    stop_ids: tuple[int, ...] = ()
    stop_texts: tuple[str, ...] = ()
    stop_tokens: tuple[int, ...] = ()
    after: tuple[int, ...] | None = None
    logprobs: int | None = None
    prompt_logprobs: int | None = None
    draft: str = "off"
    samples: int = 1
    profile: str | None = None
    save_every: float = SAVE_EVERY_S
    chat: tuple[Dialogue, ...] | None = None

    @property
    def answers(self) -> AnswerOptions:
        """How its prompts are answered."""
        return AnswerOptions(
            limit=self.max_new_tokens,
            sampling=self.sampling,
            stop_ids=self.stop_ids,
            stop_texts=self.stop_texts,
            stop_tokens=self.stop_tokens,
            after=self.after,
            logprobs=self.logprobs,
            draft=self.draft,
        )


@dataclass(frozen=True, kw_only=True)
class Report:
    """What happened: the same on every rank, except the times, which are this rank's, and
    `prompt_logprobs`, which rank 0 has.

    `resumed` of the `cached` tokens were computed by a run of this turn that was interrupted.
    `first_token` follows the new tokens (under the turn's sampling), whether or not it was
    appended. `token_ids` are the tokens appended. `ttft_s` runs from tokens and weights in memory
    to the first token; `ttit_ms` is the mean time of each further token, None where there was none.
    `processor_wait_s` is how long a rank was kept from its processors during the prefill.
    `exposed_s` is time that attention waited for other ranks during the prefill, `wire_bytes` what
    this rank sent then. `flops` counts the prefill on all ranks, `decode_bytes` what one rank reads
    for one step of decode. `ceiling_flops` is what a rank of this hardware can reach, None where
    that is unknown. `phases` holds the time per phase if the turn requested a profile. `stopped`
    says how each answer ended: `Answers`. `kv_in_file` is what of a rank's KV, in bytes, lies in a
    file that each forward reads. `predicted` is what the cost model expects; so does `memory`,
    beside what the memory came to. The prompts were read in `chunks` forwards of at most `chunk`
    new tokens, `variants[v]` of them under v; `variant` and `reason` are those of the last.
    `drafts` says what became of drafts.
    """

    tokens: int
    cached: int
    resumed: int
    cp: int
    tp: int
    device: str
    dtype: str
    kv_dtype: str
    weights: str
    widened: str | None
    variant: str | None
    reason: str
    load_s: float
    ttft_s: float
    processor_wait_s: float
    ttit_ms: float | None
    decode_variant: str | None
    decode_reason: str | None
    first_token: tuple[int, ...]
    token_ids: tuple[tuple[int, ...], ...]
    stopped: tuple[str, ...]
    exposed_s: float
    wire_bytes: int
    flops: int
    decode_bytes: int
    kv_in_file: int
    ceiling_flops: float | None
    predicted: Prediction
    memory: Used
    chunk: int
    chunks: int
    variants: dict[str, int]
    drafts: Drafted
    phases: tuple[Phases, ...] = ()
    logprobs: Logprobs | None = None
    prompt_logprobs: Logprobs | None = None

    @property
    def tokens_per_s(self) -> float | None:
        """Tokens of all sequences per second of decode, the first ones left out; None without."""
        if self.ttit_ms is None:
            return None
        steps = max(map(len, self.token_ids)) - 1
        further = sum(max(0, len(ids) - 1) for ids in self.token_ids)
        return further / (steps * self.ttit_ms / 1e3)

    def shared_fields(self) -> dict[str, object]:
        """Return the fields of the JSON of every command."""
        names = "cached", "resumed", "cp", "tp", "device", "dtype", "kv_dtype", "weights", "variant"
        others = "reason", "chunk", "chunks", "variants", "processor_wait_s"
        fields = {name: getattr(self, name) for name in (*names, *others)}
        return {**fields, **self.memory.fields()}


def run(world: "World", turn: Turn, emit: Emit | None = None) -> Report:
    """Run the turn on this rank of `world`. Collective.

    emit: called on rank 0 for each token as it is known.

    Once the launching process requests a stop, the next token of each answer is its last, and the
    session is saved. Interrupted is raised if the prompt was still being read; then a session has
    what was computed of it, beside what it had before.
    """
    from cptool.engine.answers.decode import decode, next_tokens
    from cptool.engine.prefill.session import TurnSession
    from cptool.engine.samples import sampled

    began = time.perf_counter()
    checkpoint, model = load_for(world, turn, before=partial(_check_memory, world, turn))
    small = drafting.load(world, turn, turn.draft)
    engine = make_engine(world, turn, model, batch=len(turn.prompts))
    session = TurnSession(engine, turn, checkpoint)
    profile = _Profile(engine, Path(turn.profile)) if turn.profile else None

    _allow_cancelling(world, keeps=turn.session is not None)
    waits, loaded = contention.waits(), time.perf_counter()
    prompt = _read(engine, session, turn)
    first = tuple(next_tokens(engine, turn.sampling))
    answered, waited = time.perf_counter(), contention.longest_since(waits)
    choice, exposed, sent = engine.choice, engine.ring.exposed_s, engine.ring.sent_bytes
    cached = session.cached
    new = [computed - before for computed, before in zip(engine.computed, cached, strict=True)]
    answering = sampled(engine, turn.samples, room=turn.max_new_tokens)
    answers = decode(
        answering,
        turn.answers,
        tokenizer=checkpoint.tokenizer() if turn.stop_texts else None,
        emit=emit if world.rank == 0 else None,
        interrupted=(lambda: world.board.cancelled) if world.board.shared else None,
        small=small,
    )
    if world.board.cancelled:
        world.board.notice()
    steps = max(map(len, answers.token_ids), default=0) - 1
    ended = time.perf_counter()
    if profile:
        profile.stop()
    if any(new) or any(answers.token_ids) or turn.chat is not None:
        session.save(answers.token_ids)
    sections = [Section("prefill", loaded, answered, 1)] * any(new)
    sections += [Section("decode, a token", answered, ended, steps)] * (steps > 0)
    return Report(
        tokens=sum(new),
        **session.fields(),
        cp=world.cp,
        tp=world.tp,
        device=str(world.device),
        **turn.types(checkpoint, world.device.type, tp=world.tp),
        **_chosen(choice, answering.choice if steps > 0 else None),
        load_s=loaded - began,
        ttft_s=answered - loaded,
        processor_wait_s=max(world.gather(waited)),
        ttit_ms=1e3 * (ended - answered) / steps if steps > 0 else None,
        first_token=first,
        **answers.fields(),
        exposed_s=exposed,
        wire_bytes=sent,
        flops=prefill_flops(model.config, new, cached),
        **what_a_step_reads(answering),
        ceiling_flops=engine.profile.ceiling(turn.dtype),
        phases=profile.phases(sections) if profile else (),
        **what_was_expected(engine, turn, checkpoint, new=new, cached=cached, chunk=prompt.chunk),
        **prompt.fields(),
    )


def _read(engine: "Engine", session: "TurnSession", turn: Turn) -> "Read":
    """Read what is left of the prompts, and keep what was computed where that is interrupted."""
    from cptool.engine.prefill.prompt import read

    answer = turn.max_new_tokens if turn.samples == 1 else 0
    asked: Any = {"answer": answer, "between": session.between_chunks, "chunk": session.chunk}
    try:
        return read(engine, session.rest, turn.prompt_logprobs, **asked)
    except Interrupted:
        raise Interrupted(session.keep_unfinished()) from None


def _check_memory(world: "World", turn: Turn, checkpoint: "Checkpoint") -> None:
    """Raise UserError on all ranks if one would take more memory for the turn than it may.
    Collective.
    """
    from cptool.engine.world_profile import world_profile
    from cptool.session import store

    manifest = None
    if turn.session is not None and turn.resume is not None:
        manifest = store.load(Path(turn.session), turn.resume)
    new, cached = lengths(turn, manifest)
    work = with_answers(turn, turn.on(world, checkpoint, new=new, cached=cached))
    drafts = drafting.bytes_of(turn, turn.draft, work, world_profile(world))
    check_memory(world, turn, work, drafts=drafts)


def _chosen(prefill: "Choice | None", decode: "Choice | None") -> dict[str, Any]:
    """Return the fields of a `Report` on variants; None for what did not run."""
    return {
        "variant": prefill.variant if prefill else None,
        "reason": prefill.reason if prefill else "nothing to compute, the session holds the logits",
        "decode_variant": decode.variant if decode else None,
        "decode_reason": decode.reason if decode else None,
    }


def _allow_cancelling(world: "World", *, keeps: bool) -> None:
    """Have Ctrl-C reach the ranks through the status board alone from here on, as it is sent to a
    whole group of processes, and SIGTERM too if the session `keeps` what is computed. Collective.
    """
    if world.board.path is not None:  # this rank is a local process of its own
        signal.signal(signal.SIGINT, signal.SIG_IGN)
        if keeps:
            signal.signal(signal.SIGTERM, signal.SIG_IGN)
    world.barrier()
    if world.rank == 0 and world.board.shared:
        world.board.allow_cancelling()


class _Profile:
    """Records where the time of a turn goes, for a trace in the file `path`."""

    def __init__(self, engine: "Engine", path: Path) -> None:
        self.world, self.path, self.recorder = engine.world, path, Recorder()
        self.device: DeviceProfiler | None = None
        engine.attach_recorder(self.recorder)
        if self.world.device.type == "cuda":
            from cptool.profiling import device_trace

            self.device = device_trace.DeviceProfiler()
            self.device.start()

    def stop(self) -> None:
        """Stop recording the device."""
        if self.device is not None:
            self.recorder.keep(self.device.stop())

    def phases(self, sections: Sequence[Section]) -> tuple[Phases, ...]:
        """Write the trace and return the phases of each section. Collective."""
        return collect(self.world, self.recorder, sections, self.path)
