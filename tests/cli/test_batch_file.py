"""`cptool generate --batch-file`: a file of prompts in, answers out, killed and resumed."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import greedy
from test_cli import MQA_IDS, as_json, cptool

from cptool.checkpoint import open_checkpoint
from cptool.cli import json_output
from cptool.cli.batch.answers import check_writable, kept_in
from cptool.errors import UserError

MESSAGES = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
TEXTS = ["The capital of France is", "Once upon a time", "Water boils at", "🙂🙃🙂🙃"]


def write_lines(path, *lines):
    texts = [each if isinstance(each, str) else json.dumps(each) for each in lines]
    path.write_text("".join(f"{text}\n" for text in texts))
    return path


def read_answers(path) -> list[dict]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def prompts(count: int) -> list[dict]:
    """Prompts of 1 to 40 tokens."""
    return [{"token_ids": MQA_IDS[b : b + 1 + 7 * b % 40]} for b in range(count)]


@pytest.fixture(scope="module")
def tokenizer(small_smollm2_path):
    return open_checkpoint(str(small_smollm2_path)).tokenizer()


@pytest.fixture(scope="module")
def answered(small_smollm2_reference, tokenizer):
    """Prompts and their greedy answers: texts, and messages as the second."""
    ids = [
        *(tokenizer.encode(TEXTS[0]), tokenizer.chat(MESSAGES)),
        *map(tokenizer.encode, TEXTS[1:]),
    ]
    answers = [
        greedy(small_smollm2_reference, each, 3 if b == 1 else 7, (2,))
        for b, each in enumerate(ids)
    ]
    return ids, answers


@pytest.mark.parametrize("cp", [1, 2])
def test_each_prompt_is_answered_as_alone(small_smollm2_path, answered, tokenizer, tmp_path, cp):
    ids, expected = answered
    lines = [
        {"id": "a", "prompt": TEXTS[0]},
        {"messages": MESSAGES, "max_tokens": 3, "id": 5},
        json.dumps(TEXTS[1]),
        "",
        {"token_ids": tokenizer.encode(TEXTS[2]), "id": None},
        {"prompt": TEXTS[3]},
    ]
    out = tmp_path / "out.jsonl"
    file = write_lines(tmp_path / "in.jsonl", *lines)
    asked = ("generate", small_smollm2_path, "--temperature", 0, "-n", 7, "--cp", cp)
    done = cptool(*asked, "--batch-file", file, "--output", out)
    assert done.stdout == "" and f"5, of {sum(map(len, ids))} tokens together" in done.stderr
    answers = read_answers(out)
    assert [each["token_ids"] for each in answers] == expected
    assert [each["text"] for each in answers] == [
        tokenizer.text(said, () if b == 1 else ids[b], ended=said[-1] == 2)
        for b, said in enumerate(expected)
    ]
    assert [each["id"] for each in answers] == ["a", 5, None, None, None]
    assert [each["index"] for each in answers] == list(range(5))
    assert [each["prompt_tokens"] for each in answers] == list(map(len, ids))
    alone = as_json(*asked, "--prompt", TEXTS[0])
    assert alone["token_ids"] == [expected[0]] and alone["text"] == [answers[0]["text"]]


def test_texts_go_into_the_chat_template(small_smollm2_path, tokenizer, tmp_path):
    file = write_lines(
        tmp_path / "in.jsonl", {"prompt": "Hi"}, {"prompt": "Ho", "system": "Be rude."}
    )
    asked = ("generate", small_smollm2_path, "--batch-file", file, "-n", 2)
    done = cptool(*asked, "--chat", "--system", "Be brief.")
    sizes = [json.loads(line)["prompt_tokens"] for line in done.stdout.splitlines()]
    assert sizes == [
        len(tokenizer.chat([{"role": "system", "content": s}, {"role": "user", "content": u}]))
        for s, u in (("Be brief.", "Hi"), ("Be rude.", "Ho"))
    ]
    refused = cptool(*asked, code=2)
    assert 'line 2: "system" is a message of the chat template; add --chat' in refused.stderr


def test_stop_texts_and_log_probabilities_are_those_of_generate(smollm2_path, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", *({"prompt": text} for text in TEXTS))
    asked = (
        "generate",
        smollm2_path,
        "-n",
        9,
        "--stop",
        ".",
        "--stop",
        " was",
        "--logprobs",
        2,
    )
    out = tmp_path / "out.jsonl"
    saved = ("--batch-file", file, "--batch-size", 3, "--output", out)
    cptool(*asked, "--prompt-logprobs", 0, "--temperature", 0, *saved)
    given = [word for text in TEXTS for word in ("--prompt", text)]
    whole = as_json(*asked, "--prompt-logprobs", 0, "--temperature", 0, *given)
    answers = read_answers(out)
    for name in ("token_ids", "text", "stopped"):
        assert [each[name] for each in answers] == whole[name]
    assert "stop" in whole["stopped"]
    for name in ("logprobs", "prompt_logprobs"):
        for mine, expected in zip([each[name] for each in answers], whole[name], strict=True):
            assert [s["token"] for s in mine] == [s["token"] for s in expected]
            found, wanted = [[s["logprob"] or 0 for s in each] for each in (mine, expected)]
            assert found == pytest.approx(wanted, abs=1e-4)
    refused = cptool(*asked, "--temperature", 0, *saved, code=2)
    assert "line 1: its --prompt-logprobs is not that of this run (0, here null)" in refused.stderr


@pytest.mark.parametrize("sampled", [(), ("--temperature", 1, "--seed", 3)])
def test_no_answer_depends_on_its_batch_or_the_ranks(mqa_path, token_file, tmp_path, sampled):
    batch = prompts(9)
    file = write_lines(tmp_path / "in.jsonl", *batch)
    asked = ("generate", mqa_path, "-n", 6, *sampled)
    rows = [each["token_ids"] for each in batch]
    expected = as_json(*asked, "--token-ids", token_file(rows))["token_ids"]
    for size, cp in ((1, 1), (2, 2), (4, 1), (9, 3), (None, 2)):
        out = tmp_path / f"out-{size}-{cp}.jsonl"
        sizes = () if size is None else ("--batch-size", size)
        cptool(*asked, "--batch-file", file, "--output", out, *sizes, "--cp", cp)
        assert [each["token_ids"] for each in read_answers(out)] == expected
    lines = {tuple(path.read_text().splitlines()) for path in tmp_path.glob("out-*.jsonl")}
    assert len(lines) == 1


def start(*arguments):
    words = [sys.executable, "-m", "cptool", *map(str, arguments)]
    return subprocess.Popen(words, stderr=subprocess.PIPE, text=True, start_new_session=True)


def wait_for_lines(process, out, count: int) -> None:
    end = time.monotonic() + 120
    while not out.exists() or out.read_bytes().count(b"\n") < count:
        assert process.poll() is None and time.monotonic() < end
        time.sleep(0.005)


@pytest.mark.parametrize("cp", [1, 2])
def test_a_killed_run_loses_one_batch_and_goes_on(mqa_path, tmp_path, cp):
    file = write_lines(tmp_path / "in.jsonl", *prompts(40))
    asked = ("generate", mqa_path, "-n", 30, "--batch-file", file, "--batch-size", 2)
    cptool(*asked, "--output", tmp_path / "whole.jsonl")
    out, whole = tmp_path / "out.jsonl", (tmp_path / "whole.jsonl").read_text()
    with start(*asked, "--output", out, "--cp", cp) as process:
        wait_for_lines(process, out, 4)
        os.killpg(process.pid, signal.SIGKILL)
    kept = out.read_text()
    assert whole.startswith(kept) and 4 <= len(kept.splitlines()) < 40
    out.write_text(kept + whole[len(kept) :][:100])  # cut off within a line
    summary = as_json(*asked, "--output", out, "--cp", cp)
    assert out.read_text() == whole
    assert summary["answered_before"] == len(kept.splitlines())
    assert summary["answered"] == 40 - len(kept.splitlines())
    assert summary["answer_tokens"] <= 30 * summary["answered"]


def test_ctrl_c_keeps_what_was_answered(mqa_path, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", *prompts(40))
    out = tmp_path / "out.jsonl"
    asked = ("generate", mqa_path, "-n", 200, "--batch-file", file, "--batch-size", 2)
    with start(*asked, "--output", out) as process:
        wait_for_lines(process, out, 2)
        os.killpg(process.pid, signal.SIGINT)
        errors = process.communicate(timeout=60)[1]
    assert process.returncode == 130, errors
    done = len(read_answers(out))
    assert 2 <= done < 40
    assert errors.splitlines()[-1] == (
        f"cptool: interrupted; {done} of 40 prompts are answered in {out}; the same command goes on"
    )
    assert all(each["stopped"] in ("eos", "length") for each in read_answers(out))


def test_a_finished_file_loads_nothing(mqa_path, tmp_path, monkeypatch):
    file, out = write_lines(tmp_path / "in.jsonl", *prompts(3)), tmp_path / "out.jsonl"
    asked = ("generate", mqa_path, "-n", 2, "--batch-file", file, "--output", out)
    cptool(*asked)
    before = out.read_bytes()
    monkeypatch.setattr("cptool.engine.resident.Resident.start", lambda self: 1 / 0)
    done = cptool(*asked, "--cp", 2)
    assert done.stderr == f"{out}: all 3 prompts are answered\n"
    assert out.read_bytes() == before


def test_what_is_there_must_be_of_this_run(mqa_path, tmp_path):
    file, out = write_lines(tmp_path / "in.jsonl", *prompts(3)), tmp_path / "out.jsonl"
    asked = ("generate", mqa_path, "--batch-file", file, "--output", out)
    cptool(*asked, "-n", 2)
    before = out.read_bytes()

    def refused(*more, of=asked) -> str:
        line = cptool(*of, *more, code=2).stderr
        assert out.read_bytes() == before and line.count("\n") == 1
        return line

    assert "line 1: its limit of tokens is not that of this run (2, here 3)" in refused("-n", 3)
    found = refused("-n", 2, "--temperature", 1)
    assert "line 1: its sampling is not that of this run (temperature 0.0, here 1.0)" in found
    assert "its dtype is not that" in refused("-n", 2, "--dtype", "bfloat16")
    write_lines(file, *prompts(2))
    assert "has more answers than the 2 prompts" in refused("-n", 2)
    write_lines(file, *prompts(2), {"token_ids": [5], "id": 3})
    assert "line 3: its id is not that of this run (null, here 3)" in refused("-n", 2)
    write_lines(file, *prompts(2), {"token_ids": MQA_IDS[2:17][::-1]})
    assert "line 3: its prompt is not that of this run" in refused("-n", 2)


@pytest.mark.parametrize("left", [b"\0" * 5000, b'{"schema": 1, "index": 2\0\0', b"\0\0}\n{}\n"])
def test_zero_bytes_of_a_crash_are_removed(tmp_path, left):
    """After some of the answers or all of them; nothing else that follows them is touched."""
    origins = [{"index": index} for index in range(3)]
    rows = [json_output.line({**origin, "token_ids": []}).encode() + b"\n" for origin in origins]
    for done in (2, 3):
        out = tmp_path / "out.jsonl"
        out.write_bytes(b"".join(rows[:done]) + left)
        with kept_in(out, origins) as kept:
            assert kept.done == done
        assert out.read_bytes() == b"".join(rows[:done])
    out.write_bytes(b"".join(rows) + b"x\n")
    with pytest.raises(UserError, match="more answers than the 3 prompts"), kept_in(out, origins):
        pass
    assert out.read_bytes() == b"".join(rows) + b"x\n"


def test_a_link_to_nothing_is_made_or_refused(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "file")
    check_writable(tmp_path / "link")
    with kept_in(tmp_path / "link", []):
        assert (tmp_path / "file").exists()
    (tmp_path / "lost").symlink_to(tmp_path / "none" / "file")
    with pytest.raises(UserError, match=f"lost is a link to {tmp_path}/none/file, whose folder"):
        check_writable(tmp_path / "lost")
    (tmp_path / "round").symlink_to(tmp_path / "round")
    check_writable(tmp_path / "round")
    with pytest.raises(UserError, match="symbolic links"), kept_in(tmp_path / "round", []):
        pass


@pytest.mark.parametrize("text", ["notes", "notes\n", '{"schema": 1}\n', "[]\n", "\0\n"])
def test_a_file_of_something_else_is_left_alone(mqa_path, tmp_path, text):
    file, out = write_lines(tmp_path / "in.jsonl", *prompts(3)), tmp_path / "out.jsonl"
    out.write_text(text)
    done = cptool("generate", mqa_path, "--batch-file", file, "--output", out, code=2)
    assert "line 1 is not an answer that --batch-file wrote" in done.stderr
    assert out.read_text() == text


MISTAKES = {
    "{": "it is not JSON",
    "hello": "it is not JSON",
    "7": "it is 7; write an object",
    "{}": "it has no prompt; give one of prompt, messages, token_ids",
    '{"prompt": "a", "token_ids": [1]}': "it has prompt and token_ids",
    '{"token_ids": []}': "the prompt is empty",
    '{"token_ids": [1.5]}': '"token_ids" must be a list of whole numbers',
    '{"token_ids": [301]}': "token id 301 is not in the model's vocabulary, 0 to 300",
    '{"token_ids": [1], "temperature": 1}': '"temperature" is not a field; the fields are prompt',
    '{"token_ids": [1], "max_tokens": 0}': '"max_tokens" is 0; it must be a number, 1 or more',
    '{"token_ids": [1], "max_tokens": true}': '"max_tokens" is true',
    '{"token_ids": [1], "id": [2]}': '"id" is [2]; it must be a text or a finite number',
    '{"token_ids": [1], "id": Infinity}': '"id" is Infinity; it must be a text or a finite number',
    '{"token_ids": [1], "token_ids": [2]}': 'it has "token_ids" twice; leave one out',
    '{"token_ids": [1], "id": "x"}': '"id" "x" is that of line 1; each must be unique',
    '{"token_ids": [1], "system": "x"}': '"system" goes with "prompt"',
    '{"prompt": "x"}': 'has no tokenizer; give "token_ids"',
    '{"messages": "x"}': '"messages" must be a list of messages such as',
    '{"messages": [{"role": "user"}]}': '{"role": "user"} is not a message, such as',
    '{"custom_id": "a", "method": "POST", "url": "/v1", "body": {}}': "OpenAI's batch format",
}


def test_mistakes_are_known_early(mqa_path, small_smollm2_path, tmp_path, monkeypatch):
    monkeypatch.setattr("cptool.engine.resident.Resident.start", lambda self: 1 / 0)
    out = tmp_path / "out.jsonl"
    good = {"token_ids": [1], "id": "x"}
    for line, rule in MISTAKES.items():
        file = write_lines(tmp_path / "in.jsonl", good, line)
        done = cptool("generate", mqa_path, "--batch-file", file, "--output", out, code=2)
        assert f"in.jsonl, line 2: {rule}" in done.stderr or rule in done.stderr, done.stderr
        assert done.stderr.count("\n") == 1 and "; nothing was computed" in done.stderr
    file = write_lines(tmp_path / "in.jsonl", *MISTAKES)
    done = cptool("generate", mqa_path, "--batch-file", file, "--output", out, code=2)
    assert len(done.stderr.splitlines()) == 6 and not out.exists()
    systems = [{"prompt": str(n), "system": "x"} for n in range(3)]
    file = write_lines(tmp_path / "in.jsonl", *systems)
    done = cptool("generate", small_smollm2_path, "--batch-file", file, "--output", out, code=2)
    assert f'{file}, 3 lines, the first line 1: "system" is a message of the' in done.stderr
    assert done.stderr.count("\n") == 1
    long = {"token_ids": [1] * 2048}
    file = write_lines(tmp_path / "in.jsonl", good, long)
    done = cptool("generate", mqa_path, "--batch-file", file, code=2)
    assert "line 2: the prompt has 2,048 tokens, which leaves no room" in done.stderr


def test_an_answer_has_the_room_that_the_context_has(mqa_path, tmp_path):
    long = {"token_ids": [1 + n % 9 for n in range(2045)]}
    file = write_lines(tmp_path / "in.jsonl", {"token_ids": [1, 2]}, long)
    done = cptool("generate", mqa_path, "--batch-file", file, "-n", 5)
    answers = [json.loads(line) for line in done.stdout.splitlines()]
    assert [each["max_tokens"] for each in answers] == [5, 3]
    assert [len(each["token_ids"]) for each in answers] == [5, 3]
    assert f"{file}: line 2: the context has no room" in done.stderr


def test_options_that_do_not_go_together(mqa_path, tmp_path):
    file = write_lines(tmp_path / "in.jsonl", *prompts(1))
    asked = ("generate", mqa_path, "--batch-file", file)
    for more, rule in {
        ("--prompt", "x"): "--prompt does not go with --batch-file",
        ("--session", tmp_path / "s"): "--session does not go with",
        ("--jsonl",): "--jsonl does not go with",
        ("--json",): "add --output FILE",
        ("--output", file): "--output is the --batch-file itself",
        ("--output", tmp_path): "is not a regular file",
        ("--output", tmp_path / "a" / "b"): "is not a directory; create it first",
        ("--chat",): "--chat: no line of",
    }.items():
        assert rule in cptool(*asked, *more, code=2).stderr
    for more in (("--output", "x"), ("--batch-size", 2)):
        refused = cptool("generate", mqa_path, "--prompt", "x", *more, code=2)
        assert f"{more[0]} goes with --batch-file" in refused.stderr
