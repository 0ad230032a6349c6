"""Turns of one session that several threads, or several streams, want at once: none is lost."""

import threading

import pytest
from test_cli import MQA_IDS

import cptool
from cptool.errors import UserError
from cptool.session import store

PROMPT = MQA_IDS[:8]


@pytest.fixture(scope="module")
def llm(mqa_path):
    with cptool.LLM(mqa_path, device="cpu", threads=1) as llm:
        yield llm


def saved(session) -> tuple[tuple[int, ...], ...]:
    return tuple(sequence.tokens for sequence in store.load(session.directory).sequences)


def test_threads_take_turns_in_a_session(llm, tmp_path):
    session = llm.session(tmp_path / "session")
    session.generate([PROMPT], max_tokens=2, temperature=0)
    said = [MQA_IDS[n : n + 5] for n in range(10, 16)]
    failures = []

    def go_on(b: int) -> None:
        try:
            if b % 2:
                list(session.stream(said[b], max_tokens=3, temperature=0))
            else:
                session.generate([said[b]], max_tokens=3, temperature=0)
        except UserError as error:
            failures.append((b, str(error)))

    threads = [threading.Thread(target=go_on, args=(b,)) for b in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert all(b % 2 and "has gone on" in reason for b, reason in failures)
    refused = [b for b, _ in failures]
    (tokens,) = session.tokens
    assert saved(session) == session.tokens
    text = " ".join(map(str, tokens))
    for b in range(6):
        assert (" ".join(map(str, said[b])) in text) == (b not in refused)


def test_a_stream_that_another_turn_has_overtaken(llm, tmp_path):
    session = llm.session(tmp_path / "session")
    session.generate([PROMPT], max_tokens=2, temperature=0)
    late = session.stream([4, 5], max_tokens=3, temperature=0)
    session.generate([[7, 7]], max_tokens=2, temperature=0)
    before = session.tokens
    with pytest.raises(UserError, match="has gone on since this stream was made"):
        list(late)
    assert session.tokens == saved(session) == before and late.result is None
    pieces = list(session.stream([4, 5], max_tokens=3, temperature=0))
    answer = [token for piece in pieces for token in piece.token_ids]
    assert saved(session) == session.tokens == ((*before[0], 4, 5, *answer),)


def test_a_stream_under_way_refuses_its_own_thread(llm, tmp_path):
    session = llm.session(tmp_path / "session")
    with session.stream(PROMPT, max_tokens=50, temperature=0) as stream:
        next(stream)
        for call in (session.generate, session.stream):
            with pytest.raises(UserError, match="read it to its end, or close it"):
                call(None)
    assert stream.result.stopped == "interrupted"
    assert saved(session) == session.tokens == ((*PROMPT, *stream.result.token_ids),)
