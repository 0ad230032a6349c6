"""A checkpoint as the rest of cptool sees it, whatever the file format.

Opening reads headers only and imports no torch: a wrong file is refused before any rank starts.
Tensors go by their Hugging Face names, and query and key rows are in half-split rotary order.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, fields, replace
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cptool.errors import UserError
from cptool.model.config import LlamaConfig

if TYPE_CHECKING:
    import torch

    from cptool.checkpoint.tokenizer import Tokenizer

EMBEDDING = "model.embed_tokens.weight"
HEAD = "lm_head.weight"

# Encodings that torch reads as they lie in the file; the rest is quantised.
TORCH_DTYPES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
ITEM_SIZES = {"F32": 4, "F16": 2, "BF16": 2}

_SAMPLED_BYTES = 4096

CONVERT = "convert the checkpoint to safetensors with transformers' save_pretrained"

# More than any tensor of a checkpoint has.
MAX_DIMENSIONS = 8


def bounded_product(shape: Iterable[Any]) -> int:
    """The product of the extents of a shape that a file names; ValueError for a shape that no
    tensor has. Numbers of any size cost no more than reading them.
    """
    shape = list(shape)
    if len(shape) > MAX_DIMENSIONS:
        raise ValueError(f"a shape of {len(shape)} dimensions")
    if not all(type(extent) is int and 0 <= extent < 2**63 for extent in shape):
        raise ValueError("a shape with an extent that no tensor has")
    product = math.prod(shape)
    if product >= 2**63:
        raise ValueError(f"a shape {shape} of {product} elements")
    return product


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies and how it is written.

    `shape` is the logical shape, `encoding` a safetensors or GGML type name. `interleaved_heads` is
    the number of heads whose rows are in interleaved rotary order; 0 says that none are.
    """

    file: Path
    offset: int
    nbytes: int
    shape: tuple[int, ...]
    encoding: str
    interleaved_heads: int = 0


@dataclass(frozen=True)
class JoinedTensor:
    """A tensor whose parts lie in several files, side by side along dimension `dim`."""

    parts: tuple[StoredTensor, ...]
    dim: int
    interleaved_heads: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        shape = list(self.parts[0].shape)
        shape[self.dim] = sum(part.shape[self.dim] for part in self.parts)
        return tuple(shape)

    @property
    def encoding(self) -> str:
        """The encoding of all parts."""
        return self.parts[0].encoding

    @property
    def nbytes(self) -> int:
        return sum(part.nbytes for part in self.parts)


@dataclass(frozen=True)
class Sampling:
    """The sampling defaults of a model's author; None where the model says nothing."""

    temperature: float | None = None
    top_p: float | None = None


