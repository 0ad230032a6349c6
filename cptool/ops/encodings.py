"""The types of stored weights that products can read. Imports no torch."""

ENCODINGS = {
    name: number
    for number, name in enumerate(
        (
            *("BF16", "F16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"),
            *("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "IQ4_NL", "IQ4_XS"),
        )
    )
}
"""The types that products can read, with the values of csrc/stored.h's Encoding."""

FLOAT32 = -1
"""Encoding's value for float32 as it lies, which products of many rows alone take."""

BLOCKS = {
    **{"BF16": (32, 64), "F16": (32, 64), "Q4_0": (32, 18), "Q4_1": (32, 20), "Q5_0": (32, 22)},
    **{"Q5_1": (32, 24), "Q8_0": (32, 34), "Q2_K": (256, 84), "Q3_K": (256, 110)},
    **{"Q4_K": (256, 144), "Q5_K": (256, 176), "Q6_K": (256, 210), "IQ4_NL": (32, 18)},
    "IQ4_XS": (256, 136),
}
"""Weights and bytes of a block; the kernels take plain types in blocks of 32."""

QUANTISED_AS = "Q8_0"
"""The type that `cptool.ops.quantise` makes: a float16 scale and 32 int8 weights in each block."""


def quantised_bytes(depth: int) -> int | None:
    """Return the bytes of a quantised row of `depth` weights, None if they are not whole blocks."""
    weights, size = BLOCKS[QUANTISED_AS]
    return None if depth % weights else depth // weights * size


FP8_SCALE_BYTES = 4
"""Of a row in FP8 (`cptool.ops.fp8`), which has a byte for each weight."""


def row_bytes(quantisation: str, depth: int) -> int | None:
    """Return the bytes of a row of `depth` weights quantised to what `cptool.quantisation` names;
    None if it cannot be.
    """
    return depth + FP8_SCALE_BYTES if quantisation == "fp8" else quantised_bytes(depth)


def kept_encodings(float32: bool) -> frozenset[str]:
    """Return the types of which products on a CPU, in float32 or else in 16 bits, read matrices as
    they are stored. With activations of 16 bits, weights of 16 bits have kernels of their own.
    """
    return frozenset(ENCODINGS if float32 else ENCODINGS.keys() - {"BF16", "F16"})
