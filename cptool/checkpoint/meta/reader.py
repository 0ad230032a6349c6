"""Checkpoints in Meta's own layout: params.json next to consolidated.00.pth, consolidated.01.pth...

Rows of queries and keys are in interleaved rotary order, which reading undoes. That all files are
there and whole is checked on opening; the MD5 sums of weights are left to
`md5sum -c checklist.chk`, for they take a pass over all bytes.
"""

import hashlib
from dataclasses import replace
from pathlib import Path

from cptool.checkpoint.base import Checkpoint
from cptool.checkpoint.config_checks import check_config
from cptool.checkpoint.fields import integer, read_json
from cptool.checkpoint.known_fields import check_fields
from cptool.checkpoint.lookalikes import absent
from cptool.checkpoint.meta.chameleon import (
    TextTokenizer,
    is_chameleon,
    merged_params,
    read_text_tokenizer,
)
from cptool.checkpoint.meta.config import read_config
from cptool.checkpoint.meta.files import checksums, find_files, join_files
from cptool.checkpoint.meta.known import PARAMS as PARAMS_FIELDS
from cptool.checkpoint.notes import Notes
from cptool.checkpoint.selection import mark_interleaved, select_tensors
from cptool.checkpoint.tensors import TORCH_DTYPES
from cptool.checkpoint.tokenizer.tokenizer_model import TokenizerModel, read_tokenizer_model
from cptool.errors import UserError
from cptool.model.architectures.chameleon import FAMILY as CHAMELEON
from cptool.model.architectures.llama import FAMILY as LLAMA

_PARAMS = "params.json"


def is_meta(path: Path) -> bool:
    """Return whether the directory is in this layout, and not in Hugging Face's as well."""
    found = (path / _PARAMS).is_file() or any(path.glob("consolidated*.pth"))
    return found and not any(path.glob("model*.safetensors"))


def open_meta(path: Path, name: str | None = None) -> Checkpoint:
    """Open and validate the directory `path`.

    Raises UserError for anything that is missing, damaged or neither a plain Llama nor a Chameleon.
    """
    source = path / _PARAMS
    if not source.is_file():
        raise UserError(f"{source}: {absent(source)} beside the weights; fetch it too")
    params = read_json(source)
    notes, family = Notes(), LLAMA
    if is_chameleon(params):
        params, family = merged_params(path, params), CHAMELEON
    else:
        check_fields(source, params, PARAMS_FIELDS, notes)
    if (path / "adapter_config.json").is_file():
        raise UserError(
            f"{path}: an adapter (adapter_config.json) is beside a model ({_PARAMS}), and cptool "
            f"does not apply adapters; move it away to use only the model"
        )
    heads = integer(source, params, "n_heads")
    kv_heads = integer(source, params, "n_kv_heads", heads)
    hidden = integer(source, params, "dim")
    if heads < 1 or kv_heads < 1 or hidden < 1 or (hidden % heads and "head_dim" not in params):
        raise UserError(
            f"{source}: dim {hidden} with {heads} heads on {kv_heads} key/value heads makes no "
            f"head size; correct the file"
        )
    found = join_files(find_files(path), family, hidden, heads=heads, kv_heads=kv_heads)
    config = check_config(source, read_config(source, params, family, found))
    tokens: TokenizerModel | TextTokenizer | None
    if family is CHAMELEON:
        tokens = read_text_tokenizer(path, family, config.vocab_size)
        config = replace(config, image_ids=tokens.image_ids(config.vocab_size))
    else:
        tokens = _read_tokenizer(path, config.vocab_size)
    stored = select_tensors(path, config, found, TORCH_DTYPES)
    return Checkpoint(
        path=path,
        name=name or path.resolve().name,
        config=config,
        stored=mark_interleaved(stored, config),
        eos_ids=tokens.eos_ids if tokens else (),
        bos_id=tokens.bos_id if tokens else None,
        notes=notes.lines(),
        load_tokenizer=tokens.tokenizer if tokens else lambda: None,
    )


def _read_tokenizer(path: Path, vocab_size: int) -> TokenizerModel | None:
    """Return the tokenizer.model beside the weights, or one directory up; None if there is none."""
    for directory in (path, path.resolve().parent):
        file = directory / "tokenizer.model"
        if not file.is_file():
            continue
        # A damaged token would go unnoticed otherwise, and the file is small.
        found = hashlib.md5(file.read_bytes(), usedforsecurity=False).hexdigest()
        expected = checksums(directory).get(file.name, found)
        if found != expected:
            raise UserError(
                f"{file}: its MD5 is {found}, the checklist beside it says {expected}; fetch it "
                f"again"
            )
        tokens = read_tokenizer_model(file)
        if tokens.size != vocab_size:  # As in every release; one directory up may be another's.
            raise UserError(
                f"{file}: it has {tokens.size} tokens and the model {vocab_size}; put the model's "
                f"own tokenizer.model into {path}"
            )
        return tokens
    return None
