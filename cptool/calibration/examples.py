"""The models whose parts are timed."""

from __future__ import annotations

from cptool.model.shapes import llama_config

# A GQA model of common proportions: the layer that is timed, and the model on which the rule's
# coefficients are fitted.
EXAMPLE = llama_config(
    hidden=1024,
    layers=8,
    heads=8,
    kv_heads=2,
    ffn=3072,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
# Half of its widths, by which what a layer costs whatever its widths is told from the rest.
HALF = llama_config(
    hidden=512,
    layers=8,
    heads=4,
    kv_heads=1,
    ffn=1536,
    max_position_embeddings=131072,
    tie_word_embeddings=True,
)
# One whose every product takes no time.
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
"""Rows, or queries, of what is bound by arithmetic."""
COLD_BYTES = 128 << 20
"""What is read between two uses of weights or of keys, so that no cache keeps them: those of a
model with many layers come from memory every time."""
