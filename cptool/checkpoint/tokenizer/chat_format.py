"""What a chat template writes: turns, and the control tokens that begin and end them."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from cptool.checkpoint.tokenizer.guard import Guard
from cptool.checkpoint.tokenizer.templates import Message, TemplateLimitError, render
from cptool.errors import UserError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

# Stands for the text of a message when a template is tried out.
ANSWER = "\ue000answer\ue001"

_USER, _ANSWERED = {"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}
_SYSTEM, _TOOL = {"role": "system", "content": "c"}, {"role": "tool", "content": "d"}

# Short conversations by which it is found out what a template writes.
_EXAMPLES = (
    [_USER],
    [_SYSTEM, _USER, _ANSWERED, _USER],
    [_USER, _ANSWERED],
    [_USER, _ANSWERED, _TOOL],
)


class ChatFormat:
    """A chat template with the model's added tokens, some of which it writes as control tokens.

    `special` maps the template variables `bos_token`, `eos_token` to their texts, `added` maps the
    texts of all added tokens to ids, and `marked` are those that the files mark as special.
    """

    template: str | None
    why_no_template: str | None
    _too_much: TemplateLimitError | None = None  # once a rendering went beyond its bounds

    def __init__(
        self,
        template: str | None,
        *,
        special: Mapping[str, str],
        added: Mapping[str, int],
        marked: frozenset[str],
        why_no_template: str | None = None,
    ) -> None:
        self.template, self.why_no_template = template, why_no_template
        self._special, self._added, self._marked = special, added, marked

    def text(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Return the template's text as it stands, control tokens spelled out."""
        return render(self._found, messages, add_generation_prompt, self._special)

    @property
    def _found(self) -> str:
        """The template. Raises UserError if there is none."""
        if self.template is None:
            why = self.why_no_template or "the model has no chat template"
            raise UserError(f"{why}; give a prompt or an instruct model")
        return self.template

    def rendered(self, messages: Sequence[Message], add_generation_prompt: bool) -> str:
        """Return the template's text, its own control tokens as placeholders of the guard."""
        template, guard = self._found, self.guard
        if self._too_much is not None:
            raise self._too_much
        # An answer may hold what the model writes inside of answers, such as the ends of a thought.
        guarded = [
            guard.mark(message, self._structural if message.get("role") == "assistant" else None)
            for message in messages
        ]
        text = render(template, guarded, add_generation_prompt, self._special)
        return guard.unmark(text)

    def leaves_out(self, role: str) -> bool:
        """Return whether the template omits the text of a message of `role`.

        Some templates expect a list of parts, or no system message.
        """
        messages = [{"role": role, "content": ANSWER}]
        if role == "system":
            messages.append(_USER)
        try:
            return ANSWER[0] not in self.rendered(messages, add_generation_prompt=True)
        except UserError:
            return False

    @cached_property
    def guard(self) -> Guard:
        """The guard of special tokens, those with a role, and every added one that the template can
        write.
        """
        written: set[str] = set()
        if self._others and self.template is not None:
            written = {text for text in self._others if text in self.template}
        return Guard(sorted(self._structural | written))

    @cached_property
    def after_answers(self) -> tuple[int, ...]:
        """The id of the control token that the template writes directly after an answer, if any."""
        return next(((after[0],) for _, after, at_once in self._turns if at_once), ())

    @cached_property
    def turn_marks(self) -> frozenset[int]:
        """Ids of the control tokens with which the template begins or ends a turn."""
        texts = (self._special.get(role) for role in ("bos_token", "eos_token"))
        neutral = {self._added[text] for text in texts if text is not None and text in self._added}
        marks = {i for before, after, _ in self._turns for i in (*before, *after)}
        return frozenset(marks - neutral)

    @property
    def _others(self) -> set[str]:
        return self._added.keys() - self._marked

    @cached_property
    def _structural(self) -> frozenset[str]:
        """Texts that even an answer must not hold as control tokens.

        They are those that the template writes around messages, and those that are marked special.
        """
        rendered: set[str] = set()
        if self._others and self.template is not None:
            examples = "\n".join(self._examples(self.template))
            rendered = {text for text in self._others if text in examples}
        return self._marked | rendered

    def _examples(self, template: str) -> list[str]:
        """Return the renderings of short conversations, without those that the template refuses."""
        texts = []
        for messages in _EXAMPLES:
            try:
                texts.append(render(template, messages, True, self._special))
            except TemplateLimitError as error:
                self._too_much = error
                break
            except UserError:
                continue
        return texts

    @cached_property
    def _turns(self) -> list[tuple[list[int], list[int], bool]]:
        """Control tokens before an answer and after it, and whether one follows it directly."""
        guard = self.guard
        ids = {p: self._added[text] for text, p in guard.placeholders.items()}
        answer = {"role": "assistant", "content": ANSWER}
        found = []
        # Some templates end an answer only if another turn follows.
        for messages in ([_USER, answer], [_USER, answer, _USER]):
            try:
                text = self.rendered(messages, add_generation_prompt=False)
            except UserError:
                continue
            before, _, after = text.partition(ANSWER)
            at_once = guard.placeholder.match(after.lstrip()) is not None
            begin, end = ([ids[p] for p in guard.placeholder.findall(t)] for t in (before, after))
            found.append((begin, end, at_once))
        return found
