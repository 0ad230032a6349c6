"""Text to token ids and back, through the `tokenizers` library.

Text that a user gives is never parsed for control tokens; only a chat template's own text is.
"""

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from cptool.checkpoint import backends, library
from cptool.checkpoint.base import first_line
from cptool.checkpoint.chat import Guard, Message, TemplateLimitError, default_template, render
from cptool.checkpoint.entry import check_ids, check_text
from cptool.checkpoint.sentencepiece import NORMAL, SentencePieceModel
from cptool.checkpoint.tiktoken import RankedModel
from cptool.checkpoint.tokenizer_files import read_tokenizer_files
from cptool.errors import UserError

_REPLACEMENT = "\ufffd"

# A text of fewer characters per token of the context is tokenised at once.
_CHARACTERS = 8
_PIECE = 1 << 18

# Stands for what a message says where a template is tried out.
_ANSWER = "\ue000answer\ue001"


@dataclass(frozen=True)
class _Control:
    """What is a control token: `guard` tells a user's from a template's.

    `ids` maps the ids of the placeholders, as which the template's own ones are encoded, to the
    tokens' ids. `structural` are the texts that even an answer must not hold as control tokens:
    those that a template writes around messages, and those that are marked special.
    """

    guard: Guard
    ids: dict[int, int]
    structural: frozenset[str]


