"""`cptool session list`: sessions in folders within folders."""

import os

import pytest
from test_cli import as_json, cptool

from cptool.cli.session_export import _ends


@pytest.fixture(scope="module")
def made(tiny_model, tmp_path_factory):
    where = tmp_path_factory.mktemp("made") / "s"
    cptool("prefill", tiny_model, "--synthetic", 3, "--session", where)
    return where


def listed(*arguments) -> list[str]:
    return [each["session"] for each in as_json("session", "list", *arguments)["sessions"]]


def test_sessions_are_found_levels_down_and_not_behind_links(made, tmp_path):
    places = [tmp_path / place for place in ("a", "b/one", "b/x/y", "c/d/e/f")]
    for place in places:
        place.parent.mkdir(parents=True, exist_ok=True)
        place.mkdir()
        for file in made.iterdir():
            os.link(file, place / file.name)
    os.symlink(made, tmp_path / "link")
    os.symlink(tmp_path, tmp_path / "b" / "loop")
    assert listed(tmp_path) == [str(place) for place in places[:3]]
    assert listed(tmp_path, "--depth", 4) == [str(place) for place in places]
    assert listed(tmp_path, "--depth", 1) == [str(places[0])]
    assert listed(tmp_path / "b" / "one", tmp_path / "c") == [str(places[1]), str(places[3])]
    assert listed(tmp_path / "link") == [str(tmp_path / "link")]  # which was named
    assert "3 tokens" in cptool("session", "list", places[0]).stdout


def test_what_cannot_be_listed_is_said(made, tmp_path):
    (tmp_path / "m").mkdir()
    (tmp_path / "m" / "manifest.json").write_text("{")
    fault = cptool("session", "list", tmp_path)
    assert "is not a readable session manifest" in fault.stdout
    assert "no sessions here" in cptool("session", "list", tmp_path, "--depth", 0).stderr
    missing = cptool("session", "list", tmp_path / "none", code=2).stderr
    assert "is not a directory" in missing and len(missing.splitlines()) == 1


def test_a_conversation_has_turns_and_messages(smollm2_path, tmp_path):
    """Of a document with a question after it, both are seen; with --wide, all of it."""
    document = " ".join(f"word{n}" for n in range(40))
    where = tmp_path / "s"
    said = document + "\n\nWhich is the last?"
    made = cptool("prefill", smollm2_path, "--chat", "--session", where, "--prompt", said).stdout
    assert f'continue with: cptool decode {where} --prompt "..."' in made
    shown = cptool("session", "show", where).stdout.splitlines()
    assert shown[-2:] == [
        "messages      1",
        "user          word0 word1 word2 word3 word4 ... word39 Which is the last?",
    ]
    assert document in cptool("session", "show", where, "--wide").stdout
    assert "1 turn, 1 message, " in cptool("session", "list", where).stdout


@pytest.mark.parametrize(
    "text, shown",
    [
        ("one two three", "one two three"),
        ("one two three four", "one ... four"),
        ("a" * 20, "aaaa ... aaaa"),
        ("a" * 20 + " end", "aaaa ... end"),
    ],
)
def test_beginning_and_end(text, shown):
    assert _ends(text, 13) == shown
    assert _ends(text, None) == text
