"""Drafts change how many steps an answer takes, and nothing else."""

import itertools
from functools import partial

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers import decode as decoding
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.drafts import chooser, drafter, pace
from cptool.engine.drafts.names import model_of
from cptool.engine.drafts.small import SmallModel
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.samples import sampled
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.ops.kernels import cpu_isas, force_cpu_isa


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * length + salt) % 290 for i in range(length)]


ONE = [prompt(40) + prompt(40)[3:9]]
BATCH = [ONE[0], [], prompt(1), prompt(5) * 3, prompt(12)]
PENALISED = Sampling(
    temperature=1.5, seed=2, repetition_penalty=1.3, frequency_penalty=0.4, logit_bias=((7, 2.0),)
)


def recording(engine, oracle):
    """A drafter that drafts wherever it can: what comes next by `oracle`, which is wrong at times,
    or else what it looks up.
    """

    class Recording(drafter.Drafter):
        def _drafts(self, picks, left):
            drafts = super()._drafts(picks, left)
            for b in left if self.on else ():
                known = oracle[b][len(engine.tokens[b]) + 1 :] if oracle else drafts.get(b, [])
                count = min(self._queries, self._rows - len(left) + 1, left[b]) - 1
                first = len(engine.tokens[b])
                drafts[b] = [t if n % 4 else 1 for n, t in enumerate(known[:count], first)]
            room = self._rows - len(left)
            for b in drafts:
                drafts[b] = drafts[b][:room]
                room -= len(drafts[b])
            return drafts

    return Recording


def choosing(oracle):
    """`Chooser.choose` that knows what each sequence will be, and is wrong at times."""

    def choose(self, logits):
        found = {}
        for b in logits:
            n = len(self.texts[b])
            known = oracle[b][n] if n < len(oracle[b]) else 0
            found[b] = (known if n % 4 else 1), len(chooser.PRIORS) - 1
        return found

    return choose


def say(world, path, turns, *, draft="lookup", oracle=None, **options):
    """The answers of `answers_of`, drafted wherever that is possible.

    oracle: what each sequence will be, to draft from.
    """
    if draft == "lookup":
        recorded = partial(recording, oracle=oracle)
        return answers_of(world, path, turns, draft=draft, drafting=recorded, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace.Budget, "pays", lambda self, chance: self._room > 0)
        if oracle:
            patch.setattr(chooser.Chooser, "choose", choosing(oracle))
        return answers_of(world, path, turns, draft=draft, **options)


def answers_of(world, path, turns, *, draft, drafting=None, samples=1, dtype="float32", **options):
    """Answers to each turn with log-probabilities, where KV lies, its bytes, and what was drafted.

    drafting: returns the drafter to use, from an engine.
    """
    defaults = {"variant": "auto", "weights": None, "kv_memory": None}
    settings = {name: options.pop(name, value) for name, value in defaults.items()}
    checkpoint, dtype = open_checkpoint(str(path)), getattr(torch, dtype)
    model = load_model(
        checkpoint,
        dtype,
        world.device,
        world if world.tp > 1 else None,
        weights=settings["weights"],
    )
    engine = Engine(model, world, batch=len(turns[0]), options=EngineOptions(**settings))
    answers, drafted = [], []
    small = None if model_of(draft) is None else SmallModel(world, draft, dtype)
    original = decoding.Drafter
    for turn in turns:
        engine.extend(turn)
        answering = sampled(engine, samples, room=options["limit"])
        if drafting is not None:
            decoding.Drafter = drafting(answering)
        try:
            asked = AnswerOptions(draft=draft, logprobs=2, **options)
            tokenizer = checkpoint.tokenizer()
            answer = decoding.decode(answering, asked, tokenizer=tokenizer, small=small)
        finally:
            decoding.Drafter = original
        answers.append((answer.token_ids, answer.stopped, answer.logprobs))
        drafted.append((answer.drafts.proposed, answer.drafts.accepted, answer.drafts.off))
    held = [row.tolist() for row in answering.cache.held.sequences()]
    kv = [
        answering.cache.tokens_from(layer, b, 0).flatten().view(torch.uint8).tolist()
        for layer in range(2)
        for b in range(len(held))
    ]
    state = held, kv, answering.computed, answering.tokens, answering.ended
    assert answering.cache.lengths == answering.holdings.counts[world.cp_rank]
    return answers, state, drafted


