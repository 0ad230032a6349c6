"""`--weights auto`: which matrices are quantised, and where it is kept."""

import json
from dataclasses import replace

import pytest
import torch
from click.testing import CliRunner
from test_stored_weights import kept_in

from cptool.checkpoint import open_checkpoint
from cptool.cli.plan.command import plan
from cptool.engine.options import EngineOptions
from cptool.engine.setup import quantising
from cptool.engine.setup.types import mean_weight_size, resolve_types
from cptool.engine.weights import load_model
from cptool.quantisation import KINDS, is_known, quantised_to


@pytest.fixture
def checkpoint(tiny_model, tmp_path, monkeypatch):
    monkeypatch.setenv("CPTOOL_CACHE", str(tmp_path / "cache"))
    return open_checkpoint(str(tiny_model))


def turns(monkeypatch, faster, **others):
    """Have quantised matrices of the kinds `faster` take half the time of the file's."""
    timed = []

    def turn(each, encoding, dtype="float32"):
        timed.append(each.kind)
        quantised = encoding == "Q8_0" and each.kind in faster
        return others.get(dtype, 1.0) * (0.5 if quantised else 1.0)

    monkeypatch.setattr(quantising, "_turn", turn)
    return timed


def kinds_of(checkpoint):
    return [each.kind for each in quantising.matrices(checkpoint)]


def test_names_of_weights():
    assert quantised_to("q8_0") == ("q8_0", KINDS)
    assert quantised_to("q8_0:lm_head,o_proj") == ("q8_0", ("lm_head", "o_proj"))
    assert is_known("file") and is_known("int8") and is_known("q8_0:o_proj")
    for name in (None, 8, "", "auto", "q4_0", "q8_0:", "q8_0:norm", "file:o_proj", "q8_0:o_proj,"):
        assert not is_known(name)


def test_matrices_that_are_multiplied(checkpoint):
    found = {each.kind: each for each in quantising.matrices(checkpoint)}
    config = checkpoint.config
    assert ("lm_head" in found) != ("embed_tokens" in found)
    kinds = {"qkv_proj", "o_proj", "gate_up_proj", "down_proj"}
    assert set(found) - {"lm_head", "embed_tokens"} == kinds
    gate_up = found["gate_up_proj"]
    assert (gate_up.rows, gate_up.depth) == (2 * config.intermediate_size, config.hidden_size)
    assert gate_up.count == config.num_hidden_layers


@pytest.mark.parametrize("some", [False, True])
def test_kinds_that_get_faster_are_quantised(checkpoint, monkeypatch, some):
    kinds = ["down_proj", "o_proj"] if some else kinds_of(checkpoint)
    turns(monkeypatch, kinds)
    found = quantising.chosen(checkpoint, "float32")
    assert found == f"q8_0:{','.join(sorted(kinds))}"  # embeddings stay as they are
    kept = kept_in(load_model(checkpoint, torch.float32, "cpu", weights=found))
    assert {name.split(".")[-2] for name in kept} >= {*kinds}
    layers = checkpoint.config.num_hidden_layers
    assert len(kept) == (2 * layers if some else 4 * layers + 1)
    assert 34 / 32 < mean_weight_size(checkpoint, "float32", "cpu", found) < 4


def test_a_tied_model_is_quantised_whole(checkpoint, monkeypatch):
    config = replace(checkpoint.config, tie_word_embeddings=True)
    monkeypatch.setattr(checkpoint, "config", config)
    turns(monkeypatch, kinds_of(checkpoint))
    assert quantising.chosen(checkpoint, "float32") == "q8_0"


def test_nothing_is_quantised_for_no_gain(checkpoint, monkeypatch):
    turns(monkeypatch, [])
    assert quantising.chosen(checkpoint, "float32") == "file"
    turns(monkeypatch, kinds_of(checkpoint), bfloat16=0.4)
    assert quantising.chosen(checkpoint, "bfloat16") == "file"


def test_the_choice_is_kept(checkpoint, monkeypatch, tmp_path):
    turns(monkeypatch, kinds_of(checkpoint))
    found = quantising.chosen(checkpoint, "float32")
    timed = turns(monkeypatch, [])
    assert quantising.chosen(checkpoint, "float32") == found != "file" and not timed
    (file,) = (tmp_path / "cache" / "weights").iterdir()
    file.write_text(json.dumps("q4_0"))
    assert quantising.chosen(checkpoint, "float32") == "file" and timed


def test_products_are_timed(checkpoint):
    assert is_known(quantising.chosen(checkpoint, "float32"))
    (each, *_) = quantising.matrices(checkpoint)
    assert all(
        quantising._turn(each, encoding, dtype) > 0
        for encoding, dtype in (("F32", "float32"), ("BF16", "float32"), ("BF16", "bfloat16"))
    )


def test_types_are_those_of_the_choice(checkpoint, monkeypatch):
    turns(monkeypatch, kinds_of(checkpoint))
    options = EngineOptions(weights="auto")
    assert resolve_types("auto", options, checkpoint, "cpu")[1].weights.startswith("q8_0:")
    assert resolve_types("auto", options, checkpoint, "cuda")[1].weights == "file"
    arguments = [str(checkpoint.path), "--context", "256", "--hardware", "cpu-avx2"]
    shown = CliRunner().invoke(plan, [*arguments, "--weights", "auto"])
    assert shown.exit_code == 0 and "weights quantised to q8_0" in shown.output, shown.output
