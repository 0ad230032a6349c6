"""Shapes by name have the parameters of the published models, and configs are read as they are."""

import dataclasses
import json
import math

import pytest

from cptool.checkpoint.shapes import find_shape
from cptool.errors import UserError
from cptool.model.architectures.registry import find_family
from cptool.model.shapes import SHAPES
from cptool.planning.cost.counts import matrix_parameters


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("llama2-7b", 6_738_415_616),
        ("llama2-13b", 13_015_864_320),
        ("llama2-70b", 68_976_648_192),
        ("llama3-8b", 8_030_261_248),
        ("llama3-1b", 1_235_814_400),
        ("llama3-3b", 3_212_749_824),
        ("llama3-405b", 405_853_388_800),
    ],
)
def test_parameter_counts(name, parameters):
    config = SHAPES[name]
    embeddings = (1 if config.tie_word_embeddings else 2) * config.vocab_size * config.hidden_size
    norms = (2 * config.num_hidden_layers + 1) * config.hidden_size
    assert matrix_parameters(config) + embeddings + norms == parameters


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("mistral-7b", 7.25),
        ("qwen2.5-7b", 7.62),
        ("qwen2.5-72b", 72.7),
        ("qwen3-8b", 8.19),
        ("qwen3-32b", 32.8),
        ("gemma3-27b", 27.0),
        ("seed-oss-36b", 36.15),
    ],
)
def test_tables_have_the_published_number_of_parameters(name, billions):
    config = SHAPES[name]
    tensors = find_family(config.family).tensors(config)
    count = sum(math.prod(weight.extents(config)) for weight, _ in tensors)
    assert count / 1e9 == pytest.approx(billions, rel=2e-3)


@pytest.mark.parametrize("name", SHAPES)
def test_proportions(name):
    config = SHAPES[name]
    if config.family in ("llama", "mistral", "qwen2"):
        assert config.num_attention_heads * config.head_dim == config.hidden_size
    assert config.num_attention_heads % config.num_key_value_heads == 0


def test_a_config_file_or_its_directory(mqa_path, tmp_path):
    config = find_shape(str(mqa_path))
    assert (config.num_attention_heads, config.num_key_value_heads) == (5, 1)
    alone = tmp_path / "config.json"
    alone.write_text((mqa_path / "config.json").read_text())  # no weights beside it
    assert find_shape(str(alone)) == find_shape(str(tmp_path)) == dataclasses.replace(config)
    alone.write_text(json.dumps([]))
    with pytest.raises(UserError, match="it must be a JSON object"):
        find_shape(str(alone))


def test_an_unknown_name_is_told_the_known_ones():
    with pytest.raises(UserError, match=r"no such model.*or one of the shapes llama2-7b") as error:
        find_shape("llama9-1t")
    assert "\n" not in str(error.value)


def test_what_a_configuration_leaves_open_is_noted(mqa_path, tmp_path):
    fields = json.loads((mqa_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**fields, "mood": "good"}))
    notes = []
    assert find_shape(str(tmp_path), notes) == find_shape(str(mqa_path))
    assert notes == ["fields that cptool does not know were ignored: mood"]
