"""Whole models over whole conversations: turns on changing ranks, batches of unlike prompts, long
decodes.
"""

import pytest
import torch
from conftest import greedy
from llama_reference import save_llama
from ranks import run_ranks
from test_cli import as_json

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import saving
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.session import maintenance, store
from cptool.session.store import identity
from cptool.variants import names

TURNS = [
    [504, 2365, 282, 4649, 314, 7042, 30, 378, 2365, 282, 6219, 314] * 3,
    [198, 504, 2988, 314, 42, 216, 34],
    [378, 2365, 282, 4649, 314],
]


@pytest.mark.parametrize("variant", names())
def test_three_turns_on_4_then_2_then_3_ranks(request, token_file, tmp_path, variant):
    """The real model under one variant; a small one, which starts sooner, under the others."""
    name = "smollm2" if variant == names()[0] else "mqa"
    path, reference = (request.getfixturevalue(f"{name}_{what}") for what in ("path", "reference"))
    eos = open_checkpoint(str(path)).eos_ids
    store, said = tmp_path / "s", []
    turns = TURNS if name == "smollm2" else [[id % 299 for id in turn] for turn in TURNS]
    for turn, cp in zip(turns, (4, 2, 3), strict=True):
        said += turn
        on = ("--cp", cp, "--variant", variant)
        if not store.exists():
            as_json("prefill", path, "--token-ids", token_file(turn), "--session", store, *on)
            answer = as_json("decode", store, "-n", 5, *on)
        else:
            answer = as_json("decode", store, "--token-ids", token_file(turn), "-n", 5, *on)
        assert answer["cp"] == cp
        assert answer["token_ids"] == [greedy(reference, said, 5, eos)]
        said += answer["token_ids"][0]


@pytest.fixture(scope="module")
def tiny_path(tmp_path_factory):
    """Two layers, 4 query heads on 2, a context of 4096; no EOS."""
    return save_llama(
        tmp_path_factory.mktemp("models") / "tiny",
        seed=1,
        vocab_size=97,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=4096,
        initializer_range=0.3,
        eos_token_id=None,
    )


