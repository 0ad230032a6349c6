"""`cptool models`, and the table of the README, which is the same."""

import json
import re
from pathlib import Path

from families import CASES
from test_cli import cptool

README = Path(__file__).parents[2] / "README.md"
TABLE = re.compile(r"^\| family \|.*\n\| --- .*\n((?:\|.*\n)+)", re.M)


def listed() -> list[dict]:
    return json.loads(cptool("models", "--json").stdout)["families"]


def test_the_readme_has_the_families():
    rows = []
    for each in listed():
        gguf = f"`{each['gguf']}`" if each["gguf"] else "no" if each["refused"] else "as a Llama"
        cells = [each["title"], each["members"], f"`{each['architectures'][0]}`", gguf]
        rows.append(f"| {' | '.join([*cells, each['refused'] or '-'])} |\n")
    found = TABLE.search(README.read_text())
    assert found is not None and found[1] == "".join(rows), "".join(rows)


def test_every_family_is_tested_against_transformers():
    tested = {kind for kind, _ in CASES.values()}
    tested = {"gemma3" if kind == "gemma3_text" else kind for kind in tested}
    assert {each["name"] for each in listed()} <= tested


def test_families_are_a_table():
    header, *rows, caption = cptool("models").stdout.splitlines()
    assert header.split()[:2] == ["family", "models"]
    assert len(rows) == len(listed())
    assert "Mixtures of experts are refused by name" in caption
