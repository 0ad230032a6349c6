"""The Python front door: what it generates, what it keeps, and that it leaves nothing behind."""

import gc
import inspect
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from dataclasses import fields

import pytest
from conftest import greedy
from test_chat import members
from test_cli import MQA_IDS, as_json

import cptool
from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.base import Checkpoint
from cptool.engine.answers.request import AnswerRequest
from cptool.engine.sampling_request import SamplingRequest
from cptool.errors import OptionError, RunError, UserError

BATCH = [MQA_IDS[:1], MQA_IDS[1:8], MQA_IDS[8:]]


def ranks() -> list:
    return [p for p in multiprocessing.active_children() if p.name.startswith("cptool-rank")]


@pytest.mark.parametrize("cp", [1, 2, 4])
def test_tokens_are_those_of_transformers(mqa_path, mqa_reference, cp):
    expected = [greedy(mqa_reference, ids, 9, (300,)) for ids in BATCH]
    threads = set(threading.enumerate())
    with cptool.LLM(mqa_path, cp=cp, device="cpu", threads=1) as llm:
        assert len(ranks()) == (cp if cp > 1 else 0)
        results = llm.generate(BATCH, max_tokens=9, temperature=0)
        assert [list(result.token_ids) for result in results] == expected
        assert [result.prompt_tokens for result in results] == list(map(len, BATCH))
        assert all(result.text is None for result in results)
        # Another batch, a prompt that begins as an earlier one ended, and no prompt at all.
        again = [*BATCH[1], *expected[1][:3]]
        (result,) = llm.generate([again], max_tokens=6, temperature=0)
        assert list(result.token_ids) == greedy(mqa_reference, again, 6, (300,))
        assert llm.generate([]) == []
    assert not ranks() and set(threading.enumerate()) == threads
    with pytest.raises(RunError, match="is closed"):
        llm.generate(BATCH)


def test_a_session_saved_on_four_ranks_is_read_on_one(mqa_path, mqa_reference, tmp_path):
    expected = [greedy(mqa_reference, ids, 12, (300,)) for ids in BATCH]
    with cptool.LLM(mqa_path, cp=4, device="cpu", threads=1) as llm:
        with llm.session(tmp_path / "s") as session:
            first = session.generate(BATCH, max_tokens=5, temperature=0)
            between = llm.generate([MQA_IDS[:4]], max_tokens=2, temperature=0)
            second = session.generate(max_tokens=3, temperature=0)
            assert session.tokens[0] == (*BATCH[0], *expected[0][:8])
        assert list(between[0].token_ids) == greedy(mqa_reference, MQA_IDS[:4], 2, (300,))
    with cptool.LLM(mqa_path, cp=1, device="cpu", threads=1) as llm:
        session = llm.session(tmp_path / "s")
        third = session.generate(max_tokens=2, temperature=0)
        with pytest.raises(UserError, match="2 prompts for a session of 3 sequences"):
            session.generate([[1], [2]])
    fourth = as_json("decode", tmp_path / "s", "-n", 2, "--temperature", 0)["token_ids"]
    for b, ids in enumerate(expected):
        told = [*first[b].token_ids, *second[b].token_ids, *third[b].token_ids, *fourth[b]]
        assert told == ids[: len(told)] and len(told) == len(ids)


def test_texts_and_conversations(small_smollm2_path, small_smollm2_reference, tmp_path):
    tokenizer = open_checkpoint(str(small_smollm2_path)).tokenizer()
    questions, stop = ["What is the capital of France?", "And of Spain?"], (2,)
    with cptool.LLM(small_smollm2_path, cp=2, device="cpu", dtype="float32", threads=1) as llm:
        (result,) = llm.generate(["The capital of France is"], max_tokens=5, temperature=0)
        ids = tokenizer.encode("The capital of France is")
        assert list(result.token_ids) == greedy(small_smollm2_reference, ids, 5, stop)
        assert result.text == tokenizer.decode(list(result.token_ids))
        asked = [{"role": "user", "content": questions[0]}]
        (chatted,) = llm.generate([asked], max_tokens=6, temperature=0)
        said = llm.session(tmp_path / "c").chat(questions[0], max_tokens=6, temperature=0)
        assert said.token_ids == chatted.token_ids
    with cptool.LLM(small_smollm2_path, device="cpu", dtype="float32", threads=1) as llm:
        session = llm.session(tmp_path / "c")
        answer = session.chat(questions[1], max_tokens=4, temperature=0)
        messages = [
            *asked,
            {"role": "assistant", "content": said.text},
            {"role": "user", "content": questions[1]},
        ]
        context = tokenizer.chat(messages)
        assert list(answer.token_ids) == greedy(small_smollm2_reference, context, 4, stop)
        assert session.texts[0].endswith(answer.text)


