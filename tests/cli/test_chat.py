"""Chat: the context is always the template's rendering, whatever was undone, cut or saved."""

import errno
import json
import os
import pty
import re
import select
import signal
import stat
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner
from conftest import greedy
from terminal import terminal

from cptool import files
from cptool.checkpoint import open_checkpoint
from cptool.cli.main import main
from cptool.distributed.options import RankOptions
from cptool.engine.resident import Resident
from cptool.engine.setup.loading import Setup
from cptool.errors import UserError
from cptool.session import chat_file, committing, maintenance, store
from cptool.session.chat_file import FILE
from cptool.session.chat_state import State
from cptool.session.conversation import Conversation, find_dialogues
from cptool.session.manifest import Manifest, ModelIdentity, Sequence

EOS = (2,)
QUESTIONS = ["What is the capital of France?", "And of <|im_end|> Spain?", "Name three colours."]


@pytest.fixture(scope="module")
def tokenizer(small_smollm2_path):
    return open_checkpoint(str(small_smollm2_path)).tokenizer()


def chat(source, *arguments, say: list[str], code: int = 0):
    """The result of `cptool chat SOURCE ARGUMENTS` with a line of input for each of `say`."""
    text = "".join(f"{line}\n" for line in say)
    result = CliRunner().invoke(main, ["chat", str(source), *map(str, arguments)], input=text)
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def said(tokenizer, reference, questions: list[str], count: int) -> tuple[str, list[int]]:
    """What `transformers` answers in a conversation, and the last turn's ids with its answer."""
    messages, text, ids = [], "", []
    for question in questions:
        messages.append({"role": "user", "content": question})
        ids = tokenizer.chat(messages)
        answer = greedy(reference, ids, count, EOS)
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        text, ids = text + tokenizer.decode(answer) + "\n", ids + answer
    return text, ids


def reused(result) -> list[tuple[int, int]]:
    """(tokens that had KV, tokens of the context) of each answer, from standard error."""
    found = re.findall(r"([\d,]+) of ([\d,]+) reused", result.stderr)
    return [(int(a.replace(",", "")), int(b.replace(",", ""))) for a, b in found]


@pytest.mark.parametrize("system", [None, "You are terse."])
def test_a_context_is_the_rendering_of_all_messages(tokenizer, system):
    conversation = Conversation(tokenizer, system)
    messages = [] if system is None else [{"role": "system", "content": system}]
    # A whole answer, one cut in a word, an empty one, one that tokenises otherwise when read again.
    answers = [[*tokenizer.encode("Paris."), 2], tokenizer.encode("Mad"), [2], [66, 67, 2]]
    for question, answer in zip([*QUESTIONS, "x"], answers, strict=True):
        messages.append({"role": "user", "content": question})
        context = conversation.ask(question)
        assert context == tokenizer.chat(messages)
        conversation.answered(question, context, answer)
        assert conversation.tokens == context + answer
        messages.append({"role": "assistant", "content": tokenizer.decode(answer)})
        assert conversation.messages == messages
    for question in ["x", *QUESTIONS[::-1]]:
        assert conversation.undo() == question
        del messages[-2:]
        assert conversation.ask("y") == tokenizer.chat(
            [*messages, {"role": "user", "content": "y"}]
        )
    assert conversation.undo() is None and conversation.tokens == []


def manifest_of(revision: int, tokens: list[int], chat: tuple[str, ...] = ()) -> Manifest:
    """A session that says `tokens` and has no KV of them yet."""
    return Manifest(
        session="5" * 16,
        model=ModelIdentity(
            path="model",
            fingerprint="f" * 64,
            layers=1,
            kv_heads=1,
            head_dim=8,
            vocab_size=50_000,
        ),
        dtype="float32",
        kv_dtype="float32",
        weights="file",
        cp=1,
        tp=1,
        revision=revision,
        turns=((len(tokens),),),
        sequences=(Sequence(tokens=tuple(tokens), cached=0),),
        chat=chat,
    )


