"""The models whose parts are timed."""

from __future__ import annotations

from cptool.model.shapes import llama_config

# A GQA model of common proportions: the layer that is timed, and the model on which the rule's
# coefficients are fitted.
EXAMPLE = llama_config(1024, 8, 8, 2, 3072, context=131072, tied=True)
# Half of its widths, by which what a layer costs whatever its widths is told from the rest.
HALF = llama_config(512, 8, 4, 1, 1536, context=131072, tied=True)
# One whose every product takes no time.
TINY = llama_config(64, 8, 2, 1, 64, vocab=64, head_dim=64, context=131072, tied=True)

ROWS = 512
"""Rows, or queries, of what is bound by arithmetic."""
COLD_BYTES = 128 << 20
"""What is read between two uses of weights or of keys, so that no cache keeps them: those of a
model with many layers come from memory every time."""
