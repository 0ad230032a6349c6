"""How the fetching of a model is watched."""

from typing import Protocol


class Watch(Protocol):
    """Takes what is done to fetch a model, in a few words, and the bytes that are here of `total`;
    a `total` of 0 is not known. Called from several threads.
    """

    def __call__(self, step: str, done: int = 0, total: int = 0) -> object: ...


def unwatched(step: str, done: int = 0, total: int = 0) -> None:
    """Report nothing."""