def test_a_kill_between_the_two_files_of_a_save_loses_nothing(tokenizer, tmp_path, monkeypatch):
    conversation = Conversation(tokenizer, "Be brief.")
    before = told = None
    for revision, question in enumerate(QUESTIONS, 1):
        conversation.answered(question, conversation.ask(question), [2])
        new = manifest_of(revision, conversation.tokens, before.chat if before else ())
        with monkeypatch.context() as killed:
            killed.setattr(Manifest, "dump", lambda self: exit())  # chat.json is written by then
            with pytest.raises(SystemExit):
                committing.commit(tmp_path, new, [conversation.dialogue])
        if before is not None:
            found = Conversation.read(tmp_path, store.load(tmp_path), tokenizer)
            assert (found.tokens, found.messages) == told
            assert maintenance.problems(tmp_path, before) == []
        before = committing.commit(tmp_path, new, [conversation.dialogue])
        told = conversation.tokens, conversation.messages
        found = Conversation.read(tmp_path, store.load(tmp_path), tokenizer)
        assert (found.tokens, found.messages) == told
        assert maintenance.problems(tmp_path, before) == []
    assert {path.name for path in tmp_path.iterdir()} == {FILE, store.MANIFEST}
    assert [stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()] == [0o600] * 2
    decoded = replace(
        before,
        revision=4,
        turns=(*before.turns, (len(told[0]) + 1,)),
        sequences=(Sequence(tokens=(*told[0], 5), cached=0),),
    )
    committing.commit(tmp_path, decoded)
    with pytest.raises(UserError, match="does not tell what"):
        Conversation.read(tmp_path, decoded, tokenizer)
    back = maintenance.roll_back(tmp_path, decoded, 1)
    assert Conversation.read(tmp_path, back, tokenizer).messages == told[1]


def test_every_byte_of_a_conversation_is_sealed(tokenizer, tmp_path):
    conversation = Conversation(tokenizer, "Keep secrets.")
    conversation.answered("The number is 4711.", conversation.ask("The number is 4711."), [2])
    manifest = committing.commit(
        tmp_path, manifest_of(1, conversation.tokens), [conversation.dialogue]
    )
    path = tmp_path / FILE
    whole = path.read_bytes()
    for at in range(len(whole)):
        for bit in (0, 4):
            changed = bytearray(whole)
            changed[at] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(UserError, match="is not a readable conversation") as told:
                Conversation.read(tmp_path, manifest, tokenizer)
            assert maintenance.problems(tmp_path, manifest) == [str(told.value)]
    told = (("system", "Tell all."), *conversation.dialogue.messages[1:])
    other = State.of([conversation.tokens], [replace(conversation.dialogue, messages=told)])
    for damaged, fault in [
        (b"", "is not a readable"),
        (b"{}", "is not a readable"),
        (b"[" * 100_000, "is not a readable"),
        (b'{"format": 9}', "format 9"),
        (whole[:-1] + b" }", "is not a readable"),
        (whole.replace(b'"format": 3,', b'"format": 3, "format": 3,'), "given twice"),
        (chat_file.dump([other]), "is not as it was written with the manifest"),  # sealed again
        (chat_file.dump([]), "is not as it was written with the manifest"),
    ]:
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=fault) as told:
            Conversation.read(tmp_path, manifest, tokenizer)
        assert len(str(told.value).splitlines()) == 1
        assert maintenance.problems(tmp_path, manifest) == [str(told.value)]
    path.unlink()
    os.mkfifo(path)  # nobody ever writes to it
    with pytest.raises(UserError, match="not a regular file"):
        Conversation.read(tmp_path, manifest, tokenizer)


@pytest.mark.parametrize("cp", [1, 2])
def test_answers_are_those_of_transformers(
    small_smollm2_path, small_smollm2_reference, tokenizer, tmp_path, cp
):
    where = tmp_path / "s"
    result = chat(small_smollm2_path, "--cp", cp, "-n", 6, say=[*QUESTIONS, f"/save {where}"])
    text, ids = said(tokenizer, small_smollm2_reference, QUESTIONS, 6)
    assert result.stdout == text
    assert list(store.load(where).sequences[0].tokens) == ids
    (none, _), *later = reused(result)
    assert none == 0
    for (kept, _), (_, before) in zip(later, reused(result)[:-1], strict=True):
        assert kept >= before  # all of the turn before, but for an end that was cut


def test_undo_forgets_and_a_mistake_changes_nothing(
    small_smollm2_path, small_smollm2_reference, tokenizer, tmp_path
):
    where = tmp_path / "s"
    lines = [
        "/undo",
        "/save",
        QUESTIONS[0],
        QUESTIONS[1],
        "/undo",
        "/nonsense",
        f"/save {where}",
        "word " * 8200,
        QUESTIONS[2],
    ]
    result = chat(
        small_smollm2_path,
        "-n",
        5,
        say=[*lines, "/save", "/reset", QUESTIONS[1], "/save", "/exit", "not read"],
    )
    first, _ = said(tokenizer, small_smollm2_reference, QUESTIONS[:2], 5)
    kept, _ = said(tokenizer, small_smollm2_reference, [QUESTIONS[0], QUESTIONS[2]], 5)
    fresh, ids = said(tokenizer, small_smollm2_reference, [QUESTIONS[1]], 5)
    start, _ = said(tokenizer, small_smollm2_reference, QUESTIONS[:1], 5)
    assert result.stdout == first + kept.removeprefix(start) + fresh
    for told in (
        "no question to take back",
        "name a directory",
        "/nonsense is not a command",
        "the context is full",
    ):
        assert told in result.stderr
    manifest = store.load(where)
    assert manifest.revision == 3 and list(manifest.sequences[0].tokens) == ids
    assert CliRunner().invoke(main, ["session", "verify", str(where)]).exit_code == 0


