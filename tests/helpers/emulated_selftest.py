"""The self-test of one kernel as `cptool.ops.trials` starts it, on the emulated kernels.

    python emulated_selftest.py LIBRARY MISTAKE cuda KERNEL apart

sm90 is that of LIBRARY (planted.py) and makes the MISTAKE, a number; a deadlock, which the
emulation sees, hangs as it would on a GPU. The others are right.
"""

import contextlib
import json
import sys
import time
from pathlib import Path


def main() -> int:
    library, mistake, _, kernel, apart = sys.argv[1:]
    if kernel != "sm90":
        print(json.dumps({"ready": True}))
        print(json.dumps({"name": kernel, "error": 0.0, "allowed": 1.0}))
        return 0
    import torch
    from cuda_emulator import Emulator

    from cptool.exactness import selftest

    class Sm90(Emulator):
        entries = ("emulated_attention",)

    emulator = Sm90(Path(library))
    emulator._library.emulated_device(16, 1 << 20)
    emulator._library.emulated_mistake(int(mistake))
    emulator._library.emulated_races(False)  # as on a GPU

    def attention(q, k, v, **others):
        names = ("q_pos", "k_pos", "cu_q", "cu_k", "scale")
        options = ("into", "out_dtype", "sm_margin", "window", "cap")
        try:
            return emulator.attention(
                q,
                k,
                v,
                *(others[name] for name in names),
                **{name: others[name] for name in options},
            )
        except RuntimeError as error:
            if "deadlock" in str(error):
                time.sleep(1000)
            raise

    to = torch.Tensor.to
    torch.Tensor.to = lambda self, *args, **kwargs: (
        self if args == ("cuda",) else to(self, *args, **kwargs)
    )
    selftest.attention_partial = attention
    selftest.force_cuda_kernel = contextlib.nullcontext
    selftest._taken = lambda device, dtype, head_dim, case: (
        # Windows with one head dimension, so that the test does not take long.
        "simt" if dtype == torch.float32 or (case.window and head_dim != 128) else "sm90"
    )
    return selftest.main(["cuda", kernel, apart])


if __name__ == "__main__":
    sys.exit(main())
