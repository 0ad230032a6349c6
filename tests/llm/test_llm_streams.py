"""Answers piece by piece, and that a stop of any kind leaves the ranks ready."""

import contextlib
import multiprocessing
import os
import signal
import threading
import time

import pytest
from conftest import greedy
from test_cli import MQA_IDS

import cptool
from cptool.errors import RunError, UserError

PROMPT = MQA_IDS[:8]


@pytest.fixture(scope="module", params=[1, 2])
def llm(mqa_path, request):
    with cptool.LLM(mqa_path, cp=request.param, device="cpu", threads=1) as llm:
        yield llm


def ranks() -> set:
    return {p for p in multiprocessing.active_children() if p.name.startswith("cptool-rank")}


def works(llm, reference) -> None:
    """The LLM answers as if nothing had been before."""
    (result,) = llm.generate([PROMPT], max_tokens=4, temperature=0)
    assert list(result.token_ids) == greedy(reference, PROMPT, 4, (300,))


@contextlib.contextmanager
def interrupted_after(seconds: float):
    """The main thread gets a SIGINT, and the body ends with KeyboardInterrupt soon after."""
    timer = threading.Timer(seconds, os.kill, (os.getpid(), signal.SIGINT))
    timer.start()
    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        yield
    assert time.monotonic() - began < seconds + 5
    timer.join()


def test_pieces_are_the_answer(smollm2_path, smollm2_reference):
    with cptool.LLM(smollm2_path, device="cpu", dtype="float32") as llm:
        text = "The lighthouse ☕ 日本"
        stream = llm.stream(text, max_tokens=14, temperature=0)
        assert iter(stream) is stream and stream.result is None
        pieces = list(stream)
        (whole,) = llm.generate([text], max_tokens=14, temperature=0)
        tokens = greedy(smollm2_reference, llm.tokenizer.encode(text), 14, (2,))
        assert stream.result == whole and list(whole.token_ids) == tokens
        assert [i for piece in pieces for i in piece.token_ids] == tokens
        assert "".join(piece.text for piece in pieces) == whole.text
        assert any(len(piece.token_ids) > 1 for piece in pieces)  # a character of several tokens
        assert not any("\ufffd" in piece.text for piece in pieces)
        asked = [{"role": "user", "content": "What is the capital of France?"}]
        with llm.stream(asked, temperature=0) as stream:
            assert "".join(piece.text for piece in stream) == "The capital of France is Paris."
        assert stream.result.stopped == "eos"


def test_a_stream_that_is_left_stops_its_answer(llm, mqa_reference):
    options = {"max_tokens": 2000, "temperature": 0, "logit_bias": {300: -100.0}}
    for piece in llm.stream(PROMPT, **options):
        assert piece.text is None and len(piece.token_ids) == 1
        break
    works(llm, mqa_reference)
    with pytest.raises(ZeroDivisionError):
        for _ in llm.stream(PROMPT, **options):
            raise ZeroDivisionError
    works(llm, mqa_reference)
    with llm.stream(PROMPT, **options) as stream:
        next(stream)
        with pytest.raises(UserError, match="this thread is reading a stream"):
            llm.generate([PROMPT])
    assert stream.result.stopped == "interrupted"
    assert 1 <= len(stream.result.token_ids) < 2000
    assert not list(stream)
    llm.stream(PROMPT).close()  # before its first piece: nothing was begun
    works(llm, mqa_reference)


def test_calls_of_other_threads_wait_for_a_stream(llm, mqa_reference):
    stream = llm.stream(PROMPT, max_tokens=4, temperature=0)
    next(stream)
    thread = threading.Thread(target=works, args=(llm, mqa_reference))
    thread.start()
    time.sleep(0.3)
    assert thread.is_alive()
    assert len(list(stream)) == 3
    thread.join(60)
    assert not thread.is_alive()


