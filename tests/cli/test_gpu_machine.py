"""Every command on a machine with GPUs, up to where it starts its ranks or first uses a device."""

import json

import pytest
import torch
from click.testing import CliRunner
from fake_gpu import FIRST_USE, STARTED, pretend, stop_at_launch

from cptool.checkpoint import open_checkpoint
from cptool.cli.main import COMMANDS, main
from cptool.engine.setup.loading import Setup
from cptool.errors import RunError
from cptool.exactness import selftest

SHAPE = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 1000,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 4096,
}
SWEEP = ("{shape}", "--repeats", 1)

ON_RANKS = {
    "prefill": ("prefill", "{model}", "--synthetic", 9),
    "prefill into a session": ("prefill", "{model}", "--synthetic", 9, "--session", "{new}"),
    "prefill on more ranks": ("prefill", "{model}", "--synthetic", 9, "--cp", 2),
    "generate": ("generate", "{model}", "--synthetic", 9),
    "decode": ("decode", "{session}", "-n", 2),
    "chat": ("chat", "{chat}"),
    "verify": ("verify", "{model}"),
    "demo": ("demo",),
    "bench prefill": ("bench", "prefill", *SWEEP),
    "bench decode": ("bench", "decode", *SWEEP),
    "bench levers": ("bench", "levers", "{model}"),
    "bench perplexity": ("bench", "perplexity", "{model}", "{ids}", "--ids"),
    "bench link": ("bench", "link"),
    "bench calibrate": ("bench", "calibrate"),
}
IN_THIS_PROCESS = {
    "prefill": ("prefill", "{model}", "--synthetic", 9),
    "generate": ("generate", "{model}", "--synthetic", 9),
    "decode": ("decode", "{session}", "-n", 2),
    "chat": ("chat", "{chat}"),
    "verify": ("verify", "{model}"),
    "bench attention": ("bench", "attention"),
    "bench merge": ("bench", "merge"),
    "bench prefill": ("bench", "prefill", *SWEEP, "--cp", 1),
    "bench decode": ("bench", "decode", *SWEEP, "--cp", 1),
    "bench levers": ("bench", "levers", "{model}", "--cp", 1),
    "bench perplexity": ("bench", "perplexity", "{model}", "{ids}", "--ids"),
    "bench emulate": ("bench", "emulate", "--shape", "{shape}", "--context", 64),
    "bench calibrate": ("bench", "calibrate", "--cp", 1),
}
ON_NO_DEVICE = {"plan", "session", "pull", "models"}


def cptool(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments], input="Hello\n")


@pytest.fixture(scope="module")
def places(tiny_model, smollm2_path, tmp_path_factory):
    """What the names in braces stand for; the session is made on the CPU."""
    folder = tmp_path_factory.mktemp("gpu")
    shape = folder / "config.json"
    shape.write_text(json.dumps(SHAPE))
    ids = folder / "ids.json"
    ids.write_text("[1, 2, 3]")
    made = ("prefill", tiny_model, "--synthetic", 5, "--session", folder / "s", "--device", "cpu")
    done = cptool(*made)
    assert done.exit_code == 0, done.output
    return {
        "model": tiny_model,
        "shape": shape,
        "session": folder / "s",
        "ids": ids,
        "new": folder / "new",
        "chat": smollm2_path,
    }


def filled(arguments, places) -> list[str]:
    return [str(argument).format(**places) for argument in arguments]


@pytest.mark.parametrize("name", ON_RANKS)
def test_a_command_starts_its_ranks_on_gpus(name, places, monkeypatch):
    pretend(monkeypatch)
    fake = stop_at_launch(monkeypatch)
    done = cptool(*filled(ON_RANKS[name], places))
    assert done.stderr.splitlines()[-1] == f"cptool: {STARTED}", done.stderr
    assert done.exit_code == 1 and len(fake.launches) == 1
    assert fake.launches[0].ranks.device in ("cuda", "auto")
    for setup in fake.launches[0].args:
        if isinstance(setup, Setup):
            assert fake.launches[0].ranks.device == "cuda"
            session = "decode" in name
            own = open_checkpoint(setup.model).matrix_dtype or "float32"
            assert setup.dtype == ("float32" if session else own)


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is real here: see tests/cuda")
@pytest.mark.parametrize("name", IN_THIS_PROCESS)
def test_a_command_gets_as_far_as_the_first_use_of_a_gpu(name, places, monkeypatch):
    pretend(monkeypatch, 1 if name != "verify" else 2)
    done = cptool(*filled(IN_THIS_PROCESS[name], places))
    assert done.exit_code == 1 and FIRST_USE.search(done.stderr), done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="the GPU is real here: see tests/cuda")
def test_doctor_lists_gpus_and_tests_each_of_their_kernels_apart(monkeypatch):
    def broken(device, kernel):
        raise RunError(f"no {device} device")

    monkeypatch.setattr(selftest, "run", lambda device: [selftest.Check("all", 0.0, 1.0)])
    monkeypatch.setattr(selftest, "run_apart", broken)
    pretend(monkeypatch)
    done = cptool("doctor")
    assert done.exit_code == 1
    assert "Fake GPU 0, Fake GPU 1" in done.stdout and "GPU: simt, sm80, sm90" in done.stdout
    assert all(
        f"WRONG  {kernel} on cuda: no cuda device" in done.stdout
        for kernel in ("simt", "sm80", "sm90")
    )
    assert done.stderr.endswith("no kernel is right on the GPU: use --device cpu\n")


def test_a_plan_is_the_same_on_a_machine_with_gpus(monkeypatch):
    asked = ("plan", "llama3-8b", "--context", "8K", "--hardware", "h100-sxm", "--json")
    before = cptool(*asked).stdout
    pretend(monkeypatch)
    assert cptool(*asked).stdout == before


def test_one_gpu_leaves_verify_nothing_to_compare(places, monkeypatch):
    pretend(monkeypatch, 1)
    done = cptool(*filled(ON_RANKS["verify"], places))
    assert done.exit_code == 2 and done.stderr == (
        "cptool: --device cuda: one GPU leaves nothing to compare; add --device cpu to verify "
        "here\n"
    )


def test_every_command_is_here():
    tested = {words[0] for words in (*ON_RANKS.values(), *IN_THIS_PROCESS.values())}
    assert tested | ON_NO_DEVICE | {"doctor"} == set(COMMANDS)
    bench = main.get_command(None, "bench")
    tested = {name for name in (*ON_RANKS, *IN_THIS_PROCESS) if name.startswith("bench ")}
    assert tested == {f"bench {name}" for name in bench.commands}
