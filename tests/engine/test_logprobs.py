"""Log-probabilities of answers and prompts, on every number of ranks, are those of transformers."""

import copy

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers import logprobs
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions, TokenLogprob
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.prefill.prompt import read
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model

BATCH = [[5, 6, 7, 5, 6, 7, 5], [9], [(7 * i * i + 3 * i) % 290 for i in range(40)], []]
TOP = 4


def tables(reference, said: list[int]) -> tuple[torch.Tensor, float]:
    """log-softmax of transformers' logits of every position in float64, and the largest error of
    the same in float32.
    """
    tokens = torch.tensor([said])
    with torch.inference_mode():
        single = reference(tokens).logits[0].log_softmax(-1)
        table = copy.deepcopy(reference).double()(tokens).logits[0].log_softmax(-1)
    return table, (single - table).abs().max().item()


def assert_right(found, reference, said: list[int], start: int) -> None:
    """`found` are those of the tokens from `start` on, to the rounding of float32."""
    assert [score.token for score in found] == said[start : start + len(found)]
    if not found:
        return
    table, error = tables(reference, said)
    for position, score in enumerate(found, start):
        if not position:
            assert score == TokenLogprob(said[0], None, ())
            continue
        row = table[position - 1]
        top = row.topk(TOP)
        assert [token for token, _ in score.top] == top.indices.tolist()
        numbers = [score.logprob, *(value for _, value in score.top)]
        others = [row[said[position]].item(), *top.values.tolist()]
        torch.testing.assert_close(numbers, others, rtol=0, atol=4 * error + 1e-6)


def two_turns(world, path, static, sampling, rows_at_once):
    """Prompts and answers, then two more turns: the first tokens of one follow tokens whose KV is
    pending, those of the other follow logits.
    """
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    engine = Engine(model, world, batch=len(BATCH), options=EngineOptions(static=static))
    options = AnswerOptions(limit=9, sampling=sampling, logprobs=TOP)
    before, logprobs._LOGITS_AT_ONCE = logprobs._LOGITS_AT_ONCE, rows_at_once * 301
    try:
        first = read(engine, BATCH, TOP).scores, decode(engine, options)
        later = [
            read(engine, new, TOP).scores
            for new in ([[2, 3], [4], [], [7, 8]], [[1], [2, 9], [5], []])
        ]
    finally:
        logprobs._LOGITS_AT_ONCE = before
    return first, later, engine.tokens


@pytest.mark.parametrize("static", [False, True])
def test_prompts_and_answers_on_1_to_3_ranks(mqa_path, mqa_reference, static):
    sampling = Sampling(temperature=1.3, top_k=50, repetition_penalty=1.5, seed=2)
    for n in (1, 2, 3):
        results = run_ranks(n, two_turns, mqa_path, static, sampling, 3)
        (prompts, answers), (second, third), tokens = results[0]
        for other in results[1:]:
            assert other[0][0] is None and other[1] == [None, None]
            assert other[0][1].logprobs == answers.logprobs
        for b, said in enumerate(tokens):
            assert_right(prompts[b], mqa_reference, said, 0)
            assert_right(answers.logprobs[b], mqa_reference, said, len(BATCH[b]))
            start = len(said) - len(third[b])
            assert_right(third[b], mqa_reference, said, start)
            assert_right(second[b], mqa_reference, said, start - len(second[b]))
        assert list(map(len, prompts)) == list(map(len, BATCH))
        assert list(map(len, answers.logprobs)) == [9, 9, 9, 0]
        assert list(map(len, second)) == [2, 1, 0, 2]
        assert list(map(len, third)) == [1, 2, 1, 0]


def chosen_alone(world, path):
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, world)
    engine = Engine(model, world, batch=2)
    prompt = read(engine, BATCH[:2], 0).scores
    return prompt, decode(engine, AnswerOptions(limit=3, logprobs=0)).logprobs


def test_none_of_the_likeliest_on_tensor_parallel_ranks(tiny_model):
    alone, there = (
        run(chosen_alone, tiny_model, ranks=RankOptions(cp=n, tp=n, threads=1)) for n in (1, 2)
    )
    for part, others in zip(alone, there, strict=True):
        for row, other in zip(part, others, strict=True):
            assert [score.token for score in row] == [score.token for score in other]
            for score, its in zip(row, other, strict=True):
                assert score.top == its.top == ()
                assert its.logprob == pytest.approx(score.logprob, abs=1e-4)
