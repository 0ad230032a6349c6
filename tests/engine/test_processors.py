"""What a token is drawn from is what transformers' logits processors leave of the same logits."""

import random

import pytest
import torch
from conftest import greedy
from ranks import run_ranks
from transformers import LogitsProcessorList
from transformers.generation import logits_process

from cptool.checkpoint import open_checkpoint
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.answers.sampler import Sampler
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model

VOCABULARY = 200


def random_sampling(rng: random.Random) -> Sampling:
    """Each value is on in about half of the cases."""

    def sometimes(value, otherwise):
        return value if rng.random() < 0.5 else otherwise

    biased = rng.sample(range(VOCABULARY), rng.randint(1, 9))
    return Sampling(
        temperature=sometimes(rng.uniform(0.2, 3), 1.0),
        top_k=sometimes(rng.choice([1, 2, 7, 40, 199, 200, 1000]), 0),
        top_p=sometimes(rng.uniform(0.05, 0.999), 1.0),
        min_p=sometimes(rng.uniform(0, 0.5), 0.0),
        repetition_penalty=sometimes(rng.uniform(0.5, 2), 1.0),
        logit_bias=sometimes(tuple((i, rng.uniform(-5, 5)) for i in biased), ()),
    )


def processors(sampling: Sampling) -> LogitsProcessorList:
    """Those that transformers' `generate` applies, in its order."""
    found = LogitsProcessorList()
    if sampling.logit_bias:
        bias = [[[token], float(value)] for token, value in sampling.logit_bias]
        found.append(logits_process.SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1:
        penalty = sampling.repetition_penalty
        found.append(logits_process.RepetitionPenaltyLogitsProcessor(penalty))
    found.append(logits_process.TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(logits_process.TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        found.append(logits_process.TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        found.append(logits_process.MinPLogitsWarper(sampling.min_p))
    return found


def distribution(sampling: Sampling, logits: torch.Tensor, sampler: Sampler) -> torch.Tensor:
    probabilities, tokens = sampling.distribution(sampler._penalised(0, logits))
    found = torch.zeros_like(probabilities)
    found[tokens] = probabilities / probabilities.sum()
    return found


@pytest.mark.parametrize("seed", range(8))
def test_the_distribution_is_that_of_transformers(seed):
    """400 random cases: the same tokens stay, with the same probabilities."""
    rng, generator = random.Random(seed), torch.Generator().manual_seed(seed)
    for _ in range(50):
        sampling = random_sampling(rng)
        logits = rng.uniform(0.5, 6) * torch.randn(VOCABULARY, generator=generator)
        tokens = [rng.randrange(VOCABULARY) for _ in range(rng.randint(1, 60))]
        # In float64 after the penalties, so that no rounding decides which tokens stay.
        sampler = Sampler(sampling, [tokens])
        ids = torch.tensor([tokens])
        scores = processors(sampling)(ids, logits[None].double()).softmax(-1)[0]
        found = distribution(sampling, logits, sampler)
        assert torch.equal(found > 0, scores > 0), sampling
        torch.testing.assert_close(found, scores, rtol=1e-4, atol=1e-7)
        # In float32, as `generate` computes, the penalties leave the same bits.
        before = LogitsProcessorList(processors(sampling)[: -_warpers(sampling)])
        assert torch.equal(sampler._penalised(0, logits), before(ids, logits[None])[0])


def _warpers(sampling: Sampling) -> int:
    return 1 + bool(sampling.top_k) + (sampling.top_p < 1) + bool(sampling.min_p)


def test_presence_and_frequency_count_the_answer_alone():
    """logit[i] - count[i] * frequency - (count[i] > 0) * presence, as in OpenAI's API."""
    tokens = [[3, 3, 5]]
    sampling = Sampling(presence_penalty=0.5, frequency_penalty=0.25)
    sampler, logits = Sampler(sampling, tokens), torch.randn(9)
    assert torch.equal(sampler._penalised(0, logits), logits)
    tokens[0].append(3)
    sampler.picks({0: logits})
    tokens[0] += [7, 7, 7]
    expected = logits.clone()
    expected[3] -= 0.75
    expected[7] -= 1.25
    assert torch.allclose(sampler._penalised(0, logits), expected)
    assert torch.equal(Sampler(sampling, [[*tokens[0]]])._penalised(0, logits), logits)


def decoded(world, path, batch, sampling, static, steps):
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device, None)
    engine = Engine(model, world, batch=len(batch), options=EngineOptions(static=static))
    engine.extend(batch)
    return decode(engine, AnswerOptions(limit=steps, sampling=sampling)).token_ids


@pytest.mark.parametrize("n", [1, 2, 3])
def test_greedy_with_penalties_is_that_of_transformers(mqa_path, mqa_reference, n):
    batch = [[5, 6, 7, 5, 6, 7, 5], [9], [(7 * i * i + 3 * i) % 290 for i in range(40)]]
    bias = [[[i], 2.0] for i in range(20)]
    expected = [
        greedy(mqa_reference, ids, 12, (), repetition_penalty=1.4, sequence_bias=bias)
        for ids in batch
    ]
    assert expected != [greedy(mqa_reference, ids, 12, ()) for ids in batch]
    sampling = Sampling(repetition_penalty=1.4, logit_bias=tuple((i, 2.0) for i in range(20)))
    for static in (False, True):
        assert run_ranks(n, decoded, mqa_path, batch, sampling, static, 12) == [expected] * n


def test_draws_are_the_same_on_every_number_of_ranks_and_in_every_batch(mqa_path):
    batch = [[5, 6, 7], [9], [(7 * i * i + 3 * i) % 290 for i in range(40)]]
    sampling = Sampling(
        temperature=1.2,
        top_k=50,
        min_p=0.01,
        repetition_penalty=1.2,
        presence_penalty=0.7,
        frequency_penalty=0.2,
        seed=3,
    )
    together = run_ranks(1, decoded, mqa_path, batch, sampling, False, 9)[0]
    for n in (2, 3):
        assert run_ranks(n, decoded, mqa_path, batch, sampling, True, 9) == [together] * n
    first = run_ranks(2, decoded, mqa_path, batch[:1], sampling, False, 9)[0]
    assert first == together[:1]
