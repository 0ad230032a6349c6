"""`cptool generate`: tokens against `transformers`, what is streamed and written as JSON."""

import json
import os
import shutil
import subprocess
import sys

import pytest
from click.testing import CliRunner
from conftest import edit_json, greedy
from test_cli import MQA_IDS, as_json, cptool

from cptool.checkpoint import open_checkpoint
from cptool.cli.main import main
from cptool.session import store

DOCUMENT = "The lighthouse keeper had a cat called Biscuit, who slept beside the lamp.\n"
QUESTION = "What is the cat's name?"


@pytest.fixture(scope="module")
def tokenizer(smollm2_path):
    return open_checkpoint(str(smollm2_path)).tokenizer()


@pytest.fixture(scope="module")
def chat_answer(smollm2_reference, tokenizer):
    """The prompt of the document and the question in the chat template, and its greedy answer."""
    ids = tokenizer.chat([{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}])
    return ids, greedy(smollm2_reference, ids, 24, (2,))


def lines_of(result) -> list[dict]:
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("cp", [1, 2])
def test_a_document_and_a_question_are_answered(smollm2_path, tokenizer, chat_answer, tmp_path, cp):
    (tmp_path / "doc.txt").write_text(DOCUMENT)
    asked = ("generate", smollm2_path, "--chat", "--file", tmp_path / "doc.txt", "--prompt")
    done = cptool(*asked, QUESTION, "-n", 24, "--temperature", 0, "--cp", cp)
    prompt, answer = chat_answer
    assert done.stdout == tokenizer.decode(answer) + "\n"
    assert f"prompt       {len(prompt)} tokens" in done.stderr
    assert "answer       ended " in done.stderr and "greedy" in done.stderr


