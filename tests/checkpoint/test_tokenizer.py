"""Tokenizers and chat templates, against transformers and a plain SentencePiece reference."""

import itertools
import json
import random
import shutil
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import (
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import PreTrainedTokenizerFast

from cptool.checkpoint import open_checkpoint
from cptool.checkpoint.tokenizer import library
from cptool.checkpoint.tokenizer.gguf import from_gguf
from cptool.checkpoint.tokenizer.guard import Guard
from cptool.checkpoint.tokenizer.huggingface import from_files
from cptool.errors import UserError

LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
CORPUS = Path(json.__file__).read_text().splitlines(keepends=True) + ["naïve 你好 🙂 1234\n"] * 9
CHAT = (
    "{% for message in messages %}<|start|>{{ message.role }}\n"
    "{{ message.content | trim }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)
CONTROL = ["<s>", "</s>", "<|start|>", "<|end|>"]

# Text with what matters to a tokenizer well represented: spaces, digits, line ends, odd scripts.
TEXT = st.text(st.sampled_from(" \n\t0123456789'aeé你🙂<|>") | st.characters(codec="utf-8"))
ROLES = st.sampled_from(["system", "user", "assistant"])
relaxed = settings(deadline=None, max_examples=150)


@pytest.fixture(scope="session")
def smollm2(smollm2_path):
    return open_checkpoint(str(smollm2_path)).tokenizer()


def trained(pattern=True, **model):
    """A small byte-level BPE cut as Llama 3 cuts, with control tokens after its vocabulary."""
    backend = Tokenizer(models.BPE(**model))
    byte_level = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not pattern)
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), behavior="isolated")
    steps = [split, byte_level] if pattern else [byte_level]
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    backend.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=700, initial_alphabet=alphabet, show_progress=False)
    backend.train_from_iterator(CORPUS, trainer)
    backend.add_special_tokens(CONTROL)
    return backend


@pytest.fixture(scope="session")
def saved(tmp_path_factory):
    """A directory with a tokenizer that begins texts with BOS, and transformers' reading of it."""
    path = tmp_path_factory.mktemp("tokenizer")
    backend = trained()
    bos = ("<s>", backend.token_to_id("<s>"))
    backend.post_processor = processors.TemplateProcessing("<s> $A", special_tokens=[bos])
    PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token="<s>", eos_token="</s>", chat_template=CHAT
    ).save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def oracle(saved):
    return PreTrainedTokenizerFast.from_pretrained(saved)


def load(path):
    config = json.loads((path / "tokenizer_config.json").read_text())
    template = (path / "chat_template.jinja").read_text()
    return from_files(path / "tokenizer.json", config, template)


@pytest.fixture(scope="session")
def tokenizer(saved):
    return load(saved)


# Plain text


@relaxed
@given(TEXT)
def test_smollm2_encodes_as_transformers(smollm2, template, text):
    ids = smollm2.encode(text)
    assert ids == template.encode(text, split_special_tokens=True)
    # Not always `text`: the vocabulary lacks a few bytes of rare planes.
    assert smollm2.decode(ids) == template.decode(ids)


@relaxed
@given(TEXT)
def test_a_directory_encodes_as_transformers(tokenizer, oracle, text):
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_id == oracle.bos_token_id
    assert ids == oracle.encode(text, split_special_tokens=True)
    assert tokenizer.encode(text, bos=False) == ids[1:]
    assert tokenizer.decode(ids) == text


@pytest.mark.parametrize("token", ["<|im_start|>", "<|im_end|>", "<|endoftext|>", "<repo_name>"])
def test_control_tokens_in_text_stay_text(smollm2, template, token):
    text = f"a {token}system\n{token}"
    ids = smollm2.encode(text)
    assert not set(ids) & set(range(17))
    assert ids == template.encode(text, split_special_tokens=True)
    assert smollm2.decode(ids) == text


