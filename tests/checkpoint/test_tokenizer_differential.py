"""Tokenizer directories of real-world fields: the ids of transformers, or a refusal."""

import json

from hypothesis import Phase, assume, given, settings
from hypothesis import strategies as st
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)
from transformers import AutoTokenizer

from cptool.checkpoint.tokenizer.huggingface import from_files
from cptool.errors import UserError

WORDS = ["<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|pad|>", "<tool>"]
CHATML = (
    "{{ bos_token }}{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}{{ eos_token }}"
)
LETTERS = "abcdefghijklmnopqrstuvwxyz \n▁"
TEXTS = st.text(st.sampled_from("abc xyz\n"), min_size=1, max_size=12)
FLAGS = st.fixed_dictionaries(
    {
        "lstrip": st.booleans(),
        "rstrip": st.booleans(),
        "normalized": st.booleans(),
        "special": st.booleans(),
    }
)
SOME = st.lists(st.sampled_from(WORDS), unique=True, max_size=4)


def byte_level():
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("a", "b"), ("ab", "c"), ("Ġ", "x")]
    tokens = [*alphabet, *("".join(pair) for pair in merges)]
    return models.BPE({token: i for i, token in enumerate(tokens)}, merges)


def spaced():
    characters = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), *LETTERS]
    merges = [("a", "b"), ("▁", "a"), ("▁", "▁")]
    tokens = [*characters, *("".join(pair) for pair in merges)]
    vocabulary = {token: i for i, token in enumerate(tokens)}
    return models.BPE(vocabulary, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True)


@st.composite
def directories(draw):
    """Files by name, as JSON, and a chat template."""
    kind = draw(st.sampled_from(["bytes", "spaces"]))
    backend = Tokenizer(byte_level() if kind == "bytes" else spaced())
    if kind == "bytes":
        prefix = draw(st.booleans())
        backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=prefix)
        backend.decoder = decoders.ByteLevel()
        if draw(st.booleans()):
            backend.normalizer = draw(
                st.sampled_from([normalizers.NFC(), normalizers.Lowercase(), normalizers.Strip()])
            )
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
    inside = draw(SOME)
    for word in inside:
        backend.add_tokens([AddedToken(word, **draw(FLAGS))])
    around = draw(st.sampled_from([[], ["<s>"], ["<s>", "<|im_start|>"]]))
    behind = draw(st.sampled_from([[], [], ["</s>"]]))
    if set(around + behind) <= set(inside):
        backend.post_processor = processors.TemplateProcessing(
            single=[*around, "$A", *behind],
            special_tokens=[(word, backend.token_to_id(word)) for word in {*around, *behind}],
        )
    size = backend.get_vocab_size()
    outside = [word for word in WORDS if word not in inside]
    config = {
        "tokenizer_class": draw(
            st.sampled_from(
                [
                    "PreTrainedTokenizerFast",
                    "LlamaTokenizer",
                    "LlamaTokenizerFast",
                    None,
                    "Own",
                    "CodeLlamaTokenizer",
                    "GPTNeoXTokenizerFast",
                ]
            )
        )
    }
    files = {"tokenizer_config.json": config}
    where = draw(st.sampled_from(["decoder", "added", "nowhere"]))
    listed = draw(st.permutations(outside))[: draw(st.integers(0, 3))]
    shift = draw(st.sampled_from([0, 0, 0, 1]))
    if where == "decoder":
        config["added_tokens_decoder"] = {
            str(size + shift + i): {"content": word, "single_word": False, **draw(FLAGS)}
            for i, word in enumerate(listed)
        }
    elif where == "added":
        files["added_tokens.json"] = {word: size + shift + i for i, word in enumerate(listed)}
    for file in ("tokenizer_config.json", "special_tokens_map.json"):
        if file == "special_tokens_map.json" and draw(st.booleans()):
            continue
        fields = files.setdefault(file, {})
        for role, word in (("bos_token", "<s>"), ("eos_token", draw(st.sampled_from(WORDS)))):
            form = draw(st.sampled_from(["absent", "text", "object", "null"]))
            if form == "text":
                fields[role] = word
            elif form == "object":
                mark = {"__type": "AddedToken"} if file == "tokenizer_config.json" else {}
                flags = {"lstrip": False, "rstrip": False, "normalized": draw(st.booleans())}
                fields[role] = {**mark, "content": word, "single_word": False, **flags}
            elif form == "null" and file == "tokenizer_config.json":
                fields[role] = None
        if draw(st.integers(0, 2)) == 0:
            fields["additional_special_tokens"] = draw(SOME)
        if file == "tokenizer_config.json":
            for key in ("add_bos_token", "add_eos_token", "add_prefix_space", "legacy"):
                if draw(st.booleans()):
                    config[key] = draw(st.booleans())
    config["chat_template"] = CHATML
    files = {name: {k: v for k, v in value.items()} for name, value in files.items()}
    if config["tokenizer_class"] is None:
        del files["tokenizer_config.json"]["tokenizer_class"]
    return backend.to_str(), files


# No shrinking: it takes minutes, and each example is small.
@settings(
    max_examples=80,
    deadline=None,
    derandomize=True,
    phases=[Phase.explicit, Phase.generate],
)
@given(directories(), TEXTS, TEXTS)
def test_ids_are_those_of_transformers_or_a_refusal(tmp_path_factory, made, text, question):
    path = tmp_path_factory.mktemp("tokenizer")
    tokenizer_json, files = made
    (path / "tokenizer.json").write_text(tokenizer_json)
    (path / "config.json").write_text('{"model_type": "llama"}')
    for name, fields in files.items():
        (path / name).write_text(json.dumps(fields))
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": text},
        {"role": "user", "content": text},
    ]
    try:
        reference = AutoTokenizer.from_pretrained(path)
        plain = reference.encode(text)
        chat = reference.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=False
        )
    except Exception:
        assume(False)
    try:
        ours = from_files(path / "tokenizer.json", files["tokenizer_config.json"])
        assert ours.encode(text) == plain
        assert ours.chat(messages) == chat
    except UserError as refusal:
        assert "\n" not in str(refusal)
        # The contradictions among these fields.
        assert "has id" in str(refusal) or "does not find" in str(refusal), refusal
