"""Text to token ids and back, through the `tokenizers` library.

Text that a user gives is never parsed for control tokens; only a chat template's own text is.
"""

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from cptool.checkpoint import backends
from cptool.checkpoint.base import first_line
from cptool.checkpoint.chat import Guard, Message, default_template, render
from cptool.checkpoint.sentencepiece import NORMAL, SentencePieceModel
from cptool.checkpoint.tiktoken import RankedModel
from cptool.errors import UserError

_REPLACEMENT = "\ufffd"


class Tokenizer:
    """A model's tokenizer.

    `backend` is taken over and changed. `add_bos` says whether a plain text begins with `bos_id`.
    `special` maps the template variables `bos_token`, `eos_token` to their texts.
    """

    def __init__(
        self,
        backend: Backend,
        bos_id: int | None,
        add_bos: bool,
        special: dict[str, str],
        chat_template: str | None,
    ):
        self.bos_id, self.add_bos = bos_id, add_bos and bos_id is not None
        self.chat_template, self._special = chat_template, special
        # A token with a role is a control token even where the file does not mark it as special.
        known = [text for text in special.values() if backend.token_to_id(text) is not None]
        backend.add_special_tokens(known)
        added = backend.get_added_tokens_decoder()
        control = {
            token.content: (i, token)
            for i, token in added.items()
            if token.special or token.content in special.values()
        }
        self._guard = Guard(control)
        # Control tokens in text stay text. What a template means as one becomes a placeholder, an
        # added token of its own that stands for the id: the text around it then splits and merges
        # as it does around the control token itself.
        backend.encode_special_tokens = True
        placeholders = self._guard.placeholders
        backend.add_tokens(
            [
                AddedToken(
                    placeholder,
                    lstrip=control[text][1].lstrip,
                    rstrip=control[text][1].rstrip,
                    normalized=False,
                )
                for text, placeholder in placeholders.items()
            ]
        )
        self._ids_of_placeholders = {
            backend.token_to_id(placeholder): control[text][0]
            for text, placeholder in placeholders.items()
        }
        self._backend = backend

    def encode(self, text: str, bos: bool = True) -> list[int]:
        """Token ids of a plain text; `bos` allows the BOS token that the model asks for."""
        ids = self._backend.encode(text, add_special_tokens=False).ids
        return [self.bos_id, *ids] if bos and self.add_bos else ids

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, control tokens and ids outside the vocabulary left out."""
        known = [i for i in ids if i not in self._ids_of_placeholders]
        return self._backend.decode(known, skip_special_tokens=True)

    def stream(self) -> "TextStream":
        return TextStream(self)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation: messages are dicts with `role` and `content`.

        BOS is the template's to write. Control tokens in a message count as plain text. Raises
        UserError where the model has no template, or its template refuses the messages.
        """
        if self.chat_template is None:
            raise UserError("the model has no chat template; give a prompt or an instruct model")
        guarded = self._guard.mark(list(messages))
        text = render(self.chat_template, guarded, add_generation_prompt, self._special)
        ids = self._backend.encode(self._guard.unmark(text), add_special_tokens=False).ids
        return [self._ids_of_placeholders.get(i, i) for i in ids]


class TextStream:
    """Text of tokens as they come; the pieces together are what `decode` gives for all ids."""

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        # The ids since the last piece, after those of that piece: a decoder may treat the first
        # token apart (it drops a leading space), so new text is what a known beginning grows by.
        self._ids: list[int] = []
        self._shown = 0

    def push(self, token_id: int) -> str:
        """The text that has become certain with this token; often empty inside a character."""
        self._ids.append(token_id)
        return self._advance(hold_incomplete=True)

    def flush(self) -> str:
        """What was held back, replacement characters where it is no text."""
        return self._advance(hold_incomplete=False)

    def _advance(self, hold_incomplete: bool) -> str:
        before = self._tokenizer.decode(self._ids[: self._shown])
        now = self._tokenizer.decode(self._ids)
        if len(now) <= len(before) or (hold_incomplete and now.endswith(_REPLACEMENT)):
            return ""
        del self._ids[: self._shown]
        self._shown = len(self._ids)
        return now[len(before) :]


