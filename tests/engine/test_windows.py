"""What a model's configuration says of its scores: their scale."""

from dataclasses import replace

import pytest
import torch
from ranks import run_ranks

from cptool.checkpoint import open_checkpoint
from cptool.engine.engine import Engine
from cptool.engine.options import EngineOptions
from cptool.engine.weights import load_model
from cptool.model.config import LlamaConfig
from cptool.model.shapes import SHAPES

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