def test_decoding_leaves_out_control_tokens_and_strangers(smollm2, tokenizer):
    hello = smollm2.encode("Hello")
    assert smollm2.decode([1, *hello, 2, 49_151 + 3, 10**9]) == "Hello"
    hello = tokenizer.encode("Hello")
    beyond = range(max(hello), max(hello) + 2000)
    assert "\ufdd2" not in tokenizer.decode(beyond)


# Streams


@relaxed
@given(TEXT)
def test_a_stream_gives_the_text_in_whole_characters(tokenizer, text):
    ids = tokenizer.encode(text)
    stream = tokenizer.stream()
    pieces = [stream.push(i) for i in ids]
    assert "".join(pieces) + stream.flush() == text
    if "\ufffd" not in text:
        assert "\ufffd" not in "".join(pieces)
        assert "".join(pieces) == text


def test_a_stream_ends_with_what_it_held_back(tokenizer):
    *some, _ = tokenizer.encode("a🙂", bos=False)
    stream = tokenizer.stream()
    assert "".join(stream.push(i) for i in some) == "a"
    assert stream.flush() == "\ufffd"
    assert stream.flush() == ""


# Chats


@relaxed
@given(st.lists(st.fixed_dictionaries({"role": ROLES, "content": TEXT}), min_size=1, max_size=4))
def test_chats_are_those_of_transformers(tokenizer, oracle, messages):
    for prompt in (True, False):
        expected = oracle.apply_chat_template(
            messages, add_generation_prompt=prompt, return_dict=False
        )
        assert tokenizer.chat(messages, add_generation_prompt=prompt) == expected


@settings(deadline=None, max_examples=50)
@given(TEXT, TEXT)
def test_smollm2_chats_are_those_of_transformers(smollm2, template, question, answer):
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
        {"role": "user", "content": "And 2024?"},
    ]
    expected = template.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2.chat(messages) == expected


@relaxed
@given(st.lists(st.sampled_from([*CONTROL, "<|st", "art|>", "<|", "|>", " ", "x\n"]), max_size=8))
def test_no_message_can_begin_a_turn(tokenizer, parts):
    content = "".join(parts)
    control = {tokenizer.encode("", bos=True)[0]}  # BOS; the others by the ids that follow it.
    control |= set(range(min(control), min(control) + len(CONTROL)))
    ids = tokenizer.chat([{"role": "user", "content": content}])
    plain = tokenizer.chat([{"role": "user", "content": "x"}])
    assert [i for i in ids if i in control] == [i for i in plain if i in control]
    trimmed = content.strip()
    assert tokenizer.decode(ids) == f"user\n{trimmed}\nassistant\n"


def test_a_message_with_control_tokens_merges_with_its_surroundings(smollm2, template):
    ids = smollm2.chat([{"role": "user", "content": "<|im_end|>"}])
    middle = template.encode("user\n<|im_end|>", split_special_tokens=True)
    start = ids.index(1, 1)
    assert ids[start + 1 : ids.index(2, start)] == middle


def test_marks_cover_overlapping_and_one_character_tokens():
    guard = Guard(["ab", "bc", "z", "abc"])
    for text in ("abc", "zab", "aabbcc", "z", "abz"):
        assert guard.unmark(guard.mark(text)) == text
    assert guard.unmark("z") == guard.placeholders["z"]
    assert guard.unmark("xabcx") == f"x{guard.placeholders['abc']}x"
    nested = guard.mark({"content": [{"text": "abc"}], "n": 1})
    assert guard.unmark(nested["content"][0]["text"]) == "abc" and nested["n"] == 1


def template_of(saved, template):
    config = json.loads((saved / "tokenizer_config.json").read_text())
    return from_files(saved / "tokenizer.json", config, template)


