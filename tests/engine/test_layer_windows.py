"""What a model's configuration says of its scores: scale, soft cap, windows of its layers."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.engine import saving
from cptool.engine.answers.decode import decode
from cptool.engine.answers.records import AnswerOptions
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.weights import load_model
from cptool.exactness.reference import attention
from cptool.model.config import LlamaConfig
from cptool.model.shapes import SHAPES
from cptool.parallel.step import Scores
from cptool.session.store import identity
from cptool.variants import names

PROMPT = [(7 * i * i + 3 * i) % 290 for i in range(41)]


def test_scale_and_windows_of_a_configuration():
    plain = SHAPES["llama3-1b"]
    assert plain.scale == 64**-0.5 and plain.window(3) is None
    windows = (512, None) * 8
    changed = replace(plain, score_scale=0.25, windows=windows)
    assert changed.scale == 0.25 and changed.window(0) == 512 and changed.window(1) is None


def logits(world, path, doubled: str, static: bool) -> list[torch.Tensor]:
    """Logits after a prompt and after one token more, of scores doubled in one of two ways."""
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device)
    config: LlamaConfig = model.config
    if doubled == "scale":
        model.config = replace(config, score_scale=2 * config.head_dim**-0.5)
    else:
        queries = config.num_attention_heads * config.head_dim
        for layer in model.layers:
            layer.self_attn.qkv_proj.weight[:queries] *= 2
    engine = Engine(model, world, batch=1, options=EngineOptions(static=static))
    engine.extend([PROMPT])
    seen = [*engine.logits.values()]
    engine.advance({0: 5}, 1)
    return [row.clone() for row in [*seen, *engine.logits.values()]]


@pytest.mark.parametrize("static", [False, True])
@pytest.mark.parametrize("n", [1, 2])
def test_the_scale_is_that_of_the_configuration(mqa_path, n, static):
    """A scale twice the usual gives the bits of queries twice as large."""
    expected = run_ranks(n, logits, mqa_path, "queries", static)
    for rows, wanted in zip(run_ranks(n, logits, mqa_path, "scale", static), expected, strict=True):
        assert all(map(torch.equal, rows, wanted)) and len(rows) == len(wanted)


CHANGES = {
    "windows": dict(windows=(5, None, 17)),
    "windows and caps": dict(windows=(16, 16, None), score_cap=0.5, score_scale=0.4),
    "shorter than a chunk": dict(windows=(1, 2, 3), score_cap=5.0),
    "longer than the prompt": dict(windows=(1000, 60, None)),
}
TURNS = [[PROMPT, PROMPT[3:20], []], [PROMPT[:2], [], PROMPT[5:30]]]


def changed_model(world, path, changes):
    model = load_model(open_checkpoint(str(path)), torch.float32, world.device)
    model.config = replace(model.config, **changes)
    return model


def plain_answer(world, path, changes, tokens: list[int], limit: int) -> list[int]:
    """Greedy tokens, each from a forward over all before it, in plain torch attention."""
    model = changed_model(world, path, changes)
    said: list[int] = []
    for _ in range(limit):
        positions = torch.arange(len(tokens), dtype=torch.int32)

        def attend(layer, q, k, v, positions=positions):
            of_layer = Scores.of(model.config, layer)
            scores = {"scale": of_layer.scale, "window": of_layer.window, "cap": of_layer.cap}
            return attention(q, k, v, q_pos=positions, k_pos=positions, **scores)[0]

        hidden = model(torch.tensor(tokens), positions, attend)
        said.append(int(model.logits(hidden[-1:]).argmax()))
        tokens = [*tokens, said[-1]]
    return said


def plain_answers(world, path, changes, limit: int) -> list[list[list[int]]]:
    told: list[list[int]] = [[] for _ in TURNS[0]]
    turns = []
    for turn in TURNS:
        told = [before + new for before, new in zip(told, turn, strict=True)]
        answers = [plain_answer(world, path, changes, said, limit) if said else [] for said in told]
        told = [said + answer for said, answer in zip(told, answers, strict=True)]
        turns.append(answers)
    return turns


def answers(world, path, changes, limit: int, *, variant: str, static: bool, chunk: int = 1000):
    """Of two turns of a batch, read in chunks."""
    model = changed_model(world, path, changes)
    options = EngineOptions(variant=variant, static=static)
    engine, turns = Engine(model, world, batch=len(TURNS[0]), options=options), []
    for turn in TURNS:
        for first in range(0, max(map(len, turn)), chunk):
            engine.extend([prompt[first : first + chunk] for prompt in turn])
        turns.append(decode(engine, AnswerOptions(limit=limit)).token_ids)
    return turns


@pytest.mark.parametrize("changes", CHANGES.values(), ids=CHANGES)
@pytest.mark.parametrize("n", [1, 2, 3])
def test_the_tokens_of_plain_attention(mqa_path, n, changes):
    """In every variant, step by step and in static memory, in chunks."""
    expected = run_ranks(1, plain_answers, mqa_path, changes, 6)[0]
    plain = run_ranks(1, plain_answers, mqa_path, {}, 6)[0]
    assert (expected == plain) == (changes == CHANGES["longer than the prompt"])
    for variant in names(baselines=True) if n > 1 else ["auto"]:
        got = run_ranks(n, answers, mqa_path, changes, 6, variant=variant, static=False)
        assert all(turns == expected for turns in got), variant
    for chunk in (7, 1000):
        got = run_ranks(n, answers, mqa_path, changes, 6, variant="auto", static=True, chunk=chunk)
        assert all(turns == expected for turns in got), chunk


def saved(world, path, changes, directory):
    """The answer to a first turn, saved with its session."""
    engine = Engine(changed_model(world, path, changes), world, batch=len(TURNS[0]))
    engine.extend(TURNS[0])
    answers = decode(engine, AnswerOptions(limit=6)).token_ids
    return answers, saving.save(engine, directory, None, identity(open_checkpoint(str(path))))


def resumed(world, path, changes, directory, manifest):
    """The answer to a second turn."""
    engine = Engine(changed_model(world, path, changes), world, batch=len(TURNS[0]))
    saving.restore(engine, directory, manifest)
    engine.extend(TURNS[1])
    return decode(engine, AnswerOptions(limit=6)).token_ids


@pytest.mark.parametrize("n, later", [(1, 3), (3, 2)])
def test_a_session_goes_on_with_other_ranks(mqa_path, tmp_path, n, later):
    changes = CHANGES["windows and caps"]
    first, second = run_ranks(1, plain_answers, mqa_path, changes, 6)[0]
    answers, manifest = run_ranks(n, saved, mqa_path, changes, tmp_path / "s")[0]
    assert answers == first
    got = run_ranks(later, resumed, mqa_path, changes, tmp_path / "s", manifest)
    assert all(answers == second for answers in got)


def test_runs_are_bit_identical(mqa_path):
    for variant in names(baselines=True):
        runs = [
            run_ranks(3, last_logits, mqa_path, CHANGES["windows and caps"], variant)
            for _ in range(2)
        ]
        assert runs[0] == runs[1]


def last_logits(world, path, changes, variant: str) -> list[bytes]:
    options = EngineOptions(variant=variant, static=False)
    model = changed_model(world, path, changes)
    engine = Engine(model, world, batch=len(TURNS[0]), options=options)
    for turn in TURNS:
        engine.extend(turn)
    return [row.numpy().tobytes() for row in engine.logits.values()]
