"""`draft` from Python: the same answers on ranks that keep the model that drafts."""

import pytest

from cptool import LLM
from cptool.errors import UserError

PROMPTS = ["One two three four. One two three four. One two", "The three primary colours are"]


@pytest.fixture(scope="module")
def llm(small_smollm2_path):
    with LLM(small_smollm2_path, cp=2, threads=1, dtype="float32") as llm:
        yield llm


def test_answers_are_the_same(llm, small_smollm2_path, tmp_path):
    options = {"max_tokens": 12, "temperature": 0.7, "seed": 3}
    plain = llm.generate(PROMPTS, **options)
    samples = llm.generate(PROMPTS, samples=2, **options)
    for draft in ("lookup", "auto", "layers:1", str(small_smollm2_path), "off"):
        assert llm.generate(PROMPTS, draft=draft, **options) == plain
        assert llm.generate(PROMPTS, draft=draft, samples=2, **options) == samples
    with llm.session(tmp_path / "s") as session:
        (first,) = session.generate(PROMPTS[:1], draft=str(small_smollm2_path), **options)
        (second,) = session.generate(draft="layers:1", **options)
    (whole,) = llm.generate(PROMPTS[:1], **{**options, "max_tokens": 24})
    assert first.token_ids + second.token_ids == whole.token_ids


@pytest.mark.parametrize("draft", ["layers:9", "lokup", 3, ""])
def test_mistakes(llm, draft):
    with pytest.raises(UserError, match="`draft`") as error:
        llm.generate(PROMPTS, draft=draft)
    assert "\n" not in str(error.value)
