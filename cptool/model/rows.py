"""How many tokens go at once through the steps whose intermediates are wider than their result: the
feed-forward network, the float32 rotation.
"""

ROWS_AT_ONCE = 4096
"""Enough to saturate a GPU, and a bound on the memory that these take at any prompt length."""

ROWS_AT_ONCE_CPU = 1024
"""On a CPU, which should find an intermediate in its cache when the next step reads it."""
