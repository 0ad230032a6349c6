"""The machine's ceilings, measured by ceilings.cpp, which is compiled when it is first needed."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import tempfile
from pathlib import Path

import torch

SOURCE = Path(__file__).with_name("ceilings.cpp")
# About 20 ms each.
STEPS = {"fma": 5_000_000, "bf16_dot": 5_000_000, "amx": 1_000_000, "amx_l1": 1_000_000}


class Ceilings:
    """Rates of `threads` threads; each method measures anew. Raises OSError without a compiler.

    With CPTOOL_ISA=avx2 they are those of AVX2, whatever the processor has.
    """

    def __init__(self, threads: int) -> None:
        self.threads = threads
        compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if not compiler:
            raise OSError("no C++ compiler")
        with tempfile.TemporaryDirectory() as folder:
            library = Path(folder) / "ceilings.so"
            machine = "x86-64-v3" if os.environ.get("CPTOOL_ISA") == "avx2" else "native"
            flags = ["-O2", f"-march={machine}", "-std=c++17", "-shared", "-fPIC", "-pthread"]
            command = [compiler, *flags, str(SOURCE), "-o", str(library)]
            try:
                subprocess.run(command, check=True, capture_output=True, text=True)
            except subprocess.CalledProcessError as error:
                raise OSError(f"{compiler} failed: {error.stderr.strip()}") from None
            self._library = ctypes.CDLL(str(library))
        for name in (*STEPS, "read"):
            getattr(self._library, f"{name}_rate").restype = ctypes.c_double

    def flops(self, name: str) -> float | None:
        """flop/s of a name of STEPS; None where the machine has no such units."""
        rate = getattr(self._library, f"{name}_rate")
        return rate(ctypes.c_int64(STEPS[name]), self.threads) or None

    def read(self, tensor: torch.Tensor) -> float:
        """Bytes/s of reading a contiguous tensor once."""
        address = ctypes.c_void_p(tensor.data_ptr())
        return self._library.read_rate(address, ctypes.c_int64(tensor.nbytes), self.threads)
