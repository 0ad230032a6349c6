"""Commands that read a prompt in chunks give the tokens of one piece."""

import json
import subprocess
import sys

import pytest
from test_cli import MQA_IDS, as_json, cptool

from cptool import LLM


@pytest.fixture(scope="module")
def whole(mqa_path, tmp_path_factory):
    """The greedy answer to MQA_IDS, read in one piece."""
    ids = tmp_path_factory.mktemp("ids") / "ids.json"
    ids.write_text(json.dumps(MQA_IDS))
    asked = (mqa_path, "--token-ids", ids, "-n", 9, "--temperature", 0)
    return asked, as_json("generate", *asked)["token_ids"]


def test_generate_and_what_it_reports(whole):
    asked, expected = whole
    found = as_json("generate", *asked, "--chunk", 20, "--cp", 2)
    assert found["token_ids"] == expected
    assert (found["chunk"], found["chunks"], found["tokens"]) == (20, 5, 83)
    assert sum(found["variants"].values()) == 5 and found["variant"] in found["variants"]
    told = cptool("generate", *asked, "--chunk", 50).stderr
    assert "chunks       2 of up to 50 tokens" in told
    assert "chunks " not in cptool("generate", *asked, "--chunk", "auto").stderr
    assert "'0' must be a whole number" in cptool("generate", *asked, "--chunk", 0, code=2).stderr


def test_prefill_and_a_next_turn_of_a_session(whole, mqa_path, token_file, tmp_path):
    (expected,) = whole[1]
    options = ("--chunk", 16, "--cp", 2, "--session", tmp_path / "s")
    first = as_json("prefill", mqa_path, "--token-ids", token_file(MQA_IDS[:40]), *options)
    assert (first["chunks"], first["cached"]) == (3, 0)
    more = ("--token-ids", token_file(MQA_IDS[40:]), "-n", 9, "--temperature", 0)
    answer = as_json("decode", tmp_path / "s", *more, "--chunk", 7, "--cp", 3)
    assert answer["token_ids"] == [expected]
    assert (answer["chunks"], answer["cached"]) == (7, 40)


def test_a_file_of_prompts_and_python(whole, mqa_path, tmp_path):
    _, (expected,) = whole
    lines = [{"token_ids": MQA_IDS}, {"token_ids": MQA_IDS[:3]}, {"token_ids": MQA_IDS}]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    options = ("-n", 9, "--temperature", 0, "--chunk", 10)
    done = cptool("generate", mqa_path, "--batch-file", tmp_path / "prompts.jsonl", *options)
    answers = [json.loads(line)["token_ids"] for line in done.stdout.splitlines()]
    assert answers[0] == answers[2] == expected
    with LLM(mqa_path, chunk=10) as llm:
        results = llm.generate([MQA_IDS, MQA_IDS[:3]], max_tokens=9, temperature=0)
    assert [list(result.token_ids) for result in results] == answers[:2]


def test_ranks_of_torchrun(whole):
    asked, expected = whole
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    options = ["--chunk", "20", "--threads", "1", "--json"]
    done = subprocess.run(
        [*command, "-m", "cptool", "generate", *map(str, asked), *options],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["token_ids"] == expected
