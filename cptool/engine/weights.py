"""Loading a checkpoint into a Llama: which tensors make up each parameter, and where they live."""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from cptool.checkpoint import Checkpoint
from cptool.distributed.shared_memory import shared_tensors
from cptool.host import large_pages
from cptool.model.architectures.family import Size
from cptool.model.architectures.registry import find_family
from cptool.model.config import LlamaConfig
from cptool.model.llama import Llama
from cptool.model.shares import Bounds, divided, share
from cptool.ops.encodings import (
    BLOCKS,
    ENCODINGS,
    QUANTISED_AS,
    kept_encodings,
    row_bytes,
)
from cptool.ops.fp8 import Fp8Weight, packed
from cptool.ops.quantise import quantised
from cptool.ops.stored import Blocks, StoredWeight
from cptool.parallel import tensor_parallel
from cptool.quantisation import quantised_to

if TYPE_CHECKING:
    from cptool.distributed.world import World


@dataclass(frozen=True)
class Block:
    """A checkpoint's tensor, or the part within `bounds` [start, stop) of its dimension `dim`."""

    name: str
    dim: int = 0
    bounds: tuple[int, int] | None = None

    def read(self, checkpoint: Checkpoint) -> torch.Tensor:
        return checkpoint.read(self.name, self.dim, self.bounds)


Source = tuple[Block, ...]
"""The blocks that a parameter is made of, one below the other."""


@dataclass(frozen=True)
class _Quantised:
    """A quantisation, the kinds of matrices that it is for, the dtype to compute in, and where."""

    quantisation: str
    kinds: tuple[str, ...]
    dtype: torch.dtype
    device: torch.device


def load_model(
    checkpoint: Checkpoint,
    dtype: torch.dtype,
    device: torch.device | str,
    world: "World | None" = None,
    weights: str | None = None,
    *,
    keep_stored: bool = True,
) -> Llama:
    """Return a model ready to run, with the weights of `checkpoint` in `dtype` on `device`.

    With a `world` it is this rank's share of the tensor-parallel group, sums included. Matrices
    that a CPU can multiply as they are stored (`cptool.ops.encodings.kept_encodings`) stay in the
    file (`cptool.ops.stored`; the page cache is their memory). What a run has in the
    file must stay there: replacing the file changes nothing, writing to it changes weights, and
    truncating it ends the ranks that read beyond its end (SIGBUS). Otherwise, on a CPU, a
    single rank that has room for twice the weights copies them, for they are read faster from large
    pages; if not, parameters that are stored as they are needed stay in the file, and the ranks of
    a machine hold one copy of the rest between them, each having filled a part. Collective over the
    ranks of `world`.

    weights: those of `cptool.engine.options.EngineOptions`; quantised matrices are held once on a
    machine, too. keep_stored: whether the other matrices stay as the file stores them.
    """
    device = torch.device(device)
    tp_rank, tp = (world.tp_rank, world.tp) if world else (0, 1)
    model = Llama(checkpoint.config, device="meta", tp=tp)
    sources = _sources(checkpoint.config, share(checkpoint.config, tp_rank, tp))
    sharing = world if world is not None and world.size > 1 else None
    if (quantised_as := quantised_to(weights)) is not None:
        shared = sharing if device.type == "cpu" else None
        _quantise(model, checkpoint, sources, shared, to=_Quantised(*quantised_as, dtype, device))
    if device.type == "cpu" and keep_stored:
        _keep_stored(model, checkpoint, sources, dtype)
    parameters: dict[str, torch.Tensor] = {}
    for name in model.float32_parameters() if dtype != torch.float32 else ():
        values = [block.read(checkpoint).float() for block in sources.pop(name)]
        parameters[name] = torch.cat(values).to(device)
    size = sum(model.get_parameter(name).numel() for name in sources) * dtype.itemsize
    stays = device.type == "cpu" and (sharing is not None or not large_pages.worth_copying(size))
    shapes: dict[Source, tuple[int, ...]] = {}
    for name, source in sources.items():
        mapped = _mapped(checkpoint, source, dtype) if stays else None
        if mapped is None:
            shapes[source] = tuple(model.get_parameter(name).shape)
        else:
            parameters[name] = mapped

    if device.type == "cpu" and sharing is not None:
        with shared_tensors(sharing, shapes, dtype, (Block,)) as (tensors, mine):
            _fill({source: tensors[source] for source in mine}, checkpoint, world)
    else:
        tensors = {
            source: large_pages.empty(shape, dtype, device) for source, shape in shapes.items()
        }
        _fill(tensors, checkpoint, world)

    for name in sources.keys() - parameters.keys():
        parameters[name] = tensors[sources[name]]
    model.load_state_dict(parameters, assign=True)
    model.place_frequencies(device)
    if world is not None:
        tensor_parallel.apply(model, world.tp_group)
    return model.eval()


