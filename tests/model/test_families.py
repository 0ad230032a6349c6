"""A model family is one table: a toy family of other names and with biases loads and runs.

Its reference is a Llama of `transformers` with biases of queries, keys and values.
"""

import json
import sys
from dataclasses import replace

import gguf
import pytest
import torch
from conftest import edit_json, refusal
from families import add_shape
from llama_reference import ToyAttention, logits, random_llama, rms
from safetensors.torch import save_file

from cptool.checkpoint import open_checkpoint
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine.weights import load_model
from cptool.model import architectures
from cptool.model.architectures import llama, registry
from cptool.model.architectures.family import Family, Weight
from cptool.model.architectures.registry import families, find_family, register
from cptool.model.linear import BiasedLinear
from cptool.model.llama import Llama

ROUNDING = 1.25  # as in test_model


def toy_name(name: str) -> str:
    """What the toy calls a tensor of a Llama."""
    name = name.replace("model.layers.", "trunk.blocks.").replace("model.", "trunk.")
    return name.replace("self_attn.", "mix.")


def renamed(weight: Weight) -> Weight:
    """The same weight under other names."""
    huggingface, gguf = toy_name(weight.huggingface), f"toy_{weight.gguf}"
    return replace(weight, huggingface=huggingface, gguf=gguf, meta=None)


def bias(weight: Weight) -> Weight:
    """The bias of a projection."""
    names = {
        name: getattr(weight, name).removesuffix("weight") + "bias"
        for name in ("parameter", "huggingface", "gguf")
    }
    return replace(weight, shape=weight.shape[:1], **names)


WEIGHTS = tuple(renamed(weight) for weight in llama.WEIGHTS)
TOY = Family(
    name="toy",
    title="Toy",
    architectures=("ToyForCausalLM",),
    model_type="toy",
    gguf="toy",
    gguf_interleaved=False,
    weights=tuple(
        made
        for weight in WEIGHTS
        for made in ([weight, bias(weight)] if "qkv_proj" in weight.parameter else [weight])
    ),
    neutral_fields={"attention_bias": (True,)},
)
SHAPE = dict(num_attention_heads=4, num_key_value_heads=2, attention_bias=True)


@pytest.fixture
def toy():
    """The family, registered for a test."""
    register(TOY)
    yield TOY
    del registry._registered()[TOY.name]


@pytest.fixture
def reference(tmp_path):
    """A Llama with biases, saved under the toy's names to tmp_path / "toy"."""
    model = random_llama(SHAPE, tmp_path / "llama")
    state = model.state_dict()
    for name in [name for name in state if name.endswith("o_proj.bias")]:
        state.pop(name).zero_()
    for name, tensor in state.items():
        if name.endswith(".bias"):
            torch.nn.init.normal_(tensor)
    (tmp_path / "toy").mkdir()
    save_file(
        {toy_name(name): tensor.contiguous() for name, tensor in state.items()},
        tmp_path / "toy" / "model.safetensors",
    )
    fields = json.loads((tmp_path / "llama" / "config.json").read_text())
    fields |= {"architectures": ["ToyForCausalLM"], "model_type": "toy"}
    (tmp_path / "toy" / "config.json").write_text(json.dumps(fields))
    return model


def write_gguf(path, stored, config):
    """The stored tensors as a GGUF of the toy."""
    writer = gguf.GGUFWriter(str(path), "toy")
    add_shape(writer, config)
    for weight, layer in TOY.tensors(config):
        tensor = stored[weight.huggingface.format(layer)]
        writer.add_tensor(weight.gguf.format(layer), tensor.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def compute(model, tokens):
    """Logits of all tokens."""
    positions = torch.arange(len(tokens), dtype=torch.int32)
    with torch.inference_mode():
        return model.logits(model(tokens, positions, ToyAttention().at(positions)))


def tokens_of(model, count=60):
    return torch.randint(model.config.vocab_size, (count,), generator=torch.manual_seed(1))


def test_a_registered_family_loads_and_runs_from_both_formats(toy, reference, tmp_path):
    tokens = tokens_of(reference)
    exact = logits(reference, tokens, torch.float64)
    allowed = ROUNDING * rms(logits(reference, tokens, torch.float32) - exact)
    checkpoint = open_checkpoint(str(tmp_path / "toy"))
    assert checkpoint.config.family == "toy"
    assert all(name.startswith(("trunk.", "lm_head.")) for name in checkpoint.names())
    model = load_model(checkpoint, torch.float32, "cpu")
    assert isinstance(model.layers[0].self_attn.qkv_proj, BiasedLinear)
    assert rms(compute(model, tokens) - exact) <= allowed

    stored = {name: checkpoint.read(name) for name in checkpoint.names()}
    write_gguf(tmp_path / "toy.gguf", stored, checkpoint.config)
    model = load_model(open_checkpoint(str(tmp_path / "toy.gguf")), torch.float32, "cpu")
    assert rms(compute(model, tokens) - exact) <= allowed


def forward(world, path, tokens):
    register(TOY)
    model = load_model(open_checkpoint(path), torch.float32, "cpu", world)
    return world.gather(compute(model, torch.tensor(tokens)))


def test_two_ranks_divide_a_registered_family(toy, reference, tmp_path):
    tokens = tokens_of(reference)
    exact = logits(reference, tokens, torch.float64)
    allowed = ROUNDING * rms(logits(reference, tokens, torch.float32) - exact)
    path = str(tmp_path / "toy")
    ranks = RankOptions(tp=2, device="cpu", threads=1)
    first, second = run(forward, path, tokens.tolist(), ranks=ranks)
    assert torch.equal(first, second)
    assert rms(first - exact) <= allowed


def test_a_file_in_the_folder_is_all_that_a_family_takes(monkeypatch, tmp_path):
    (tmp_path / "other_family.py").write_text(
        "from dataclasses import replace\n"
        "from cptool.model.architectures.llama import FAMILY as LLAMA\n"
        "FAMILY = replace(LLAMA, name='other', model_type='other', gguf='other',\n"
        "                 architectures=('OtherForCausalLM',))\n"
    )
    random_llama({}, tmp_path)
    edit_json(tmp_path / "config.json", architectures=["OtherForCausalLM"], model_type="other")
    monkeypatch.setattr(architectures, "__path__", [*architectures.__path__, str(tmp_path)])
    registry._registered.cache_clear()
    try:
        assert open_checkpoint(str(tmp_path)).config.family == "other"
    finally:
        registry._registered.cache_clear()
        sys.modules.pop(f"{architectures.__name__}.other_family")


def test_a_family_that_is_not_registered_is_refused(reference, tmp_path):
    message = refusal(tmp_path / "toy")
    assert "architecture ['ToyForCausalLM'] of type 'toy' is not supported" in message
    assert message.endswith("use one of those that `cptool models` lists")


@pytest.mark.parametrize("family", families(), ids=lambda family: family.name)
def test_tables_and_models_have_the_same_parameters(family, reference, tmp_path):
    random_llama(dict(num_key_value_heads=2), tmp_path / "plain")
    config = replace(open_checkpoint(str(tmp_path / "plain")).config, family=family.name)
    assert find_family(family.name) is family
    parameters = {w.parameter.format(layer): w for w, layer in family.tensors(config)}
    assert set(Llama(config).state_dict()) == set(parameters)
    for layout in ("huggingface", "gguf", "meta"):
        names = [getattr(weight, layout) for weight in family.weights]
        names = [name for name in names if name is not None]
        assert len(set(names)) == len(names)
