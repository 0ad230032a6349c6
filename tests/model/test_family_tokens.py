"""Each family says what `transformers` says: on one rank and more, from both formats, in parts."""

from functools import cache

import pytest
import torch
from families import CASES, NO_GGUF, greedy, random_model, write_gguf
from llama_reference import ToyAttention, rms
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.answers.decode import next_tokens
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.model.shares import check

PROMPT = [(7 * i * i + 3 * i) % 97 for i in range(41)]
STEPS = 6
ROUNDING = 1.25  # as in test_model


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A function from the name of a case to its model's folder and the tokens that it says."""

    @cache
    def make(case):
        folder = tmp_path_factory.mktemp("family")
        model = random_model(case, folder / "model")
        if case not in NO_GGUF:
            write_gguf(model, folder / "model.gguf")
        return folder, greedy(model, PROMPT, STEPS)

    return make


def answer(world, path, options):
    """Tokens after the prompt, which is read in two turns."""
    model = load_model(open_checkpoint(path), torch.float32, "cpu", world)
    engine = Engine(model, world, batch=1, options=options)
    engine.extend([PROMPT[:30]])
    engine.extend([PROMPT[30:]], reserve=STEPS)
    tokens = []
    for left in range(STEPS, 0, -1):
        tokens += next_tokens(engine, Sampling())
        engine.advance({0: tokens[-1]}, left)
    return tokens


@pytest.mark.parametrize(
    ("ranks", "options"),
    [
        (1, EngineOptions()),
        (2, EngineOptions(variant="pass-kv")),
        (2, EngineOptions(variant="pass-q", static=True)),
        (3, EngineOptions(variant="gather-kv")),
    ],
    ids=["1", "2-pass-kv", "2-static", "3-gather-kv"],
)
@pytest.mark.parametrize("case", CASES)
def test_the_tokens_of_transformers(made, case, ranks, options):
    folder, expected = made(case)
    said = run_ranks(ranks, answer, str(folder / "model"), options)
    assert said == [expected] * ranks


@pytest.mark.parametrize("case", sorted(CASES.keys() - NO_GGUF))
def test_the_same_from_gguf(made, case):
    folder, expected = made(case)
    assert run_ranks(1, answer, str(folder / "model.gguf"), EngineOptions()) == [expected]


@pytest.mark.parametrize("case", ["qwen3", "phi3-long"])
def test_the_same_from_split_gguf(case, tmp_path):
    model = random_model(case, tmp_path / "model")
    write_gguf(model, tmp_path / "parts.gguf", every=7)
    assert len(list(tmp_path.glob("parts-0000?-of-0000?.gguf"))) > 3
    expected = greedy(model, PROMPT, STEPS)
    assert run_ranks(2, answer, str(tmp_path), EngineOptions()) == [expected] * 2


def answers(world, paths):
    return world.gather([answer(world, path, EngineOptions()) for path in paths])


def test_two_tensor_parallel_ranks_say_the_same(made):
    paths, expected = [], []
    for case in CASES:
        folder, tokens = made(case)
        check(open_checkpoint(str(folder / "model")).config, 2)
        paths.append(str(folder / "model"))
        expected.append(tokens)
    ranks = RankOptions(tp=2, device="cpu", threads=1)
    assert run(answers, paths, ranks=ranks) == [expected, expected]


def logits(model, tokens):
    positions = torch.arange(len(tokens), dtype=torch.int32)
    return model.logits(model(tokens, positions, ToyAttention(model.config).at(positions)))


@pytest.mark.parametrize("case", CASES)
def test_bfloat16_errs_no_more_than_in_transformers(case, tmp_path):
    reference = random_model(case, tmp_path, torch.bfloat16)
    tokens = torch.tensor(PROMPT)
    with torch.inference_mode():
        theirs = reference(tokens[None]).logits[0].float()
        exact = reference.float()(tokens[None]).logits[0]
        ours = logits(load_model(open_checkpoint(str(tmp_path)), torch.bfloat16, "cpu"), tokens)
    assert rms(ours - exact) <= ROUNDING * rms(theirs - exact)
