"""Sessions as users handle them: whole prompts over a session, going back, checking, compacting."""

from dataclasses import replace

import pytest
from conftest import greedy
from test_cli import MQA_IDS, as_json, cptool

from cptool.session import store as session_files

EOS = (300,)


@pytest.fixture
def session(mqa_path, token_file, tmp_path):
    """50 tokens read on 3 ranks, then 6 said."""
    where = tmp_path / "s"
    as_json(
        "prefill", mqa_path, "--token-ids", token_file(MQA_IDS[:50]), "--session", where, "--cp", 3
    )
    answer = as_json("decode", where, "-n", 6)["token_ids"][0]
    return where, MQA_IDS[:50] + answer


def files(session):
    return {path.name: path.read_bytes() for path in session.iterdir()}


def test_a_longer_prompt_computes_what_it_adds(session, mqa_path, mqa_reference, token_file):
    where, said = session
    prompt = said + MQA_IDS[60:70]
    first = as_json(
        "prefill", mqa_path, "--token-ids", token_file(prompt), "--session", where, "--cp", 2
    )
    assert (first["cached"], first["tokens"]) == (
        55,
        11,
    )  # the last token of the answer had no KV yet
    assert first["first_token"] == greedy(mqa_reference, prompt, 1, EOS)
    assert as_json("decode", where, "-n", 4)["token_ids"] == [greedy(mqa_reference, prompt, 4, EOS)]


def test_the_same_prompt_again_computes_nothing(mqa_path, token_file, tmp_path):
    where = tmp_path / "s"
    arguments = ("prefill", mqa_path, "--token-ids", token_file(MQA_IDS), "--session", where)
    first = as_json(*arguments)
    before = files(where)
    again = as_json(*arguments)
    assert (again["tokens"], again["cached"], again["first_token"]) == (
        0,
        len(MQA_IDS),
        first["first_token"],
    )
    assert files(where) == before


@pytest.mark.parametrize(
    "prompt, place",
    [([*MQA_IDS[:20], 7, 8, 9], "differs at token 20"), (MQA_IDS[:30], "ends at token 30")],
)
def test_another_prompt_is_refused_or_rewinds(
    session, mqa_path, mqa_reference, token_file, prompt, place
):
    where, _ = session
    before = files(where)
    arguments = ("prefill", mqa_path, "--token-ids", token_file(prompt), "--session", where)
    error = cptool(*arguments, code=2).stderr
    assert place in error and "--rewind" in error and len(error.splitlines()) == 1
    assert files(where) == before
    first = as_json(*arguments, "--rewind", "--cp", 2)
    assert first["cached"] + first["tokens"] == len(prompt)
    assert first["first_token"] == greedy(mqa_reference, prompt, 1, EOS)
    cptool("session", "verify", where)
    assert as_json("decode", where, "-n", 5)["token_ids"] == [greedy(mqa_reference, prompt, 5, EOS)]


def test_rollback_takes_back_turns(session, mqa_reference):
    where, said = session
    assert as_json("session", "show", where)["turns"] == [[50], [56]]
    as_json("decode", where, "-n", 3)
    cptool("session", "rollback", where, "--turns", 2)
    shown = as_json("session", "show", where)
    assert (shown["turns"], shown["tokens"], shown["cached"]) == ([[50]], [50], [49])
    cptool("session", "verify", where)
    assert as_json("decode", where, "-n", 6)["token_ids"] == [said[50:]]
    assert (
        "at least the first must stay"
        in cptool("session", "rollback", where, "--turns", 2, code=2).stderr
    )


def test_what_says_nothing_is_no_turn(session, mqa_path, token_file):
    """`decode -n 0` computes KV that was pending; the same prompt again finds it there."""
    where, said = session
    assert as_json("decode", where, "-n", 0)["tokens"] == 1
    prompt = ("prefill", mqa_path, "--token-ids", token_file(said), "--session", where)
    assert as_json(*prompt)["tokens"] == 0
    shown = as_json("session", "show", where)
    assert (shown["turns"], shown["tokens"], shown["cached"]) == ([[50], [56]], [56], [56])
    cptool("session", "verify", where)
    cptool("session", "rollback", where)
    assert as_json("session", "show", where)["tokens"] == [50]
    as_json(*prompt[:2], "--token-ids", token_file(said[:50]), *prompt[4:])
    assert as_json("session", "show", where)["turns"] == [[50]]


