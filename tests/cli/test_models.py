"""`cptool models` lists the families."""

import json

from test_cli import cptool


def listed() -> list[dict]:
    return json.loads(cptool("models", "--json").stdout)["families"]


def test_families_are_a_table():
    header, *rows, caption = cptool("models").stdout.splitlines()
    assert header.split()[:2] == ["family", "models"]
    assert len(rows) == len(listed())
    assert "Mixtures of experts are refused by name" in caption
