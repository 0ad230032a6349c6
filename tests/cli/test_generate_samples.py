"""`cptool generate --samples`: K answers to each prompt, the same on any number of ranks."""

import json

import pytest
from test_cli import MQA_IDS, as_json, cptool

BATCH = [MQA_IDS[:31], MQA_IDS[3:6]]
WARM = ("--temperature", 0.8, "--seed", 3)


@pytest.fixture
def asked(mqa_path, token_file):
    return ("generate", mqa_path, "--token-ids", token_file(BATCH), "-n", 7, *WARM)


def test_samples_differ_and_the_first_is_the_answer_without(asked):
    single = as_json(*asked)
    fields = [as_json(*asked, "--samples", 3, "--cp", cp) for cp in (1, 2)]
    assert fields[0]["token_ids"] == fields[1]["token_ids"]
    answers = fields[0]["token_ids"]
    assert answers[::3] == single["token_ids"]
    assert len(set(map(tuple, answers))) == 6
    assert fields[0]["sequence"] == [0, 0, 0, 1, 1, 1]
    assert fields[0]["sample"] == [0, 1, 2, 0, 1, 2]
    assert fields[0]["tokens"] == single["tokens"]  # each prompt is read once
    assert single["sequence"] == [0, 1] and single["sample"] == [0, 0]


def test_samples_are_numbered_and_their_prompt_echoed_once(asked):
    answers = as_json(*asked, "--samples", 2)["token_ids"]
    shown = [" ".join(map(str, ids)) for ids in (*answers, *BATCH)]
    done = cptool(*asked, "--samples", 2, "--echo")
    assert done.stdout.splitlines() == [
        f"[1] {shown[4]}",
        f"[1.1] {shown[0]}",
        f"[1.2] {shown[1]}",
        f"[2] {shown[5]}",
        f"[2.1] {shown[2]}",
        f"[2.2] {shown[3]}",
    ]
    assert "per step of 4 sequences" in done.stderr


def test_lines_of_json_name_the_sample(asked):
    *lines, result = map(json.loads, cptool(*asked, "--samples", 2, "--jsonl").stdout.splitlines())
    for n, answer in enumerate(result["token_ids"]):
        b, s = divmod(n, 2)
        mine = [line["token"] for line in lines if (line["sequence"], line["sample"]) == (b, s)]
        assert mine == answer


def test_a_text_has_several_continuations(smollm2_path):
    """Stop texts and log-probabilities are those of each answer."""
    asked = ("generate", smollm2_path, "--prompt", "Once upon a time", "-n", 12, *WARM)
    asked += ("--samples", 3, "--stop", " a", "--logprobs", 1)
    fields = as_json(*asked, "--cp", 2)
    assert len(set(fields["text"])) == 3
    assert all(" a" not in text for text in fields["text"]) and "stop" in fields["stopped"]
    assert list(map(len, fields["logprobs"])) == list(map(len, fields["token_ids"]))
    done = cptool(*asked)
    assert done.stdout == "".join(f"[1.{s}] {text}\n" for s, text in enumerate(fields["text"], 1))
    assert "Log-probabilities of the answer 1.3" in done.stderr


def test_what_samples_do_not_go_with(mqa_path, token_file, tmp_path):
    asked = ("generate", mqa_path, "--token-ids", token_file(MQA_IDS), "-n", 2, "--samples", 2)
    refused = cptool(*asked, "--session", tmp_path / "s", code=2)
    assert "--samples 2: a session keeps one answer" in refused.stderr
    assert not (tmp_path / "s").exists()
    greedy = cptool(*asked, "--temperature", 0)
    assert "at temperature 0 all answers to a prompt are the same" in greedy.stderr
    first, second = greedy.stdout.splitlines()
    assert first.removeprefix("[1.1] ") == second.removeprefix("[1.2] ")
