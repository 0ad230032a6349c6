"""Compile csrc/ into cptool/_C with CMake and Ninja; everything else is in pyproject.toml.

Environment: CPTOOL_CUDA=auto|on|off (auto: if nvcc is found), CPTOOL_CUDA_ARCHS (default "80;90a"),
CPTOOL_WERROR=1 (warnings are errors), CPTOOL_WATCHDOG=1 (a GPU kernel that would hang ends in an
error), CPTOOL_SANITIZE (as in -fsanitize=; used by tests/sanitizers.py). CMAKE_ARGS is passed on.
"""

from __future__ import annotations

import os
import runpy
import shlex
import subprocess
import sys
from pathlib import Path

import pybind11
from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
source_hash = runpy.run_path(str(ROOT / "cptool" / "ops" / "extension.py"))["source_hash"]


class CMakeBuild(build_ext):
    """Build the extension with CMake in the build directory, which later builds reuse."""

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name)).resolve()
        build = Path(self.build_temp).resolve() / "cmake"
        settings = {
            "CMAKE_BUILD_TYPE": "Debug" if self.debug else "Release",
            "CMAKE_LIBRARY_OUTPUT_DIRECTORY": target.parent,
            "Python_EXECUTABLE": sys.executable,
            "pybind11_DIR": pybind11.get_cmake_dir(),
            "CPTOOL_VERSION": self.distribution.get_version(),
            "CPTOOL_SOURCE_HASH": source_hash(ROOT / "csrc"),
            "CPTOOL_CUDA": os.environ.get("CPTOOL_CUDA", "auto"),
            "CPTOOL_CUDA_ARCHS": os.environ.get("CPTOOL_CUDA_ARCHS", "80;90a"),
            "CPTOOL_SANITIZE": os.environ.get("CPTOOL_SANITIZE", ""),
            "CPTOOL_WATCHDOG": "ON" if os.environ.get("CPTOOL_WATCHDOG") == "1" else "OFF",
            "CPTOOL_WERROR": "ON" if os.environ.get("CPTOOL_WERROR") == "1" else "OFF",
        }
        # An isolated build has its own Ninja, in a directory that is deleted afterwards: its path
        # must not be cached.
        configure = [
            "cmake",
            "-G",
            "Ninja",
            "-U",
            "CMAKE_MAKE_PROGRAM",
            "-S",
            str(ROOT),
            "-B",
            str(build),
        ]
        configure += [f"-D{name}={value}" for name, value in settings.items()]
        configure += shlex.split(os.environ.get("CMAKE_ARGS", ""))
        subprocess.run(configure, check=True)
        subprocess.run(["cmake", "--build", str(build)], check=True)


setup(ext_modules=[Extension("cptool._C", sources=[])], cmdclass={"build_ext": CMakeBuild})
