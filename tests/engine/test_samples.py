"""Samples share the KV of their prompt: held once, read together, with the answers of a batch that
repeats the prompt."""

import random
from dataclasses import replace

import pytest
import torch
from ranks import run_ranks
from reference import check, make_case, tolerance

from cptool.cache import KVCache
from cptool.checkpoint import open_checkpoint
from cptool.engine import saving
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.samples import Samples
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.ops.attention import merge_partials
from cptool.parallel.attention import over_local
from cptool.parallel.step import Scores
from cptool.session.store import identity
from cptool.sharding import Placement

SAMPLES = 3
WARM = Sampling(temperature=2.0, seed=5)
PENALISED = Sampling(temperature=1.5, seed=2, repetition_penalty=1.3, frequency_penalty=0.4)


def prompt(length: int, salt: int = 0) -> list[int]:
    return [(7 * i * i + 3 * i + 11 * length + salt) % 290 for i in range(length)]


PROMPTS = [prompt(37), prompt(1), prompt(12)]


def answered(world, path, *, static=False, variant="auto", sampling=WARM, stop=(), steps=9):
    """The answers of samples that share their prompts, with what each cache holds; the prompts are
    read in two turns."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    options = EngineOptions(static=static, variant=variant)
    engine = Engine(model, world, batch=len(PROMPTS), options=options)
    engine.extend([said[: len(said) // 2] for said in PROMPTS])
    engine.extend([said[len(said) // 2 :] for said in PROMPTS])
    before = [row.tolist() for row in engine.cache.held.sequences()]
    samples = Samples(engine, SAMPLES, room=steps)
    asked = AnswerOptions(limit=(steps,) * len(PROMPTS), sampling=sampling, stop_ids=stop)
    answers = decode(samples, asked).token_ids
    assert [row.tolist() for row in engine.cache.held.sequences()] == before
    assert engine.tokens == PROMPTS
    held = [row.tolist() for row in samples.cache.held.sequences()]
    memory = sum(map(len, before)), engine.cache.nbytes, samples.cache.nbytes
    return answers, held, samples.choice.variant, memory


def repeated(world, path, *, samples=SAMPLES, sampling=WARM, stop=(), steps=9):
    """The answers of a batch that has each prompt several times, with the same draws."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    engine = Engine(model, world, batch=samples * len(PROMPTS))
    engine.samples = samples
    engine.extend([said for said in PROMPTS for _ in range(samples)])
    options = AnswerOptions(limit=steps, sampling=sampling, stop_ids=stop)
    return decode(engine, options).token_ids


@pytest.fixture(scope="module")
def expected(mqa_path):
    return run_ranks(1, repeated, mqa_path)[0]


