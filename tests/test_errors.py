"""What one line says of any exception."""

import ast
import errno
import pickle
import re
from pathlib import Path

import pytest
import torch

from cptool import errors
from cptool.distributed.launch import run
from cptool.distributed.options import RankOptions
from cptool.errors import OptionError, RunError, UserError, as_options, explain


def raised(error):
    try:
        raise error
    except BaseException as caught:
        return caught


def test_mistakes_and_failures_speak_for_themselves():
    assert explain(raised(UserError("a: b; c"))) == "a: b; c"
    assert explain(raised(RunError("two\n lines"))) == "two lines"
    assert (
        explain(raised(FileNotFoundError(2, "No such file", "x\udcff"))) == "x\udcff: No such file"
    )
    assert explain(raised(OSError(errno.EMFILE, "Too many", "f"))).startswith("f: Too many; raise")
    assert explain(raised(OSError("no number"))) == "no number"


def test_an_option_is_named_in_backquotes_and_shown_as_an_option():
    error = OptionError("top_p", 0, "it must lie in (0, 1]", "leave `top_p` out")
    assert isinstance(error, UserError) and (error.name, error.value) == ("top_p", 0)
    assert str(error) == "`top_p` 0: it must lie in (0, 1]; leave `top_p` out"
    assert as_options(explain(error)) == "--top-p 0: it must lie in (0, 1]; leave --top-p out"
    assert str(OptionError("cp", 0, "it must be at least 1")) == "`cp` 0: it must be at least 1"
    assert str(pickle.loads(pickle.dumps(error))) == str(error)
    assert as_options("run `cptool bench calibrate`") == "run `cptool bench calibrate`"


def test_no_message_of_the_library_spells_an_option():
    """A caller in Python has arguments; the command line writes options for their names."""
    package = Path(errors.__file__).parent
    commands = re.compile(r"cptool prefill|gguf-split")
    for path in package.rglob("*.py"):
        if path.is_relative_to(package / "cli"):
            continue
        raised = [n for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Raise)]
        for text in (part for statement in raised for part in ast.walk(statement)):
            if isinstance(text, ast.Constant) and isinstance(text.value, str):
                spelled = re.search(r"(?<![\w-])--[a-z]", text.value)
                assert not spelled or commands.search(text.value), (path, text.value)


def test_anything_else_is_to_be_reported_with_its_place():
    class Panic(BaseException):
        def __str__(self):
            raise ValueError

    told = explain(raised(Panic()))
    assert (
        told.startswith("internal error: Panic (test_errors.py:") and "please report this" in told
    )
    assert len(explain(raised(KeyError("x" * 10_000)))) < 1000


def test_the_place_is_the_innermost_that_is_ours():
    with pytest.raises(TypeError) as found:
        errors.text_of(None, None)
    assert "(test_errors.py:" in explain(found.value)
    with pytest.raises(AttributeError) as found:
        errors.is_out_of_memory.__globals__["_place"](None)
    assert "(cptool/errors.py:" in explain(found.value) and ", _place)" in explain(found.value)


@pytest.mark.parametrize(
    "error, wanted",
    [
        (MemoryError(), ""),
        (MemoryError("std::bad_alloc"), ""),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), ""),
        (RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0"), "2.00 GiB"),
        (
            RuntimeError("unable to mmap 4096 bytes from file <x>: Cannot allocate memory (12)"),
            "4096 bytes",
        ),
    ],
)
def test_memory_that_is_not_there(error, wanted):
    told = explain(raised(error), during="load the weights")
    more = f" ({wanted} more were needed)" if wanted else ""
    assert told.startswith(f"out of memory during load the weights{more}; use a shorter prompt")
    assert "in test_errors.py:" in explain(raised(error))


def take_all_memory(world):
    world.report("prefill, layer", 1, 4)
    torch.empty(1 << 55, dtype=torch.uint8)


def test_torchs_allocator_names_the_bytes_and_the_step():
    told = "^out of memory during prefill, layer, step 2 of 4 \\(36028797018963968 bytes more were"
    with pytest.raises(RunError, match=told):
        run(take_all_memory, ranks=RankOptions(device="cpu"))


def test_threads_that_the_system_does_not_give():
    assert "ulimit -u" in explain(raised(RuntimeError("can't start new thread")))
