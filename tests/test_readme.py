"""The Python blocks of README.md run as scripts, word for word but for the model, and its table of
families is what a run of the tests showed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from family_table import CHECKS, OUTCOMES, README, TABLE, expected, table
from material import make_huggingface

from cptool.model.architectures.registry import families

BLOCKS = re.findall(r"^```python\n(.*?)^```$", README.read_text(), re.M | re.S)
MODEL = "smollm2-135m-instruct"


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """Random weights, with a tokenizer and a chat template."""
    return make_huggingface(tmp_path_factory.mktemp("models") / "small")


def test_the_readme_has_its_blocks():
    assert len(BLOCKS) >= 3
    assert any("attention_partial" in block for block in BLOCKS)
    assert sum(MODEL in block for block in BLOCKS) >= 2


@pytest.mark.parametrize("block", BLOCKS, ids=lambda block: block.splitlines()[-1].strip()[:30])
def test_a_block_runs(block, model, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(block.replace(MODEL, str(model)))
    done = subprocess.run(
        [sys.executable, script],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        timeout=300,
    )
    assert done.returncode == 0 and done.stderr == "", done.stderr
    assert ("print(" in block) == bool(done.stdout.strip())


def test_the_table_of_families_is_what_a_run_of_the_tests_showed():
    found = TABLE.search(README.read_text())
    assert found is not None
    assert found[0] == table(json.loads(OUTCOMES.read_text())), "run tests/helpers/family_table.py"


def test_the_outcomes_are_of_every_family_and_configuration():
    shown = json.loads(OUTCOMES.read_text())["families"]
    cases = expected()
    assert shown.keys() == cases.keys() == {family.name for family in families()}
    for name, checks in shown.items():
        assert {check: set(checks[check]) for check in CHECKS if check in checks} == cases[name]
        for check in cases[name]:
            assert {outcome for outcome, _ in checks[check].values()} == {"passed"}