class Tokenizer:
    """A model's tokenizer, and the one door through which texts come to the model.

    `backend` is taken over and changed; its post-processor says what goes around a text that begins
    a sequence. `special` maps the template variables `bos_token`, `eos_token` to their texts.
    `ends` are texts of further tokens that end an answer. `vocab_size` and `context` bound what a
    text may become, if they are set.
    """

    vocab_size: int | None = None
    context: int | None = None
    _too_much: TemplateLimitError | None = None  # once a rendering went beyond its bounds

    def __init__(
        self,
        backend: Backend,
        bos_id: int | None,
        special: dict[str, str],
        chat_template: str | None,
        *,
        ends: Sequence[str] = (),
        why_no_template: str | None = None,
    ):
        self.bos_id, self.chat_template, self._special = bos_id, chat_template, special
        self._why_no_template = why_no_template
        # A token with a role is a control token even where the file does not mark it as special.
        present = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens(
            [
                text
                for text in dict.fromkeys(special.values())
                if text not in present and backend.token_to_id(text) is not None
            ]
        )
        self._added = {
            token.content: (token_id, token)
            for token_id, token in sorted(backend.get_added_tokens_decoder().items())
            if token.content
        }
        self._marked = {
            text
            for text, (_, token) in self._added.items()
            if token.special or text in special.values()
        }
        self._left_out = {self._added[text][0] for text in self._marked}
        self._ends = tuple(text for text in ends if text in self._added)
        backend.encode_special_tokens = True
        self._backend = backend

    def encode(self, text: str, bos: bool = True, parse: bool = False) -> list[int]:
        """Token ids of a plain text.

        `bos` says that it begins a sequence, so that it gets what the model puts around one: BOS
        as a rule. Control tokens in it are letters, unless `parse` asks for them. Raises UserError
        where the text is none, or becomes tokens that the model does not have, or more of them
        than it can take.
        """
        limit = library.Limit(len(text))
        self._check_text(text, limit)
        if parse:
            bos = bos and not (self._first and text.startswith(self._first))
            text = self._control.guard.unmark(text)
        return self._checked(self._ids(text, limit, around=bos))

    def decode(self, ids: Iterable[int]) -> str:
        """The text of token ids, control tokens and ids outside the vocabulary left out."""
        known = [i for i in ids if i not in self._left_out and i not in self._placeholder_ids]
        try:
            return library.call(self._backend.decode, known, skip_special_tokens=False)
        except library.LibraryError as error:
            raise UserError(f"the model's tokenizer cannot write this text ({error})") from None

    def stream(self) -> "TextStream":
        return TextStream(self)

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Token ids of a conversation: messages are dicts with `role` and `content`.

        BOS is the template's to write. Control tokens in a message count as plain text. Raises
        UserError where the model has no template, or its template refuses the messages, and as
        `encode` does.
        """
        texts = [value for message in messages for value in message.values()]
        for text in texts:
            if isinstance(text, str):
                self._check_text(text, library.Limit(len(text)))
        rendered = self._rendered(messages, add_generation_prompt)
        ids = self._ids(rendered, library.Limit(len(rendered)))
        if not ids:
            raise UserError(
                "the model's chat template writes nothing for these messages; give a plain prompt"
            )
        return self._checked(ids)

    def spelled(self, text: str) -> list[str]:
        """Control tokens whose texts occur in a plain text, which `encode` takes as letters."""
        if not self._any_added.search(text):
            return []
        found = self._control.guard.placeholders
        return sorted((token for token in found if token in text), key=text.index)

    def leaves_out(self, role: str) -> bool:
        """Whether the chat template writes nothing of what a message of `role` says, as those do
        that expect a list of parts, or no system message.
        """
        messages = [{"role": role, "content": _ANSWER}]
        if role == "system":
            messages.append({"role": "user", "content": "a"})
        try:
            return _ANSWER[0] not in self._rendered(messages, add_generation_prompt=True)
        except UserError:
            return False

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """Ids that end an answer in a chat, beside those that the checkpoint names.

        They are EOS by the tokenizer's own files, the control token that the template writes after
        an answer, and known names of one.
        """
        texts = [self._special[role] for role in ("eos_token",) if role in self._special]
        texts += self._ends
        ids = [self._added[text][0] for text in texts if text in self._added]
        return tuple(dict.fromkeys([*ids, *self._after_answers]))

    def in_turns(self, ids: Iterable[int]) -> bool:
        """Whether tokens hold a control token with which the template begins or ends a turn."""
        return not self._turn_marks.isdisjoint(ids)

    # What enters

    def _check_text(self, text: str, limit: library.Limit) -> None:
        check_text(text)
        if self.context is None or len(text) <= _CHARACTERS * self.context:
            return
        # Counted piece by piece, so that a text far too long costs no more than one that fits. A
        # cut changes tokens beside it alone; only twice the context is certainly too much.
        count, start = 0, 0
        while start < len(text):
            piece = text[start : start + _PIECE]
            if len(piece) == _PIECE and (cut := max(piece.rfind(" "), piece.rfind("\n"))) > 0:
                piece = piece[:cut]
            start += len(piece)
            count += len(self._ids(piece, limit))
            if count > 2 * self.context:
                raise UserError(
                    f"it has more than {2 * self.context:,} tokens, the model's context is "
                    f"{self.context:,}; shorten it, or give --context-length if the model was made "
                    f"for more"
                )

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and self.vocab_size is not None:
            check_ids(ids, self.vocab_size)
        return ids

    def _ids(self, text: str, limit: library.Limit, around: bool = False) -> list[int]:
        placeholders = self._control.ids
        try:
            with library.muted():
                # A batch, for that alone lets other threads run meanwhile.
                (encoding,) = limit.call(
                    self._backend.encode_batch, [text], add_special_tokens=around
                )
        except library.LibraryError as error:
            raise UserError(f"the model's tokenizer cannot read this text ({error})") from None
        found = sum(i in placeholders for i in encoding.ids)
        if found != len(self._control.guard.placeholder.findall(text)):
            # Its normaliser changes the token's text, so that the library finds it here and there.
            raise UserError(
                "the model's tokenizer does not find the control tokens that its chat template "
                "writes; mark them as not normalized in its files"
            )
        return [placeholders.get(i, i) for i in encoding.ids]

    # Control tokens

    @cached_property
    def _first(self) -> str | None:
        """The token that goes before a text, which a rendered prompt may begin with already."""
        around = self._backend.encode("", add_special_tokens=True).ids
        return self._backend.id_to_token(around[0]) if around else None

    @cached_property
    def _any_added(self) -> re.Pattern:
        return re.compile("|".join(map(re.escape, self._added)) or r"(?!)")

    @cached_property
    def _control(self) -> _Control:
        """Special tokens, those with a role, and every added one that the template can write."""
        written, rendered = set(), set()
        others = self._added.keys() - self._marked
        if others and self.chat_template is not None:
            written = {text for text in others if text in self.chat_template}
            examples = "\n".join(self._examples)
            rendered = {text for text in others if text in examples}
        control = sorted(self._marked | written | rendered)
        guard = Guard(control)
        backend = self._backend
        # What a template means as a control token becomes a placeholder, an added token of its own
        # that stands for the id: the text around it then splits and merges as it does around the
        # control token itself. The texts of the tokens are letters then.
        for text in control:
            token = self._added[text][1]
            flags = {
                name: getattr(token, name)
                for name in ("lstrip", "rstrip", "single_word", "normalized")
            }
            if not token.special:
                backend.add_special_tokens([AddedToken(text, special=True, **flags)])
            backend.add_tokens([AddedToken(guard.placeholders[text], **flags)])
        ids = {
            backend.token_to_id(placeholder): self._added[text][0]
            for text, placeholder in guard.placeholders.items()
        }
        return _Control(guard, ids, frozenset(self._marked | rendered))

    @property
    def _placeholder_ids(self) -> dict[int, int]:
        control = self.__dict__.get("_control")  # not there: no placeholder yet
        return control.ids if control else {}

    def _rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """The template's text, its own control tokens as placeholders."""
        if self.chat_template is None:
            why = self._why_no_template or "the model has no chat template"
            raise UserError(f"{why}; give a prompt or an instruct model")
        guard = self._control.guard
        if self._too_much is not None:
            raise self._too_much
        # An answer may hold what the model writes inside of answers, such as the ends of a thought.
        guarded = [
            guard.mark(
                message,
                self._control.structural if message.get("role") == "assistant" else None,
            )
            for message in messages
        ]
        text = render(self.chat_template, guarded, add_generation_prompt, self._special)
        return guard.unmark(text)

    # What a template writes, found out by examples

    @cached_property
    def _examples(self) -> list[str]:
        """Renderings of short conversations, those that the template refuses left out."""
        texts = []
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
        system, tool = {"role": "system", "content": "c"}, {"role": "tool", "content": "d"}
        for messages in (
            [user],
            [system, user, answer, user],
            [user, answer],
            [user, answer, tool],
        ):
            try:
                texts.append(render(self.chat_template, messages, True, self._special))
            except TemplateLimitError as error:
                self._too_much = error
                break
            except UserError:
                continue
        return texts

    @cached_property
    def _turns(self) -> list[tuple[list[int], list[int], bool]]:
        """Control tokens before an answer and after it, and whether one follows it at once."""
        guard = self._control.guard
        ids = {p: self._added[text][0] for text, p in guard.placeholders.items()}
        user, answer = {"role": "user", "content": "a"}, {"role": "assistant", "content": _ANSWER}
        found = []
        # Some templates end an answer only where another turn follows.
        for messages in ([user, answer], [user, answer, user]):
            try:
                text = self._rendered(messages, add_generation_prompt=False)
            except UserError:
                continue
            before, _, after = text.partition(_ANSWER)
            at_once = guard.placeholder.match(after.lstrip()) is not None
            found.append(
                (
                    *([ids[p] for p in guard.placeholder.findall(t)] for t in (before, after)),
                    at_once,
                )
            )
        return found

    @cached_property
    def _after_answers(self) -> tuple[int, ...]:
        return next(((after[0],) for _, after, at_once in self._turns if at_once), ())

    @cached_property
    def _turn_marks(self) -> frozenset[int]:
        roles = {self._special.get(role) for role in ("bos_token", "eos_token")}
        neutral = {self._added[text][0] for text in roles if text in self._added}
        marks = {i for before, after, _ in self._turns for i in (*before, *after)}
        return frozenset(marks - neutral)


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
    """The tokenizer of a Hugging Face directory, out of all its files.

    `path` is its tokenizer.json, `settings` its tokenizer_config.json; `chat_template` goes before
    any template in the files. Raises UserError as `read_tokenizer_files` does.
    """
    files = read_tokenizer_files(path, settings, chat_template)
    backend, roles = files.backend, files.roles
    bos_id = backend.token_to_id(roles["bos_token"]) if "bos_token" in roles else None
    around = backend.encode("", add_special_tokens=True).ids
    if bos_id is None and len(around) == 1:
        bos_id = around[0]
    return Tokenizer(
        backend, bos_id, roles, files.chat_template, why_no_template=files.why_no_template
    )


