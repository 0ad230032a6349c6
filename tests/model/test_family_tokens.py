"""Each family says what `transformers` says: on one rank and more, from both formats, in parts.

The README's table of families is made of the outcomes (`family_table.py`).
"""

import shutil
from functools import cache

import pytest
import torch
from conftest import edit_json, refusal
from families import CASES, META_FILES, NO_GGUF, greedy, random_model, write_gguf, write_meta
from family_table import REFUSED
from llama_reference import ToyAttention, rms
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import saving
from cptool.engine.answers.decode import next_tokens
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.prefill.prompt import read
from cptool.engine.sampling import Sampling
from cptool.engine.weights import load_model
from cptool.model.architectures.registry import find_family
from cptool.model.shares import check
from cptool.session.store import identity
from cptool.variants import names

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
        if case in META_FILES:
            write_meta(case, model, folder / "meta")
        return folder, greedy(model, PROMPT, STEPS)

    return make


def answer(engine, new):
    """Tokens after what the engine holds and then `new`."""
    read(engine, [new], answer=STEPS)
    tokens = []
    for left in range(STEPS, 0, -1):
        tokens += next_tokens(engine, Sampling())
        engine.advance({0: tokens[-1]}, left)
    return tokens


def answers(world, path, *settings):
    """Tokens after the prompt, which is read in two turns, under each of the options."""
    model = load_model(open_checkpoint(path), torch.float32, "cpu", world)
    said = []
    for options in settings or [EngineOptions()]:
        engine = Engine(model, world, batch=1, options=options)
        read(engine, [PROMPT[:30]])
        said.append(answer(engine, PROMPT[30:]))
    return said


SETTINGS = {
    "1 rank": (1, [EngineOptions(), EngineOptions(static=True)]),
    "2 ranks": (
        2,
        [
            EngineOptions(variant="pass-kv"),
            EngineOptions(variant="gather-q"),
            EngineOptions(static=True),
        ],
    ),
    "3 ranks": (
        3,
        [
            EngineOptions(variant="gather-kv"),
            EngineOptions(variant="pass-q"),
            EngineOptions(variant="pass-q-all2all"),
        ],
    ),
    "chunks": (2, [EngineOptions(chunk=7)]),
}


def test_every_variant_is_compared():
    settings = [options for _, some in SETTINGS.values() for options in some]
    assert {options.variant for options in settings} == {"auto", *names(baselines=True)}


@pytest.mark.parametrize("check", SETTINGS)
@pytest.mark.parametrize("case", CASES)
def test_the_tokens_of_transformers(made, case, check, family_outcome):
    family_outcome(check, case)
    folder, expected = made(case)
    ranks, settings = SETTINGS[check]
    said = run_ranks(ranks, answers, str(folder / "model"), *settings)
    assert said == [[expected] * len(settings)] * ranks


def saved(world, path, directory):
    """The session of a first turn."""
    checkpoint = open_checkpoint(path)
    engine = Engine(load_model(checkpoint, torch.float32, "cpu", world), world, batch=1)
    read(engine, [PROMPT[:30]])
    return saving.save(engine, directory, None, identity(checkpoint))


def resumed(world, path, directory, manifest):
    model = load_model(open_checkpoint(path), torch.float32, "cpu", world)
    engine = Engine(model, world, batch=1)
    saving.restore(engine, directory, manifest)
    return answer(engine, PROMPT[30:])


@pytest.mark.parametrize("case", CASES)
def test_the_same_in_a_session_that_goes_on_elsewhere(made, case, tmp_path, family_outcome):
    family_outcome("session", case)
    folder, expected = made(case)
    path = str(folder / "model")
    manifest = run_ranks(2, saved, path, tmp_path / "session")[0]
    for ranks in (1, 3):
        said = run_ranks(ranks, resumed, path, tmp_path / "session", manifest)
        assert said == [expected] * ranks


@pytest.mark.parametrize("case", sorted(CASES.keys() - NO_GGUF))
def test_the_same_from_gguf(made, case, family_outcome):
    family_outcome("GGUF", case)
    folder, expected = made(case)
    assert run_ranks(1, answers, str(folder / "model.gguf")) == [[expected]]


@pytest.mark.parametrize("case", META_FILES)
def test_the_same_from_metas_layout(made, case, family_outcome):
    family_outcome("Meta", case)
    folder, expected = made(case)
    assert run_ranks(1, answers, str(folder / "meta")) == [[expected]]


@pytest.mark.parametrize(
    ("family", "what", "fields"),
    [
        (
            "gemma3",
            "images beside the text",
            dict(architectures=["Gemma3ForConditionalGeneration"], model_type="gemma3"),
        ),
        (
            "ministral3",
            "images beside the text",
            dict(architectures=["Mistral3ForConditionalGeneration"], model_type="mistral3"),
        ),
    ],
)
def test_the_rest_is_refused_in_one_line(made, family, what, fields, tmp_path, family_outcome):
    folder, _ = made(family)
    shutil.copytree(folder / "model", tmp_path / "model")
    edit_json(tmp_path / "model" / "config.json", **fields)
    line = refusal(tmp_path / "model").removeprefix(f"{tmp_path / 'model' / 'config.json'}: ")
    family_outcome(REFUSED, what, family=family, line=line)
    assert what in find_family(family).refused and str(tmp_path) not in line


@pytest.mark.parametrize("case", ["qwen3", "phi3-long"])
def test_the_same_from_split_gguf(case, tmp_path):
    model = random_model(case, tmp_path / "model")
    write_gguf(model, tmp_path / "parts.gguf", every=7)
    assert len(list(tmp_path.glob("parts-0000?-of-0000?.gguf"))) > 3
    expected = greedy(model, PROMPT, STEPS)
    assert run_ranks(2, answers, str(tmp_path)) == [[expected]] * 2


def of_each(world, paths):
    return world.gather([answers(world, path)[0] for path in paths])


def test_two_tensor_parallel_ranks_say_the_same(made, family_outcome):
    paths, expected = [], []
    for case in CASES:
        family_outcome("tp 2", case)
        folder, tokens = made(case)
        check(open_checkpoint(str(folder / "model")).config, 2)
        paths.append(str(folder / "model"))
        expected.append(tokens)
    ranks = RankOptions(tp=2, device="cpu", threads=1)
    assert run(of_each, paths, ranks=ranks) == [expected, expected]


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