def check(n, path, turns, *, draft="lookup", **options):
    """Drafts that are found, and some that are known, give the same on every rank."""
    plain = run_ranks(n, answers_of, path, turns, draft="off", **options)
    oracle = plain[0][1][3]
    proposed = accepted = 0
    for known in (None, oracle):
        drafted = run_ranks(n, say, path, turns, draft=draft, oracle=known, **options)
        for rank, (answers, state, counts) in enumerate(drafted):
            assert answers == plain[rank][0]
            assert state == plain[rank][1]
            assert all(off is None for *_, off in counts)
        proposed += sum(count for count, *_ in drafted[0][2])
        accepted += sum(count for _, count, _ in drafted[0][2])
    assert 0 < accepted < proposed
    return plain


@pytest.fixture(params=["lookup", "layers:1", "model"])
def draft(request):
    return str(request.getfixturevalue("tiny_model")) if request.param == "model" else request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("n", [1, 2, 3])
def test_one_sequence(mqa_path, n, dtype, draft):
    check(n, mqa_path, [ONE, [[5, 6]]], limit=40, dtype=dtype, draft=draft)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_a_batch(mqa_path, n, draft):
    """Two turns, with empty members and sequences that end early, each with drafts of its own."""
    turns = [BATCH, [prompt(2, 1), prompt(3, 1), [], prompt(20, 1), []]]
    options = {"sampling": Sampling(temperature=2.0, seed=5), "stop_ids": tuple(range(30))}
    plain = check(n, mqa_path, turns, limit=24, draft=draft, **options)
    assert len({len(answer) for answer in plain[0][0][0][0]}) > 3


@pytest.mark.parametrize("variant", ["pass-kv", "gather-kv", "pass-q", "gather-q"])
def test_every_variant(mqa_path, variant, draft):
    check(2, mqa_path, [BATCH], limit=20, variant=variant, draft=draft)


@pytest.mark.parametrize("n", [1, 2])
def test_draws_penalties_and_bias(mqa_path, n, draft):
    check(n, mqa_path, [BATCH], limit=20, sampling=PENALISED, draft=draft)


@pytest.mark.parametrize("n", [1, 2])
def test_samples(mqa_path, n, draft):
    turns, sampling = [[ONE[0], prompt(5) * 3]], Sampling(temperature=0.7, seed=1)
    check(n, mqa_path, turns, limit=16, samples=3, sampling=sampling, draft=draft)


def test_quantised_weights(mqa_path, draft):
    check(2, mqa_path, [ONE], limit=30, weights="q8_0", draft=draft)


def test_kv_in_a_file(mqa_path, draft):
    check(2, mqa_path, [ONE], limit=40, kv_memory=60_000, draft=draft)


def over_tensor_parallel_ranks(world, path, draft):
    """Whether drafts give the same on this rank, and how many came true of how many."""
    plain = answers_of(world, path, [BATCH], draft="off", limit=20)
    drafted = [
        say(world, path, [BATCH], draft=draft, oracle=oracle, limit=20)
        for oracle in (None, plain[1][3])
    ]
    return [each[:2] == plain[:2] for each in drafted], drafted[1][2][0][:2]


@pytest.mark.parametrize("source", ["lookup", "layers:1", "model"])
def test_tensor_parallel_ranks(tiny_model, mqa_path, source):
    draft = str(mqa_path) if source == "model" else source
    ranks = RankOptions(tp=2, cp=2, device="cpu", threads=1)
    same, (proposed, accepted) = run(over_tensor_parallel_ranks, tiny_model, draft, ranks=ranks)
    assert same == [True, True] and 0 < accepted < proposed


def test_portable_kernels(mqa_path):
    with force_cpu_isa(cpu_isas()[0]):
        run_ranks(1, portable, mqa_path)


