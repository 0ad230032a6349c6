"""Text that comes in several calls: wherever a sequence of tokens is cut, the texts of the calls
are the text decoded whole, and every character comes once.
"""

import itertools
import json
from pathlib import Path

import pytest
from test_cli import as_json, cptool
from test_tokenizer import sentencepiece_metadata
from test_tokenizer_model import (  # fixtures among them
    llama3,  # noqa: F401
    llama3_model,  # noqa: F401
    llama3_tokens,  # noqa: F401
    read,
    train_sentencepiece,
)

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.tokenizer.gguf import from_gguf
from cptool.session import store
from cptool.session.conversation import find_dialogues

TEXT = " Paris  is a🙂🦜 龘漢字、かな naïve 👩‍👧!"
PARROT = "🦜"  # three tokens of SmolLM2, none of them a character


@pytest.fixture(scope="module")
def smollm2(smollm2_path):
    return open_checkpoint(str(smollm2_path)).tokenizer()


@pytest.fixture(scope="module", params=["smollm2", "gguf", "sentencepiece", "tiktoken"])
def tokenizer(request, tmp_path_factory):
    if request.param == "smollm2":
        return request.getfixturevalue("smollm2")
    if request.param == "gguf":
        return from_gguf(Path("x.gguf"), sentencepiece_metadata())
    if request.param == "sentencepiece":
        return read(tmp_path_factory.mktemp("m"), train_sentencepiece()).tokenizer()
    return request.getfixturevalue("llama3")


def calls(ids: list[int], cuts: tuple[int, ...]):
    """The tokens before each call, those of the call, and whether it is the last."""
    borders = [0, *cuts, len(ids)]
    for first, end in itertools.pairwise(borders):
        yield ids[:first], ids[first:end], end == len(ids)


def test_the_texts_of_all_calls_are_the_text_decoded_whole(tokenizer):
    ids = tokenizer.encode(TEXT)
    assert len(ids) > 20
    once = [(cut,) for cut in range(len(ids) + 1)]
    for cuts in [*once, *itertools.pairwise(range(len(ids) + 1))]:
        streamed, whole = [], []
        for before, new, last in calls(ids, cuts):
            stream = tokenizer.stream(before)
            streamed.append("".join(map(stream.push, new)))
            streamed.append(stream.flush() if last else "")
            whole.append(tokenizer.text(new, before, ended=last))
        assert "".join(streamed) == "".join(whole) == tokenizer.decode(ids) == TEXT
        assert "\ufffd" not in "".join(streamed)


def test_a_long_run_of_bytes_before_a_call_is_read_from_its_beginning(tokenizer):
    ids = tokenizer.encode("龘" * 40, bos=False)
    for cut in range(len(ids) - 8, len(ids)):
        texts = [tokenizer.text(n, b, ended=last) for b, n, last in calls(ids, (cut,))]
        assert "".join(texts) == "龘" * 40 and "\ufffd" not in texts[0]


def test_what_no_call_completes_is_replaced_once_the_text_has_ended(smollm2):
    *before, last = smollm2.encode("a" + PARROT, bos=False)
    assert smollm2.text(before, ended=False) == "a"
    assert smollm2.text(before, ended=True) == "a\ufffd"
    assert smollm2.text([], before, ended=True) == "\ufffd"
    assert smollm2.text([last], before, ended=False) == PARROT
    letters = smollm2.encode("bc", bos=False)
    assert smollm2.text(letters, before, ended=False) == "\ufffdbc"


def test_a_character_that_commands_share_comes_from_the_last(smollm2_path, smollm2, tmp_path):
    where, ids = tmp_path / "s", smollm2.encode(PARROT, bos=False)
    cptool("prefill", smollm2_path, "--chat", "--prompt", "Draw a parrot.", "--session", where)
    answers = [
        ("decode", where, "-n", 1, "--logit-bias", f"{token}=1000", "--temperature", 0)
        for token in ids
    ]
    assert cptool(*answers[0]).stdout == "\n"
    assert as_json(*answers[1])["text"] == [""]
    *tokens, result = map(json.loads, cptool(*answers[2], "--jsonl").stdout.splitlines())
    assert [line["text"] for line in tokens] == result["text"] == [PARROT]
    (dialogue,) = find_dialogues(where, store.load(where))
    assert dialogue.messages[-1] == ("assistant", PARROT)


def test_a_prompt_and_its_continuation_share_a_character(
    smollm2_path, smollm2, token_file, tmp_path
):
    *ids, last = smollm2.encode("a" + PARROT, bos=False)
    forced = ("-n", 1, "--logit-bias", f"{last}=1000", "--temperature", 0)
    asked = ("generate", smollm2_path, "--token-ids", token_file(ids), *forced)
    assert as_json(*asked)["text"] == [PARROT]
    assert cptool(*asked, "--echo").stdout == f"a{PARROT}\n"
    assert as_json(*asked, "--echo")["prompt"] == ["a"]
    batch = ("generate", smollm2_path, "--token-ids", token_file([ids, ids]), *forced)
    assert cptool(*batch, "--echo").stdout == f"[1] a{PARROT}\n[2] a{PARROT}\n"