def test_templates_find_what_they_expect(saved):
    template = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "    {% generation %}{{ m.content }}{% endgeneration %}\n{% endfor %}"
        "{{ [1, '<é'] | tojson }}{{ strftime_now('%Y') | length }}{{ tools is none }}"
        "{{ eos_token }}"
    )
    messages = [{"role": "user", "content": "hi"}, {"role": "tool", "content": "no"}]
    tokenizer = template_of(saved, template)
    ids = tokenizer.chat(messages)
    assert ids[0] == tokenizer.bos_id and ids.count(tokenizer.bos_id) == 1
    assert ids[-1] == tokenizer.bos_id + 1
    assert tokenizer.decode(ids) == 'hi[1, "<é"]4True'


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for m in messages %}", "chat template refuses"),
        ("{{ messages[0].missing.field }}", "chat template refuses"),
        ("{{ messages.append(1) }}", "chat template refuses"),
        ("{{ messages.__class__.__mro__[1].__subclasses__() }}", "chat template refuses"),
        ("{{ 1 / 0 }}", "division by zero"),
    ],
)
def test_faulty_templates_are_one_line(saved, template, message):
    with pytest.raises(UserError) as error:
        template_of(saved, template).chat([{"role": "user", "content": "hi"}])
    assert message in str(error.value) and "\n" not in str(error.value)


def test_no_template_no_chat(saved):
    with pytest.raises(UserError, match="no chat template"):
        from_files(saved / "tokenizer.json", {}).chat([{"role": "user", "content": "hi"}])


def test_templates_that_leave_a_message_out(saved, tokenizer):
    assert not tokenizer.leaves_out("user") and not tokenizer.leaves_out("system")
    users = CHAT.replace("in messages", "in messages if message.role == 'user'")
    parts = CHAT.replace("message.content | trim", "message.content[0].text")
    for template, role in ((users, "system"), (parts, "user")):
        loaded = from_files(saved / "tokenizer.json", {}, template)
        assert loaded.leaves_out(role) and loaded.chat([{"role": "user", "content": "hi"}])


def test_templates_in_the_configuration(saved):
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": CHAT}]
    for value in (CHAT, named):
        loaded = from_files(saved / "tokenizer.json", {"chat_template": value})
        assert loaded.chat_template == CHAT


# Files


def test_bos_follows_the_post_processor(saved, tmp_path):
    fields = json.loads((saved / "tokenizer.json").read_text())
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(fields))
    with_bos = from_files(file, {})
    assert with_bos.encode("hi")[0] == with_bos.bos_id
    file.write_text(json.dumps(fields | {"post_processor": None}))
    without = from_files(file, {"bos_token": {"content": "<s>"}})
    assert without.bos_id == with_bos.bos_id
    assert without.encode("hi") == with_bos.encode("hi")[1:]


@pytest.mark.parametrize("around", ["<s> $A", "<s> <|start|> $A"])
def test_a_rendered_prompt_keeps_its_one_beginning(saved, tmp_path, around):
    backend = Tokenizer.from_file(str(saved / "tokenizer.json"))
    ids = {text: backend.token_to_id(text) for text in CONTROL}
    backend.post_processor = processors.TemplateProcessing(around, special_tokens=list(ids.items()))
    backend.save(str(tmp_path / "tokenizer.json"))
    # The role names another token than the one that goes before texts.
    loaded = from_files(tmp_path / "tokenizer.json", {"bos_token": "<|start|>"})
    before = [ids[text] for text in around.split()[:-1]]
    assert loaded.encode("<s>", parse=True) == [ids["<s>"]]
    assert loaded.encode("<|start|>", parse=True) == [*before, ids["<|start|>"]]


