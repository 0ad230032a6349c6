"""How long a context may be: the model's own, what linear scaling makes of it, and the user's."""

import json

import pytest
import torch
from click.testing import CliRunner
from conftest import edit_json, greedy
from llama_reference import save_llama
from transformers import LlamaForCausalLM

from cptool.cli.main import main

IDS = [(7 * i * i + 3 * i) % 96 for i in range(90)]


@pytest.fixture
def stretched(tmp_path):
    """Made for 32 tokens, and stretched to 128."""
    return save_llama(
        tmp_path / "stretched",
        seed=2,
        vocab_size=97,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        tie_word_embeddings=False,
        initializer_range=0.3,
        eos_token_id=96,
        rope_parameters={"rope_type": "linear", "factor": 4.0, "rope_theta": 10000.0},
    )


def run(*arguments):
    return CliRunner().invoke(main, [str(a) for a in arguments])


def test_linear_scaling_takes_prompts_of_the_stretched_context(stretched, token_file, tmp_path):
    reference = LlamaForCausalLM.from_pretrained(stretched, dtype=torch.float32)
    prompt = ("--token-ids", token_file(IDS), "--session", tmp_path / "s")
    assert run("prefill", stretched, *prompt).exit_code == 0
    answer = run("decode", tmp_path / "s", "-n", 8, "--json")
    assert json.loads(answer.stdout)["token_ids"] == [greedy(reference, IDS, 8, (96,))]


def test_the_user_may_allow_more_and_less(stretched, token_file, tmp_path):
    prompt = ("--token-ids", token_file(IDS + IDS))
    refused = run("prefill", stretched, *prompt)
    assert refused.exit_code == 2
    assert "180 tokens" in refused.stderr and "context is 128" in refused.stderr
    assert "--context-length" in refused.stderr
    kept = ("--session", tmp_path / "s")
    assert run("prefill", stretched, *prompt, *kept, "--context-length", 256).exit_code == 0
    assert "context is 128" in run("decode", tmp_path / "s", "-n", 8).stderr
    # The session knows its model again, whatever context either was opened with.
    longer = run("decode", tmp_path / "s", "-n", 8, "--context-length", "1K")
    assert longer.exit_code == 0, longer.stderr
    less = run("prefill", stretched, "--token-ids", token_file(IDS), "--context-length", 64)
    assert "context is 64" in less.stderr
    beyond = run("prefill", stretched, *prompt, "--context-length", "3000M")
    assert "positions go up to" in beyond.stderr


def test_notes_of_a_checkpoint_are_said_once(stretched, token_file):
    edit_json(stretched / "config.json", strange=3, stranger="x")
    prompt = ("--token-ids", token_file(IDS[:9]), "--cp", 2, "--json")
    result = run("prefill", stretched, *prompt)
    assert result.exit_code == 0
    json.loads(result.stdout)
    assert result.stderr.count("were ignored: strange, stranger") == 1
