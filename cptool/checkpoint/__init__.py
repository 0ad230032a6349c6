"""Files of models: opening them, reading their tensors, tokenising with what they bring."""

import re
from dataclasses import replace
from pathlib import Path

from cptool.checkpoint.base import Checkpoint
from cptool.checkpoint.fetching import Watch, unwatched
from cptool.checkpoint.fields import first_line
from cptool.errors import UserError
from cptool.files import expanded
from cptool.model.context import with_context

__all__ = ["Checkpoint", "open_checkpoint"]

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
HUB_FILE = re.compile(rf"{HUB_ID.pattern}/.+\.gguf")


def open_checkpoint(
    model: str, context_length: int | None = None, *, watch: Watch | None = unwatched
) -> Checkpoint:
    """Open a model and check everything that its headers state; imports no torch.

    `model` is a directory in the Hugging Face layout or in Meta's, a .gguf file, any part of a
    split one or the directory of its parts, or a name of the catalogue, a hub id `org/name` or a
    file there, `org/name/FILE.gguf`, downloaded on first use; `watch` is called while it is, or, if
    it is None, the hub's library draws its bars. `context_length` takes the place of the context
    that its files state. Raises UserError, one line, for anything else.
    """
    checkpoint = _open(model, watch)
    if context_length is not None:
        config = with_context(checkpoint.config, context_length)
        checkpoint = replace(checkpoint, config=config)
    return checkpoint


def _open(model: str, watch: Watch | None) -> Checkpoint:
    from cptool.checkpoint import catalogue, hub

    path = expanded(model)
    try:
        if model and path.is_dir():
            return _open_directory(path)
        if path.is_file():
            return _open_file(path)
        if model in catalogue.MODELS:
            return _open_file(catalogue.find(model, watch or unwatched), model)
        if HUB_ID.fullmatch(model) and path.suffix not in (".gguf", ".safetensors"):
            return _open_directory(hub.snapshot(model, watch), model)
        if HUB_FILE.fullmatch(model) and not Path(path.parts[0]).exists():  # else a mistaken path
            return _open_file(hub.gguf_file(model, watch))
    except OSError as error:
        raise UserError(f"{model}: cannot be read ({first_line(error)})") from None
    raise UserError(
        f"{model}: no such model; give a directory, a .gguf file, a hub id such as org/name, "
        f"or one of {', '.join(catalogue.MODELS)}"
    )


def _open_directory(path: Path, name: str | None = None) -> Checkpoint:
    from cptool.checkpoint.huggingface.reader import open_huggingface
    from cptool.checkpoint.meta.reader import is_meta, open_meta

    if not (path / "config.json").exists() and any(path.glob("*-of-*.gguf")):
        from cptool.checkpoint.gguf.parts import find_parts

        if (part := find_parts(path)) is not None:
            return _open_file(part, name)
    return open_meta(path, name) if is_meta(path) else open_huggingface(path, name)


def _open_file(path: Path, name: str | None = None) -> Checkpoint:
    from cptool.checkpoint.gguf.reader import open_gguf

    if path.suffix == ".safetensors":
        raise UserError(f"{path}: only weights; give the directory that holds them")
    return open_gguf(path, name)