def test_an_interrupt_leaves_the_llm_usable(llm, mqa_reference):
    forever = {"max_tokens": 2000, "logit_bias": {300: -100.0}}
    with interrupted_after(0.3):
        llm.generate([PROMPT], **forever)
    works(llm, mqa_reference)
    with interrupted_after(0.3):
        for _ in llm.stream(PROMPT, **forever):
            pass
    works(llm, mqa_reference)


def test_an_interrupt_stops_a_prompt_that_is_read(llm, mqa_reference):
    long = [1 + i % 290 for i in range(2000)]
    handler = signal.signal(signal.SIGALRM, _interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.02)
    try:
        with pytest.raises(KeyboardInterrupt):
            while True:
                llm.generate([long] * 4, max_tokens=1)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
    works(llm, mqa_reference)


def test_an_interrupt_before_the_request_is_sent(llm, mqa_reference, monkeypatch):
    """It comes while `Thread.start` waits for a thread that has not begun to run yet."""
    start, late, sent = threading.Thread.start, [], []

    def interrupted_start(thread):
        if thread.name != "cptool-request":
            return start(thread)
        late.append(thread)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(threading.Thread, "start", interrupted_start)
        llm.generate([PROMPT] * 4, max_tokens=8)
    with monkeypatch.context() as patch:
        patch.setattr(llm._resident, "answer", lambda *request: sent.append(request))
        for thread in late:
            thread.start()
            thread.join()
    assert late and not sent
    works(llm, mqa_reference)


def _interrupt(number, frame):
    raise KeyboardInterrupt


def test_an_interrupted_session_keeps_what_was_said(llm, mqa_reference, tmp_path):
    forever = {"max_tokens": 2000, "logit_bias": {300: -100.0}, "temperature": 0}
    session = llm.session(tmp_path / "s")
    with interrupted_after(0.5):
        session.generate([PROMPT], **forever)
    said = session.tokens[0]
    assert said[:8] == tuple(PROMPT) and 8 < len(said) < 2008
    works(llm, mqa_reference)
    for _ in session.stream(**forever):
        break
    more = session.tokens[0]
    assert more[: len(said)] == said and len(said) < len(more) < 2008
    assert llm.session(tmp_path / "s").tokens == (more,)
    with pytest.raises(UserError, match="2 sequences, a stream is of one"):
        batch = llm.session(tmp_path / "b")
        batch.generate([PROMPT, PROMPT], max_tokens=1)
        batch.stream()
    stream = session.stream(**forever)
    next(stream)
    session.close()
    assert stream.result.stopped == "interrupted"
    assert len(llm.session(tmp_path / "s").tokens[0]) > len(more)


def test_a_second_interrupt_ends_the_ranks(mqa_path, monkeypatch):
    before = ranks()
    llm = cptool.LLM(mqa_path, cp=2, device="cpu", threads=1)
    monkeypatch.setattr(llm._resident, "stop", lambda on=True: None)  # ranks that do not listen
    timers = [threading.Timer(s, os.kill, (os.getpid(), signal.SIGINT)) for s in (0.3, 0.6)]
    for timer in timers:
        timer.start()
    with pytest.raises(KeyboardInterrupt):
        llm.generate([PROMPT] * 4, max_tokens=2000, logit_bias={300: -100.0})
    with pytest.raises(RunError, match="is closed"):
        llm.generate([PROMPT])
    assert ranks() == before


def test_closing_in_another_thread_ends_an_answer(mqa_path):
    llm = cptool.LLM(mqa_path, device="cpu", threads=1)
    stream = llm.stream(PROMPT, max_tokens=2000, logit_bias={300: -100.0})
    next(stream)
    thread = threading.Thread(target=llm.close)
    thread.start()
    with pytest.raises(RunError, match="is closed"):
        list(stream)
    thread.join(20)
    assert not thread.is_alive()


def test_the_threads_of_streams_end(llm):
    before = threading.active_count()
    for _ in llm.stream(PROMPT, max_tokens=3):
        pass
    assert threading.active_count() <= before
