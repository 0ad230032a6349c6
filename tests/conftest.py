"""Models that several test files read."""

import json
import os
import signal
from pathlib import Path

import pytest

# Threads of torch that have nothing to do sleep: while they spin, other processes of a test do not
# run. It is read once, when torch is imported.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from family_table import Recorder, recorder
from llama_reference import save_llama
from small_smollm2 import small_smollm2 as write_small_smollm2

# All readers, which `rank_modules` then has ranks forked with.
import cptool.checkpoint.gguf.reader
import cptool.checkpoint.huggingface.reader
import cptool.checkpoint.meta.reader  # noqa: F401
from cptool.checkpoint import catalogue, open_checkpoint
from cptool.distributed import server_process
from cptool.engine.rank_modules import rank_modules
from cptool.errors import UserError
from cptool.files import cache_dir

# Ranks are forked from a process that imports test modules: asking for a GPU must not start CUDA.
os.environ.setdefault("PYTORCH_NVML_BASED_CUDA_CHECK", "1")

# A process hands down what it ignores, as one in the background of a shell does; handlers it keeps.
for number, handler in (
    (signal.SIGINT, signal.default_int_handler),
    (signal.SIGHUP, lambda *_: None),
):
    if signal.getsignal(number) == signal.SIG_IGN:
        signal.signal(number, handler)

SMOLLM2 = "smollm2-135m-instruct"


def pytest_configure(config):
    if path := os.environ.get("CPTOOL_FAMILY_OUTCOMES"):
        config.pluginmanager.register(Recorder(Path(path)))


family_outcome = pytest.fixture(recorder)


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory):
    """A cache that shares the user's models, and has no hardware profile but what tests save."""
    directory = tmp_path_factory.mktemp("cache")
    models = cache_dir() / "models"
    models.mkdir(parents=True, exist_ok=True)
    (directory / "models").symlink_to(models, target_is_directory=True)
    before = os.environ.get("CPTOOL_CACHE")
    os.environ["CPTOOL_CACHE"] = str(directory)
    yield
    if before is None:
        del os.environ["CPTOOL_CACHE"]
    else:
        os.environ["CPTOOL_CACHE"] = before


@pytest.fixture(scope="session", autouse=True)
def ranks_are_forked_with_their_modules():
    """Whichever test is the first to start ranks, those of all others need import nothing."""
    start = server_process.start

    def start_for_all(entry, preload=()):
        start(entry, {*preload, *rank_modules()})

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(server_process, "start", start_for_all)
        yield


@pytest.fixture(scope="session")
def smollm2_path() -> Path:
    """The real SmolLM2-135M-Instruct as GGUF, pulled once into the user's cache."""
    return catalogue.pull(SMOLLM2)


@pytest.fixture(scope="session")
def smollm2_reference(smollm2_path):
    """The same model in `transformers`, float32, read from the GGUF by its own code."""
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        smollm2_path.parent, gguf_file=smollm2_path.name, dtype=torch.float32
    )


@pytest.fixture(scope="session")
def small_smollm2(smollm2_path, tmp_path_factory):
    """A small model with SmolLM2's tokenizer: its GGUF file, and itself in `transformers`."""
    path = tmp_path_factory.mktemp("models") / "small-smollm2.gguf"
    return path, write_small_smollm2(smollm2_path, path)


@pytest.fixture(scope="session")
def small_smollm2_path(small_smollm2) -> Path:
    return small_smollm2[0]


@pytest.fixture(scope="session")
def small_smollm2_reference(small_smollm2):
    return small_smollm2[1]


@pytest.fixture(scope="session")
def template(smollm2_path):
    """The tokenizer of SmolLM2 in `transformers`, with its own rendering of chat templates."""
    from tokenizers import pre_tokenizers
    from transformers import AutoTokenizer

    oracle = AutoTokenizer.from_pretrained(smollm2_path.parent, gguf_file=smollm2_path.name)
    # transformers does not look at `tokenizer.ggml.pre`; this is what the model's own
    # tokenizer.json says, and what llama.cpp means by "smollm".
    oracle.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return oracle


@pytest.fixture(scope="session")
def mqa_path(tmp_path_factory) -> Path:
    """A random-weight checkpoint with 5 query heads on 1 KV head; no tokenizer."""
    return save_llama(
        tmp_path_factory.mktemp("models") / "mqa",
        seed=0,
        vocab_size=301,
        hidden_size=160,
        intermediate_size=224,
        num_hidden_layers=3,
        num_attention_heads=5,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=2048,
        tie_word_embeddings=False,
        initializer_range=0.2,
        eos_token_id=300,
        bos_token_id=299,
    )


@pytest.fixture(scope="session")
def mqa_reference(mqa_path):
    from transformers import LlamaForCausalLM

    return LlamaForCausalLM.from_pretrained(mqa_path, dtype=torch.float32)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory) -> Path:
    """4 query heads on 2 KV heads, which two tensor-parallel ranks divide."""
    return save_llama(
        tmp_path_factory.mktemp("models") / "tiny",
        seed=1,
        vocab_size=301,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        max_position_embeddings=512,
        tie_word_embeddings=False,
        initializer_range=0.3,
    )


@pytest.fixture
def token_file(tmp_path):
    """Writes token ids as `--token-ids` takes them."""

    def write(ids) -> str:
        path = tmp_path / f"ids-{abs(hash(str(ids)))}.json"
        path.write_text(json.dumps(ids))
        return str(path)

    return write


def greedy(reference, ids: list[int], count: int, eos: tuple[int, ...], **options) -> list[int]:
    """What `transformers` continues `ids` with: greedy, at most `count` tokens, up to and with a
    token of `eos`; `options` are further ones of its `generate`.
    """
    tokens = torch.tensor([ids])
    with torch.inference_mode():
        out = reference.generate(
            tokens,
            attention_mask=torch.ones_like(tokens),
            max_new_tokens=count,
            do_sample=False,
            temperature=None,
            top_p=None,
            eos_token_id=list(eos) or None,
            pad_token_id=0,
            **options,
        )
    return out[0, len(ids) :].tolist()


def edit_json(path: Path, **changes) -> None:
    """Changes fields of a JSON file; a value of `...` removes the field."""
    fields = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: v for key, v in fields.items() if v is not ...}))


def refusal(path: Path) -> str:
    """The one line by which opening the checkpoint is refused."""
    with pytest.raises(UserError) as error:
        open_checkpoint(str(path))
    message = str(error.value)
    assert "\n" not in message
    return message


def refused_or_harmless(model: Path, size: int) -> None:
    """Opening a damaged file of `size` bytes ends in one line, or leaves every tensor inside."""
    try:
        checkpoint = open_checkpoint(str(model))
    except UserError as error:
        assert "\n" not in str(error)
    else:
        for stored in checkpoint.stored.values():
            assert stored.offset + stored.nbytes <= size
