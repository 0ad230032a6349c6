"""What this machine's processor multiplies fast, told without torch."""

import os

from cptool.ops import extension

# The instruction set that caps of torch and oneDNN come down to, by variable and value.
_CAPS = {
    "ATEN_CPU_CAPABILITY": {"default": "avx2", "avx2": "avx2"},
    "ONEDNN_MAX_CPU_ISA": {
        "sse41": "portable",
        "avx": "portable",
        "avx2": "avx2",
        "avx2_vnni": "avx2",
        "avx2_vnni_2": "avx2",
        "avx512_core": "avx512",
        "avx512_core_vnni": "avx512",
    },
}


def instruction_set() -> str:
    """Return the best instruction set of `cptool.ops.kernels.cpu_isas` that both cptool's kernels
    and those of torch use, but for those that are slow on this processor.

    Variables of the environment cap it: CPTOOL_ISA, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.
    """
    built, named = extension.load(), os.environ.get("CPTOOL_ISA")
    slow = set(built.cpu_slow_isas()) - {named}
    isas: list[str] = built.cpu_isas()
    caps = [named, *(known.get(os.environ.get(name, "").lower()) for name, known in _CAPS.items())]
    best = min(isas.index(cap) if cap in isas else len(isas) - 1 for cap in caps)
    return next(isa for isa in reversed(isas[: best + 1]) if isa not in slow)


def has_bfloat16_products() -> bool:
    """Return whether products of bfloat16 run at least as fast as those of float32 on this
    processor, with the instruction set in use. Processors of Intel without AMX have AVX-512's dot
    products of bfloat16, and take twice as long for them.
    """
    return instruction_set() in ("avx512bf16", "amx")