# How byte-level vocabularies cut text before merging, by `tokenizer.ggml.pre`.
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3")
_CUTS = {
    "gpt-2": backends.GPT2_CUT,
    **dict.fromkeys(("smollm", "starcoder", "refact", "minerva-7b"), backends.DIGITS_CUT),
    **dict.fromkeys(_LLAMA3, backends.LLAMA3_CUT),
}

# Tokens that end a turn or a message, by the names that models give them. Many files name only the
# end of the text in their metadata.
_ENDS = (
    "<|eot_id|>",
    "<|eom_id|>",
    "<|im_end|>",
    "<|end|>",
    "<|return|>",
    "<|call|>",
    "<end_of_turn>",
    "<|end_of_text|>",
    "<|endoftext|>",
    "<|end_of_turn|>",
    "<|eot|>",
    "<EOT>",
)


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
        by_default = {"bos": 1, "eos": 2} if kind == "llama" and len(tokens) > 2 else {}
        ids = {
            name: metadata.get(f"tokenizer.ggml.{name}_token_id", by_default.get(name))
            for name in ("bos", "eos")
        }
        for name, token_id in ids.items():
            if token_id is not None and token_id not in range(len(tokens)):
                raise ValueError(f"{name}_token_id is {token_id}, there are {len(tokens)} tokens")
        special = {f"{name}_token": tokens[i] for name, i in ids.items() if i is not None}
        add_bos = metadata.get("tokenizer.ggml.add_bos_token", bos_by_default)
        add_eos = metadata.get("tokenizer.ggml.add_eos_token", False)
        backends.put_around(
            backend, ids["bos"] if add_bos else None, ids["eos"] if add_eos else None
        )
    except Exception as error:  # The library raises bare Exception, bad metadata anything.
        raise UserError(
            f"{path}: its tokenizer is damaged ({first_line(error)}); fetch the file again"
        ) from None
    template = default_template(metadata.get("tokenizer.chat_template"))
    return Tokenizer(backend, ids["bos"], special, template, ends=_ENDS)


