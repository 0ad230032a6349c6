"""lm-evaluation-harness gives the same scores through cptool as through its own model `hf`."""

import json
import subprocess
import sys

import pytest
import torch

from cptool.errors import UserError

lm_eval = pytest.importorskip("lm_eval", reason="lm-evaluation-harness is not installed")
HFLM = pytest.importorskip("lm_eval.models.huggingface").HFLM
CptoolLM = pytest.importorskip("cptool.evaluation.harness").CptoolLM

QUESTIONS = [
    {"question": f"What is the {thing} of the lighthouse?", "choices": choices, "label": label}
    for thing, choices, label in (
        ("keeper's name", ["Ann", "Ben the old sailor", "Carl"], 1),
        ("lamp made of", ["glass", "wood"], 0),
        ("height", ["ten", "twenty feet", "thirty feet and a half", "x"], 2),
        ("cat", ["Biscuit", "Whisky"], 0),
        ("wind tonight", ["west", "east", "north"], 1),
    )
]
TEXTS = [
    {"text": "The wind came from the west, and the sea was rough.\n" * lines, "answer": "lamp"}
    for lines in (1, 7, 20)
]
CHOICE = """
task: local_choice
dataset_path: json
dataset_kwargs: {data_files: {test: %(questions)s}, cache_dir: %(cache)s}
test_split: test
output_type: multiple_choice
doc_to_text: "Question: {{question}}\\nAnswer:"
doc_to_choice: "{{choices}}"
doc_to_target: label
metric_list: [{metric: acc}, {metric: acc_norm}]
"""
UNTIL = """
task: local_until
dataset_path: json
dataset_kwargs: {data_files: {test: %(texts)s}, cache_dir: %(cache)s}
test_split: test
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: answer
generation_kwargs: {until: ["\\n", " the"], max_gen_toks: 12, do_sample: false}
metric_list: [{metric: exact_match}]
"""
ROLLING = """
task: local_rolling
dataset_path: json
dataset_kwargs: {data_files: {test: %(texts)s}, cache_dir: %(cache)s}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""
TASKS = {"local_choice": CHOICE, "local_until": UNTIL, "local_rolling": ROLLING}
CONTEXT = 128


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    """A folder with the tasks and their data."""
    folder = tmp_path_factory.mktemp("tasks")
    places = {"cache": folder / "cache"}
    for name, rows in (("questions", QUESTIONS), ("texts", TEXTS)):
        places[name] = folder / f"{name}.jsonl"
        places[name].write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    for name, text in TASKS.items():
        (folder / f"{name}.yaml").write_text(text % places)
    return folder


def evaluated(model, tasks, **options):
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(tasks), include_defaults=False)
    return lm_eval.simple_evaluate(
        model,
        tasks=list(TASKS),
        task_manager=manager,
        bootstrap_iters=0,
        log_samples=True,
        **options,
    )


def through_hf(reference, template, tasks):
    """What the harness's own model gives."""
    template.pad_token = template.eos_token
    model = HFLM(reference, tokenizer=template, max_length=CONTEXT, device="cpu")
    return evaluated(model, tasks)


def through_cptool(path, tasks, **options):
    model = CptoolLM(str(path), threads=1, device="cpu", max_length=CONTEXT, **options)
    try:
        return evaluated(model, tasks)
    finally:
        model.close()


@pytest.fixture(scope="module")
def by_transformers(tasks, small_smollm2_reference, template):
    return through_hf(small_smollm2_reference, template, tasks)


def numbers(results, task):
    return {
        name: value
        for name, value in results["results"][task].items()
        if isinstance(value, float) and "stderr" not in name
    }


def answers(results, task):
    return [sample["resps"][0][0] for sample in results["samples"][task]]


def assert_same(found, by_transformers):
    for task in TASKS:
        ours, theirs = numbers(found, task), numbers(by_transformers, task)
        assert theirs and ours == pytest.approx(theirs, rel=1e-5), task
    assert answers(found, "local_until") == answers(by_transformers, "local_until")
    for ours, theirs in zip(
        found["samples"]["local_choice"],
        by_transformers["samples"]["local_choice"],
        strict=True,
    ):
        for (mine, greedy), (other, likeliest) in zip(
            ours["filtered_resps"], theirs["filtered_resps"], strict=True
        ):
            assert mine == pytest.approx(other, rel=1e-5) and greedy == likeliest


