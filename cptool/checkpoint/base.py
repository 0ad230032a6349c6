"""A checkpoint as the rest of cptool sees it, whatever the file format.

Opening reads headers only and imports no torch: a wrong file is refused before any rank starts.
Tensors have their Hugging Face names, and rows of queries and keys are in half-split rotary order.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING

from cptool.checkpoint.reading import TensorReader, is_mapped
from cptool.checkpoint.sampling import SamplingDefaults
from cptool.checkpoint.tensors import TORCH_DTYPES, AnyTensor

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from pathlib import Path

    import torch

    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer
    from cptool.model.config import LlamaConfig


@dataclass(kw_only=True)
class Checkpoint:
    """An opened and validated checkpoint, whose tensors are read on demand.

    `stored` maps the Hugging Face names of all tensors that the model needs to where they are.
    `eos_ids` are the token ids that end an answer, in the order in which the files give them.
    `sampling` holds the author's defaults. `notes` are lines for the user: which of two answers
    counts, and which fields were ignored.
    """

    path: Path
    name: str
    config: LlamaConfig
    stored: dict[str, AnyTensor]
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    sampling: SamplingDefaults = field(default_factory=SamplingDefaults)
    notes: tuple[str, ...] = ()
    load_tokenizer: Callable[[], Tokenizer | None] = lambda: None
    _reader: TensorReader = field(default_factory=TensorReader, repr=False)
    _tokenizers: list[Tokenizer | None] = field(default_factory=list, repr=False)

    @property
    def matrix_dtype(self) -> str | None:
        """The torch dtype of all stored matrices; None if they are quantised or differ."""
        encodings = {tensor.encoding for tensor in self.stored.values() if len(tensor.shape) == 2}
        return TORCH_DTYPES.get(encodings.pop()) if len(encodings) == 1 else None

    def names(self) -> list[str]:
        """Return the names of the tensors that the model needs."""
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the logical shape of the tensor `name`."""
        return self.stored[name].shape

    def is_mapped(self, name: str) -> bool:
        """Return whether `read(name)` is a view of the page cache, which all processes share."""
        return is_mapped(self.stored[name])

    def read(self, name: str, dim: int = 0, bounds: tuple[int, int] | None = None) -> torch.Tensor:
        """Read a tensor in its stored dtype, float32 if it is quantised.

        `bounds` [start, stop) selects a part of dimension `dim`; rows of queries and keys can be
        divided between heads only. Of a joined tensor, only the files that hold the part are read.
        A mapped tensor (see `is_mapped`) keeps the mapping alive and is copy-on-write: changing it
        changes neither the file nor what other processes see.
        """
        tensor = self.stored[name]
        return self._reader.read(tensor, dim, bounds or (0, tensor.shape[dim]))

    def read_stored(
        self, name: str, dim: int = 0, bounds: tuple[int, int] | None = None
    ) -> torch.Tensor | None:
        """Return a matrix, or the part within `bounds`, as the bytes that the file stores: uint8
        [rows, bytes of a row], a view of the page cache. Rows are in the file's order.

        None if it is not stored in one piece, or `bounds` cut a block of its encoding.
        """
        tensor = self.stored[name]
        return self._reader.read_stored(tensor, dim, bounds or (0, tensor.shape[dim]))

    def release(self) -> None:
        """Let files that were read leave this process's memory, but for what views there are."""
        self._reader.release()

    @cached_property
    def state(self) -> str:
        """The identity of the files, including their times, when this was first read.

        Files with another state hold other weights than those that were opened.
        """
        from cptool.checkpoint.fingerprint import state

        return state(self)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 that tells models apart, whatever their path or their split into files.

        All bytes are read, once for as long as the files do not change; see
        `cptool.checkpoint.fingerprint`.
        """
        from cptool.checkpoint.fingerprint import fingerprint

        return fingerprint(self, self.state)

    def tokenizer(self) -> Tokenizer | None:
        """Return the model's tokenizer, None if the files hold none; UserError if unsupported.

        It refuses texts that become tokens beyond the vocabulary, or more than fit in the context.
        """
        if not self._tokenizers:
            found = self.load_tokenizer()
            if found is not None:
                found.vocab_size = self.config.vocab_size
                found.context = self.config.max_position_embeddings
            self._tokenizers.append(found)
        return self._tokenizers[0]

    def answer_ends(self, *sequences: Sequence[int]) -> tuple[int, ...]:
        """Return the token ids that end an answer to `sequences`.

        They are those that the files name and, if one of the sequences holds turns of the chat
        template, those that end a turn; if one has a gap to fill, those that end what fills it.
        """
        if (tokenizer := self.tokenizer()) is None:
            return self.eos_ids
        turns = any(map(tokenizer.in_turns, sequences))
        more = tokenizer.turn_ends if turns or not self.eos_ids else ()
        if (infilling := tokenizer.infilling) is not None:
            if any(infilling.middle in ids for ids in sequences):
                more = (*more, *infilling.ends)
        known = (i for i in more if i < self.config.vocab_size)
        return tuple(dict.fromkeys((*self.eos_ids, *known)))
