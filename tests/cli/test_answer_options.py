"""`--stop`, `--logprobs` and `--prompt-logprobs` against transformers."""

import json
from types import SimpleNamespace

import pytest
import torch
from conftest import greedy
from test_cli import MQA_IDS, as_json, cptool

from cptool.checkpoint import open_checkpoint
from cptool.cli.answers import logprobs
from cptool.engine.answers.records import TokenLogprob
from cptool.session import store

TEXT = "The three primary colours are"


@pytest.fixture(scope="module")
def tokenizer(small_smollm2_path):
    return open_checkpoint(str(small_smollm2_path)).tokenizer()


@pytest.fixture(scope="module")
def free(small_smollm2_reference, tokenizer):
    """The prompt's tokens, and 30 more, which nothing stops."""
    ids = tokenizer.encode(TEXT)
    return ids, greedy(small_smollm2_reference, ids, 30, (2,))


def spanning(tokenizer, answer: list[int], n: int) -> str:
    """A text that begins within token n - 1 of an answer and ends within token n."""
    before = len(tokenizer.decode(answer[: n - 1]))
    return tokenizer.decode(answer[: n + 1])[before + 1 : -1]


@pytest.mark.parametrize("cp", [1, 3])
def test_a_stop_text_across_tokens(
    small_smollm2_path, small_smollm2_reference, tokenizer, template, free, cp
):
    ids, answer = free
    stop = spanning(tokenizer, answer, 8)
    options = {"stop_strings": [stop, "no such text"], "tokenizer": template}
    expected = greedy(small_smollm2_reference, ids, 30, (2,), **options)
    assert expected == answer[:9]
    asked = (
        "generate",
        small_smollm2_path,
        "--prompt",
        TEXT,
        "-n",
        30,
        "--temperature",
        0,
        "--cp",
        cp,
    )
    stops = ("--stop", "no such text", "--stop", stop)
    lines = [
        json.loads(line)
        for line in cptool(*asked, *stops, "--jsonl", "--logprobs", 2).stdout.splitlines()
    ]
    result = lines.pop()
    scores = [{name: line[name] for name in ("token", "logprob", "top")} for line in lines]
    assert scores == result["logprobs"][0]
    whole = tokenizer.text(expected, ids, ended=True)
    assert result["token_ids"] == [expected] and result["stopped"] == ["stop"]
    assert result["text"] == [whole[: whole.index(stop)]]
    assert "".join(line["text"] for line in lines) == result["text"][0]
    if cp == 1:
        shown = cptool(*asked, *stops)
        assert shown.stdout == result["text"][0] + "\n"
        assert "ended at a stop text" in shown.stderr


def test_each_answer_of_a_batch_stops_by_itself(small_smollm2_path, tokenizer, free):
    """One at a stop text, one at the limit; the text of the prompt does not count."""
    answer = free[1]
    stop = tokenizer.decode(answer[4:6])
    asked = ("generate", small_smollm2_path, "-n", 9, "--temperature", 0, "--cp", 2, "--stop", stop)
    prompts = ("--prompt", TEXT, "--prompt", f"Once{stop}")
    fields = as_json(*asked, *prompts)
    assert fields["token_ids"][0] == answer[:6] and fields["stopped"] == ["stop", "length"]
    assert stop not in "".join(fields["text"])
    shown = cptool(*asked, *prompts).stdout
    assert shown == f"[1] {fields['text'][0]}\n[2] {fields['text'][1]}\n"


def test_a_session_goes_on_after_a_stop_text(small_smollm2_path, tokenizer, free, tmp_path):
    ids, answer = free
    made = tmp_path / "s"
    cptool("prefill", small_smollm2_path, "--prompt", TEXT, "--session", made)
    asked = ("decode", made, "--temperature", 0, "-n", 12)
    first = as_json(*asked, "--stop", tokenizer.decode(answer[4:6]))
    assert first["token_ids"] == [answer[:6]] and not store.load(made).sequences[0].ended
    assert list(store.load(made).sequences[0].tokens) == ids + answer[:6]
    again = as_json(*asked, "--logprobs", 1)
    assert again["token_ids"] == [answer[6:18]]
    assert [score["token"] for score in again["logprobs"][0]] == answer[6:18]