def test_compact_keeps_what_counts(session, mqa_reference):
    where, said = session
    as_json("decode", where, "-n", 3)
    cptool("session", "rollback", where)
    before = as_json("session", "show", where)
    cptool("session", "compact", where)
    after = as_json("session", "show", where)
    assert (after["tokens"], after["cached"], after["turns"]) == (
        before["tokens"],
        before["cached"],
        before["turns"],
    )
    assert after["segments"] <= 3 and after["bytes"] < before["bytes"]
    cptool("session", "verify", where)
    assert as_json("decode", where, "-n", 3)["token_ids"] == [greedy(mqa_reference, said, 3, EOS)]


@pytest.mark.parametrize("at", [3, 9, -5], ids=["length of the header", "header", "contents"])
def test_verify_tells_what_is_wrong(session, at):
    where, _ = session
    segment = next(where.glob("segment-*"))
    data = bytearray(segment.read_bytes())
    data[at] ^= 1
    segment.write_bytes(data)
    result = cptool("session", "verify", where, code=1)
    assert "does not match its checksum" in result.stderr
    result = cptool("session", "compact", where, code=2)
    assert "does not match its checksum" in result.stderr
    for cp in (1, 2):
        told = cptool("decode", where, "-n", 1, "--cp", cp, code=2).stderr
        assert "does not match its checksum" in told and told.count("\n") == 1


def emptied(where):
    (where / session_files.MANIFEST).write_text("{")


def without_segments(where):
    for segment in where.glob("segment-*"):
        segment.unlink()


def cut_short(where):
    segment = next(where.glob("segment-*"))
    segment.write_bytes(segment.read_bytes()[:-1])


def of_another_length(where):
    """Sealed, but of tokens that have no KV."""
    manifest = session_files.load(where)
    sequence = manifest.sequences[0]
    longer = replace(sequence, tokens=(*sequence.tokens, 0), cached=sequence.cached + 1)
    turns = (*manifest.turns[:-1], (len(longer.tokens),))
    changed = replace(manifest, sequences=(longer,), turns=turns)
    (where / session_files.MANIFEST).write_text(changed.dump())


@pytest.mark.parametrize(
    "damage, told",
    [
        (emptied, "not a readable session manifest"),
        (without_segments, "is missing"),
        (cut_short, "bytes, the manifest says"),
        (of_another_length, "the segments hold 55 positions"),
    ],
)
def test_verify_reports_all_damage_alike(session, damage, told):
    where, _ = session
    lines = len(list(where.glob("segment-*"))) if damage is without_segments else 1
    damage(where)
    result = cptool("session", "verify", where, code=1)
    assert result.stderr.count(told) == len(result.stderr.splitlines()) == lines
    assert result.stderr.count("; restore it or prefill anew\n") == lines


def test_verify_of_what_is_no_session_is_a_mistake(tmp_path):
    assert "holds no session" in cptool("session", "verify", tmp_path, code=2).stderr


def test_a_session_of_a_batch_takes_whole_prompts(mqa_path, mqa_reference, token_file, tmp_path):
    where, batch = tmp_path / "s", [MQA_IDS[:9], MQA_IDS[9:40]]
    arguments = ("--session", where, "--cp", 2)
    as_json("prefill", mqa_path, "--token-ids", token_file(batch), *arguments)
    longer = [batch[0] + [5, 6], batch[1]]
    first = as_json("prefill", mqa_path, "--token-ids", token_file(longer), *arguments)
    assert (first["tokens"], first["cached"]) == (2, 40)
    assert first["first_token"] == [greedy(mqa_reference, ids, 1, EOS)[0] for ids in longer]
    wrong = cptool("prefill", mqa_path, "--token-ids", token_file(batch[0]), *arguments, code=2)
    assert "1 prompts" in wrong.stderr
    other = cptool(
        "prefill",
        mqa_path,
        "--token-ids",
        token_file(longer),
        *arguments,
        "--dtype",
        "bfloat16",
        code=2,
    )
    assert "--dtype bfloat16" in other.stderr
