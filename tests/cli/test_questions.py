"""Several questions about one document: every answer is that of transformers in its own template,
given the messages that the session keeps.
"""

import json

import pytest
from conftest import greedy
from test_chat import chat
from test_cli import as_json, cptool

from cptool.checkpoint import open_checkpoint
from cptool.session import store
from cptool.session.conversation import find_dialogues

DOCUMENT = "The lighthouse keeper's cat is called Biscuit. The boat comes on Fridays.\n"
QUESTIONS = ["What is the cat's name?", "When does the boat come?", "Is it a dog?"]


def messages(where) -> list[dict[str, str]]:
    """The messages that the session keeps."""
    (dialogue,) = find_dialogues(where, store.load(where))
    return dialogue.dicts()


def expected(template, reference, said: list[dict[str, str]], count: int) -> list[int]:
    """What transformers answers to messages."""
    ids = template.apply_chat_template(said, add_generation_prompt=True, return_dict=False)
    return greedy(reference, ids, count, (2,))


@pytest.mark.parametrize("cp", [1, 2])
def test_questions_about_a_document(
    small_smollm2_path, small_smollm2_reference, template, tmp_path, cp
):
    where, document = tmp_path / "s", tmp_path / "doc.txt"
    document.write_text(DOCUMENT)
    asked = ("--chat", "--prompt-file", document, "--session", where, "--cp", cp)
    as_json("prefill", small_smollm2_path, *asked)
    assert messages(where) == [{"role": "user", "content": DOCUMENT}]
    for number, question in enumerate(QUESTIONS):
        greedily = ("-n", 8, "--temperature", 0)
        answer = as_json("decode", where, "--prompt", question, *greedily)
        *before, last = messages(where)
        first = f"{DOCUMENT}\n\n{question}" if number == 0 else question
        assert before[-1] == {"role": "user", "content": first}
        assert answer["token_ids"] == [expected(template, small_smollm2_reference, before, 8)]
        assert last["content"] == open_checkpoint(str(small_smollm2_path)).tokenizer().decode(
            answer["token_ids"][0]
        )
        assert answer["cached"] > 20
    before = [*messages(where), {"role": "user", "content": "Who comes?"}]
    result = chat(where, "-n", 4, "--temperature", 0, say=["Who comes?", "/save"])
    said = expected(template, small_smollm2_reference, before, 4)
    assert result.stdout.strip() == template.decode(said, skip_special_tokens=True).strip()
    assert list(store.load(where).sequences[0].tokens[-len(said) :]) == said
    assert len(messages(where)) == 8
    cptool("session", "verify", where)
    cptool("session", "rollback", where, "--turns", 3)
    assert [m["role"] for m in messages(where)] == ["user", "assistant"]
    cptool("session", "rollback", where)
    assert messages(where) == [{"role": "user", "content": DOCUMENT}]
    again = as_json("decode", where, "--prompt", QUESTIONS[1], "-n", 4, "--temperature", 0)
    before = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTIONS[1]}"}]
    assert again["token_ids"] == [expected(template, small_smollm2_reference, before, 4)]


def test_an_answer_that_was_cut_goes_on_and_raw_text_ends_the_conversation(
    small_smollm2_path, small_smollm2_reference, template, tmp_path
):
    where, batch = tmp_path / "s", ("--prompt", "Name three colours.", "--prompt", "Say hello.")
    as_json("prefill", small_smollm2_path, "--chat", *batch, "--session", where)
    answers = [as_json("decode", where, "-n", n, "--temperature", 0) for n in (3, 2)]
    dialogues = find_dialogues(where, store.load(where))
    for b, text in enumerate(batch[1::2]):
        said = [token for answer in answers for token in answer["token_ids"][b]]
        asked = [{"role": "user", "content": text}]
        assert said == expected(template, small_smollm2_reference, asked, 5)
        answer = template.decode(said, skip_special_tokens=True)
        assert dialogues[b].messages == (("user", text), ("assistant", answer))
    result = cptool("decode", where, "--raw", "--prompt", "a", "--prompt", "b", "-n", 1)
    assert "not a conversation any more" in result.stderr
    result = cptool("decode", where, "--prompt", "a", "--prompt", "b", "-n", 1)
    assert "appended as it is" in result.stderr
    cptool("session", "rollback", where, "--turns", 2)
    assert find_dialogues(where, store.load(where)) == dialogues


def test_chat_takes_files_and_opens_a_prefilled_document(
    small_smollm2_path, small_smollm2_reference, template, tmp_path
):
    where, document = tmp_path / "s", tmp_path / "doc.txt"
    document.write_text(DOCUMENT)
    greedily = ("-n", 4, "--temperature", 0)
    lines = [f"/file {document}", "/undo", f"/file {tmp_path / 'none'}", QUESTIONS[0]]
    result = chat(small_smollm2_path, "--file", document, *greedily, say=lines)
    assert "took back" in result.stderr and "cannot be read" in result.stderr
    asked = [{"role": "user", "content": f"{DOCUMENT}\n\n{QUESTIONS[0]}"}]
    said = template.decode(expected(template, small_smollm2_reference, asked, 4))
    assert result.stdout.strip() == said.strip()
    as_json("prefill", small_smollm2_path, "--chat", "--prompt-file", document, "--session", where)
    result = chat(where, *greedily, say=[QUESTIONS[0], "/undo", "/undo", "/undo"])
    assert result.stdout.strip() == said.strip()
    assert "your next question joins it" in result.stderr
    assert f"took back: {QUESTIONS[0]}" in result.stderr and "took back: The li" in result.stderr


def test_a_session_shows_lists_and_exports_its_messages(small_smollm2_path, tmp_path):
    where, out = tmp_path / "s", tmp_path / "out.json"
    as_json("prefill", small_smollm2_path, "--chat", "--prompt", "Hi ☕", "--session", where)
    said = [{"role": "user", "content": "Hi ☕"}]
    assert as_json("session", "show", where)["messages"] == [said]
    assert "Hi ☕" in cptool("session", "show", where).output
    (listed,) = as_json("session", "list", tmp_path)["sessions"]
    assert (listed["session"], listed["messages"]) == (str(where), [1])
    assert "1 message" in cptool("session", "list", tmp_path).stdout
    cptool("session", "export", where, "--output", out)
    assert json.loads(out.read_text())["messages"] == said
    for form, text in (("text", "user: Hi ☕\n"), ("markdown", "## user\n\nHi ☕\n")):
        assert cptool("session", "export", where, "--format", form).stdout == text
    cptool("decode", where, "--raw", "--prompt", "x", "-n", 1)
    assert "Hi ☕" in json.loads(cptool("session", "export", where).stdout)["text"][0]