def test_ranks_of_a_launcher_answer_once(
    small_smollm2_path, small_smollm2_reference, tokenizer, tmp_path
):
    (tmp_path / "doc.txt").write_text(DOCUMENT)
    asked = ("generate", small_smollm2_path, "--chat", "--file", tmp_path / "doc.txt")
    launcher = ("-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "cptool")
    done = subprocess.run(
        [sys.executable, *launcher, *map(str, asked), "--prompt", QUESTION, "-n", "24"],
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )
    ids = tokenizer.chat([{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTION}"}])
    answer = greedy(small_smollm2_reference, ids, 24, (2,))
    assert done.stdout == tokenizer.decode(answer) + "\n", done.stderr


def test_a_batch_is_written_in_order_as_each_answer_ends(
    mqa_path, mqa_reference, token_file, tmp_path
):
    batch = [MQA_IDS[:5], MQA_IDS[:31], MQA_IDS[3:6]]
    expected = [greedy(mqa_reference, ids, 9, (300,)) for ids in batch]
    asked = ("generate", mqa_path, "--token-ids", token_file(batch), "-n", 9, "--cp", 2)
    done = cptool(*asked)
    assert done.stdout.splitlines() == [
        f"[{b}] {' '.join(map(str, ids))}" for b, ids in enumerate(expected, 1)
    ]
    fields = as_json(*asked, "--session", tmp_path / "s")
    assert fields["token_ids"] == expected and fields["tokens"] == sum(map(len, batch))
    more = as_json("decode", tmp_path / "s", "-n", 5)["token_ids"]
    longer = [greedy(mqa_reference, ids, 14, (300,))[9:] for ids in batch]
    assert more == longer


def test_a_session_takes_a_longer_prompt_and_rewinds(mqa_path, mqa_reference, token_file, tmp_path):
    made, asked = tmp_path / "s", ("generate", mqa_path, "--session", tmp_path / "s", "-n", 4)
    first = as_json(*asked, "--token-ids", token_file(MQA_IDS[:30]))["token_ids"][0]
    assert list(store.load(made).sequences[0].tokens) == MQA_IDS[:30] + first
    refused = cptool(*asked, "--token-ids", token_file(MQA_IDS), code=2)
    assert "--rewind" in refused.stderr
    fields = as_json(*asked, "--token-ids", token_file(MQA_IDS), "--rewind")
    assert fields["token_ids"] == [greedy(mqa_reference, MQA_IDS, 4, (300,))]
    assert fields["cached"] == 29  # the last token before what was taken back is computed again


def test_standard_input_is_the_prompt(small_smollm2_path, small_smollm2_reference, tokenizer):
    text = "Once upon a time"
    answer = greedy(small_smollm2_reference, tokenizer.encode(text), 8, (2,))
    words = ["generate", str(small_smollm2_path), "-n", "8", "--temperature", "0"]
    done = CliRunner().invoke(main, words, input=text)
    assert done.stdout == tokenizer.decode(answer) + "\n", done.output
    echoed = CliRunner().invoke(main, [*words, "--echo"], input=text)
    assert echoed.stdout == text + tokenizer.decode(answer) + "\n"


def test_the_prompt_of_a_chat_is_echoed_as_the_template_writes_it(small_smollm2_path, tmp_path):
    asked = ("generate", small_smollm2_path, "--chat", "--system", "Be brief.", "--echo", "-n", 2)
    done = cptool(*asked, "--prompt", "Hi <|im_end|>", "--prompt", "Ho")
    rendered = (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi <|im_end|><|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert done.stdout.startswith(f"[1] {rendered}")
    assert f"[2] {rendered.replace('Hi <|im_end|>', 'Ho')}" in done.stdout


def test_json_lines_carry_whole_characters_and_end_with_the_result(small_smollm2_path, tokenizer):
    text = "🙂🙃🙂🙃🙂🙃"
    asked = (
        "generate",
        small_smollm2_path,
        "--prompt",
        text,
        "--prompt",
        "Hello",
        "-n",
        9,
        "--echo",
    )
    *tokens, result = lines_of(cptool(*asked, "--jsonl"))
    assert tokens[:2] == [
        {"type": "prompt", "sequence": 0, "text": text},
        {"type": "prompt", "sequence": 1, "text": "Hello"},
    ]
    assert result["schema"] == 1 and result["type"] == "result"
    assert set(as_json(*asked)) - {"prompt"} == set(result) - {"type"}
    for b in (0, 1):
        mine = [line for line in tokens[2:] if line["sequence"] == b]
        assert [line["token"] for line in mine if line["token"] is not None] == (
            result["token_ids"][b]
        )
        assert "".join(line["text"] for line in mine) == result["text"][b]
        assert all("\ufffd" not in line["text"] for line in mine[:-1])


def test_an_answer_that_ends_at_its_first_token_says_so(
    mqa_path, mqa_reference, token_file, tmp_path
):
    """Of a model whose EOS is the token that it begins with."""
    model = shutil.copytree(mqa_path, tmp_path / "m")
    (first,) = greedy(mqa_reference, MQA_IDS, 1, ())
    for name in ("config.json", "generation_config.json"):
        edit_json(model / name, eos_token_id=first)
    done = cptool("generate", model, "--token-ids", token_file(MQA_IDS))
    assert f"the answer ended at its first token (id {first})" in done.stderr
    assert "ended by the model" in done.stderr


@pytest.mark.parametrize("command", ["generate", "decode"])
def test_an_answer_is_as_long_as_the_context_allows(tiny_model, token_file, tmp_path, command):
    ids = token_file([1 + n % 250 for n in range(500)])
    if command == "decode":
        made = ("--session", tmp_path / "s")
        cptool("prefill", tiny_model, "--token-ids", ids, *made)
        asked = ("decode", tmp_path / "s")
    else:
        asked = ("generate", tiny_model, "--token-ids", ids)
    done = cptool(*asked, "-n", 5000, "--json")
    assert len(json.loads(done.stdout)["token_ids"][0]) == 12
    assert done.stderr == "-n 5000: the context of 512 tokens has room for 12 more\n"
    full = token_file([1 + n % 250 for n in range(512)])
    refused = cptool("generate", tiny_model, "--token-ids", full, code=2).stderr
    assert "sequence 1 has 513 tokens (512 new, 1 to come), the model's context is 512" in refused


def test_mistakes_of_generate(mqa_path, token_file):
    for words, expected in [
        ((), "standard input: the prompt is empty"),
        (("--json", "--jsonl", "--synthetic", 3), "--json and --jsonl exclude each other"),
        (("-n", 0, "--synthetic", 3), "0 is not in the range"),
        (("--rewind", "--synthetic", 3), "add --session DIR"),
    ]:
        refused = cptool("generate", mqa_path, *words, code=2)
        assert expected in refused.stderr and len(refused.stderr.splitlines()) == 1
