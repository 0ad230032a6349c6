"""Drafts leave the distribution of answers as it is: what is drawn with them follows the model's
probabilities in float64.
"""

import random
from collections import Counter

import pytest
import torch
from llama_reference import save_llama
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.drafts import pace
from cptool.engine.drafts.names import model_of
from cptool.engine.drafts.small import SmallModel
from cptool.engine.engine import Engine
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model

VOCABULARY, TEMPERATURE = 7, 0.8
PROMPT = random.Random(1).choices(range(VOCABULARY), k=60)  # most pairs of tokens occur
BATCH, RUNS = 5, 300


@pytest.fixture(scope="module")
def paths(tmp_path_factory):
    """Two models of as few tokens."""
    return [saved(tmp_path_factory.mktemp("models") / f"seven-{seed}", seed) for seed in (3, 4)]


def saved(path, seed):
    return save_llama(
        path,
        seed,
        vocab_size=VOCABULARY,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        initializer_range=0.3,
        eos_token_id=None,
        bos_token_id=None,
        pad_token_id=None,
    )


def expected(path) -> dict[tuple[int, ...], float]:
    """The probability of each answer of three tokens, by transformers in float64."""
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path, dtype=torch.float64)

    def following(said):
        with torch.no_grad():
            logits = model(torch.tensor(said)).logits[:, -1]
        return torch.softmax(logits / TEMPERATURE, dim=-1)

    answers = [()]
    chances = torch.ones(1, dtype=torch.float64)
    for _ in range(3):
        chances = (chances[:, None] * following([PROMPT + list(a) for a in answers])).flatten()
        answers = [(*a, token) for a in answers for token in range(VOCABULARY)]
    return dict(zip(answers, chances.tolist(), strict=True))


def drawn(world, path, draft):
    """Answers under many seeds, and how many drafts were checked and came true."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device)
    small = None if model_of(draft) is None else SmallModel(world, draft, torch.float32)
    engine = Engine(model, world, batch=BATCH)
    engine.extend([PROMPT] * BATCH)
    here, found, proposed, accepted = engine.mark(), [], 0, 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(pace.Budget, "pays", lambda self, chance: self._room > 0)
        for seed in range(RUNS):
            engine.rewind(here)
            engine.extend([[]] * BATCH)
            sampling = Sampling(temperature=TEMPERATURE, seed=seed)
            options = AnswerOptions(limit=4, draft=draft, sampling=sampling)
            answers = decode(engine, options, small=small)
            found += [tuple(answer[:3]) for answer in answers.token_ids]
            proposed += answers.drafts.proposed
            accepted += answers.drafts.accepted
    return found, proposed, accepted


def fit(found: list[tuple[int, ...]], chances: dict[tuple[int, ...], float]) -> float:
    """The probability of a chi-square as large, of answers that follow `chances`.

    Answers that are expected less than five times count as one.
    """
    counts, total = Counter(found), len(found)
    rare = {answer for answer, chance in chances.items() if chance * total < 5}
    cells = [(counts[a], chances[a] * total) for a in chances if a not in rare]
    cells.append((sum(counts[a] for a in rare), sum(chances[a] for a in rare) * total))
    statistic = sum((count - wanted) ** 2 / wanted for count, wanted in cells)
    half = torch.tensor([(len(cells) - 1) / 2, statistic / 2], dtype=torch.float64)
    return float(torch.special.gammaincc(half[0], half[1]))


@pytest.mark.parametrize("draft", ["off", "lookup", "layers:1", "model"])
def test_answers_are_as_frequent_as_the_model_has_them(paths, draft):
    path, other = paths
    chances = expected(path)
    source = str(other) if draft == "model" else draft
    ((found, proposed, accepted),) = run_ranks(1, drawn, path, source)
    assert len(found) == BATCH * RUNS
    assert fit(found, chances) > 0.001
    if draft != "off":
        assert 0 < accepted < proposed


def test_another_distribution_does_not_fit(paths):
    chances = expected(paths[0])
    ((found, *_),) = run_ranks(1, drawn, paths[0], "off")
    flat = {answer: chance**0.8 for answer, chance in chances.items()}
    assert fit(found, {a: c / sum(flat.values()) for a, c in flat.items()}) < 0.001