@pytest.fixture(scope="module")
def tiny_reference(tiny_path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(tiny_path, dtype=torch.float32)


def prompt(length: int) -> list[int]:
    return [(5 * i * i + 7 * i + length) % 97 for i in range(length)]


def test_a_batch_of_unlike_prompts_on_3_ranks(tiny_path, token_file, tmp_path):
    batch = [prompt(length) for length in (1, 7, 500, 3000)]
    together = ("--token-ids", token_file(batch), "--session", tmp_path / "all", "--cp", 3)
    as_json("prefill", tiny_path, *together)
    answers = as_json("decode", tmp_path / "all", "-n", 64)["token_ids"]
    for number, ids in enumerate(batch):
        alone = tmp_path / str(number)
        as_json("prefill", tiny_path, "--token-ids", token_file(ids), "--session", alone)
        assert as_json("decode", alone, "-n", 64)["token_ids"] == [answers[number]]


def say(world, path, variant: str, turns, steps: int) -> list[list[int]]:
    """What a batch answers to each turn, greedily."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device)
    options, answers = EngineOptions(variant=variant), []
    engine = Engine(model, world, batch=len(turns[0]), options=options)
    for turn in turns:
        engine.extend(turn)
        answers.append(decode(engine, AnswerOptions(limit=steps)).token_ids)
    return answers


@pytest.mark.parametrize("variant", names())
def test_up_to_8_ranks_say_what_one_says(tiny_path, tiny_reference, variant):
    """Two turns of a batch with an empty member and sequences shorter than the ranks are many."""
    turns = [[prompt(70), [], prompt(1), prompt(5)], [prompt(2), prompt(3), [], prompt(33)]]
    alone = run_ranks(1, say, tiny_path, variant, turns, 6)
    said = turns[0][0] + alone[0][0][0] + turns[1][0]
    assert alone[0][1][0] == greedy(tiny_reference, said, 6, ())
    for n in (5, 6, 7, 8):
        for answers in run_ranks(n, say, tiny_path, variant, turns, 6):
            assert answers == alone[0]


def long_decode(world, path, steps: int, stop: tuple[int, ...]):
    """KV lengths of every rank at the end, and how many tokens each sequence said."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    engine = Engine(model, world, batch=4)
    engine.extend([prompt(length) for length in (3, 10, 1, 22)])
    answers = decode(
        engine, AnswerOptions(limit=steps, sampling=Sampling(temperature=1.0), stop_ids=stop)
    ).token_ids
    return world.gather(engine.cache.lengths), list(map(len, answers))


@pytest.mark.parametrize("steps, stop", [(300, ()), (200, (3,))])
def test_kv_grows_evenly_over_a_long_decode(tiny_path, steps, stop):
    lengths, said = run(long_decode, tiny_path, steps, stop, ranks=RankOptions(cp=4, threads=1))
    assert all(max(counts) - min(counts) <= 1 for counts in zip(*lengths, strict=True))
    assert [sum(counts) for counts in zip(*lengths, strict=True)] == [
        p + n - 1 for p, n in zip((3, 10, 1, 22), said, strict=True)
    ]
    if stop:
        assert len(set(said)) > 1  # some left the batch before others


def undone_turn(world, path, directory) -> None:
    """Says a turn on top of a session, takes it back to the session's end, says another, saves."""
    checkpoint = open_checkpoint(str(path))
    engine = Engine(load_model(checkpoint, torch.float32, world.device, world), world)
    engine.extend([prompt(9)])
    manifest = saving.save(engine, directory, None, identity(checkpoint))
    engine.extend([prompt(6)])
    engine.truncate([9])
    engine.extend([prompt(4)])
    saving.save(engine, directory, manifest.truncated([9]), identity(checkpoint))


@pytest.mark.parametrize("cp", [1, 2])
def test_a_turn_taken_back_to_the_end_of_a_session(tiny_path, token_file, tmp_path, cp):
    directory = tmp_path / "s"
    run(undone_turn, tiny_path, directory, ranks=RankOptions(cp=cp, threads=1))
    assert maintenance.problems(directory, store.load(directory)) == []
    whole = tmp_path / "whole"
    ids = prompt(9) + prompt(4)
    as_json("prefill", tiny_path, "--token-ids", token_file(ids), "--session", whole)
    answers = [as_json("decode", place, "-n", 8)["token_ids"] for place in (directory, whole)]
    assert answers[0] == answers[1]


def with_an_empty_member(world, path) -> list[list[int]]:
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    engine = Engine(model, world, batch=3)
    engine.extend([prompt(5), [], prompt(3)])
    answers = decode(engine, AnswerOptions(limit=4)).token_ids
    assert engine.tokens == [prompt(5) + answers[0], [], prompt(3) + answers[2]]
    return answers


def test_an_empty_sequence_says_nothing(tiny_path):
    assert [
        len(ids) for ids in run(with_an_empty_member, tiny_path, ranks=RankOptions(cp=2, threads=1))
    ] == [4, 0, 4]


def ended_and_asked_again(world, path, directory) -> dict[str, list[list[int]]]:
    """Three decodes of a batch of two, of which the first sequence ends within the first decode."""
    checkpoint = open_checkpoint(str(path))
    model = load_model(checkpoint, torch.float32, world.device)

    def engine() -> Engine:
        return Engine(model, world, batch=2)

    whole = engine()
    whole.extend([prompt(5), prompt(8)])
    free = decode(whole, AnswerOptions(limit=12)).token_ids
    stop = next(token for token in free[0] if token not in free[1])
    first = engine()
    first.extend([prompt(5), prompt(8)])
    said = {
        "free": free,
        "first": decode(
            first, AnswerOptions(limit=6 + free[0].index(stop), stop_ids=(stop,))
        ).token_ids,
    }
    manifest = saving.save(first, directory, None, identity(checkpoint))
    second = engine()
    saving.restore(second, directory, store.load(directory))
    said["second"] = decode(second, AnswerOptions(limit=2, stop_ids=(stop,))).token_ids
    said["third"] = (second.extend([[7], []]), decode(second, AnswerOptions(limit=1)).token_ids)[1]
    assert manifest.sequences[0].ended and not manifest.sequences[1].ended
    return said


def test_an_answer_that_ended_stays_so_until_more_is_asked(tiny_path, tmp_path):
    said = run_ranks(1, ended_and_asked_again, tiny_path, tmp_path / "s")[0]
    length = len(said["first"][0])
    assert said["first"][0] == said["free"][0][:length] and length < len(said["first"][1])
    assert said["second"][0] == [] and len(said["third"][0]) == 1
    together = said["first"][1] + said["second"][1]
    assert together[:12] == said["free"][1][: len(together)]