def from_tokenizer_json(
    path: Path, settings: dict[str, Any], chat_template: str | None = None
) -> Tokenizer:
    """The tokenizer of a Hugging Face directory.

    `settings` is its tokenizer_config.json; `chat_template` goes before the one in there. BOS is
    added where the file's post-processor adds it.
    """
    try:
        backend = Backend.from_file(str(path))
    except Exception as error:  # The library raises bare Exception.
        raise UserError(
            f"{path}: not a tokenizer ({first_line(error)}); fetch the file again"
        ) from None
    backend.no_truncation()
    backend.no_padding()
    special = {
        name: text
        for name in ("bos_token", "eos_token", "unk_token", "pad_token")
        if (text := _content(settings.get(name))) is not None
    }
    bos_id = backend.token_to_id(special["bos_token"]) if "bos_token" in special else None
    added = backend.encode("", add_special_tokens=True).ids
    if bos_id is None and len(added) == 1:
        bos_id = added[0]
    template = chat_template or default_template(settings.get("chat_template"))
    return Tokenizer(backend, bos_id, bos_id in added, special, template)


def _content(token: Any) -> str | None:
    text = token.get("content") if isinstance(token, dict) else token
    return text if isinstance(text, str) else None


# How byte-level vocabularies cut text before merging, by `tokenizer.ggml.pre`.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_CUTS = {
    "gpt-2": backends.GPT2_CUT,
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), backends.DIGITS_CUT),
    **dict.fromkeys(_LLAMA3, backends.LLAMA3_CUT),
}


def from_gguf(path: Path, metadata: dict[str, Any]) -> Tokenizer | None:
    """The tokenizer that a GGUF file describes, None where it describes none.

    Supports byte-level BPE (`gpt2`) with the cuts above and SentencePiece BPE (`llama`).
    """
    kind = metadata.get("tokenizer.ggml.model")
    if kind in (None, "none", "no_vocab"):
        return None
    if kind not in ("gpt2", "llama"):
        raise UserError(
            f"{path}: tokenizer {kind!r} is not supported (gpt2 and llama are); give token ids"
        )
    pre = metadata.get("tokenizer.ggml.pre")
    if kind == "gpt2" and pre not in _CUTS:
        raise UserError(
            f"{path}: tokenizer.ggml.pre is {pre!r}, cptool knows {', '.join(_CUTS)}; use the "
            f"Hugging Face checkpoint"
        )
    try:
        tokens = metadata["tokenizer.ggml.tokens"]
        types = metadata.get("tokenizer.ggml.token_type") or [NORMAL] * len(tokens)
        if len(types) != len(tokens):
            raise ValueError(f"{len(tokens)} tokens and {len(types)} token types")
        if kind == "gpt2":
            merges = metadata.get("tokenizer.ggml.merges", [])
            # Llama 3's vocabulary holds words that its merges do not reach.
            bos_by_default = ignore_merges = pre in _LLAMA3
            backend = backends.byte_level_bpe(
                tokens, [tuple(m.split(" ", 1)) for m in merges], _CUTS[pre], ignore_merges
            )
        else:
            bos_by_default = True
            scores = metadata.get("tokenizer.ggml.scores", [])
            dummy_prefix = metadata.get("tokenizer.ggml.add_space_prefix", True)
            backend = backends.sentencepiece_bpe(tokens, scores, types, dummy_prefix)
        backends.add_tokens(backend, tokens, types)
        ids = {name: metadata.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
        special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
    except Exception as error:  # The library raises bare Exception, bad metadata anything.
        raise UserError(
            f"{path}: its tokenizer is damaged ({first_line(error)}); fetch the file again"
        ) from None
    add_bos = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)
    template = default_template(metadata.get("tokenizer.chat_template"))
    return Tokenizer(backend, ids["bos"], bool(add_bos), special, template)


def from_sentencepiece(model: SentencePieceModel, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a SentencePiece `tokenizer.model`; a plain text begins with BOS."""
    backend = backends.sentencepiece_bpe(
        model.pieces, model.scores, model.types, model.dummy_prefix
    )
    backends.add_tokens(backend, model.pieces, model.types)
    special = {"bos_token": model.pieces[model.bos_id], "eos_token": model.pieces[model.eos_id]}
    return Tokenizer(backend, model.bos_id, True, special, chat_template)


def from_ranks(
    model: RankedModel, bos_id: int, eos_id: int, chat_template: str | None
) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` of Llama 3; a plain text begins with BOS."""
    tokens = [backends.printable(token) for token in model.tokens]
    backend = backends.byte_level_bpe(
        tokens, backends.all_merges(tokens), backends.LLAMA3_CUT, ignore_merges=True
    )
    backend.add_special_tokens(model.special)
    ids = {"bos_token": bos_id, "eos_token": eos_id}
    special = {name: backend.id_to_token(i) for name, i in ids.items()}
    return Tokenizer(backend, bos_id, True, special, chat_template)
