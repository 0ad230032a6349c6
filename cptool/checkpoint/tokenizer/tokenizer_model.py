"""Tokenizers from a `tokenizer.model`, of either kind that Meta released, told apart by content."""

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from cptool.checkpoint.tokenizer import sentencepiece, tiktoken
from cptool.errors import UserError

if TYPE_CHECKING:
    from cptool.checkpoint.tokenizer.tokenizer import Tokenizer

# The formats that the models were trained on, which Meta's releases define in code only.

_LLAMA2_CHAT = """\
{%- if messages[0].role == 'system' -%}
  {%- set system = '<<SYS>>\\n' ~ messages[0].content ~ '\\n<</SYS>>\\n\\n' -%}
  {%- set turns = messages[1:] -%}
{%- else -%}
  {%- set system = '' -%}
  {%- set turns = messages -%}
{%- endif -%}
{%- for message in messages -%}
  {%- for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] -%}
    {%- if tag in message.content -%}
      {{- raise_exception('the text holds ' ~ tag ~ ', which marks the turns') -}}
    {%- endif -%}
  {%- endfor -%}
{%- endfor -%}
{%- for message in turns -%}
  {%- if message.role != ['user', 'assistant'][loop.index0 % 2] -%}
    {{- raise_exception('user and assistant must alternate, after at most one system message') -}}
  {%- endif -%}
  {%- if message.role == 'user' -%}
    {%- set content = (system if loop.first else '') ~ message.content -%}
    {{- bos_token ~ '[INST] ' ~ content | trim ~ ' [/INST]' -}}
  {%- else -%}
    {{- ' ' ~ message.content | trim ~ ' ' ~ eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""

_LLAMA3_CHAT = """\
{{- bos_token -}}
{%- for message in messages -%}
  {%- if message.role not in ['system', 'user', 'assistant', 'ipython'] -%}
    {{- raise_exception('role ' ~ message.role ~ ' is not one of Llama 3') -}}
  {%- endif -%}
  {{- '<|start_header_id|>' ~ message.role ~ '<|end_header_id|>\\n\\n' -}}
  {{- message.content | trim ~ '<|eot_id|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
  {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' -}}
{%- endif -%}
"""


@dataclass(frozen=True, kw_only=True)
class TokenizerModel:
    """A `tokenizer.model` and what its release defines beside it.

    `size` counts the ids, `eos_ids` end an answer, `chat_template` is None if cptool does not know
    the format.
    """

    path: Path
    model: sentencepiece.SentencePieceModel | tiktoken.RankedModel
    size: int
    bos_id: int
    eos_ids: tuple[int, ...]
    chat_template: str | None

    def tokenizer(self) -> "Tokenizer":
        """Return the tokenizer; a plain text begins with BOS."""
        from cptool.checkpoint.tokenizer.meta import from_ranks, from_sentencepiece

        if isinstance(self.model, tiktoken.RankedModel):
            return from_ranks(self.model, self.bos_id, self.eos_ids[0], self.chat_template)
        return from_sentencepiece(self.model, self.chat_template)


def read_tokenizer_model(path: Path) -> TokenizerModel:
    """Read either kind; UserError if the file is neither, or is damaged."""
    data = path.read_bytes()
    if not data:
        raise UserError(f"{path}: the file is empty; fetch it again")
    if data[0] == 0x0A:  # The first field of a SentencePiece model; base64 has no such byte.
        model = sentencepiece.parse(path, data)
        # Code Llama 70B, the only one with this piece, was trained on another format.
        template = None if "<step>" in model.pieces else _LLAMA2_CHAT
        return TokenizerModel(
            path=path,
            model=model,
            size=len(model.pieces),
            bos_id=model.bos_id,
            eos_ids=(model.eos_id,),
            chat_template=template,
        )
    ranked = tiktoken.parse(path, data)
    # Ends of a message (`eom`), a turn (`eot`) or a text: a base model writes only the last.
    eos_ids = tuple(ranked.special_id(name) for name in ("end_of_text", "eom_id", "eot_id"))
    return TokenizerModel(
        path=path,
        model=ranked,
        size=len(ranked.tokens) + len(ranked.special),
        bos_id=ranked.special_id("begin_of_text"),
        eos_ids=eos_ids,
        chat_template=_LLAMA3_CHAT,
    )
