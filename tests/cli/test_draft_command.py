"""`--draft` on the command line: the same answers, and one line where it cannot be."""

import json
from dataclasses import replace

import pytest
from test_batch_file import prompts, read_answers, write_lines
from test_chat import chat
from test_cli import MQA_IDS, as_json, cptool

from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.engine import turn
from cptool.engine.drafts import pace
from cptool.engine.options import EngineOptions
from cptool.engine.turn import Turn
from cptool.errors import UserError


@pytest.fixture(params=["lookup", "layers:1", "model"])
def draft(request, monkeypatch):
    """Where drafts come from, with drafts wherever there is room for one, in this process."""
    monkeypatch.setattr(pace.Budget, "pays", lambda self, chance: self._room > 0)
    return str(request.getfixturevalue("tiny_model")) if request.param == "model" else request.param


@pytest.fixture(scope="module")
def repeated(tmp_path_factory):
    """A file of two prompts, the first of which repeats itself."""
    path = tmp_path_factory.mktemp("prompts") / "ids.json"
    path.write_text(json.dumps([MQA_IDS[:12] * 2, MQA_IDS[3:9]]))
    return path


SETTINGS = (
    ("--temperature", 0),
    ("--temperature", 0.9, "--seed", 4, "--repetition-penalty", 1.2, "--logit-bias", "7=2.5"),
    ("--temperature", 1.2, "--samples", 3, "--logprobs", 2),
)


@pytest.mark.parametrize("settings", SETTINGS)
def test_generate(mqa_path, repeated, draft, settings):
    asked = ("generate", mqa_path, "--token-ids", repeated, "-n", 14, *settings)
    plain, drafted = as_json(*asked), as_json(*asked, "--draft", draft)
    for name in ("token_ids", "text", "stopped", "logprobs"):
        assert drafted.get(name) == plain.get(name)
    assert drafted["draft"] == draft and drafted["draft_off"] is None
    assert plain["drafted_tokens"] == 0
    assert drafted["drafted_tokens"] > 0 or draft == "lookup"  # what is new is not found
    assert ("drafts" in drafted["memory_parts_bytes"]) == (draft not in ("lookup", "layers:1"))


def test_sessions(mqa_path, repeated, tmp_path, draft):
    """A session with drafts has the files of one without, and goes on either way."""
    found = []
    for name, options in (("plain", ()), ("drafted", ("--draft", draft))):
        session = tmp_path / name
        asked = ("generate", mqa_path, "--token-ids", repeated, "-n", 9, "--temperature", 0)
        first = as_json(*asked, "--session", session, *options)
        second = as_json("decode", session, "-n", 8, "--temperature", 0, *options)
        segments = sorted(path.read_bytes() for path in session.rglob("*.safetensors"))
        assert segments
        found.append((first["token_ids"], second["token_ids"], segments))
    assert found[0] == found[1]


def test_a_file_of_prompts(mqa_path, tmp_path, draft):
    lines = prompts(5)
    lines[1]["token_ids"] = MQA_IDS[:9] * 2
    file = write_lines(tmp_path / "in.jsonl", *lines)
    answers = []
    for n, options in enumerate(((), ("--draft", draft))):
        out = tmp_path / f"{n}.jsonl"
        asked = ("generate", mqa_path, "--temperature", 0, "-n", 9, "--batch-size", 3)
        said = as_json(*asked, "--batch-file", file, "--output", out, *options)
        answers.append([answer["token_ids"] for answer in read_answers(out)])
    assert answers[0] == answers[1] and said["drafted_tokens"] > 0


@pytest.mark.parametrize("source", ["lookup", "layers:1", "model"])
def test_chat_and_stop_texts(small_smollm2_path, source):
    draft = small_smollm2_path if source == "model" else source
    asked = (small_smollm2_path, "--temperature", 0, "-n", 12, "--dtype", "float32")
    say = ["What is the capital of France?", "And of Spain?"]
    plain = chat(*asked, say=say)
    assert chat(*asked, "--draft", draft, say=say).stdout == plain.stdout
    stop = plain.stdout.splitlines()[0][5:9]
    shown = [chat(*asked, "--stop", stop, *more, say=say) for more in ((), ("--draft", draft))]
    assert shown[0].stdout == shown[1].stdout != plain.stdout


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("layers:3", "less than the 3 layers of the model"),
        ("lokup", "no such model"),
        ("smollm2", "it has 49,152 tokens, and mqa has 301"),
    ],
)
def test_mistakes(mqa_path, repeated, small_smollm2_path, value, told):
    value = small_smollm2_path if value == "smollm2" else value
    asked = ("generate", mqa_path, "--token-ids", repeated, "-n", 2, "--draft", value)
    said = cptool(*asked, code=2).stderr
    assert told in said and "--draft" in said and said.strip().count("\n") == 0


def test_a_model_that_drafts_counts_in_the_memory(mqa_path, tiny_model, repeated):
    asked = ("generate", mqa_path, "--token-ids", repeated, "-n", 2, "--draft", tiny_model)
    parts = as_json(*asked)["memory_parts_bytes"]
    assert parts["drafts"] > tiny_model.joinpath("model.safetensors").stat().st_size
    request = Turn(
        model=str(mqa_path),
        dtype="float32",
        prompts=tuple(map(tuple, json.loads(repeated.read_text()))),
        max_new_tokens=2,
        options=EngineOptions(memory=int(sum(parts.values()) - parts["drafts"] / 2)),
    )
    ranks = RankOptions(device="cpu", threads=1)
    run(turn.run, request, ranks=ranks)
    with pytest.raises(UserError, match=r"drafts .* more than the .* another `draft`"):
        run(turn.run, replace(request, draft=str(tiny_model)), ranks=ranks)
