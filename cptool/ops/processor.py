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
    and those of torch use.

    Variables of the environment cap it: CPTOOL_ISA, ATEN_CPU_CAPABILITY and ONEDNN_MAX_CPU_ISA.
    """
    isas: list[str] = extension.load().cpu_isas()
    caps = [os.environ.get("CPTOOL_ISA")]
    caps += [known.get(os.environ.get(name, "").lower()) for name, known in _CAPS.items()]
    return isas[min(isas.index(cap) if cap in isas else len(isas) - 1 for cap in caps)]


def has_bfloat16_products() -> bool:
    """Return whether products of bfloat16 run at least as fast as those of float32 on this
    processor, with the instruction set in use.
    """
    return instruction_set() in ("avx512bf16", "amx")
