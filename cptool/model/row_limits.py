"""How many tokens pass together through the steps whose intermediates are wider than their result.

These steps are the feed-forward network and the float32 rotation.
"""

ROWS_AT_ONCE = 4096
"""Enough to saturate a GPU, and a bound on the memory of these steps at any prompt length."""

ROWS_AT_ONCE_CPU = 1024
"""On a CPU, an intermediate should still be in its cache when the next step reads it."""
