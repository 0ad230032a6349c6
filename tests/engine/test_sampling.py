"""Which tokens may be drawn, how often, and from what a draw depends."""

import pytest
import torch

from cptool.engine.answers.sampler import Sampler
from cptool.engine.sampling import Sampling
from cptool.errors import RunError, UserError


def drawn(sampling: Sampling, logits: torch.Tensor, *, position: int, sequence: int = 0) -> int:
    """What a sequence of `position` tokens is continued with."""
    tokens = [[0] * position] * (sequence + 1)
    return Sampler(sampling, tokens).picks({sequence: logits})[sequence]


def test_greedy_takes_the_largest():
    logits = torch.randn(1000)
    assert drawn(Sampling(), logits, position=3) == int(logits.argmax())


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_no_token(wrong, temperature):
    logits = {0: torch.randn(50), 2: torch.randn(50)}
    logits[0][7] = -float("inf")  # a token that cannot be: allowed
    sampler = Sampler(Sampling(temperature=temperature), [[0] * 5, [0] * 5, [0] * 6])
    sampler.picks(logits)
    logits[2][7] = wrong
    with pytest.raises(RunError, match="sequence 3: the logits after 6 tokens are not finite"):
        sampler.picks(logits)


@pytest.mark.parametrize("top_p", [0.01, 0.3, 0.5, 0.9, 1.0])
def test_nucleus_is_the_reference_rule(top_p):
    """A token is kept iff the mass of all likelier ones is at most top_p (Llama's reference
    code).
    """
    probabilities = torch.tensor([0.5, 0.25, 0.15, 0.1], dtype=torch.float64)
    kept = {i for i in range(4) if float(probabilities[:i].sum()) <= top_p}
    sampling = Sampling(temperature=1.0, top_p=top_p)
    assert {drawn(sampling, probabilities.log(), position=p) for p in range(400)} == kept


def test_frequencies_follow_the_tempered_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0, -1.0])
    sampling = Sampling(temperature=0.7, seed=5)
    count = 3000
    draws = torch.tensor([drawn(sampling, logits, sequence=1, position=p) for p in range(count)])
    expected = torch.softmax(logits.double() / 0.7, -1) * count
    observed = torch.bincount(draws, minlength=4)
    chi_square = ((observed - expected) ** 2 / expected).sum()
    assert chi_square < 16.27  # the 99.9th percentile for 3 degrees of freedom


def test_a_draw_depends_on_seed_sequence_and_position_alone():
    logits = torch.randn(50)
    draws = [
        drawn(Sampling(temperature=1.0, seed=s), logits, sequence=b, position=p)
        for s in range(4)
        for b in range(4)
        for p in range(4)
    ]
    again = [
        drawn(Sampling(temperature=1.0, seed=s), logits, sequence=b, position=p)
        for s in range(4)
        for b in range(4)
        for p in range(4)
    ]
    assert draws == again
    assert len(set(draws)) > 10


def test_any_temperature_above_zero_draws():
    logits = torch.tensor([3.0, 5.0, -2.0])
    assert drawn(Sampling(temperature=1e-320), logits, position=0) == 1
    assert drawn(Sampling(temperature=1e300), logits, position=0) in (0, 1, 2)


@pytest.mark.parametrize(
    "wrong",
    [
        {"temperature": -1},
        {"temperature": float("nan")},
        {"temperature": "1"},
        {"top_p": 0},
        {"top_p": 1.1},
        {"top_k": -1},
        {"top_k": 2.5},
        {"min_p": -0.1},
        {"repetition_penalty": 0},
        {"presence_penalty": 2.1},
        {"frequency_penalty": float("nan")},
        {"logit_bias": ((-1, 0.5),)},
        {"logit_bias": ((1, float("inf")),)},
    ],
)
def test_settings_out_of_range_are_refused(wrong):
    with pytest.raises(UserError, match="must"):
        Sampling(**wrong)