@pytest.mark.parametrize(("cp", "batch_size"), [(1, 1), (2, "auto")])
def test_scores_are_those_of_hf(tasks, small_smollm2_path, by_transformers, cp, batch_size):
    found = through_cptool(small_smollm2_path, tasks, cp=cp, batch_size=batch_size)
    assert_same(found, by_transformers)


@pytest.mark.slow
def test_smollm2_has_the_scores_of_hf(tasks, smollm2_path, smollm2_reference, template):
    found = through_cptool(smollm2_path, tasks, cp=2, batch_size="auto", dtype="float32")
    assert_same(found, through_hf(smollm2_reference, template, tasks))


def test_the_last_token_of_a_text_may_lie_beyond_the_context(mqa_path, mqa_reference):
    """As in the windows of a text longer than the model's context."""
    from cptool import LLM
    from cptool.llm.scoring import scores

    tokens = [n % 290 for n in range(2049)]
    with LLM(mqa_path, threads=1, device="cpu", dtype="float32") as llm:
        (found,) = scores(llm, [tokens], first=[2040], top=1)
        with pytest.raises(UserError, match="2,050 tokens"):
            scores(llm, [[*tokens, 1]], first=[1])
    with torch.inference_mode():
        table = mqa_reference(torch.tensor([tokens[:-1]])).logits[0].log_softmax(-1)
    truth = [table[n - 1, tokens[n]].item() for n in range(2040, 2049)]
    assert [score.logprob for score in found] == pytest.approx(truth, rel=1e-4)
    assert [score.top[0][0] for score in found] == table[2039:].argmax(-1).tolist()


def test_the_template_is_that_of_transformers(small_smollm2_path, template):
    model = CptoolLM(str(small_smollm2_path), threads=1, device="cpu")
    said = [{"role": "user", "content": "Who keeps the lamp?"}]
    begun = [*said, {"role": "assistant", "content": "Its keeper is"}]
    try:
        text = model.apply_chat_template(said)
        assert text == template.apply_chat_template(
            said, tokenize=False, add_generation_prompt=True
        )
        assert model.tok_encode(text) == template(text)["input_ids"]
        assert model.apply_chat_template(begun, False) == template.apply_chat_template(
            begun, tokenize=False, continue_final_message=True
        )
        assert model.chat_template(True) == template.chat_template
        assert (model.prefix_token_id, model.eot_token_id) == (
            template.bos_token_id,
            template.eos_token_id,
        )
    finally:
        model.close()


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        ({"num_beams": 4}, "num_beams: no such argument of a generation"),
        ({"max_gen_toks": 8192}, "an answer must leave room for a prompt"),
    ],
)
def test_generations_that_cannot_be(small_smollm2_path, arguments, line):
    model = CptoolLM(str(small_smollm2_path), threads=1, device="cpu")
    try:
        with pytest.raises(UserError, match=line):
            model._generation(arguments)
    finally:
        model.close()


@pytest.mark.parametrize(
    ("options", "line"),
    [
        ({"batch_size": "many"}, "it must be a number of requests"),
        ({"max_length": 1 << 20}, "2 to the model's context"),
        ({"weights": "q9"}, "weights"),
    ],
)
def test_options_that_cannot_be(small_smollm2_path, options, line):
    with pytest.raises(UserError, match=line):
        CptoolLM(str(small_smollm2_path), threads=1, device="cpu", **options)


def test_the_command_line_of_the_harness_knows_the_model(
    tasks, small_smollm2_path, tmp_path, monkeypatch, capsys
):
    arguments = f"pretrained={small_smollm2_path},cp=2,threads=1,max_length={CONTEXT}"
    command = ["--model", "cptool", "--model_args", arguments]
    command += ["--tasks", "local_until", "--include_path", str(tasks)]
    done = subprocess.run(
        [sys.executable, "-m", "cptool.evaluation", *command, "--output_path", str(tmp_path)],
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "local_until" in done.stdout
    (written,) = tmp_path.rglob("results*.json")
    assert json.loads(written.read_text())["config"]["model"] == "cptool"

    from cptool.evaluation.__main__ import main

    command[command.index(arguments)] = "pretrained=/nowhere"
    monkeypatch.setattr(sys, "argv", ["cptool.evaluation", *command])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("cptool: /nowhere")
