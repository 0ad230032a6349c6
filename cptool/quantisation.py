"""What float weights can be quantised to while they are loaded, as options and sessions name it."""

QUANTISED = ("q8_0", "int8")
"""Weight-only quantisations: a scale for each block of 32 weights, or for each row of a matrix."""

FP8_FEED_FORWARD = "fp8-ffn"
"""The matrices of feed-forward layers in FP8, and the rows that are multiplied with them too."""

WEIGHTS = ("file", *QUANTISED, FP8_FEED_FORWARD)
"""All weights as the file has them, all matrices quantised, or those of the feed-forward layers."""

AUTO = "auto"
"""A choice that is made by measuring (`cptool.engine.setup.quantising`)."""

KINDS = ("embed_tokens", "qkv_proj", "o_proj", "gate_up_proj", "down_proj", "lm_head")
"""The matrices of a model, of which some may be quantised and others not."""

FEED_FORWARD = ("gate_up_proj", "down_proj")
"""Those of a feed-forward layer."""


def quantised_to(weights: str | None) -> tuple[str, tuple[str, ...]] | None:
    """Return the quantisation that `weights` names and the kinds of matrices that it is for; None
    if it names none.

    A quantisation alone is for all matrices; "q8_0:down_proj,lm_head" is for those two kinds, and
    "fp8-ffn" is "fp8" for those of feed-forward layers.
    """
    if weights == FP8_FEED_FORWARD:
        return "fp8", FEED_FORWARD
    name, colon, listed = (weights or "").partition(":")
    kinds = tuple(listed.split(",")) if colon else KINDS
    if name not in QUANTISED or not set(kinds) <= set(KINDS):
        return None
    return name, kinds


def is_known(weights: object) -> bool:
    """Return whether `weights` names what KV can have been computed with."""
    return isinstance(weights, str) and (weights == "file" or quantised_to(weights) is not None)
