"""Conversations of the Python front door: every answer is that of transformers in the model's own
template, given the messages that the session keeps, on 1 and 2 ranks, and `cptool` goes on in them.
"""

import pytest
from conftest import greedy
from test_chat import chat
from test_cli import as_json
from test_questions import DOCUMENT, QUESTIONS, expected

import cptool
from cptool.errors import UserError
from cptool.session import chat_file, store
from cptool.session.manifest import Damaged

GREEDY = {"max_tokens": 5, "temperature": 0}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


@pytest.mark.parametrize("cp", [1, 2])
def test_questions_about_a_document(
    small_smollm2_path, small_smollm2_reference, template, tmp_path, cp
):
    where, document = tmp_path / "s", tmp_path / "doc.txt"
    document.write_text(DOCUMENT)
    with cptool.LLM(small_smollm2_path, cp=cp, device="cpu", dtype="float32", threads=1) as llm:
        session = llm.session(where)
        (nothing,) = session.generate([[user(DOCUMENT)]], max_tokens=0)
        assert nothing.token_ids == () and session.messages == [[user(DOCUMENT)]]
        read = session.tokens
        for number, question in enumerate(QUESTIONS):
            if number == 0:
                (answer,) = session.generate([question], **GREEDY)
            elif number == 1:
                answer = session.chat(question, **GREEDY)
            else:
                with session.stream(question, **GREEDY) as stream:
                    text = "".join(piece.text for piece in stream)
                answer = stream.result
                assert answer.text == text
            *before, last = session.messages[0]
            first = f"{DOCUMENT}\n\n{question}" if number == 0 else question
            assert before[-1] == user(first)
            assert list(answer.token_ids) == expected(template, small_smollm2_reference, before, 5)
            assert last == {"role": "assistant", "content": answer.text}
        assert session.tokens[0][:20] == read[0][:20]
    messages = session.messages[0]
    answer = as_json("decode", where, "--prompt", "Who?", "-n", 4, "--temperature", 0)
    before = [*messages, user("Who?")]
    assert answer["token_ids"] == [expected(template, small_smollm2_reference, before, 4)]


def test_python_goes_on_where_commands_have_been(
    small_smollm2_path,
    small_smollm2_reference,
    template,
    tmp_path,
):
    where = tmp_path / "s"
    as_json("prefill", small_smollm2_path, "--chat", "--prompt", DOCUMENT, "--session", where)
    with cptool.LLM(small_smollm2_path, cp=2, device="cpu", dtype="float32", threads=1) as llm:
        with llm.session(where) as session:  # a pending document is answered without a prompt
            cut = [session.generate(max_tokens=n, temperature=0)[0] for n in (3, 2)]
            said = [i for result in cut for i in result.token_ids]
            assert said == expected(template, small_smollm2_reference, [user(DOCUMENT)], 5)
            assert len(session.messages[0]) == 2
            asked = [*session.messages[0], user(QUESTIONS[0])]
            answer = session.chat(QUESTIONS[0], **GREEDY)
            assert list(answer.token_ids) == expected(template, small_smollm2_reference, asked, 5)
    result = chat(where, "-n", 4, "--temperature", 0, say=[QUESTIONS[1], "/save"])
    with cptool.LLM(small_smollm2_path, device="cpu", dtype="float32", threads=1) as llm:
        session = llm.session(where)
        assert session.messages[0][-2] == user(QUESTIONS[1])
        assert session.messages[0][-1]["content"].strip() == result.stdout.strip()
        asked = [
            *session.messages[0],
            {"role": "user", "content": "Is it?"},
            {"role": "assistant", "content": "Perhaps."},
            {"role": "user", "content": "Sure?"},
        ]
        (answer,) = session.generate([asked[-3:]], **GREEDY)
        assert list(answer.token_ids) == expected(template, small_smollm2_reference, asked, 5)
        assert session.messages[0][:-1] == asked


def test_a_batch_is_conversations_or_none(
    small_smollm2_path, small_smollm2_reference, template, tmp_path
):
    texts = ["Name three colours.", "Say hello."]
    with cptool.LLM(small_smollm2_path, device="cpu", dtype="float32", threads=1) as llm:
        session = llm.session(tmp_path / "s")
        asked = [[{"role": "system", "content": "Be brief."}, user(text)] for text in texts]
        results = session.generate(asked, **GREEDY)
        for b, messages in enumerate(asked):
            said = list(results[b].token_ids)
            assert said == expected(template, small_smollm2_reference, messages, 5)
        assert [len(messages) for messages in session.messages] == [3, 3]
        for prompts, rule in [
            ([user("a"), user("b")], "`prompts` must be a list"),
            ([[1, 2], [3]], "prompt 1: token ids do not go into the template"),
            (["a"], "1 prompt for a session of 2 sequences"),
            (["a", ""], "prompt 2: it is empty"),
            (["a", [{"role": "user"}]], "prompt 2: a message of a session has a `role`"),
            (["a", [user("a"), {"role": "system", "content": ""}]], "prompt 2: the last message"),
        ]:
            with pytest.raises(UserError, match=rule):
                session.generate(prompts, **GREEDY)
        with pytest.raises(UserError, match="chat messages go into the chat template; leave `raw`"):
            session.generate(asked, raw=True)
        before = session.tokens
        raw = session.generate([" and", " or"], raw=True, **GREEDY)
        for b, text in enumerate((" and", " or")):
            ids = [*before[b], *llm.tokenizer.encode(text, bos=False)]
            assert list(raw[b].token_ids) == greedy(small_smollm2_reference, ids, 5, (2,))
        assert session.messages is None
        assert llm.session(tmp_path / "s").messages is None
        for refused in (lambda: session.generate(asked), lambda: session.chat("What?")):
            with pytest.raises(UserError, match="is not a conversation, so give a text"):
                refused()
        with pytest.raises(UserError, match="all prompts of a session are messages, or none is"):
            llm.session(tmp_path / "t").generate(["a", [user("a")]])
        with pytest.raises(UserError, match="prompt 1: the last message must be a user's"):
            llm.session(tmp_path / "t").generate([[{"role": "assistant", "content": "a"}]])


def test_a_damaged_conversation_is_continued_raw_alone(small_smollm2_path, tmp_path):
    where = tmp_path / "s"
    with cptool.LLM(small_smollm2_path, device="cpu", dtype="float32", threads=1) as llm:
        llm.session(where).chat("Hi", max_tokens=1)
        (where / chat_file.FILE).unlink()
        session = llm.session(where)
        for refused in (session.generate, lambda: session.messages, lambda: session.chat("a")):
            with pytest.raises(Damaged, match="missing"):
                refused()
        session.generate(["a"], raw=True, max_tokens=1)
    assert len(store.load(where).turns) == 2