def _sources(config: LlamaConfig, held: dict[Size, Bounds]) -> dict[str, Source]:
    """Return every parameter with the blocks that it is made of, on a rank that holds `held`."""
    sources: dict[str, Source] = {}
    for weight, layer in find_family(config.family).tensors(config):
        parameter = weight.parameter.format(layer)
        block = Block(weight.huggingface.format(layer), *divided(weight, held))
        sources[parameter] = (*sources.get(parameter, ()), block)
    return sources


def _keep_stored(
    model: Llama, checkpoint: Checkpoint, sources: dict[str, Source], dtype: torch.dtype
) -> None:
    """Have the matrices that products in `dtype` can read as they are stored stay so, and take them
    out of `sources`.
    """
    for name, source in list(sources.items()):
        if (weight := _stored(checkpoint, source, dtype)) is not None:
            model.keep_stored(name, weight)
            del sources[name]


def _quantise(
    model: Llama,
    checkpoint: Checkpoint,
    sources: dict[str, Source],
    sharing: "World | None",
    *,
    to: _Quantised,
) -> None:
    """Have the matrices whose rows are whole blocks be quantised, and take them out of `sources`.
    Collective over the ranks that share them.
    """
    taken, shapes = {}, {}
    for name, source in list(sources.items()):
        rows, *depth = model.get_parameter(name).shape
        if name.split(".")[-2] not in to.kinds:
            continue
        if depth and (size := row_bytes(to.quantisation, *depth)) is not None:
            taken[name], shapes[source] = sources.pop(name), (rows, size)

    def fill(tensors: dict[Source, torch.Tensor]) -> None:
        for source, tensor in tensors.items():
            row = 0
            for block in source:
                values = _quantised(block.read(checkpoint), to.quantisation)
                tensor[row : row + len(values)] = values
                row += len(values)

    if sharing is None:
        tensors = {each: large_pages.empty(shape, torch.uint8) for each, shape in shapes.items()}
        fill(tensors)
    else:
        with shared_tensors(sharing, shapes, torch.uint8, (Block,)) as (tensors, mine):
            fill({source: tensors[source] for source in mine})
    for name, source in taken.items():
        data = tensors[source].to(to.device)
        if to.quantisation == "fp8":
            model.keep_stored(name, Fp8Weight(data, to.dtype))
        else:
            model.keep_stored(name, StoredWeight([Blocks(data, QUANTISED_AS)], to.dtype))


def _quantised(matrix: torch.Tensor, quantisation: str) -> torch.Tensor:
    if quantisation == "fp8":
        return packed(matrix)
    return quantised(matrix, whole_rows=quantisation == "int8")


def original(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    """Return the matrix `name` of a whole model as the checkpoint has it, in one of its dtypes."""
    source = _sources(checkpoint.config, share(checkpoint.config, 0, 1))[name]
    return torch.cat([block.read(checkpoint).float() for block in source])


def _stored(checkpoint: Checkpoint, source: Source, dtype: torch.dtype) -> StoredWeight | None:
    """Return the matrix as its file stores it, None if products in `dtype` cannot read it so."""
    parts = []
    kept = kept_encodings(dtype == torch.float32)
    if not any(checkpoint.stored[block.name].encoding in kept for block in source):
        return None
    for block in source:
        stored = checkpoint.stored[block.name]
        if stored.encoding not in ENCODINGS:
            return None
        data = checkpoint.read_stored(block.name, block.dim, block.bounds)
        if data is None or data.shape[1] % BLOCKS[stored.encoding][1]:
            return None
        heads = stored.interleaved_heads
        parts.append(Blocks(data, stored.encoding, stored.shape[0] // heads if heads else 0))
    return StoredWeight(parts, dtype)


def _mapped(checkpoint: Checkpoint, source: Source, dtype: torch.dtype) -> torch.Tensor | None:
    """Return the parameter as a view of the file, None if it is not stored in one piece and in
    `dtype`.

    A block of columns is a strided view, which matmul takes as it is.
    """
    block, *others = source
    if others or not checkpoint.is_mapped(block.name):
        return None
    tensor = block.read(checkpoint)
    return tensor if tensor.dtype == dtype else None


def _fill(
    tensors: dict[Source, torch.Tensor], checkpoint: Checkpoint, world: "World | None"
) -> None:
    for done, (source, tensor) in enumerate(tensors.items()):
        if world is not None:
            world.report("loading weights", done, len(tensors))
        row = 0
        for block in source:
            values = block.read(checkpoint)
            tensor[row : row + values.shape[0]].copy_(values)
            row += values.shape[0]