SAMPLED = {
    "temperature": 0.9,
    "top_p": 0.95,
    "top_k": 40,
    "min_p": 0.01,
    "repetition_penalty": 1.2,
    "presence_penalty": 0.3,
    "frequency_penalty": -0.4,
    "logit_bias": {7: 4.5, 21: -2.0},
    "seed": 11,
}
WRONG = [
    ("max_tokens", -1),
    ("max_tokens", 2.5),
    ("temperature", -1),
    ("top_p", 2),
    ("top_k", 1.5),
    ("min_p", "a"),
    ("repetition_penalty", 0),
    ("presence_penalty", "much"),
    ("frequency_penalty", 3),
    ("logit_bias", {301: 1.0}),
    ("logit_bias", [(1, 1.0)]),
    ("seed", "a"),
    ("stop", 5),
]


def test_options_are_those_of_the_commands(mqa_path, token_file, tmp_path):
    reported = {f.name for f in fields(AnswerRequest)}
    assert set(cptool.GenerateOptions.__annotations__) == {"max_tokens", *SAMPLED, *reported}
    assert {f.name for f in fields(SamplingRequest)} == set(SAMPLED)
    for method in (
        cptool.LLM.generate,
        cptool.LLM.stream,
        cptool.Session.generate,
        cptool.Session.stream,
        cptool.Session.chat,
    ):
        assert {*SAMPLED, *reported} < set(inspect.signature(method).parameters)
    assert "\nrepetition_penalty: above 1" in cptool.LLM.generate.__doc__
    given = ["--token-ids", token_file(BATCH), "-n", 9]
    for name, value in SAMPLED.items():
        values = [f"{i}={x}" for i, x in value.items()] if name == "logit_bias" else [value]
        for each in values:
            given += ["--" + name.replace("_", "-"), each]
    told = as_json("generate", mqa_path, "--device", "cpu", *given)
    with cptool.LLM(mqa_path, cp=2, device="cpu", threads=1) as llm:
        batch = llm.generate(BATCH, max_tokens=9, **SAMPLED)
        kept = llm.session(tmp_path / "s").generate(BATCH, max_tokens=9, **SAMPLED)
    assert batch == kept and [list(r.token_ids) for r in batch] == told["token_ids"]
    assert [r.stopped for r in batch] == told["stopped"]


def test_the_context_ends_answers(mqa_path, mqa_reference, tmp_path):
    """`max_tokens` is capped as -n is, and the context is what `context_length` says."""
    with cptool.LLM(mqa_path, device="cpu", threads=1, context_length=20) as llm:
        (result,) = llm.generate([BATCH[1]], temperature=0)
        assert list(result.token_ids) == greedy(mqa_reference, BATCH[1], 13, ())
        assert result.stopped == "length"
        session = llm.session(tmp_path / "s")
        session.generate([BATCH[1]], max_tokens=11, temperature=0)
        (result,) = session.generate(max_tokens=3, temperature=0)
        assert len(result.token_ids) == 2 and result.stopped == "length"
        with pytest.raises(UserError, match="context is 20; shorten it, or give `context_length`"):
            session.generate()
    with cptool.LLM(mqa_path, device="cpu", threads=1, context_length=3000) as llm:
        (result,) = llm.generate([[1] * 2050], max_tokens=2)
        assert len(result.token_ids) == 2


