"""Conversations on disk: templates that rewrite what was said, batches, --rewind, older files."""

import json
from dataclasses import replace

import pytest
import torch
from conftest import edit_json, greedy
from material import TEMPLATE, make_huggingface
from test_chat import chat, reused
from test_cli import as_json, cptool

from cptool.checkpoint import open_checkpoint
from cptool.session import chat_file, store
from cptool.session.chat_state import old_digest, old_state
from cptool.session.conversation import find_dialogues
from cptool.session.manifest import Damaged

QUESTIONS = ["what did the keeper write", "and the ships", "the weather"]
# Earlier answers lose their beginning, as templates that leave out what was thought have it.
REWRITING = TEMPLATE.replace("m.content", "m.content[2:] if m.role == 'assistant' else m.content")


@pytest.fixture(scope="module", params=[TEMPLATE, REWRITING], ids=["plain", "rewriting"])
def model(request, tmp_path_factory):
    directory = make_huggingface(tmp_path_factory.mktemp("model") / "hf")
    edit_json(directory / "tokenizer_config.json", chat_template=request.param)
    return directory


@pytest.fixture(scope="module")
def tokenizer(model):
    return open_checkpoint(str(model)).tokenizer()


@pytest.fixture(scope="module")
def reference(model):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(model, dtype=torch.float32)


def messages(where) -> list:
    return [list(d.messages) for d in find_dialogues(where, store.load(where))]


def expected(tokenizer, reference, said, count: int) -> list[int]:
    """What `transformers` answers to messages in the model's template."""
    ids = tokenizer.chat([{"role": role, "content": content} for role, content in said])
    return greedy(reference, ids, count, (1,))


@pytest.mark.parametrize("cp", [1, 2])
def test_batches_of_conversations(model, tokenizer, reference, tmp_path, cp):
    where, ranks = tmp_path / "s", ("--cp", cp, "--dtype", "float32")
    said = [[("user", text)] for text in QUESTIONS[:2]]
    first = [word for text in QUESTIONS[:2] for word in ("--prompt", text)]
    as_json("prefill", model, "--chat", *first, "--session", where, *ranks)
    for number in range(3):
        prompts = []
        if number:
            texts = [f"{question} {number}" for question in QUESTIONS[:2]]
            prompts = [word for text in texts for word in ("--prompt", text)]
            for b, text in enumerate(texts):
                said[b].append(("user", text))
        found = as_json("decode", where, *prompts, "-n", 5, "--temperature", 0, "--cp", cp)
        for b, conversation in enumerate(said):
            answer = expected(tokenizer, reference, conversation, 5)
            assert found["token_ids"][b] == answer
            conversation.append(("assistant", tokenizer.decode(answer).rstrip("\ufffd")))
        assert messages(where) == said
    cptool("session", "verify", where)
    for turns in (2, 1):
        cptool("session", "rollback", where)
        said = [conversation[: 2 * turns] for conversation in said]
        assert messages(where) == said


def test_every_byte_of_a_batch_is_sealed(model, tmp_path):
    where = tmp_path / "s"
    asked = ("--prompt", QUESTIONS[0], "--prompt", QUESTIONS[1])
    as_json("prefill", model, "--chat", *asked, "--session", where)  # pending messages
    as_json("decode", where, "-n", 3)
    manifest, path = store.load(where), where / chat_file.FILE
    whole, dialogues = path.read_bytes(), find_dialogues(where, manifest)
    for at in range(len(whole)):
        changed = bytearray(whole)
        changed[at] ^= 1
        path.write_bytes(changed)
        with pytest.raises(Damaged):
            find_dialogues(where, manifest)
    path.write_bytes(whole)
    *earlier, last = chat_file.read(where).values()
    swapped = replace(last, dialogues=last.dialogues[::-1])
    path.write_bytes(chat_file.dump([*earlier, swapped]))  # sealed again, not by the manifest
    with pytest.raises(Damaged, match="not as it was written with the manifest"):
        find_dialogues(where, manifest)
    path.write_bytes(whole)
    assert find_dialogues(where, manifest) == dialogues


def test_rewinding_to_another_question(model, tokenizer, reference, tmp_path):
    where, greedily = tmp_path / "s", ("-n", 4, "--temperature", 0)
    asked = ("prefill", model, "--chat", "--dtype", "float32", "--session", where, "--prompt")
    as_json(*asked, QUESTIONS[0])
    as_json("decode", where, *greedily)
    assert "--rewind" in cptool(*asked, QUESTIONS[2], code=2).stderr
    assert len(messages(where)[0]) == 2  # as it was
    for question in (QUESTIONS[2], QUESTIONS[0]):
        fields = as_json(*asked, question, "--rewind")
        assert fields["cached"] > 0
        assert messages(where) == [[("user", question)]]
        answer = as_json("decode", where, *greedily)["token_ids"]
        assert answer == [expected(tokenizer, reference, [("user", question)], 4)]
    cptool("session", "rollback", where)
    assert messages(where) == [[("user", QUESTIONS[0])]]
    cptool("session", "verify", where)


def test_chat_computes_again_what_the_template_rewrote(model, tokenizer, reference, tmp_path):
    where, said, texts = tmp_path / "s", [], []
    options = ("-n", 6, "--temperature", 0, "--dtype", "float32")
    done = chat(model, *options, say=[*QUESTIONS, f"/save {where}"])
    for question in QUESTIONS:
        said.append(("user", question))
        answer = expected(tokenizer, reference, said, 6)
        said.append(("assistant", tokenizer.decode(answer).rstrip("\ufffd")))
        texts.append(said[-1][1] + "\n")
    assert done.stdout == "".join(texts)
    assert messages(where) == [said]
    for (kept, _), (_, before) in zip(reused(done)[1:], reused(done)[:-1], strict=True):
        assert kept >= before - 1  # the context of the last answer, but for nothing after it
    cptool("session", "verify", where)


def test_a_conversation_of_format_2_is_still_read(model, tokenizer, reference, tmp_path):
    where, options = tmp_path / "s", ("-n", 4, "--temperature", 0)
    chat(model, *options, "--dtype", "float32", say=[QUESTIONS[0], f"/save {where}"])
    manifest, (said,) = store.load(where), messages(where)
    (tokens,) = (sequence.tokens for sequence in manifest.sequences)
    state = old_state(old_digest(tokens), None, [[said[0][1], said[1][1]]])
    (where / chat_file.FILE).write_bytes(chat_file.dump([state], chat_file.OLD_FORMAT))
    (where / store.MANIFEST).write_text(replace(manifest, chat=(state.seal(),)).dump())
    assert json.loads((where / chat_file.FILE).read_text())["format"] == 2
    cptool("session", "verify", where)
    assert messages(where) == [said]
    question = [*said, ("user", QUESTIONS[1])]
    answer = as_json("decode", where, "--prompt", QUESTIONS[1], *options)["token_ids"][0]
    assert answer == expected(tokenizer, reference, question, 4)
    assert json.loads((where / chat_file.FILE).read_text())["format"] == chat_file.FORMAT
    assert messages(where)[0][:3] == question
    cptool("session", "verify", where)
    cptool("session", "rollback", where)
    assert messages(where) == [said]
    done = chat(where, *options, say=[QUESTIONS[1]])
    assert done.stdout == tokenizer.decode(answer).rstrip("\ufffd") + "\n"
