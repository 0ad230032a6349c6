"""The models whose parts are timed."""

from __future__ import annotations

from cptool.model.shapes import llama_config

# A GQA model of common proportions: its layer is timed, and the coefficients of the fitted rule are
# computed for it.
EXAMPLE = llama_config(
    hidden=1024,
    layers=8,
    heads=8,
    kv_heads=2,
    ffn=3072,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
# Half of its widths: comparing the two separates the part of a layer's time that does not depend on
# widths.
HALF = llama_config(
    hidden=512,
    layers=8,
    heads=4,
    kv_heads=1,
    ffn=1536,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
# A model whose products take next to no time.
TINY = llama_config(
    hidden=64,
    layers=8,
    heads=2,
    kv_heads=1,
    ffn=64,
    vocab_size=64,
    head_dim=64,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)

ROWS = 512
"""Rows, or queries, at which arithmetic is the bound."""
COLD_BYTES = 256 << 20
"""Bytes read between two uses of the same weights or keys, so that no cache keeps them: in a model
with many layers they come from memory every time."""