def test_mistakes_are_one_line_and_the_ranks_go_on(mqa_path, smollm2_path, tmp_path):
    with cptool.LLM(mqa_path, device="cpu", threads=1) as llm:
        for prompts, rule in [
            ("text", "`prompts` must be a list"),
            ([{"role": "user", "content": "a"}], "`prompts` must be a list"),
            ([1, 2], "`prompts` must be a list"),
            ([[1.5]], "prompt 1: it must be a text, a list of token ids"),
            ([[1], None], "prompt 2: it must be a text, a list of token ids"),
            ([[1], []], "prompt 2: it is empty"),
            ([[301]], "prompt 1: token id 301 is not in the model's vocabulary"),
            (["text"], "has no tokenizer"),
            ([[1] * 2048], "the model's context is 2048"),
        ]:
            with pytest.raises(UserError, match=rule) as told:
                llm.generate(prompts)
            assert "\n" not in str(told.value)
        for option, wrong in WRONG:
            with pytest.raises(OptionError, match=f"^`{option}` ") as told:
                llm.generate(BATCH, **{option: wrong})
            assert "\n" not in str(told.value)
        with pytest.raises(TypeError, match="unexpected keyword argument 'topp'; the options are"):
            llm.generate(BATCH, topp=1)
        with pytest.raises(UserError, match="is a new session"):
            llm.session(tmp_path / "s").generate()
        assert len(llm.generate(BATCH, max_tokens=1)) == 3
    for options, rule in [
        ({"cp": 0}, "`cp` 0"),
        ({"dtype": "int8"}, "`dtype` int8"),
        ({"kv_dtype": "int8"}, "`kv_dtype` int8"),
        ({"dtype": "bfloat16", "kv_dtype": "float32"}, "`kv_dtype` float32"),
        ({"variant": "fast"}, "`variant` fast"),
        ({"tp": 2}, "`tp` 2"),
        ({"context_length": 0}, "`context_length` 0"),
    ]:
        with pytest.raises(UserError, match=rule):
            cptool.LLM(mqa_path, device="cpu", **options)
    with pytest.raises(UserError, match="no such model"):
        cptool.LLM(tmp_path / "nothing")


def test_a_damaged_session_is_refused_and_the_ranks_go_on(mqa_path, tmp_path):
    with cptool.LLM(mqa_path, cp=2, device="cpu", threads=1) as llm:
        with llm.session(tmp_path / "s") as session:
            session.generate(BATCH, max_tokens=1)
        segment = min((tmp_path / "s").glob("segment-*"))
        data = bytearray(segment.read_bytes())
        data[-1] ^= 1
        segment.write_bytes(data)
        with pytest.raises(UserError, match="does not match its checksum"):
            llm.session(tmp_path / "s")
        assert len(llm.generate(BATCH, max_tokens=1)) == 3


def test_nothing_is_left_of_a_start_that_fails(mqa_path, monkeypatch):
    threads = set(threading.enumerate())
    monkeypatch.setattr(Checkpoint, "state", "another one")  # in this process, not in the ranks
    with pytest.raises(RunError, match="was changed while it was loaded"):
        cptool.LLM(mqa_path, cp=2, device="cpu", threads=1)
    assert not ranks() and set(threading.enumerate()) == threads


def test_nothing_is_left_of_an_error_or_of_what_is_forgotten(mqa_path):
    threads = set(threading.enumerate())
    with pytest.raises(ZeroDivisionError), cptool.LLM(mqa_path, cp=2, device="cpu", threads=1):
        raise ZeroDivisionError
    assert not ranks()
    llm = cptool.LLM(mqa_path, cp=2, device="cpu", threads=1)
    other = cptool.LLM(mqa_path, cp=2, device="cpu", threads=1)
    assert len(ranks()) == 4
    del llm
    gc.collect()
    assert len(ranks()) == 2 and len(other.generate(BATCH, max_tokens=1)) == 3
    os.kill(ranks()[0].pid, signal.SIGKILL)
    with pytest.raises(RunError, match="rank"):
        other.generate(BATCH, max_tokens=100)
    with pytest.raises(RunError, match="is closed"):
        other.generate(BATCH)
    assert not ranks() and set(threading.enumerate()) == threads


SCRIPT = """
import sys
import cptool
assert "LLM" in dir(cptool) and "torch" not in sys.modules
llm = cptool.LLM({path!r}, cp=2, device="cpu", threads=1)
print(len(llm.generate([[1, 2, 3]], max_tokens=2)[0].token_ids), flush=True)
{end}
"""


@pytest.mark.parametrize("end", ["", "raise SystemExit(3)"])
def test_a_script_without_a_guard_leaves_no_process(mqa_path, tmp_path, end):
    """It is not run again by its ranks, and its end is theirs, however it comes."""
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=str(mqa_path), end=end))
    before = set(tmp_path.iterdir())
    process = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        start_new_session=True,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        timeout=300,
    )
    assert process.stdout == "2\n" and process.stderr == ""
    assert process.returncode == (3 if end else 0)
    assert set(tmp_path.iterdir()) == before


def test_a_process_that_is_killed_leaves_no_rank(mqa_path, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(path=str(mqa_path), end="import time; time.sleep(300)"))
    process = subprocess.Popen(
        [sys.executable, script], stdout=subprocess.PIPE, start_new_session=True
    )
    assert process.stdout.readline() == b"2\n" and len(members(process.pid)) >= 4
    process.kill()
    process.wait()
    process.stdout.close()
    end = time.monotonic() + 20
    while members(process.pid):
        assert time.monotonic() < end, "ranks have outlived the process that started them"
        time.sleep(0.05)
