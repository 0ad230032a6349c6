"""The instruction sets of the CPU kernels: their table, their selection, and how one is added."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from cptool.ops.kernels import build_info

ROOT = Path(__file__).resolve().parents[2]
CPU = ROOT / "csrc" / "cpu"
COMPILER = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
LISTED = re.findall(r"^add_isa\((\w+)", (ROOT / "CMakeLists.txt").read_text(), re.MULTILINE)
TOY = """
#include "cpu/isa.h"
namespace cptool::cpu {
extern constexpr Isa isa_toy = {"toy", [] { return false; }};
}
"""


def test_cmake_the_sources_and_the_extension_agree():
    compiled = build_info()["isas"]
    assert compiled == [name for name in LISTED if name in compiled]
    assert compiled[0] == LISTED[0] == "portable"
    definition = re.compile(r"^extern constexpr Isa isa_(\w+) = \{\s*\"(\w+)\"", re.MULTILINE)
    defined = {path.stem: definition.findall(path.read_text()) for path in CPU.glob("*.cpp")}
    assert {stem: names for stem, names in defined.items() if names} == {
        name: [(name, name)] for name in LISTED
    }


@pytest.mark.parametrize("source", ["dispatch", "attention", "few_rows", "tokenwise", "schedule"])
def test_shared_sources_name_no_instruction_set(source):
    code = re.sub(r"//.*", "", (CPU / f"{source}.cpp").read_text())
    assert not re.search("|".join(LISTED), code.lower())


@pytest.mark.skipif(not COMPILER, reason="no C++ compiler")
def test_selection(tmp_path):
    names = ["portable", "wide", "absent", "pairs", "steps"]
    table = (CPU / "isa_table.h.in").read_text()
    table = table.replace(
        "@isa_declarations@", "".join(f"extern const Isa isa_{n};" for n in names)
    )
    table = table.replace("@isa_addresses@", "".join(f"&isa_{n}," for n in names))
    (tmp_path / "cpu").mkdir()
    (tmp_path / "cpu" / "isa_table.h").write_text(table)
    program = tmp_path / "isa_check"
    sources = [Path(__file__).with_name("isa_check.cpp"), CPU / "dispatch.cpp"]
    command = [COMPILER, "-std=c++17", "-Wall", "-Wextra", "-Werror", "-I", tmp_path]
    command += ["-I", ROOT / "csrc", *sources, "-o", program]
    subprocess.run(command, check=True)
    done = subprocess.run([program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_a_new_instruction_set_is_one_file_and_one_line(tmp_path):
    """Configures a copy of the sources to which a toy instruction set was added."""
    pybind11 = pytest.importorskip("pybind11")
    if shutil.which("cmake") is None or shutil.which("ninja") is None:
        pytest.skip("no CMake and Ninja outside the isolated build")
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    lists = (ROOT / "CMakeLists.txt").read_text()
    last = re.search(rf"^add_isa\({LISTED[-1]}.*\n", lists, re.MULTILINE)
    (tmp_path / "CMakeLists.txt").write_text(
        lists[: last.end()] + "add_isa(toy)\n" + lists[last.end() :]
    )
    (tmp_path / "csrc" / "cpu" / "toy.cpp").write_text(TOY)
    build = tmp_path / "build"
    settings = {
        "CPTOOL_CUDA": "off",
        "Python_EXECUTABLE": sys.executable,
        "pybind11_DIR": pybind11.get_cmake_dir(),
    }
    command = ["cmake", "-G", "Ninja", "-S", tmp_path, "-B", build]
    command += [f"-D{name}={value}" for name, value in settings.items()]
    subprocess.run(command, check=True, capture_output=True)
    table = (build / "generated" / "cpu" / "isa_table.h").read_text()
    declared = re.findall(r"extern const Isa isa_(\w+);", table)
    assert declared == re.findall(r"&isa_(\w+),", table) == [*build_info()["isas"], "toy"]
    subprocess.run(
        ["ninja", "-C", build, "CMakeFiles/_C.dir/csrc/cpu/toy.cpp.o"],
        check=True,
        capture_output=True,
    )
