"""Small models in every format, and a session with a conversation, for others to damage."""

import json
import os
import subprocess
import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = sorted({str(path.parent) for path in TESTS.rglob("*.py")})

SAID = "the lighthouse keeper wrote"
WIDTHS = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=16,
    max_position_embeddings=65536,
    initializer_range=0.3,
    tie_word_embeddings=False,
)
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
LETTERS = ["<unk>", "<s>", "</s>", "\u2581", *"abcdefghijklmnopqrstuvwxyz", "th", "he"]


def command(*arguments) -> list[str]:
    return [sys.executable, "-m", "cptool", *map(str, arguments)]


def cptool(*arguments, **options) -> subprocess.CompletedProcess:
    """Runs the command, which must succeed."""
    done = subprocess.run(
        command(*arguments), capture_output=True, text=True, timeout=300, env=os.environ, **options
    )
    if done.returncode:
        raise RuntimeError(f"cptool {arguments}: {done.stderr}")
    return done


def make_huggingface(directory: Path) -> Path:
    from llama_reference import save_llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([f"{SAID} down the weather and the ships " * 50], trainer)
    size = tokenizer.get_vocab_size()
    save_llama(directory, seed=1, vocab_size=size, eos_token_id=1, bos_token_id=None, **WIDTHS)
    tokenizer.save(str(directory / "tokenizer.json"))
    fields = {"eos_token": "<|im_end|>", "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(fields))
    return directory


def make_meta(directory: Path) -> Path:
    import torch
    from meta_checkpoint import save_meta
    from test_tokenizer_model import train_sentencepiece
    from transformers import LlamaConfig, LlamaForCausalLM

    model = train_sentencepiece()
    torch.manual_seed(2)
    llama = LlamaForCausalLM(LlamaConfig(vocab_size=600, **WIDTHS))
    save_meta(llama, directory)
    (directory / "tokenizer.model").write_bytes(model)
    return directory


def make_gguf(path: Path) -> Path:
    from test_checkpoint_gguf import write

    path.parent.mkdir(parents=True, exist_ok=True)
    write(
        path,
        **{
            "tokenizer.ggml.model": "llama",
            "tokenizer.ggml.tokens": LETTERS,
            "tokenizer.ggml.scores": [-float(i) for i in range(len(LETTERS))],
            "tokenizer.ggml.token_type": [2, 3, 3] + [1] * (len(LETTERS) - 3),
            "tokenizer.ggml.bos_token_id": 1,
            "tokenizer.ggml.eos_token_id": 2,
            "tokenizer.ggml.unknown_token_id": 0,
        },
    )
    return path


def make_session(model: Path, directory: Path) -> Path:
    """Two questions of a conversation, each saved: two segments and two turns."""
    for said in ("what did the keeper write", "and the ships"):
        source = directory if directory.exists() else model
        cptool(
            "chat",
            source,
            "-n",
            6,
            "--threads",
            1,
            "--device",
            "cpu",
            input=f"{said}\n/save {directory}\n",
        )
    return directory


def make_conversations(model: Path, directory: Path, *, answered: bool) -> Path:
    """Two conversations of a batch, whose first messages have answers or wait for them."""
    rest = ("--threads", 1, "--device", "cpu")
    asked = ("--prompt", SAID, "--prompt", "and the ships")
    cptool("prefill", model, "--chat", *asked, "--session", directory, *rest)
    if answered:
        cptool("decode", directory, "-n", 4, *rest)
    return directory
