"""Text to token ids and back, through the `tokenizers` library.

Text that a user gives is never parsed for control tokens; only a chat template's own text is.
"""

import re
from collections.abc import Iterable, Sequence
from functools import cached_property

from tokenizers import AddedToken
from tokenizers import Tokenizer as Backend

from cptool.checkpoint.tokenizer import library
from cptool.checkpoint.tokenizer.chat_format import ChatFormat
from cptool.checkpoint.tokenizer.infilling import (
    Infilling,
    find_infilling,
    infilling_texts,
    unmerged,
)
from cptool.checkpoint.tokenizer.input_checks import check_ids, check_text
from cptool.checkpoint.tokenizer.stream import TextStream
from cptool.checkpoint.tokenizer.templates import Message
from cptool.errors import UserError

# A text of fewer characters per token of the context is tokenised at once.
_CHARACTERS = 8
_PIECE = 1 << 18

# Is encoded before a text that goes on; merges with nothing, and is what Code Llama's code takes.
_MARKER = "☺"


class Tokenizer:
    """A model's tokenizer, through which all texts reach the model.

    `backend` is taken over and changed; its post-processor says what goes around a text that begins
    a sequence. `special` maps the template variables `bos_token`, `eos_token` to their texts.
    `ends` are texts of further tokens that end an answer. `space_first` puts a space before a text
    that does not begin with a control token. `vocab_size` and `context` bound what a text may
    become, if they are set.
    """

    vocab_size: int | None = None
    context: int | None = None

    def __init__(
        self,
        backend: Backend,
        bos_id: int | None,
        special: dict[str, str],
        chat_template: str | None,
        *,
        ends: Sequence[str] = (),
        why_no_template: str | None = None,
        space_first: bool = False,
    ) -> None:
        self.bos_id, self._special = bos_id, special
        # Tokens with a role and those for infilling are control tokens even where the file does not
        # mark them as special.
        gap = infilling_texts(backend, special)
        control = dict.fromkeys((*special.values(), *gap))
        present = {token.content for token in backend.get_added_tokens_decoder().values()}
        backend.add_special_tokens(
            [t for t in control if t not in present and backend.token_to_id(t) is not None]
        )
        backend = unmerged(backend, gap)
        self._added = {
            token.content: (token_id, token)
            for token_id, token in sorted(backend.get_added_tokens_decoder().items())
            if token.content
        }
        marked = frozenset(
            text for text, (_, token) in self._added.items() if token.special or text in control
        )
        self._left_out = {self._added[text][0] for text in marked}
        self._ends = tuple(text for text in ends if text in self._added)
        self._chat = ChatFormat(
            chat_template,
            special=special,
            added={text: token_id for text, (token_id, _) in self._added.items()},
            marked=marked,
            why_no_template=why_no_template,
        )
        backend.encode_special_tokens = True
        self._backend, self._space_first = backend, space_first

    @property
    def chat_template(self) -> str | None:
        """The Jinja text of the chat template, None if the model has none."""
        return self._chat.template

    @property
    def eos_id(self) -> int | None:
        """The id of the token that ends a sequence by the tokenizer's own files, None if they name
        none.
        """
        return self.control_token(self._special.get("eos_token", ""))

    def encode(self, text: str, bos: bool = True, parse: bool = False) -> list[int]:
        """Return the token ids of a plain text.

        `bos` marks the beginning of a sequence, so that the text gets what the model puts around
        one: BOS as a rule. Control tokens in it are letters, unless `parse` is set. Raises
        UserError if the text is not Unicode, becomes tokens that the model does not have, or
        becomes more of them than the context holds.
        """
        limit = library.Limit(len(text))
        self._check_text(text, limit)
        if parse:
            bos = bos and not (self._first and text.startswith(self._first))
            text = self._chat.guard.unmark(text)
        return self._checked(self._ids(text, limit, around=bos))

    @cached_property
    def infilling(self) -> Infilling | None:
        """The tokens that stand around a gap which an answer fills, None if the model has none."""
        return find_infilling(self._special, self._known_id)

    def infill(self, prefix: str, suffix: str, bos: bool = True) -> list[int]:
        """Return the token ids of a prompt whose answer goes between two texts: `prefix`, `suffix`
        and the token that begins the answer. Raises UserError if the vocabulary has no tokens for
        that, and as `encode` does. Whether the model was trained for it is not known here.
        """
        if (tokens := self.infilling) is None:
            raise UserError(
                "the model has no tokens for infilling; leave out the text behind the gap, or use "
                "a model such as Code Llama 7B or Qwen 2.5 Coder"
            )
        for text in (prefix, suffix):
            self._check_text(text, library.Limit(len(text)))
        ids = [
            *(self._around if bos else ()),
            tokens.before,
            *self._plain(prefix),
            tokens.behind,
            *self._plain(suffix, goes_on=True),
            tokens.middle,
        ]
        return self._checked(ids)

    def _plain(self, text: str, goes_on: bool = False) -> list[int]:
        """Return the ids of a part of a text; one that goes on has no space before it that is not
        its own.
        """
        if not text:
            return []
        limit = library.Limit(len(text))
        if not (goes_on and self._adds_space):
            return self._ids(text, limit)
        marker = self._ids(_MARKER, limit)
        return self._ids(_MARKER + text, limit)[len(marker) :]

    def _known_id(self, text: str) -> int | None:
        """Return the id of the token of a text, None if the model's vocabulary has none."""
        found = self._backend.token_to_id(text) if text else None
        known = found is not None and (self.vocab_size is None or found < self.vocab_size)
        return found if known else None

    def decode(self, ids: Iterable[int], *, control: bool = False) -> str:
        """Return the text of token ids, without ids outside the vocabulary, and without control
        tokens unless `control` is set.
        """
        hidden = self.__dict__.get("_placeholder_ids", {})  # missing until a text is encoded
        left_out = () if control else self._left_out
        known = [i for i in ids if i not in left_out and i not in hidden]
        try:
            return library.call(self._backend.decode, known, skip_special_tokens=False)
        except library.LibraryError as error:
            raise UserError(f"the model's tokenizer cannot write this text ({error})") from None

    def spelling(self, token_id: int) -> str:
        """Return how the vocabulary spells a token, control tokens included."""
        return self._backend.id_to_token(token_id) or f"id {token_id}"

    def control_token(self, text: str) -> int | None:
        """Return the id of the control token that is spelled `text`, None if there is none."""
        token_id, _ = self._added.get(text, (None, None))
        return token_id if token_id in self._left_out else None

    def stream(self, after: Iterable[int] = (), *, control: bool = False) -> TextStream:
        """Return a decoder of tokens that arrive one at a time, after those whose text it goes on
        with; `control` is that of `decode`.
        """
        left_out = () if control else self._left_out
        before = [i for i in after if i not in left_out]
        return TextStream(lambda ids: self.decode(ids, control=control), before)

    def text(
        self, ids: Iterable[int], after: Iterable[int] = (), *, ended: bool, control: bool = False
    ) -> str:
        """Return the text that `ids` add to that of the tokens before them.

        A character that `after` leaves unfinished is part of it. One that `ids` leave unfinished is
        not, for the tokens to come, unless the text has `ended`: then it is U+FFFD.
        """
        stream = self.stream(after, control=control)
        return stream.push(*ids) + (stream.flush() if ended else "")

    def chat(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> list[int]:
        """Return the token ids of a conversation: messages are dicts with `role` and `content`.

        Whether there is a BOS is up to the template. Control tokens in a message count as plain
        text. Raises UserError if the model has no template or its template refuses the messages,
        and as `encode` does.
        """
        texts = [value for message in messages for value in message.values()]
        for text in texts:
            if isinstance(text, str):
                self._check_text(text, library.Limit(len(text)))
        rendered = self._chat.rendered(messages, add_generation_prompt)
        ids = self._ids(rendered, library.Limit(len(rendered)))
        if not ids:
            raise UserError(
                "the model's chat template writes nothing for these messages; give a plain prompt"
            )
        return self._checked(ids)

    def chat_text(self, messages: Sequence[Message], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the template writes it, control tokens spelled out.

        What a message spells is not told apart from them. Raises as `chat` does.
        """
        return self._chat.text(messages, add_generation_prompt)

    def spelled(self, text: str) -> list[str]:
        """Return the control tokens whose texts occur in a plain text.

        `encode` takes them as letters.
        """
        if not self._any_added.search(text):
            return []
        found = self._chat.guard.placeholders
        return sorted((token for token in found if token in text), key=text.index)

    def leaves_out(self, role: str) -> bool:
        """Return whether the chat template omits the text of a message of `role`."""
        return self._chat.leaves_out(role)

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """Ids that end an answer in a chat, beside those that the checkpoint names.

        They are EOS by the tokenizer's own files, the control token that the template writes after
        an answer, and known names of one.
        """
        texts = [self._special[role] for role in ("eos_token",) if role in self._special]
        texts += self._ends
        ids = [self._added[text][0] for text in texts if text in self._added]
        return tuple(dict.fromkeys([*ids, *self._chat.after_answers]))

    def in_turns(self, ids: Iterable[int]) -> bool:
        """Return whether tokens hold a control token that begins or ends a turn."""
        return not self._chat.turn_marks.isdisjoint(ids)

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
                    f"{self.context:,}; shorten it, or give `context_length` if the model was made "
                    f"for more"
                )

    def _checked(self, ids: list[int]) -> list[int]:
        if ids and self.vocab_size is not None:
            check_ids(ids, self.vocab_size)
        return ids

    def _ids(self, text: str, limit: library.Limit, around: bool = False) -> list[int]:
        placeholders = self._placeholder_ids
        if self._space_first and text and not self._chat.guard.placeholder.match(text):
            text = f" {text}"
        try:
            with library.muted():
                # A batch, for only that lets other threads run meanwhile.
                (encoding,) = limit.call(
                    self._backend.encode_batch, [text], add_special_tokens=around
                )
        except library.LibraryError as error:
            raise UserError(f"the model's tokenizer cannot read this text ({error})") from None
        found = sum(i in placeholders for i in encoding.ids)
        if found != len(self._chat.guard.placeholder.findall(text)):
            # Its normaliser changes the token's text, so that the library finds it here and there.
            raise UserError(
                "the model's tokenizer does not find the control tokens that its chat template "
                "writes; mark them as not normalized in its files"
            )
        ids: list[int] = encoding.ids
        return [placeholders.get(i, i) for i in ids]

    @cached_property
    def _placeholder_ids(self) -> dict[int, int]:
        """The ids of the control tokens by those of their placeholders.

        What a template means as a control token becomes a placeholder, an added token of its own
        that stands for the id: the text around it then splits and merges as it does around the
        control token itself. The texts of the tokens are letters then.
        """
        backend, placeholders = self._backend, self._chat.guard.placeholders
        marked, added = [], []
        for text in sorted(placeholders):
            token = self._added[text][1]
            flags = {
                name: getattr(token, name)
                for name in ("lstrip", "rstrip", "single_word", "normalized")
            }
            if not token.special:
                marked.append(AddedToken(text, special=True, **flags))
            added.append(AddedToken(placeholders[text], **flags))
        # All at once: each call goes through all added tokens, of which a Gemma has thousands.
        backend.add_special_tokens(marked)
        backend.add_tokens(added)
        ids = {text: backend.token_to_id(placeholder) for text, placeholder in placeholders.items()}
        return {i: self._added[text][0] for text, i in ids.items() if i is not None}

    @cached_property
    def _around(self) -> list[int]:
        """The ids that go before a text that begins a sequence."""
        ids: list[int] = self._backend.encode("", add_special_tokens=True).ids
        return [i for i in ids if i == self.bos_id]

    @cached_property
    def _adds_space(self) -> bool:
        """Whether a text gets a space before it that is not its own."""
        first = self._ids("a", library.Limit(1))[:1]
        return bool(first) and str(self._backend.id_to_token(first[0])).startswith("▁")

    @cached_property
    def _first(self) -> str | None:
        """The token that goes before a text, which a rendered prompt may begin with already."""
        around = self._backend.encode("", add_special_tokens=True).ids
        return self._backend.id_to_token(around[0]) if around else None

    @cached_property
    def _any_added(self) -> re.Pattern[str]:
        return re.compile("|".join(map(re.escape, self._added)) or r"(?!)")
