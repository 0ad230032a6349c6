"""Build the CPU extension with sanitizers and run the tests of the ops under them.

    python tests/sanitizers.py [address] [thread] [--short]

address: AddressSanitizer and UndefinedBehaviorSanitizer under the tests, in every instruction set
that the machine has. thread: ThreadSanitizer under tests/ops/threads_check.py, which drives the
extension without torch, whose own threads it would report. Both by default. --short: a choice of
shapes, for every commit. Needs CMake, Ninja, pybind11, setuptools and GCC's sanitizer libraries.
"""

import argparse
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
SANITIZERS = {"address": "address,undefined", "thread": "thread"}
TESTS = (
    "ops/test_ops",
    "ops/test_stored",
    "ops/test_ops_properties",
    "ops/test_tokenwise",
    "ops/test_fused_layer",
    "engine/test_static_decode",
    "test_cache",
)
SHORT_TESTS = TESTS[:2]
SHORT = (
    "few_rows_of_any_heads or rows_around or empty or into or slots or few_queries or strided "
    "or any_bytes"
)
# torch keeps memory for as long as the process lives. A module that throws needs the C++ library
# before the sanitizer looks for its functions, so it is loaded first too.
OPTIONS = {
    "ASAN_OPTIONS": "detect_leaks=0:halt_on_error=1",
    "UBSAN_OPTIONS": "print_stacktrace=1:halt_on_error=1",
    "TSAN_OPTIONS": "halt_on_error=1:exitcode=66",
}


def build(kind: str) -> Path:
    """Build the instrumented extension. Return the folder of a package that contains it."""
    folder = ROOT / "build" / f"sanitized-{kind}"
    environment = os.environ | {"CPTOOL_SANITIZE": SANITIZERS[kind], "CPTOOL_CUDA": "off"}
    command = [sys.executable, "setup.py", "-q", "build_ext", f"--build-lib={folder}"]
    command += [f"--build-temp={ROOT / 'build' / f'temp-{kind}'}"]
    subprocess.run(command, check=True, cwd=ROOT, env=environment, stdout=subprocess.DEVNULL)
    # Away from csrc, so that it is not compared with the sources.
    shutil.copytree(
        ROOT / "cptool",
        folder / "cptool",
        dirs_exist_ok=True,
        ignore=shutil.ignore_patterns("*.so", "__pycache__"),
    )
    return folder


def library(name: str) -> str:
    """Return the path of a shared library of the compiler."""
    compiler = os.environ.get("CXX", "c++")
    command = [compiler, f"-print-file-name={name}"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()


def run(kind: str, short: bool) -> int:
    folder = build(kind)
    preloaded = [library({"address": "libasan.so", "thread": "libtsan.so"}[kind])]
    preloaded.append(library("libstdc++.so"))
    environment = (
        os.environ
        | OPTIONS
        | {
            "CPTOOL_SANITIZE": SANITIZERS[kind],
            "LD_PRELOAD": " ".join(preloaded),
            "PYTHONPATH": str(folder),
            "OMP_NUM_THREADS": "2",
        }
    )
    if kind == "thread":
        # Its shadow memory has fixed places, which random addresses may take.
        command = [
            "setarch",
            "-R",
            sys.executable,
            str(ROOT / "tests" / "ops" / "threads_check.py"),
        ]
    else:
        tests = [str(ROOT / "tests" / f"{name}.py") for name in (SHORT_TESTS if short else TESTS)]
        command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", *tests]
        command += ["--durations=0", "--durations-min=10"]
        command += ["-k", SHORT] if short else []
    # Not in the checkout, whose package would come first.
    return subprocess.run(command, cwd=folder, env=environment).returncode


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("kinds", nargs="*", choices=[[], *SANITIZERS], default=list(SANITIZERS))
    parser.add_argument("--short", action="store_true", help="a choice of shapes")
    asked = parser.parse_args()
    codes = {kind: run(kind, asked.short) for kind in asked.kinds or SANITIZERS}
    for kind, code in codes.items():
        print(f"{kind}: {'clean' if code == 0 else f'exit code {code}'}", flush=True)
    return max(abs(code) for code in codes.values())


if __name__ == "__main__":
    sys.exit(main())