@dataclass
class Checkpoint:
    """An opened and validated checkpoint; tensors are read on demand.

    `eos_ids` are the token ids that end an answer, in the order in which the files give them.
    `notes` are lines for the user: which of two answers counts, and which fields were ignored.
    """

    path: Path
    name: str
    config: LlamaConfig
    stored: dict[str, StoredTensor | JoinedTensor]
    eos_ids: tuple[int, ...] = ()
    bos_id: int | None = None
    sampling: Sampling = Sampling()
    notes: tuple[str, ...] = ()
    load_tokenizer: Callable[[], "Tokenizer | None"] = lambda: None
    _tokenizers: list["Tokenizer | None"] = field(default_factory=list, repr=False)
    _mappings: dict[Path, "torch.UntypedStorage"] = field(default_factory=dict, repr=False)

    @property
    def matrix_dtype(self) -> str | None:
        """The torch dtype of all stored matrices; None where they are quantised or differ."""
        encodings = {tensor.encoding for tensor in self.stored.values() if len(tensor.shape) == 2}
        return TORCH_DTYPES.get(encodings.pop()) if len(encodings) == 1 else None

    def names(self) -> list[str]:
        """Names of the tensors that the model needs, without `lm_head.weight` where it is tied."""
        return list(self.stored)

    def shape(self, name: str) -> tuple[int, ...]:
        return self.stored[name].shape

    def is_mapped(self, name: str) -> bool:
        """Whether `read(name)` is a view of the file in the page cache, shared by all processes."""
        tensor = self.stored[name]
        if isinstance(tensor, JoinedTensor) or tensor.interleaved_heads:
            return False
        size = ITEM_SIZES.get(tensor.encoding)
        return size is not None and tensor.offset % size == 0

    def read(
        self, name: str, dim: int = 0, bounds: tuple[int, int] | None = None
    ) -> "torch.Tensor":
        """The tensor in its stored dtype, float32 where it is quantised; or what lies within
        `bounds` [start, stop) of its dimension `dim`, which are whole heads in rows of q and k.

        Of a joined tensor only the parts that this takes are read. A mapped tensor (see
        `is_mapped`) keeps the mapping alive and is copy-on-write: changing it changes neither the
        file nor what other processes see.
        """
        tensor = self.stored[name]
        start, stop = bounds or (0, tensor.shape[dim])
        if isinstance(tensor, JoinedTensor):
            values = self._join(tensor, dim, start, stop)
        else:
            values = self._values(tensor).narrow(dim, start, stop - start)
        if not tensor.interleaved_heads:
            return values
        # Rows 2j, 2j+1 of a head are one rotary pair in the file; j, j + D/2 are one here.
        head_dim = tensor.shape[0] // tensor.interleaved_heads
        if dim == 0 and (start % head_dim or stop % head_dim):
            raise ValueError(f"{name}: rows {start} to {stop} cut a head of {head_dim} rows")
        pairs = values.reshape(-1, head_dim // 2, 2, values.shape[1])
        return pairs.transpose(1, 2).reshape(values.shape)

    def _join(self, tensor: JoinedTensor, dim: int, start: int, stop: int) -> "torch.Tensor":
        import torch

        pieces, before = [], 0
        for part in tensor.parts:
            first, last = start, stop
            if dim == tensor.dim:
                first = max(start - before, 0)
                last = min(stop - before, part.shape[dim])
                before += part.shape[dim]
            if first < last:
                pieces.append(self._values(part).narrow(dim, first, last - first))
        return torch.cat(pieces, tensor.dim) if len(pieces) > 1 else pieces[0]

    def _values(self, tensor: StoredTensor) -> "torch.Tensor":
        """The tensor as it lies in one file, a view of it where it is aligned."""
        import torch

        mapping = self._mapping(tensor.file)
        if tensor.encoding not in TORCH_DTYPES:
            from cptool.checkpoint.gguf import dequantize

            return dequantize(_bytes_of(mapping, tensor), tensor)
        dtype = _torch_dtype(tensor)
        if tensor.offset % dtype.itemsize:
            values = _bytes_of(mapping, tensor).clone().view(dtype)
        else:
            values = torch.empty(0, dtype=dtype).set_(
                mapping, tensor.offset // dtype.itemsize, (math.prod(tensor.shape),)
            )
        return values.view(tensor.shape)

    @cached_property
    def state(self) -> str:
        """The state of the files when this was first asked for, by their identity and times:
        whoever finds another one has opened other weights.
        """
        from cptool.checkpoint.fingerprint import state

        return state(self)

    @cached_property
    def fingerprint(self) -> str:
        """Hex SHA-256 that tells models apart, whatever their path or their split into files.

        All bytes are read, once for as long as the files stay as they are; see
        `cptool.checkpoint.fingerprint`.
        """
        from cptool.checkpoint.fingerprint import fingerprint

        return fingerprint(self)

    def tokenizer(self) -> "Tokenizer | None":
        """The model's tokenizer, None where the files hold none; UserError if it is unsupported.

        It refuses texts that become tokens beyond the vocabulary, or more than the context takes.
        """
        if not self._tokenizers:
            found = self.load_tokenizer()
            if found is not None:
                found.vocab_size = self.config.vocab_size
                found.context = self.config.max_position_embeddings
            self._tokenizers.append(found)
        return self._tokenizers[0]

    def answer_ends(self, *sequences: Sequence[int]) -> tuple[int, ...]:
        """Ids that end an answer to `sequences`: those that the files name and, where one of them
        holds turns of the chat template, those that end a turn.
        """
        if (tokenizer := self.tokenizer()) is None:
            return self.eos_ids
        turns = any(map(tokenizer.in_turns, sequences))
        more = tokenizer.turn_ends if turns or not self.eos_ids else ()
        known = (i for i in more if i < self.config.vocab_size)
        return tuple(dict.fromkeys((*self.eos_ids, *known)))

    def _mapping(self, file: Path) -> "torch.UntypedStorage":
        import torch

        if file not in self._mappings:
            # shared=False maps privately: pages are the page cache's own until they are written to.
            with file.open("rb") as opened:
                # torch takes UTF-8 only, and the name of a file may be bytes of no encoding.
                told = str(file) if str(file).isprintable() else f"/proc/self/fd/{opened.fileno()}"
                self._mappings[file] = torch.UntypedStorage.from_file(
                    told, shared=False, nbytes=file.stat().st_size
                )
        return self._mappings[file]


def byte_ranges(
    tensor: StoredTensor | JoinedTensor, start: int, stop: int
) -> Iterator[tuple[Path, int, int]]:
    """File, offset and count of the bytes [start, stop) of a tensor, in the order of the tensor."""
    parts, rows = (tensor,), 1
    if isinstance(tensor, JoinedTensor):
        parts, rows = tensor.parts, math.prod(tensor.shape[: tensor.dim])
    width = tensor.nbytes // rows
    for row in range(start // width, -(-stop // width)):
        begin = row * width
        for part in parts:
            share = part.nbytes // rows
            first, last = max(start - begin, 0), min(stop - begin, share)
            if first < last:
                yield part.file, part.offset + row * share + first, last - first
            begin += share


def differ(a: StoredTensor | JoinedTensor, b: StoredTensor | JoinedTensor) -> bool:
    """Whether two tensors differ in shape, in encoding, or in a sample of their bytes."""
    if (a.shape, a.encoding, a.nbytes) != (b.shape, b.encoding, b.nbytes):
        return True
    length = min(a.nbytes, _SAMPLED_BYTES)
    starts = {(a.nbytes - length) * i // 63 for i in range(64)}
    with ExitStack() as opened:
        files = cache(lambda path: opened.enter_context(path.open("rb")))

        def sample(tensor: StoredTensor | JoinedTensor, start: int) -> bytes:
            pieces = []
            for path, offset, count in byte_ranges(tensor, start, start + length):
                files(path).seek(offset)
                pieces.append(files(path).read(count))
            return b"".join(pieces)

        return any(sample(a, start) != sample(b, start) for start in sorted(starts))


def _torch_dtype(tensor: StoredTensor) -> "torch.dtype":
    import torch

    return getattr(torch, TORCH_DTYPES[tensor.encoding])


def _bytes_of(mapping: "torch.UntypedStorage", tensor: StoredTensor) -> "torch.Tensor":
    import torch

    return torch.empty(0, dtype=torch.uint8).set_(mapping, tensor.offset, (tensor.nbytes,))


def llama_tensors(config: LlamaConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a Llama model, in the order that a forward uses them."""
    hidden, ffn = config.hidden_size, config.intermediate_size
    q_rows = config.num_attention_heads * config.head_dim
    kv_rows = config.num_key_value_heads * config.head_dim
    tensors: dict[str, tuple[int, ...]] = {EMBEDDING: (config.vocab_size, hidden)}
    for i in range(config.num_hidden_layers):
        layer = f"model.layers.{i}"
        tensors |= {
            f"{layer}.input_layernorm.weight": (hidden,),
            f"{layer}.self_attn.q_proj.weight": (q_rows, hidden),
            f"{layer}.self_attn.k_proj.weight": (kv_rows, hidden),
            f"{layer}.self_attn.v_proj.weight": (kv_rows, hidden),
            f"{layer}.self_attn.o_proj.weight": (hidden, q_rows),
            f"{layer}.post_attention_layernorm.weight": (hidden,),
            f"{layer}.mlp.gate_proj.weight": (ffn, hidden),
            f"{layer}.mlp.up_proj.weight": (ffn, hidden),
            f"{layer}.mlp.down_proj.weight": (hidden, ffn),
        }
    tensors["model.norm.weight"] = (hidden,)
    if not config.tie_word_embeddings:
        tensors[HEAD] = (config.vocab_size, hidden)
    return tensors


def select_tensors(
    source: Path,
    config: LlamaConfig,
    found: Mapping[str, StoredTensor | JoinedTensor],
    encodings: Iterable[str],
) -> dict[str, StoredTensor | JoinedTensor]:
    """The tensors that the model needs out of those `found`, each with the expected shape.

    Raises UserError for a tensor that is missing, misshapen or in an encoding not in `encodings`,
    and for one that no Llama has: ignoring a bias or a query norm would change the answer.
    """
    if config.num_hidden_layers > len(found):
        raise UserError(
            f"{source}: {config.num_hidden_layers} layers in the configuration, {len(found)} "
            f"tensors in the files; the two are not of one model"
        )
    needed = llama_tensors(config)
    for name, shape in needed.items():
        tensor = found.get(name)
        if tensor is None:
            raise UserError(
                f"{source}: tensor {name} is missing; {_why_missing(name, found, len(needed))}"
            )
        if tensor.shape != shape:
            raise UserError(
                f"{source}: tensor {name} has shape {list(tensor.shape)}, the configuration makes "
                f"it {list(shape)}; the two are not of one model"
            )
        if tensor.encoding not in encodings:
            raise UserError(
                f"{source}: tensor {name} is stored as {tensor.encoding}, which is not supported; "
                f"use one of {', '.join(encodings)}"
            )
    if extra := sorted(found.keys() - needed.keys() - {HEAD}):
        raise UserError(
            f"{source}: tensor {extra[0]!r} ({len(extra)} such) belongs to no plain Llama model, "
            f"and ignoring it could change the answer; use a checkpoint of the Llama architecture"
        )
    return {name: found[name] for name in needed}


def _why_missing(name: str, found: Iterable[str], count: int) -> str:
    """What may be wrong with files that lack a tensor, with the remedy: a name with the same parts
    in the same order and others between them is that of another library or of a training run.
    """
    parts = name.removeprefix("model.").split(".")

    def has_them(other: str) -> bool:
        remaining = iter(other.split("."))
        return all(part in remaining for part in parts) and next(remaining, None) is None

    if (other := next(filter(has_them, sorted(found)), None)) is not None:
        return (
            f"the files have it as {other!r:.100}, as another library or a training run wrote it; "
            f"{CONVERT}"
        )
    return (
        f"the model's shape calls for {count} tensors, so fetch the checkpoint again or correct "
        f"its configuration"
    )


def mark_interleaved(
    stored: Mapping[str, StoredTensor | JoinedTensor], config: LlamaConfig
) -> dict[str, StoredTensor | JoinedTensor]:
    """The same tensors, those of queries and keys marked as in interleaved rotary order."""
    heads = {
        "q_proj.weight": config.num_attention_heads,
        "k_proj.weight": config.num_key_value_heads,
    }
    return {
        name: replace(tensor, interleaved_heads=heads.get(name.rpartition("self_attn.")[2], 0))
        for name, tensor in stored.items()
    }


# What attention takes (`cptool.ops.checks`): a multiple of the step up to the maximum.
_HEAD_DIM_STEP, _MAX_HEAD_DIM = 8, 256

# Far beyond any model, and small enough that no product of them overflows 64 bits.
_MAX_SIZE = 2**24
_MAX_LAYERS, _MAX_CONTEXT = 10_000, 2**31 - 1

# The range of normal float32 numbers, in which the model computes with them.
_SMALLEST, _LARGEST = 2.0**-126, 2.0**127


def check_config(source: Path, config: LlamaConfig) -> LlamaConfig:
    """The same configuration; UserError where its numbers cannot be those of a Llama that cptool
    computes.
    """
    limits = {"num_hidden_layers": _MAX_LAYERS, "max_position_embeddings": _MAX_CONTEXT}
    for name in (entry.name for entry in fields(config)):
        value, limit = getattr(config, name), limits.get(name, _MAX_SIZE)
        if type(value) is int and not 0 < value <= limit:
            raise UserError(
                f"{source}: {name} is {value}, it must be positive and at most {limit}; correct "
                f"the file"
            )
        if type(value) is float:
            _check_number(source, name, value)
    if config.num_attention_heads % config.num_key_value_heads:
        raise UserError(
            f"{source}: {config.num_attention_heads} query heads on {config.num_key_value_heads} "
            f"key/value heads; the first must be a multiple of the second"
        )
    if config.head_dim % _HEAD_DIM_STEP or config.head_dim > _MAX_HEAD_DIM:
        raise UserError(
            f"{source}: head_dim is {config.head_dim}, attention takes multiples of "
            f"{_HEAD_DIM_STEP} up to {_MAX_HEAD_DIM}; use another model"
        )
    if (scaling := config.rope_scaling) is not None:
        numbers = (scaling.factor, scaling.low_freq_factor, scaling.high_freq_factor)
        for value in (*numbers, float(scaling.original_context)):
            _check_number(source, "a number of the rope scaling", value)
        if not scaling.low_freq_factor < scaling.high_freq_factor:
            raise UserError(
                f"{source}: rope scaling with low_freq_factor {scaling.low_freq_factor} and "
                f"high_freq_factor {scaling.high_freq_factor} makes no sense; the first must be "
                f"below the second"
            )
    return config


def _check_number(source: Path, name: str, value: float) -> None:
    if not _SMALLEST <= value <= _LARGEST:
        raise UserError(
            f"{source}: {name} is {value}, it must be positive and within the range of float32; "
            f"correct the file"
        )


def first_line(error: BaseException) -> str:
    """The first line of an error's text, to quote it inside a one-line message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def token_ids(source: Path, key: str, value: Any, vocab_size: int) -> tuple[int, ...]:
    """Token ids out of an int, a list of ints or None, each once; UserError for anything else.

    -1, or the same in 32 unsigned bits, is how several formats write that there is no such token.
    """
    ids = value if isinstance(value, list) else [value]
    ids = [i for i in ids if i is not None and not (type(i) is int and i in (-1, 2**32 - 1))]
    for i in ids:
        if type(i) is not int or not 0 <= i < vocab_size:
            raise UserError(
                f"{source}: {key} is {i!r:.60}, it must be an id in the model's vocabulary, 0 to "
                f"{vocab_size - 1}; correct the file"
            )
    return tuple(dict.fromkeys(ids))