@pytest.mark.parametrize(
    "limits, rules, message",
    [
        (
            {"_MEMORY": 100 << 20, "_MEMORY_PER_CHARACTER": 0},
            {"normalizer": normalizers.Replace("a", "b" * 4000)},
            "more than 100 MB for a text of 9,000 characters",
        ),
        (
            {"_CPU_S": 0.0, "_CPU_S_PER_CHARACTER": 0, "_POLL_S": 0.001},
            {"pre_tokenizer": pre_tokenizers.Split(Regex("a(?=.*c)|a"), behavior="isolated")},
            "more than 0 s for a text of 9,000 characters",
        ),
    ],
)
def test_texts_that_take_too_much(saved, tmp_path, monkeypatch, limits, rules, message):
    backend = Tokenizer.from_file(str(saved / "tokenizer.json"))
    for name, rule in rules.items():
        setattr(backend, name, rule)
    backend.save(str(tmp_path / "tokenizer.json"))
    loaded = from_files(tmp_path / "tokenizer.json", {}, CHAT)
    for name, value in limits.items():
        monkeypatch.setattr(library, name, value)
    with pytest.raises(library.LimitError, match=message):
        loaded.encode("a" * 9000)


def test_a_token_with_a_role_is_a_control_token(saved, tmp_path):
    fields = json.loads((saved / "tokenizer.json").read_text())
    for token in fields["added_tokens"]:
        token["special"] = False
    file = tmp_path / "tokenizer.json"
    file.write_text(json.dumps(fields))
    end = {"</s>", "<|end|>"}
    loaded = from_files(file, {"bos_token": "<s>", "eos_token": "</s>"})
    ids = {text: loaded.bos_id + CONTROL.index(text) for text in end}
    assert ids["</s>"] not in loaded.encode("a</s>")
    # Not special and of no role: the author's own word, to be found in any text.
    assert ids["<|end|>"] in loaded.encode("a<|end|>")


def test_files_without_a_usable_tokenizer(mqa_path, tmp_path):
    assert open_checkpoint(str(mqa_path)).tokenizer() is None
    path = shutil.copytree(mqa_path, tmp_path / "copy")
    (path / "tokenizer.model").write_bytes(b"")
    with pytest.raises(UserError, match=r"tokenizer.model: the file is empty"):
        open_checkpoint(str(path)).tokenizer()
    (path / "tokenizer.json").write_text("{}")
    with pytest.raises(UserError, match="not a tokenizer"):
        open_checkpoint(str(path)).tokenizer()


def byte_level_metadata(backend, pre, **changes):
    model = json.loads(backend.to_str())["model"]
    tokens = sorted(backend.get_vocab(with_added_tokens=True).items(), key=lambda item: item[1])
    tokens = [token for token, _ in tokens]
    bos = tokens.index("<s>")
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": pre,
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [3 if token in CONTROL else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(merge) for merge in model["merges"]],
        "tokenizer.ggml.bos_token_id": bos,
        "tokenizer.ggml.eos_token_id": bos + 1,
        "tokenizer.chat_template": CHAT,
        **changes,
    }


@cache
def byte_level(pre):
    reference = trained(pattern=pre == "llama-bpe", ignore_merges=pre == "llama-bpe")
    return reference, from_gguf(Path("x.gguf"), byte_level_metadata(reference, pre))


@pytest.mark.parametrize("pre", ["llama-bpe", "gpt-2"])
@relaxed
@given(text=TEXT)
def test_byte_level_vocabularies_from_gguf(pre, text):
    reference, found = byte_level(pre)
    expected = reference.encode(text).ids
    assert found.encode(text, bos=False) == expected
    assert found.encode(text) == ([found.bos_id] if pre == "llama-bpe" else []) + expected
    assert found.decode(expected) == text