@pytest.mark.parametrize("n", [1, 2, 3])
@pytest.mark.parametrize("static", [False, True])
def test_the_answers_of_a_batch_that_repeats_the_prompt(mqa_path, expected, n, static):
    results = run_ranks(n, answered, mqa_path, static=static)
    assert all(answers == expected for answers, *_ in results)
    for s, answer in enumerate(expected):
        assert answer != expected[s // SAMPLES * SAMPLES + (s + 1) % SAMPLES]
        # Only the answer's own tokens, each on one rank; the last one is pending.
        own = sorted(position for _, held, *_ in results for position in held[s])
        start = len(PROMPTS[s // SAMPLES])
        assert own == list(range(start, start + len(answer) - 1))


@pytest.mark.parametrize("variant", ["pass-kv", "gather-kv", "pass-q", "pass-q-all2all"])
def test_keys_of_the_prompt_stay_where_they_are(mqa_path, expected, variant):
    for answers, _, used, _ in run_ranks(2, answered, mqa_path, variant=variant):
        assert answers == expected
        assert used == (variant if variant.startswith("pass-q") else "gather-q")


@pytest.mark.parametrize("static", [False, True])
def test_samples_that_stop_leave(mqa_path, static):
    options = {"stop": tuple(range(40)), "sampling": PENALISED, "steps": 20}
    expected = run_ranks(1, repeated, mqa_path, **options)[0]
    assert len({len(answer) for answer in expected}) > 3
    for answers, *_ in run_ranks(3, answered, mqa_path, static=static, **options):
        assert answers == expected


def test_the_first_sample_is_the_answer_without_samples(mqa_path, expected):
    assert run_ranks(1, repeated, mqa_path, samples=1)[0] == expected[::SAMPLES]


def test_memory_holds_the_prompt_once(mqa_path):
    """On one of the ranks, with slack of a quarter; and room for the answers."""
    token = 3 * 2 * 64 * 4  # layers, K and V of one head, float32
    for n in (1, 2):
        memory = [used for *_, used in run_ranks(n, answered, mqa_path, steps=8)]
        assert sum(tokens for tokens, _, _ in memory) == sum(map(len, PROMPTS))
        for tokens, shared, own in memory:
            assert token * tokens <= shared <= token * tokens * 1.25
            assert own == token * SAMPLES * len(PROMPTS) * (8 // n + 1)


def restored_and_answered(world, path, directory):
    """Samples of a session with an answer that is pending, saved and restored."""
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, torch.float32, world.device, world)
    engine = Engine(model, world)
    engine.extend([prompt(21)])
    decode(engine, AnswerOptions(limit=4))
    manifest = saving.save(engine, directory, None, identity(checkpoint))
    plain, shared = Engine(model, world), Engine(model, world)
    for restored in (plain, shared):
        saving.restore(restored, directory, manifest)
        restored.extend([prompt(5)])
    asked = AnswerOptions(limit=6, sampling=WARM)
    answers = decode(Samples(shared, 2), asked).token_ids
    return answers[:1] == decode(plain, asked).token_ids and answers[1] != answers[0]


@pytest.mark.parametrize("n", [1, 3])
def test_samples_of_a_restored_session(mqa_path, tmp_path, n):
    assert all(run_ranks(n, restored_and_answered, mqa_path, tmp_path / "s"))


@pytest.mark.parametrize("window", [None, 4, 60])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ranks", [1, 3])
def test_a_step_over_a_shared_prefix_against_float64(ranks, dtype, window):
    """Keys on any rank; some samples have no query, and some ranks no key."""
    prefixes, samples, heads = (300, 0, 1, 70), 4, (6, 2)
    draw = random.Random(ranks)
    own = [draw.randrange(6) for _ in range(samples * len(prefixes))]
    queries = [draw.random() < 0.8 for _ in own]
    starts = [prefix for prefix in prefixes for _ in range(samples)]
    case = make_case(
        [
            (range(p + n, p + n + asks), range(p + n + asks))
            for p, n, asks in zip(starts, own, queries, strict=True)
        ],
        heads=heads,
        dtype=dtype,
    )
    for b, start in enumerate(starts):
        first, mine = int(case.cu_k[b // samples * samples]), int(case.cu_k[b])
        for x in (case.k, case.v):
            x[mine : mine + start] = x[first : first + start]
    case = replace(case, window=window)
    placement = Placement(case.q_pos, case.cu_q)
    partials = [
        over_local(case.q, placement, kv, scores=Scores(case.scale, window))
        for kv in shards(case, prefixes, starts, ranks=ranks, draw=draw)
    ]
    merged = merge_partials(*zip(*partials, strict=True))
    check(case, merged, tolerance(case, dtype, merged=True))


def shards(case, prefixes, starts, *, ranks, draw):
    """The layer's KV of each rank: its part of the prefixes, and of what follows."""
    samples = len(starts) // len(prefixes)
    ends = case.cu_k[1:].tolist()
    begins = case.cu_k[:-1].tolist()
    common = [range(begins[p * samples], begins[p * samples] + n) for p, n in enumerate(prefixes)]
    own = [range(b + start, e) for b, e, start in zip(begins, ends, starts, strict=True)]
    owner = {slot: draw.randrange(ranks) for rows in (*common, *own) for slot in rows}
    for rank in range(ranks):
        prefix, cache = (
            held(case, [[slot for slot in row if owner[slot] == rank] for row in rows])
            for rows in (common, own)
        )
        cache.begin_with(prefix)
        yield cache.layer(0)


def held(case, rows):
    """A cache of one layer that holds these slots of the case."""
    _, heads, dim = case.k.shape
    cache = KVCache(
        layers=1, kv_heads=heads, head_dim=dim, batch=len(rows), dtype=case.k.dtype, device="cpu"
    )
    slots = torch.tensor([slot for row in rows for slot in row], dtype=torch.int64)
    cache.extend(Placement.of([case.k_pos[row] if row else case.k_pos[:0] for row in rows]))
    cache.store(0, case.k[slots], case.v[slots])
    return cache
