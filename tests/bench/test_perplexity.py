"""`cptool bench perplexity` is that of transformers on every number of ranks, by both protocols."""

import json
import math

import pytest
import torch
from click.testing import CliRunner
from ranks import run_ranks

from cptool.bench.perplexity import Job, Window, measure, windows
from cptool.cli.main import main
from cptool.engine.options import EngineOptions
from cptool.engine.setup.loading import Setup
from cptool.errors import OptionError

TEXT = [(11 * i * i + 5 * i + i // 7) % 290 for i in range(150)]


def test_windows_that_overlap_score_each_token_but_the_first_once():
    found = windows(23, window=8, stride=3)
    assert found[:3] == [Window(0, 8, 1), Window(3, 11, 8), Window(6, 14, 11)]
    assert found[-1] == Window(15, 23, 20)
    scored = [n for window in found for n in range(window.first, window.stop)]
    assert scored == list(range(1, 23))
    assert all(window.first - window.start >= 8 - 3 for window in found[1:])


def test_windows_side_by_side_score_all_but_their_first_tokens():
    assert windows(20, window=8, stride=8) == [
        Window(0, 8, 1),
        Window(8, 16, 9),
        Window(16, 20, 17),
    ]
    assert len(windows(20, window=8, stride=8, whole=True)) == 2
    assert len(windows(17, window=8, stride=8)) == 2  # nothing is before the last token
    assert windows(1, window=8, stride=8) == windows(7, window=8, stride=8, whole=True) == []


@pytest.mark.parametrize(("window", "stride"), [(1, 1), (8, 9), (8, 0)])
def test_windows_that_cannot_be(window, stride):
    with pytest.raises(OptionError):
        windows(20, window=window, stride=stride)


def sliding(model, tokens: list[int], length: int, stride: int) -> tuple[float, int]:
    """The sum of negative log-likelihoods and their number, by the loop of "Perplexity of
    fixed-length models" in the documentation of transformers, but that each window's mean is
    multiplied by the number of its scores: there, later windows count one too few.
    """
    ids, total, count, before = torch.tensor([tokens]), 0.0, 0, 0
    for begin in range(0, len(tokens), stride):
        end = min(begin + length, len(tokens))
        targets = ids[:, begin:end].clone()
        targets[:, : -(end - before)] = -100
        scores = int((targets[:, 1:] != -100).sum())
        if scores:
            total += model(ids[:, begin:end], labels=targets).loss.item() * scores
        count, before = count + scores, end
        if end == len(tokens):
            break
    return total, count


def gptq(model, tokens: list[int], length: int) -> tuple[float, int]:
    """The same by the loop of GPTQ's evaluation: whole windows side by side."""
    losses = []
    for n in range(len(tokens) // length):
        batch = torch.tensor([tokens[n * length : (n + 1) * length]])
        logits = model(batch).logits[:, :-1]
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        losses.append(loss.double().item())
    return sum(losses) * (length - 1), len(losses) * (length - 1)


def reference(model, tokens, length, stride, whole):
    with torch.inference_mode():
        return gptq(model, tokens, length) if whole else sliding(model, tokens, length, stride)


def assert_same(fields, nll: float, count: int) -> None:
    """The mean is the same but for float32 roundings of logits, as is its exponential."""
    assert fields["scored"] == count
    assert fields["nll"] == pytest.approx(nll / count, rel=2e-6)
    assert fields["perplexity"] == math.exp(fields["nll"])
    parts = fields["results"]
    assert sum(part["scored"] for part in parts) == count
    assert math.fsum(part["scored"] * part["nll"] for part in parts) == pytest.approx(nll, rel=2e-6)


CUTS = {"sliding": (32, 12, False), "side by side": (32, 32, False), "GPTQ": (32, 32, True)}


@pytest.mark.parametrize("cut", CUTS)
def test_random_models_on_1_to_4_ranks_are_transformers(mqa_path, mqa_reference, cut):
    length, stride, whole = CUTS[cut]
    found = windows(len(TEXT), window=length, stride=stride, whole=whole)
    job = Job(tokens=tuple(TEXT), windows=tuple(found))
    nll, count = reference(mqa_reference, TEXT, length, stride, whole)
    setup = Setup(model=str(mqa_path), dtype="float32")
    for n in (1, 2, 4):
        fields, *others = run_ranks(n, measure, setup, job)
        assert_same(fields, nll, count)
        assert others == [{}] * (n - 1)


def test_windows_in_chunks_and_several_batches(mqa_path, mqa_reference):
    tokens = [(13 * i * i + i) % 290 for i in range(2500)]
    found = windows(len(tokens), window=1000, stride=600)
    job = Job(tokens=tuple(tokens), windows=tuple(found))
    assert job.batch == 2 and len(job.windows) == 4
    setup = Setup(model=str(mqa_path), dtype="float32", options=EngineOptions(chunk=512))
    fields = run_ranks(2, measure, setup, job)[0]
    assert_same(fields, *reference(mqa_reference, tokens, 1000, 600, False))
    assert sum(fields["variants"].values()) == 8


def bench(*arguments, code=0):
    result = CliRunner().invoke(main, ["bench", "perplexity", *map(str, arguments)])
    assert result.exit_code == code, (result.output, result.stderr, result.exception)
    return result


def test_a_text_file(small_smollm2_path, small_smollm2_reference, template, tmp_path):
    path, plot = tmp_path / "text.txt", tmp_path / "p.png"
    text = "The lamp was lit early, for the wind came from the west.\n" * 30
    path.write_text(text)
    asked = (small_smollm2_path, path, "--window", 64, "--stride", 16, "--cp", 2, "--threads", 1)
    fields = json.loads(bench(*asked, "--json", "--plot", plot).stdout)
    tokens = template(text)["input_ids"]
    assert fields["tokens"] == len(tokens)
    assert_same(fields, *reference(small_smollm2_reference, tokens, 64, 16, False))
    assert plot.read_bytes().startswith(b"\x89PNG")
    shown = bench(*asked[:2], "--threads", 1)
    assert f"of {len(tokens) - 1:,} of {len(tokens):,} tokens" in shown.stdout


def test_a_text_longer_than_the_context(tiny_model, tmp_path):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps([n % 90 for n in range(1300)]))
    fields = json.loads(bench(tiny_model, path, "--ids", "--threads", 1, "--json").stdout)
    assert fields["window"] == fields["stride"] <= 512 and fields["windows"] > 2


@pytest.mark.parametrize(
    ("ids", "arguments", "line"),
    [
        ([], (), "has 0 tokens"),
        ([1], (), "has 1 token, and at least 2 are needed"),
        ([1, 2], ("--whole-windows", "--window", 8), "at least 8 are needed"),
        ([[1], [2]], (), "holds 2 sequences"),
        ([1, 2, 3000], (), "token id 3000"),
        ([1, 2, 3], ("--window", "1M"), "--window 1000000: the model's context is"),
        ([1, 2, 3], ("--window", 4, "--stride", 5), "--stride 5: it must be 1 to the window"),
    ],
)
def test_mistakes(tiny_model, tmp_path, ids, arguments, line):
    path = tmp_path / "ids.json"
    path.write_text(json.dumps(ids))
    stderr = bench(tiny_model, path, "--ids", *arguments, code=2).stderr
    assert line in stderr and len(stderr.splitlines()) == 1


@pytest.mark.slow
def test_smollm2_on_1_to_4_ranks_is_transformers(smollm2_path, smollm2_reference):
    from test_readme import README

    from cptool.checkpoint import open_checkpoint

    tokens = open_checkpoint(str(smollm2_path)).tokenizer().encode(README.read_text())[:3000]
    for length, stride, whole in ((512, 256, False), (512, 512, True)):
        found = windows(len(tokens), window=length, stride=stride, whole=whole)
        job = Job(tokens=tuple(tokens), windows=tuple(found))
        nll, count = reference(smollm2_reference, tokens, length, stride, whole)
        for n in (1, 2, 4):
            fields = run_ranks(n, measure, Setup(model=str(smollm2_path), dtype="float32"), job)[0]
            assert_same(fields, nll, count)
