"""`LLM.generate(samples=K)`: the answers of `cptool generate --samples K`."""

from dataclasses import replace

import pytest
from test_cli import MQA_IDS, as_json

import cptool
from cptool.errors import OptionError

BATCH = [MQA_IDS[:31], MQA_IDS[3:6]]
WARM = {"temperature": 0.8, "seed": 3}


@pytest.fixture(scope="module", params=[1, 2])
def llm(mqa_path, request):
    with cptool.LLM(mqa_path, cp=request.param, device="cpu", threads=1) as llm:
        yield llm


def test_answers_are_those_of_the_command(llm, mqa_path, token_file):
    options = ("-n", 7, "--temperature", 0.8, "--seed", 3, "--samples", 3, "--logprobs", 1)
    told = as_json("generate", mqa_path, "--token-ids", token_file(BATCH), *options)
    found = llm.generate(BATCH, samples=3, max_tokens=7, logprobs=1, **WARM)
    assert [list(result.token_ids) for result in found] == told["token_ids"]
    assert [result.stopped for result in found] == told["stopped"]
    assert [result.prompt_tokens for result in found] == [31] * 3 + [3] * 3
    for result in found:
        assert [score.token for score in result.logprobs] == list(result.token_ids)
    for single, first in zip(
        llm.generate(BATCH, max_tokens=7, logprobs=1, **WARM), found[::3], strict=True
    ):
        assert replace(single, logprobs=None) == replace(first, logprobs=None)
        # The attention of several answers is merged from that over the prompt and their own.
        assert [score.logprob for score in single.logprobs] == pytest.approx(
            [score.logprob for score in first.logprobs], abs=1e-5
        )


def test_answers_to_a_prompt_share_its_log_probabilities(llm):
    found = llm.generate(BATCH, samples=2, max_tokens=2, prompt_logprobs=0, **WARM)
    scores = [[score.token for score in result.prompt_logprobs] for result in found]
    assert scores == [BATCH[0], BATCH[0], BATCH[1], BATCH[1]]
    nothing = llm.generate(BATCH, samples=2, max_tokens=0)
    assert [(result.token_ids, result.stopped) for result in nothing] == [((), "length")] * 4


def test_each_answer_has_its_own_text_and_end(smollm2_path):
    with cptool.LLM(smollm2_path, cp=2, threads=1, dtype="float32") as llm:
        prompts = ["Once upon a time", "The sea was"]
        found = llm.generate(prompts, samples=3, max_tokens=12, stop=" a", **WARM)
        single = llm.generate(prompts, max_tokens=12, stop=" a", **WARM)
    assert found[::3] == single and len({result.text for result in found}) == 6
    assert all(" a" not in result.text for result in found)
    assert "stop" in [result.stopped for result in found]


def test_what_samples_do_not_go_with(llm, tmp_path):
    for wrong in (0, 1.5, True):
        with pytest.raises(OptionError, match=f"^`samples` {wrong}: it must be a whole number"):
            llm.generate(BATCH, samples=wrong)
    with pytest.raises(TypeError, match="unexpected keyword argument 'samples'"):
        llm.stream(BATCH[0], samples=2)
    with pytest.raises(TypeError, match="unexpected keyword argument 'samples'"):
        llm.session(tmp_path / "s").generate(BATCH, samples=2)