def portable(world, path):
    with force_cpu_isa(cpu_isas()[0]):
        plain = answers_of(world, path, [ONE], draft="off", limit=30)
        drafted = say(world, path, [ONE], oracle=plain[1][3], limit=30)
    assert drafted[:2] == plain[:2] and drafted[2][0][1]


def test_limits_within_a_draft(mqa_path):
    """Every limit, and each token of the answer as the one that ends it."""
    plain = run_ranks(1, answers_of, mqa_path, [ONE], draft="off", limit=12)[0]
    oracle, answer = plain[1][3], plain[0][0][0][0]
    for limit, stop in itertools.product((1, 2, 3, 6, 7, 12), ((), (answer[1],), (answer[5],))):
        for kind in ("stop_ids", "stop_tokens"):
            options = {"limit": limit, kind: stop}
            expected = run_ranks(1, answers_of, mqa_path, [ONE, [[3]]], draft="off", **options)[0]
            found = run_ranks(1, say, mqa_path, [ONE, [[3]]], oracle=oracle, **options)[0]
            assert found[:2] == expected[:2]


def stopped_at(world, path, oracle, count):
    """A turn that is interrupted at its token `count`, and what comes after it."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, None)
    engine = Engine(model, world, batch=len(BATCH))
    calls = itertools.count(1)
    original = decoding.Drafter
    decoding.Drafter = recording(engine, oracle)
    found = []
    try:
        for turn, stop in ((BATCH, count), ([[7], [], [], [8], []], 99)):
            engine.extend(turn)
            answers = decoding.decode(
                engine,
                AnswerOptions(limit=9, draft="lookup" if oracle else "off"),
                interrupted=lambda stop=stop: next(calls) >= stop,
            )
            found.append((answers.token_ids, answers.stopped))
            assert engine.computed == [max(len(said) - 1, 0) for said in engine.tokens]
            assert engine.cache.lengths == engine.holdings.counts[world.cp_rank]
    finally:
        decoding.Drafter = original
    return found, engine.tokens


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_an_interrupt_leaves_what_was_said(mqa_path, n, count):
    """Each answer is the beginning of the one that goes on, and the session goes on after it."""
    whole, oracle = run_ranks(1, stopped_at, mqa_path, None, 99)[0]
    for (first, second), tokens in run_ranks(n, stopped_at, mqa_path, oracle, count):
        for b, said in enumerate(BATCH):
            assert first[0][b] == whole[0][0][b][: len(first[0][b])]
            assert bool(first[0][b]) == bool(said)
            rest = tokens[b][len(said) + len(first[0][b]) :]
            assert len(rest) == len(second[0][b]) + (b in (0, 3))
        assert "interrupted" in first[1]


def test_stop_texts(smollm2_path):
    """A text that ends within a draft."""
    checkpoint = open_checkpoint(str(smollm2_path))
    said = checkpoint.tokenizer().encode("one two three four. one two three four. one")
    options = {"limit": 20, "stop_texts": (" four",)}
    plain = run_ranks(1, answers_of, smollm2_path, [[said]], draft="off", **options)[0]
    assert plain[0][0][1] == ["stop"]
    drafted = run_ranks(1, say, smollm2_path, [[said]], oracle=plain[1][3], **options)[0]
    assert drafted[:2] == plain[:2] and drafted[2][0][1]


def why(world, path, *, batch=1, samples=1, static=None, tp=1):
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, None)
    engine = Engine(model, world, batch=batch, options=EngineOptions(static=static))
    engine.extend([[1, 2, 3]] * batch)
    answering = sampled(engine, samples, room=2)
    object.__setattr__(world, "tp", tp)
    return drafter.why_not(answering, range(batch * samples))


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"batch": 64}, "64 sequences leave no row of the"),
        ({"samples": 9}, "9 samples leave no query of the 8"),
        ({"static": True}, "outside static memory"),
        ({"tp": 4}, "4 tensor-parallel ranks"),
        ({}, None),
    ],
)
def test_what_cannot_be_drafted_says_why(mqa_path, options, reason):
    (found,) = run_ranks(1, why, mqa_path, **options)
    assert (found is None) if reason is None else (reason in found)
