"""What this machine's processor multiplies fast, told without torch."""

import os

from cptool.ops import extension

_BFLOAT16 = "avx512bf16"
# Values of the variables that cap what torch and oneDNN use, and lie below bfloat16 products.
_BELOW_BFLOAT16 = {
    "ATEN_CPU_CAPABILITY": ("default", "avx2"),
    "ONEDNN_MAX_CPU_ISA": (
        "sse41",
        "avx",
        "avx2",
        "avx2_vnni",
        "avx2_vnni_2",
        "avx512_core",
        "avx512_core_vnni",
    ),
}


def has_bfloat16_products() -> bool:
    """Return whether products of bfloat16 run at least as fast as those of float32 on this
    processor.

    They do where it has AVX512-BF16 (every processor with AMX-BF16 has it too), unless a variable
    of the environment caps the instructions in use below that: CPTOOL_ISA, ATEN_CPU_CAPABILITY or
    ONEDNN_MAX_CPU_ISA.
    """
    isas = extension.load().cpu_isas()
    cap = os.environ.get("CPTOOL_ISA")
    if cap in isas:
        isas = isas[: isas.index(cap) + 1]
    capped = any(
        os.environ.get(name, "").lower() in values for name, values in _BELOW_BFLOAT16.items()
    )
    return _BFLOAT16 in isas and not capped