def test_a_save_that_fails_ends_nothing(
    small_smollm2_path, small_smollm2_reference, tokenizer, tmp_path, monkeypatch
):
    original, failed = files.write_all, []

    def fail_once(file, data):
        if not failed and "segment" in os.readlink(f"/proc/self/fd/{file.fileno()}"):
            failed.append(True)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        original(file, data)

    monkeypatch.setattr(files, "write_all", fail_once)
    first, second = tmp_path / "s", tmp_path / "t"
    lines = [QUESTIONS[0], f"/save {first}", QUESTIONS[1], f"/save {second}"]
    result = chat(small_smollm2_path, "-n", 4, say=lines)
    assert "No space left on device" in result.stderr
    text, ids = said(tokenizer, small_smollm2_reference, QUESTIONS[:2], 4)
    assert result.stdout == text
    assert list(store.load(second).sequences[0].tokens) == ids
    assert not list(first.iterdir())


def test_a_saved_chat_is_a_session(
    small_smollm2_path, small_smollm2_reference, tokenizer, tmp_path
):
    where = tmp_path / "s"
    chat(small_smollm2_path, "--cp", 2, "-n", 4, say=[QUESTIONS[0], f"/save {where}"])
    result = chat(where, "--cp", 1, "-n", 4, say=[QUESTIONS[1]])
    assert "continue with: cptool chat" in result.stderr  # saved at its end
    assert "continue with" not in chat(where, "-n", 4, say=["/undo"]).stderr
    text, ids = said(tokenizer, small_smollm2_reference, QUESTIONS[:2], 4)
    assert text.endswith(result.stdout) and result.stdout
    assert reused(result)[0][0] > 30
    decoded = CliRunner().invoke(main, ["decode", str(where), "-n", "3", "--json", "--raw"])
    assert json.loads(decoded.stdout)["token_ids"] == [greedy(small_smollm2_reference, ids, 3, ())]
    raw = ["decode", str(where), "--raw", "--prompt", "And", "-n", "1"]
    assert "not a conversation any more" in CliRunner().invoke(main, raw).stderr
    assert "does not tell what" in chat(where, say=[], code=2).stderr
    (where / FILE).unlink()
    error = chat(where, say=[], code=2).stderr
    assert f"{FILE} is missing" in error and len(error.splitlines()) == 1


def test_ranks_refuse_a_session_that_changed_while_they_started(small_smollm2_path, tmp_path):
    where = tmp_path / "s"
    chat(small_smollm2_path, "-n", 2, say=[QUESTIONS[0], f"/save {where}"])
    manifest = store.load(where)
    setup = Setup(model=str(small_smollm2_path), dtype=manifest.dtype, session=str(where), resume=7)
    with pytest.raises(RuntimeError, match=r"changed by another run \(it is at revision 1, this"):
        with Resident(setup, RankOptions(cp=1, tp=1, device="cpu", threads=1, timeout=60)):
            pass


def test_mistakes_are_told_before_any_rank_starts(small_smollm2_path, mqa_path, monkeypatch):
    assert "has no tokenizer" in chat(mqa_path, say=[], code=2).stderr
    assert (
        "is not a session"
        in chat(small_smollm2_path, "--model", small_smollm2_path, say=[], code=2).stderr
    )
    for name, value in {"RANK": "0", "WORLD_SIZE": "1"}.items():
        monkeypatch.setenv(name, value)
    error = chat(small_smollm2_path, say=[], code=2).stderr
    assert "starts its own ranks" in error and len(error.splitlines()) == 1


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "cptool", "chat", *map(str, arguments)]


def read_until(terminal: int, pattern: str, patience: float = 120) -> str:
    """What the program writes until `pattern` is in it."""
    seen, end = "", time.monotonic() + patience
    while not re.search(pattern, seen):
        assert select.select([terminal], [], [], max(0, end - time.monotonic()))[0], seen
        seen += os.read(terminal, 4096).decode(errors="replace")
    return seen


def test_a_text_that_is_pasted_is_one_question(smollm2_path, tmp_path):
    """At a terminal with bracketed paste, whatever its lines begin with."""
    where = tmp_path / "s"
    with terminal("chat", smollm2_path, "-n", 2, "--threads", 1) as opened:
        opened.wait_for("> ")
        opened.type(b"\x1b[200~/exit\n\nWhat is this?\n\x1b[201~\r")
        opened.wait_for(r"in\s+context\]\s*> ")
        opened.type(f"/save {where}\r/exit\r".encode())
        assert opened.end() == 0
    (dialogue,) = find_dialogues(where, store.load(where))
    assert ("user", "/exit\n\nWhat is this?") in dialogue.messages
    assert dialogue.answers == 1