def from_sentencepiece(model: SentencePieceModel, chat_template: str | None) -> Tokenizer:
    """The tokenizer of a SentencePiece `tokenizer.model`; a plain text begins with BOS."""
    backend = backends.sentencepiece_bpe(
        model.pieces, model.scores, model.types, model.dummy_prefix
    )
    backends.add_tokens(backend, model.pieces, model.types)
    backends.put_around(backend, model.bos_id)
    special = {"bos_token": model.pieces[model.bos_id], "eos_token": model.pieces[model.eos_id]}
    return Tokenizer(backend, model.bos_id, special, chat_template)


def from_ranks(
    model: RankedModel, bos_id: int, eos_id: int, chat_template: str | None
) -> Tokenizer:
    """The tokenizer of a `tokenizer.model` of Llama 3; a plain text begins with BOS."""
    tokens = [backends.printable(token) for token in model.tokens]
    backend = backends.byte_level_bpe(
        tokens, backends.all_merges(tokens), backends.LLAMA3_CUT, ignore_merges=True
    )
    backend.add_special_tokens(model.special)
    backends.put_around(backend, bos_id)
    ids = {"bos_token": bos_id, "eos_token": eos_id}
    special = {name: backend.id_to_token(i) for name, i in ids.items()}
    return Tokenizer(backend, bos_id, special, chat_template)