def test_a_control_token_stops_without_ending(small_smollm2_path, tmp_path):
    asked = ("generate", small_smollm2_path, "--chat", "--prompt", "Hi", "-n", 3)
    bias = ("--logit-bias", "1=1000", "--session", tmp_path / "s")
    fields = as_json(*asked, *bias, "--stop", "<|im_start|>")
    assert fields["token_ids"] == [[1]] and fields["stopped"] == ["stop"] and fields["text"] == [""]
    assert not store.load(tmp_path / "s").sequences[0].ended


def test_log_probabilities_are_those_of_transformers(
    small_smollm2_path, small_smollm2_reference, free
):
    """Whatever the penalties are."""
    ids = free[0]
    asked = (
        "generate",
        small_smollm2_path,
        "--prompt",
        TEXT,
        "-n",
        6,
        "--temperature",
        0,
        "--cp",
        2,
    )
    more = ("--logprobs", 3, "--prompt-logprobs", 2, "--repetition-penalty", 1.3)
    fields = as_json(*asked, *more, "--dtype", "float32")
    said = ids + fields["token_ids"][0]
    with torch.inference_mode():
        table = small_smollm2_reference(torch.tensor([said])).logits[0].float().log_softmax(-1)
    scores = fields["prompt_logprobs"][0] + fields["logprobs"][0]
    assert scores[0] == {"token": ids[0], "logprob": None, "top": []}
    assert fields["prompt_logprobs_from"] == [0]
    for position, score in enumerate(scores[1:], 1):
        assert score["token"] == said[position]
        count = 2 if position < len(ids) else 3
        top = table[position - 1].topk(count)
        assert [token for token, _ in score["top"]] == top.indices.tolist()
        found = torch.tensor([score["logprob"], *(value for _, value in score["top"])])
        own = table[position - 1, said[position]][None]
        torch.testing.assert_close(found, torch.cat([own, top.values]), rtol=1e-5, atol=5e-4)


def test_tables_fit_and_say_what_is_left_out(mqa_path, token_file, tmp_path):
    asked = ("generate", mqa_path, "-n", 3, "--session", tmp_path / "s")
    done = cptool(*asked, "--token-ids", token_file(MQA_IDS[:30]), "--logprobs", 0)
    assert done.stderr.splitlines()[-1].startswith("3 tokens: mean -")
    longer = token_file([*store.load(tmp_path / "s").sequences[0].tokens, 5, 6])
    done = cptool(*asked, "--token-ids", longer, "--prompt-logprobs", 2)
    assert "the 33 tokens before them were read earlier" in done.stderr
    assert "position  token" in done.stderr and "2 tokens: mean -" in done.stderr


@pytest.mark.parametrize(
    "options, told",
    [
        (["--stop", ""], "--stop '': it must be a text of at least one character"),
        (["--stop", "a<|im_end|>"], "no text of an answer has the control token <|im_end|>"),
        (["--logprobs", 21], "--logprobs 21: it must be a whole number from 0 to 20"),
        (["--prompt-logprobs", -1], "--prompt-logprobs -1: it must be"),
    ],
)
def test_mistakes_are_one_line(small_smollm2_path, options, told):
    done = cptool("generate", small_smollm2_path, "--prompt", "Hi", *options, code=2)
    assert told in done.stderr and len(done.stderr.splitlines()) == 1


def test_stop_texts_need_a_tokenizer(mqa_path, token_file):
    asked = ("generate", mqa_path, "--token-ids", token_file([1, 2]), "--stop", "a")
    assert "--stop needs a tokenizer" in cptool(*asked, code=2).stderr


@pytest.mark.parametrize("logprob", [-800.0, float("-inf")])
def test_a_table_of_tokens_that_the_model_excludes(capsys, logprob):
    scores = ((TokenLogprob(5, None, ()), TokenLogprob(7, logprob, ((3, 0.0),))),)
    report = SimpleNamespace(prompt_logprobs=scores, logprobs=None)
    logprobs.show(report, SimpleNamespace(keep=None, prompts=((5, 7),), samples=1), None)
    assert "perplexity inf" in capsys.readouterr().err
