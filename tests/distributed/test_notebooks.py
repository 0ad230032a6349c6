"""Ranks of a program that is not a file: standard input, `python -c`, a notebook, a prompt."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = "def entry(world):\n    return 40 + world.size\n"
START = """
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
{entry}
print(run({name}, ranks=RankOptions(cp={cp}, device="cpu", threads=1)))
"""
NOTEBOOK = """
import sys, types
main = sys.modules["__main__"] = types.ModuleType("__main__")  # as IPython has it
exec(compile({cell!r}, "<ipython-input-1>", "exec"), main.__dict__)
"""
CANNOT = (
    "is defined in a notebook, at a prompt or in standard input, from where ranks cannot import"
)


def cell(entry: str = OWN, name: str = "entry", cp: int = 2) -> str:
    return START.format(entry=entry, name=name, cp=cp)


def ran(how: str, code: str, folder: Path) -> tuple[str, str]:
    """Standard output, and the last line of standard error."""
    (folder / "script.py").write_text(code)
    (folder / "notebook.py").write_text(NOTEBOOK.format(cell=code))
    (folder / "functions.py").write_text(OWN)
    command, text = {
        "stdin": (["-"], code),
        "-c": (["-c", code], None),
        "prompt": (["-i", "-q"], code),
        "notebook": (["notebook.py"], None),
        "script": (["script.py"], None),
    }[how]
    done = subprocess.run(
        [sys.executable, *command],
        input=text,
        capture_output=True,
        text=True,
        cwd=folder,
        env={**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}"},
        timeout=120,
    )
    return done.stdout, done.stderr.removesuffix(">>> \n").strip().rpartition("\n")[2]


@pytest.mark.parametrize("how", ["stdin", "-c", "notebook"])
def test_a_function_that_ranks_cannot_import_is_refused_in_one_line(how, tmp_path):
    output, error = ran(how, cell(), tmp_path)
    assert not output and error.startswith("cptool.errors.UserError: entry ") and CANNOT in error
    assert ran(how, cell(cp=1), tmp_path)[0] == "41\n"


@pytest.mark.parametrize("how", ["stdin", "-c", "notebook"])
def test_an_imported_function_runs_on_ranks(how, tmp_path):
    assert ran(how, cell("from functions import entry"), tmp_path) == ("42\n", "")


def test_a_script_needs_a_guard_and_a_function_a_name(tmp_path):
    output, error = ran("script", cell(), tmp_path)
    assert not output and "put that part of it under `if __name__ ==" in error
    guarded = cell().replace("print(", 'if __name__ == "__main__":\n    print(')
    assert ran("script", guarded, tmp_path) == ("42\n", "")
    output, error = ran("script", cell("", "lambda world: 1"), tmp_path)
    assert not output and "<lambda> cannot be imported by ranks" in error


@pytest.mark.parametrize("how", ["stdin", "-c", "notebook", "prompt"])
def test_an_llm_needs_nothing(how, mqa_path, tmp_path):
    code = (
        f"import cptool\nllm = cptool.LLM({str(mqa_path)!r}, cp=2, device='cpu', threads=1)\n"
        "print(len(llm.generate([[1, 2, 3]], max_tokens=2)[0].token_ids))\n"
    )
    output, error = ran(how, code, tmp_path)
    assert output == "2\n" and (how == "prompt" or not error)
