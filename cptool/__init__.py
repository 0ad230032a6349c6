"""Exact long-context inference of Llama-family models, split over ranks by context."""

__version__ = "0.1.0"
