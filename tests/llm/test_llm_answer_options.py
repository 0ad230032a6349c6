"""`stop`, `logprobs` and `prompt_logprobs` from Python."""

import pytest
import torch

from cptool import LLM, TokenLogprob
from cptool.errors import UserError


@pytest.fixture(scope="module")
def llm(small_smollm2_path):
    with LLM(small_smollm2_path, cp=2, threads=1, dtype="float32") as llm:
        yield llm


def test_stop_texts(llm, tmp_path):
    prompts = ["The three primary colours are", "Once upon a time"]
    free = llm.generate(prompts, max_tokens=12, temperature=0)
    stop = llm.tokenizer.decode(free[0].token_ids[4:7])[2:-1]
    found = llm.generate(prompts, max_tokens=12, temperature=0, stop=["no such text", stop])
    assert found[0].stopped == "stop" and found[0].token_ids == free[0].token_ids[:7]
    assert found[0].text == free[0].text[: free[0].text.index(stop)]
    assert found[1] == free[1]
    with llm.stream(prompts[0], max_tokens=12, temperature=0, stop=stop) as stream:
        pieces = list(stream)
    assert "".join(piece.text for piece in pieces) == found[0].text
    assert sum((piece.token_ids for piece in pieces), ()) == found[0].token_ids
    with llm.session(tmp_path / "s") as session:
        session.generate(prompts[:1], max_tokens=12, temperature=0, stop=stop)
        (rest,) = session.generate(max_tokens=5, temperature=0)
        assert found[0].token_ids + rest.token_ids == free[0].token_ids


def test_log_probabilities(llm, small_smollm2_reference, tmp_path):
    text = "The three primary colours are"
    (found,) = llm.generate([text], max_tokens=3, temperature=0, logprobs=2, prompt_logprobs=0)
    prompt = llm.tokenizer.encode(text)
    said = [*prompt, *found.token_ids]
    with torch.inference_mode():
        table = small_smollm2_reference(torch.tensor([said])).logits[0].log_softmax(-1)
    scores = (*found.prompt_logprobs, *found.logprobs)
    assert scores[0] == TokenLogprob(prompt[0], None, ())
    assert [score.token for score in scores] == said
    for row, score in zip(table, scores[1:], strict=False):
        assert score.logprob == pytest.approx(row[score.token].item(), abs=5e-4)
    assert [len(score.top) for score in scores] == [0] * len(prompt) + [2] * 3
    assert llm.generate([text], max_tokens=1)[0].logprobs is None
    with llm.session(tmp_path / "s") as session:
        session.generate([prompt[:3]], max_tokens=0)
        (rest,) = session.generate([prompt[3:]], max_tokens=1, prompt_logprobs=0)
    wanted = [score.logprob for score in found.prompt_logprobs[3:]]
    assert [score.logprob for score in rest.prompt_logprobs] == pytest.approx(wanted, abs=1e-4)


def test_mistakes(llm):
    for options, told in (
        ({"stop": ""}, "`stop` ''"),
        ({"stop": [3]}, "`stop` 3"),
        ({"logprobs": 21}, "from 0 to 20"),
        ({"prompt_logprobs": True}, "`prompt_logprobs` True"),
    ):
        with pytest.raises(UserError, match=told):
            llm.generate(["Hi"], **options)
