"""What files say of single layers: windows, kinds, and the rotary embedding of each."""

from pathlib import Path

import pytest
from conftest import edit_json, refusal
from families import random_model

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.gguf.config import window_fields
from cptool.checkpoint.gguf.metadata import Metadata
from cptool.checkpoint.layers import read_windows
from cptool.model.architectures.registry import find_family
from cptool.parallel.step import Scores


@pytest.mark.parametrize(
    ("case", "changes", "windows"),
    [
        ("qwen3", dict(use_sliding_window=True, sliding_window=600, max_window_layers=1), "-xx"),
        ("qwen3", dict(use_sliding_window=False, sliding_window=600, layer_types=...), "---"),
        ("gemma2", {}, "x-x-x-x"),
        ("gemma2", dict(layer_types=...), "x-x-x-x"),
        ("gemma3", dict(layer_types=...), "xxxxx-x"),
        ("gemma3", dict(layer_types=..., sliding_window_pattern=3), "xx-xx-x"),
        ("olmo3", dict(layer_types=...), "xxx-"),
        ("smollm3", dict(use_sliding_window=True, sliding_window=600, layer_types=...), "---x"),
    ],
)
def test_which_layers_have_a_window(case, changes, windows, tmp_path):
    random_model(case, tmp_path)
    edit_json(tmp_path / "config.json", **{"layer_types": ..., **changes})
    found = open_checkpoint(str(tmp_path)).config
    marks = ["-" if found.window(n) is None else "x" for n in range(len(windows))]
    assert "".join(marks) == windows


@pytest.mark.parametrize(("context", "hiding"), [(600, None), (601, 600)])
def test_a_window_of_the_whole_context_hides_nothing(context, hiding, tmp_path):
    random_model("mistral", tmp_path)
    edit_json(tmp_path / "config.json", sliding_window=600, max_position_embeddings=context)
    found = open_checkpoint(str(tmp_path)).config
    assert found.window(0) == 600 and Scores.of(found, 0).window == hiding
    longer = open_checkpoint(str(tmp_path), context_length=2000).config
    assert Scores.of(longer, 0).window == 600


@pytest.mark.parametrize(
    ("case", "changes", "message"),
    [
        ("gemma3", dict(layer_types=["full_attention"]), "has 1 entries for 7 layers"),
        ("gemma3", dict(layer_types=["chunked_attention"] * 7), "layer_types is"),
        ("gemma3", dict(layer_types=..., sliding_window_pattern=0), "must be positive"),
        ("gemma3", dict(sliding_window=-1), "must be positive"),
        ("gemma3", dict(rope_parameters={"rope_type": "default"}), "one object for each of"),
        ("gemma3", dict(use_bidirectional_attention=True), "use_bidirectional_attention is True"),
        ("smollm3", dict(no_rope_layers=[1, 0]), "a 0 or a 1 for each of the 4 layers"),
        ("smollm3", dict(no_rope_layers=..., no_rope_layer_interval=0), "must be positive"),
        ("olmo2", dict(sliding_window=16), "a OLMo 2 attends to the whole"),
    ],
)
def test_what_makes_no_sense_is_refused(case, changes, message, tmp_path):
    random_model(case, tmp_path)
    edit_json(tmp_path / "config.json", **changes)
    assert message in refusal(tmp_path)


@pytest.mark.parametrize(
    ("case", "changes"),
    [
        ("qwen2", dict(use_mrope=False)),
        ("phi3", dict(full_attn_mod=1, interpolate_factor=1)),
        ("gemma2", dict(sliding_window_size=4096)),
    ],
)
def test_fields_that_published_files_have_change_nothing(case, changes, tmp_path):
    random_model(case, tmp_path)
    plain = open_checkpoint(str(tmp_path)).config
    edit_json(tmp_path / "config.json", **changes)
    assert open_checkpoint(str(tmp_path)).config == plain
    edit_json(tmp_path / "config.json", **dict.fromkeys(changes, 2))
    assert next(iter(changes)) in refusal(tmp_path)


@pytest.mark.parametrize(("name", "window"), [("gemma2", 4096), ("gemma3", None), ("phi3", None)])
def test_the_first_files_of_gemma_2_do_not_state_their_window(name, window):
    family = find_family(name)
    fields = window_fields(Metadata(Path("m.gguf"), {}, str(family.gguf)), family)
    found = read_windows(Path("m.gguf"), {**family.defaults, **fields}, family, 2)
    assert found == (None if window is None else (window, None))


def test_rotary_embeddings_of_two_kinds_in_both_forms(tmp_path):
    random_model("gemma3-linear", tmp_path)
    new = open_checkpoint(str(tmp_path)).config
    assert (new.rope_theta, new.window_rope_theta, new.rope_scaling.factor) == (1e6, 5e3, 8.0)
    assert new.max_position_embeddings == 512
    edit_json(
        tmp_path / "config.json",
        rope_parameters=...,
        rope_theta=1e6,
        rope_local_base_freq=5e3,
        rope_scaling={"rope_type": "linear", "factor": 8.0},
    )
    assert open_checkpoint(str(tmp_path)).config == new