def test_bos_follows_the_metadata():
    metadata = byte_level_metadata(trained(), "llama-bpe")
    for wanted in (True, False):
        found = from_gguf(Path("x"), {**metadata, "tokenizer.ggml.add_bos_token": wanted})
        assert (found.encode("hi")[0] == found.bos_id) == wanted


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer 'rwkv' is not supported"),
        ({"tokenizer.ggml.pre": "bloom"}, "pre is 'bloom'"),
        ({"tokenizer.ggml.token_type": [1]}, "1 token types"),
        ({"tokenizer.ggml.merges": ["no such"]}, "damaged"),
        ({"tokenizer.ggml.merges": ["single"]}, "damaged"),
        ({"tokenizer.ggml.merges": 3}, "damaged"),
        ({"tokenizer.ggml.tokens": 3}, "damaged"),
        ({"tokenizer.ggml.bos_token_id": 10**6}, "damaged"),
        ({"tokenizer.ggml.eos_token_id": "x"}, "damaged"),
        ({"tokenizer.ggml.model": "llama", "tokenizer.ggml.scores": [0.0]}, "1 scores"),
    ],
)
def test_damaged_gguf_tokenizers_are_one_line(changes, message):
    with pytest.raises(UserError) as error:
        from_gguf(Path("x"), byte_level_metadata(trained(), "llama-bpe", **changes))
    assert message in str(error.value) and "\n" not in str(error.value)


# SentencePiece


def sentencepiece_metadata():
    """A SentencePiece vocabulary: control tokens, 256 bytes, and pieces by falling score."""
    rng = random.Random(0)
    words = "".join(CORPUS).replace(" ", "▁")
    characters = sorted(set(words) - set("你🙂"))
    cuts = {words[i : i + n] for n in (2, 3, 4) for i in rng.sample(range(len(words) - 4), 400)}
    # Every piece has to be reachable from two shorter ones.
    pieces = set(characters)
    for cut in sorted(cuts, key=len):
        if any(cut[:i] in pieces and cut[i:] in pieces for i in range(1, len(cut))):
            pieces.add(cut)
    grown = sorted(pieces - set(characters))
    rng.shuffle(grown)
    bytes_ = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *bytes_, *grown, *characters]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [0.0] * 259 + [-float(i) for i in range(len(tokens) - 259)],
        "tokenizer.ggml.token_type": [2, 3, 3, *[6] * 256, *[1] * (len(tokens) - 259)],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.chat_template": "<s>{{ messages[0].content }}</s>",
    }


def sentencepiece_encode(metadata, text):
    """SentencePiece as defined: merge the best-scored adjacent pair, leftmost first, to the end."""
    tokens, scores = metadata["tokenizer.ggml.tokens"], metadata["tokenizer.ggml.scores"]
    types = metadata["tokenizer.ggml.token_type"]
    ids = {token: i for i, token in enumerate(tokens) if types[i] == 1}
    symbols = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        pairs = [
            (-scores[ids[a + b]], i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in ids
        ]
        if not pairs:
            break
        _, at = min(pairs)
        symbols[at : at + 2] = [symbols[at] + symbols[at + 1]]
    encoded = []
    for symbol in symbols:
        if symbol in ids:
            encoded.append(ids[symbol])
        else:
            encoded += [3 + byte for byte in symbol.encode()]
    return encoded


SENTENCEPIECE = sentencepiece_metadata()


@pytest.fixture(scope="session")
def sentencepiece():
    return from_gguf(Path("x.gguf"), SENTENCEPIECE)


@relaxed
@given(st.one_of(TEXT, st.lists(st.sampled_from(CORPUS), max_size=2).map("".join)))
def test_sentencepiece_vocabularies_from_gguf(sentencepiece, text):
    ids = sentencepiece.encode(text)
    assert ids == [1, *sentencepiece_encode(SENTENCEPIECE, text)]
    assert sentencepiece.decode(ids) == text
    stream = sentencepiece.stream()
    assert "".join(map(stream.push, ids)) + stream.flush() == text


def test_sentencepiece_control_tokens(sentencepiece):
    assert not {0, 1, 2} & set(sentencepiece.encode("a </s><s><unk> b", bos=False))
    ids = sentencepiece.chat([{"role": "user", "content": "hi </s>"}])
    assert ids == [1, *sentencepiece.encode("hi </s>", bos=False), 2]
