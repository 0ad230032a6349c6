"""A `tokenizer.model` without a tokenizer.json beside it, encoded as SentencePiece does.

The fields of tokenizer_config.json mean what they do for transformers 4's `LlamaTokenizer` of
Python, with which such directories were written:

    legacy              True if absent: a space goes before each stretch of text between control
                        tokens, if the model says so. Otherwise before the first one alone, if
                        `add_prefix_space`.
    add_prefix_space    True if absent
    add_bos_token       True if absent
    add_eos_token       False if absent
"""

from pathlib import Path
from typing import Any

from tokenizers import Tokenizer as Backend

from cptool.checkpoint.tokenizer import backends
from cptool.checkpoint.tokenizer.sentencepiece import SentencePieceModel
from cptool.checkpoint.tokenizer.tokenizer_model import read_tokenizer_model
from cptool.errors import UserError

CLASSES = ("LlamaTokenizer", "CodeLlamaTokenizer")
_REMEDY = "write a tokenizer.json with transformers"


def read(path: Path, settings: dict[str, Any], kind: str) -> tuple[Backend, bool]:
    """Return the vocabulary at `path`, and whether a space goes before each text.

    kind: the tokenizer's class, of `CLASSES`. Raises UserError for another one, and for a file that
    is not a SentencePiece model of a Llama.
    """
    if kind not in CLASSES:
        raise UserError(
            f"{path}: the tokenizer of a {kind} is not read from a tokenizer.model; {_REMEDY}"
        )
    if settings.get("sp_model_kwargs"):
        raise UserError(f"{path}: sp_model_kwargs are not supported; remove them, or {_REMEDY}")
    model = read_tokenizer_model(path).model
    if not isinstance(model, SentencePieceModel):
        raise UserError(f"{path}: ranked tokens as in Llama 3, without their rules; {_REMEDY}")
    legacy = settings.get("legacy") in (None, True) and kind == "LlamaTokenizer"
    each = legacy and model.dummy_prefix
    first = not legacy and settings.get("add_prefix_space") is not False
    backend = backends.sentencepiece_bpe(
        model.pieces, model.scores, model.types, dummy_prefix=each, strip=each or first
    )
    backends.add_tokens(backend, model.pieces, model.types)
    return backend, first


def put_around(backend: Backend, settings: dict[str, Any], roles: dict[str, str]) -> None:
    """Put BOS and EOS around a text that begins a sequence, as `settings` say."""

    def token(role: str, default: bool) -> int | None:
        added = settings.get(f"add_{role}_token", default)
        text = roles.get(f"{role}_token")
        return backend.token_to_id(text) if added and text is not None else None

    backends.put_around(backend, token("bos", True), token("eos", False))