def test_retry_answers_again_from_the_context_before(smollm2_path, tmp_path):
    """With other draws each time; a document before the question stays."""
    (tmp_path / "doc").write_text("word " * 99)
    where, options = tmp_path / "s", ("-n", 6, "--temperature", 1, "--stop", "\n")
    lines = ["/retry", f"/file {tmp_path / 'doc'}", "/retry", QUESTIONS[0], "/retry", "/retry"]
    result = chat(smollm2_path, *options, say=[*lines, f"/save {where}"])
    assert result.stderr.count("the last question has no answer yet") == 2
    first, second, third = result.stdout.splitlines()
    assert len({first, second, third}) == 3
    assert reused(result)[1][0] > 99  # all but the answer
    manifest = store.load(where)
    (dialogue,) = find_dialogues(where, manifest)
    roles = [role for role, _ in dialogue.messages if role != "system"]
    assert roles == ["user", "assistant"] and dialogue.messages[-1][1] == third.rstrip()
    greedily = chat(where, "--temperature", 0, say=["/retry"])
    assert "at temperature 0 the answer would be the same" in greedily.stderr


@pytest.mark.parametrize("cp", [1, 2])
def test_ctrl_c_stops_the_answer_and_keeps_the_conversation(smollm2_path, tokenizer, tmp_path, cp):
    """At a real terminal, where Ctrl-C reaches all processes of the foreground group."""
    pid, terminal = pty.fork()
    if pid == 0:
        os.execvp(sys.executable, command(smollm2_path, "--cp", cp, "-n", 200))
    try:
        read_until(terminal, "> ")
        os.write(terminal, b"\x03")  # seen also before readline waits for a key
        read_until(terminal, "Ctrl-D or /exit to end")
        os.write(terminal, b"Write a long story.\n")
        read_until(terminal, r"\x1b\[2K[A-Z]\w+ \w")  # the bar has gone
        os.write(terminal, b"\x03")
        assert "tokens, stopped;" in read_until(terminal, r"in\s+context\][^>]*> ")
        os.write(terminal, f"/save {tmp_path / 's'}\n".encode())
        read_until(terminal, r"continue with[^>]*> ")
        os.write(terminal, b"What is the capital of France?\n")
        again = read_until(terminal, r"in\s+context\][^>]*> ")
        kept, context = map(int, re.search(r"(\d+) of (\d+) reused", again).groups())
        os.write(terminal, b"\x04")
        while True:
            try:
                if not os.read(terminal, 4096):
                    break
            except OSError:  # how a pseudo-terminal says that the other end is closed
                break
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
    except BaseException:
        os.kill(pid, signal.SIGKILL)
        raise
    finally:
        os.close(terminal)
    tokens = store.load(tmp_path / "s").sequences[0].tokens
    assert 0 < kept < context < len(tokens)  # the end has saved the second answer
    manifest = store.load(tmp_path / "s")
    assert Conversation.read(tmp_path / "s", manifest, tokenizer).messages[1]["content"]
    assert CliRunner().invoke(main, ["session", "verify", str(tmp_path / "s")]).exit_code == 0


def test_ranks_end_with_the_terminal(small_smollm2_path):
    process = subprocess.Popen(
        command(small_smollm2_path, "--cp", 2, "-n", 4),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    process.stdin.write("Hi\n")
    process.stdin.flush()
    process.stderr.readline()  # the line after the first answer: all ranks are up, and idle
    ranks = members(process.pid) - {process.pid}
    assert len(ranks) >= 2
    process.kill()
    process.wait()
    end = time.monotonic() + 20
    while members(process.pid):
        assert time.monotonic() < end, "ranks have outlived the process that started them"
        time.sleep(0.05)
    process.stdin.close(), process.stdout.close(), process.stderr.close()


def test_a_single_rank_is_done_before_the_program_ends(mqa_path):
    """It is a thread of the program: torn down in the midst of its work, it would abort all."""
    threads, setup = set(threading.enumerate()), Setup(model=str(mqa_path), dtype="float32")
    with pytest.raises(KeyboardInterrupt), Resident(setup, RankOptions(cp=1, tp=1)):
        raise KeyboardInterrupt
    assert set(threading.enumerate()) == threads


def members(session_id: int) -> set[int]:
    """Processes, ended ones that wait for their parent left out, of a session of the system."""
    found = set()
    for path in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, _, owner = path.read_text().rpartition(") ")[2].split()[:4]
        except OSError:
            continue
        if int(owner) == session_id and state not in "ZX":
            found.add(int(path.parent.name))
    return found
