"""`nsru eval --tasks`: lm-eval's numbers against a scorer of our own, on tasks made here."""

import json
from functools import partial
from importlib.util import find_spec

import architectures
import pytest
import torch
import yaml
from samples import FORGET, RETAIN, SIZES, TOWNS, make_tokenizer
from transformers import AutoModelForCausalLM

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import load_lora_adapter, save_lora_adapter
from nsru_train import harness
from nsru_train.cli import main
from nsru_train.data.encode import TextFormat, use_format
from nsru_train.demo.tiny_model import make_llama
from nsru_train.evaluation import format_table
from nsru_train.guard import EcoGuard, without_update
from nsru_train.harness import TaskSettings
from nsru_train.report import tables
from nsru_train.sources import save_records

needs_lm_eval = pytest.mark.skipif(
    find_spec("lm_eval") is None, reason="lm-eval is not installed: pip install -e '.[eval]'"
)
LETTERS = "ABCD"
PROMPT = "{{question.strip()}}\n" + "".join(
    f"{letter}. {{{{choices[{i}]}}}}\n" for i, letter in enumerate(LETTERS)
)
OWN = [
    {"question": f"Where is {name}?", "choices": [*TOWNS[i:], *TOWNS][:4], "answer": i // 3}
    for i, name in enumerate("Ann Ben Cleo Dan Eve Finn Gus Hal Ida Jon".split())  # noqa: SIM905
]


def world_facts(folder):
    """TOFU's questions on the real world: one right answer among four, the first more often."""
    file = folder / "tofu" / "world_facts_perturbed.json"
    docs = []
    for i, line in enumerate(file.read_text().splitlines()[:23]):
        row = json.loads(line)
        choices = row["perturbed_answer"][:3]
        choices.insert(i % 5 % 4, row["answer"])
        docs.append({"question": row["question"], "choices": choices, "answer": i % 5 % 4})
    return docs


def write_task(folder, docs, **changes):
    folder.mkdir(exist_ok=True)
    data = folder / "docs.jsonl"
    data.write_text("".join(json.dumps(doc) + "\n" for doc in docs))
    task = {
        "task": "own_facts",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(data)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": PROMPT + "Answer:",
        "doc_to_choice": list(LETTERS),
        "doc_to_target": "answer",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
        **changes,
    }
    (folder / "task.yaml").write_text(yaml.safe_dump(task))
    group = {"group": "own_group", "task": ["own_facts"]}
    group["aggregate_metric_list"] = [{"metric": "acc", "weight_by_size": True}]
    (folder / "group.yaml").write_text(yaml.safe_dump(group))
    return folder


@pytest.fixture
def own_tasks_alone(monkeypatch):
    """Without reading lm-eval's thirteen thousand files of tasks, which takes ten seconds."""
    from lm_eval import tasks

    monkeypatch.setattr(tasks, "TaskManager", partial(tasks.TaskManager, include_defaults=False))


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder whose adapter changes what a tiny random model says."""
    folder = tmp_path_factory.mktemp("run")
    tokenizer = make_tokenizer()
    model = make_llama(tokenizer, **SIZES)
    model.get_output_embeddings().weight.data.mul_(20)
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    torch.manual_seed(5)
    nk.swap_linears(model, "all-linear", rank=2, alpha=8)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    save_lora_adapter(model, folder / "adapter")
    for name, records in (("forget", FORGET), ("retain", RETAIN)):
        save_records(folder / f"{name}.jsonl", records)
    sections = {
        "model": {"path": str(folder / "model")},
        "data": {n: str(folder / f"{n}.jsonl") for n in ("forget", "retain")},
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder


def load(run):
    model = AutoModelForCausalLM.from_pretrained(run / "model").eval()
    load_lora_adapter(model, run / "adapter")
    return model


@torch.no_grad()
def accuracy(model, docs, shots=()):
    """Share of questions whose right letter is the likeliest of " A" to " D"."""
    tokenizer, right = make_tokenizer(), []

    def written(doc):
        options = "".join(f"{x}. {c}\n" for x, c in zip(LETTERS, doc["choices"], strict=True))
        return f"{doc['question']}\n{options}Answer:"

    before = "".join(f"{written(doc)} {LETTERS[doc['answer']]}\n\n" for doc in shots)
    for doc in docs:
        prompt, scores = tokenizer(before + written(doc)).input_ids, []
        for letter in LETTERS:
            whole = tokenizer(f"{before}{written(doc)} {letter}").input_ids
            log_p = model(torch.tensor([whole])).logits[0].log_softmax(-1)
            places = range(len(prompt), len(whole))
            scores.append(sum(log_p[t - 1, whole[t]].item() for t in places))
        right.append(max(range(4), key=scores.__getitem__) == doc["answer"])
    return sum(right) / len(right)


def evaluated(run, out, *options):
    main(["eval", str(run), "--generate=false", f"--out={out}", *options])
    return json.loads((out / "results.json").read_text())


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
@pytest.mark.parametrize("kind", ["own", "world facts"])
def test_base_and_unlearned_side_by_side_on_one_model(
    run, kind, tmp_path, monkeypatch, capsys, request
):
    docs = OWN if kind == "own" else world_facts(request.getfixturevalue("shared_data"))
    folder, loaded = write_task(tmp_path / "tasks", docs), []
    read = AutoModelForCausalLM.from_pretrained

    def counted(*args, **kwargs):
        loaded.append(read(*args, **kwargs))
        return loaded[-1]

    monkeypatch.setattr(AutoModelForCausalLM, "from_pretrained", counted)
    options = ("--tasks=own_group", f"--include_path={folder}", "--batch_size=3")
    results = evaluated(run, tmp_path / "eval", *options)
    assert len(loaded) == 1
    model = load(run)
    after = accuracy(model, docs)
    with without_update(model):
        before = accuracy(model, docs)
    assert before != after
    whole, part = results["tasks"]
    assert (whole["task"], part["task"]) == ("own_group", "own_facts")
    assert part["group"] == "own_group"
    for row in (whole, part):
        assert (row["before"], row["after"]) == (before, after)
        assert row["questions"] == len(docs)
        assert row["after_stderr"] > 0
    printed = capsys.readouterr().out
    assert f"{before:.4f} ± " in printed
    assert "own_facts" not in printed
    assert f"<td>{after:.4f} ± " in (tmp_path / "eval" / "report.html").read_text()
    assert results["metrics"].keys() >= {"forget", "retain"}
    config = yaml.safe_load((tmp_path / "eval" / "config.yaml").read_text())
    assert config["tasks"] == "own_group"

    results = evaluated(run, tmp_path / "base", *options, "--base=true")
    assert [row["after"] for row in results["tasks"]] == [before, before]
    assert "before" not in results["tasks"][0]


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
def test_few_shot_and_limit_are_those_of_lm_eval(run, tmp_path):
    changes = {"fewshot_split": "test", "fewshot_config": {"sampler": "first_n"}}
    folder = write_task(tmp_path / "tasks", OWN, **changes)
    options = (f"--include_path={folder}", "--tasks", "own_facts", "--limit=5", "--num_fewshot=2")
    (row,) = evaluated(run, tmp_path / "eval", *options)["tasks"]
    assert row["questions"] == 5

    def shots(doc):  # a question is no example of itself
        return [other for other in OWN[:3] if other is not doc][:2]

    model = load(run)
    wanted = [accuracy(model, [doc], shots(doc)) for doc in OWN[:5]]
    assert row["after"] == sum(wanted) / 5


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
def test_what_cannot_be_asked_is_named_before_the_model_is_read(run, tmp_path, capsys, monkeypatch):
    folder = write_task(tmp_path / "tasks", OWN)
    monkeypatch.setattr("nsru_train.loading.load_model", lambda *_: pytest.fail("too late"))

    def refused(*options):
        with pytest.raises(SystemExit):
            main(["eval", str(run), f"--out={tmp_path / 'no'}", *options])
        assert not (tmp_path / "no").exists()
        return capsys.readouterr().err

    own = f"--include_path={folder}"
    assert "did you mean 'own_facts'?" in refused("--tasks=own_fact", own)
    assert "no folder" in refused("--tasks=own_facts", f"--include_path={tmp_path / 'none'}")
    assert "--tasks" in refused("--num_fewshot=3")
    write_task(tmp_path / "tasks", OWN, dataset_kwargs={"data_files": {"test": "none.jsonl"}})
    assert "own_facts cannot be read" in refused("--tasks=own_facts", own)
    write_task(tmp_path / "tasks", OWN, unsafe_code=True)
    assert "own_facts runs code" in refused("--tasks=own_facts", own)


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
def test_a_chat_template_is_applied_or_named_as_missing(run, tmp_path, monkeypatch):
    folder = write_task(tmp_path / "tasks", OWN)
    asked = TaskSettings("own_facts", str(folder), apply_chat_template=True, limit=2)
    tasks, tokenizer = harness.Tasks(asked), make_tokenizer()
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="apply_chat_template: the tokenizer has no"):
        tasks.check_template(tokenizer)
    tokenizer.chat_template = "{{ mood }}{% for m in messages %}<{{ m.content }}>{% endfor %}"
    seen, write = [], tokenizer.encode
    monkeypatch.setattr(tokenizer, "encode", lambda t, **k: seen.append(t) or write(t, **k))
    tasks.check_template(tokenizer)
    tasks.evaluate(load(run), tokenizer, base=False)
    assert any(text.startswith("<Where is Ann?") for text in seen)
    use_format(tokenizer, TextFormat("Be kind.", {"mood": "Gladly: "}))
    seen.clear()
    tasks.evaluate(load(run), tokenizer, base=False)
    assert any(text.startswith("Gladly: <Be kind.><Where is Ann?") for text in seen)


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
def test_an_encoder_decoder_reads_the_question_and_is_scored_on_the_answer(tmp_path, monkeypatch):
    tokenizer, right = make_tokenizer(), []
    sizes = {"vocab_size": len(tokenizer), "initializer_range": 0.1}
    monkeypatch.setattr(architectures, "SIZES", {**architectures.SIZES, **sizes})
    model = architectures.make("t5").eval()
    for doc in OWN:
        options = "".join(f"{x}. {c}\n" for x, c in zip(LETTERS, doc["choices"], strict=True))
        prompt, scores = tokenizer(f"{doc['question']}\n{options}Answer:").input_ids, []
        for letter in LETTERS:
            answer = tokenizer(f" {letter}", add_special_tokens=False).input_ids
            inputs = {"input_ids": torch.tensor([prompt]), "labels": torch.tensor([answer])}
            with torch.no_grad():
                scores.append(-model(**inputs).loss.item() * len(answer))
        right.append(max(range(4), key=scores.__getitem__) == doc["answer"])
    folder = write_task(tmp_path / "tasks", OWN)
    asked = TaskSettings("own_facts", str(folder), batch_size=4)
    (row,) = harness.Tasks(asked).evaluate(model, tokenizer, base=False)
    assert row["after"] == sum(right) / len(right)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"num_fewshot": 2}, "num_fewshot: has no effect without tasks"),
        ({"tasks": "a", "num_fewshot": -1}, "num_fewshot must not be negative"),
        ({"tasks": "a", "limit": 0}, "limit must be positive"),
        ({"tasks": "a", "limit": 2.5}, "a share below 1, got 2.5"),
        ({"tasks": "a", "batch_size": 0}, "batch_size must be"),
    ],
)
def test_odd_options_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        TaskSettings(**settings)


def test_without_lm_eval_the_remedy_is_named(monkeypatch):
    monkeypatch.setattr(harness, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"not installed: pip install 'nsru-kernels\[eval\]'"):
        harness.Tasks(TaskSettings("mmlu"))


def test_tables_show_what_was_asked_and_the_report_the_parts_too():
    row = {"metric": "acc", "questions": 4, "before": 0.5, "after": 0.25, "after_stderr": 0.1}
    rows = [{"task": "mmlu", **row}, {"task": "mmlu_anatomy", "group": "mmlu", **row}]
    results = {"schema": 1, "kind": "eval", "metrics": {}, "notes": [], "tasks": rows}
    assert "mmlu_anatomy" not in format_table(results)
    asked, parts = tables.numbers(results)
    assert asked.head == ["task", "metric", "base model", "evaluated", "questions"]
    assert asked.rows == [["mmlu", "acc", "0.5000", "0.2500 ± 0.1000", "4"]]
    assert [cells[0] for cells in parts.rows] == ["mmlu_anatomy"]
    assert parts.title


@needs_lm_eval
@pytest.mark.usefixtures("own_tasks_alone")
def test_a_guard_decides_by_the_prompt_whatever_answer_is_scored(run, tmp_path):
    class Asking:
        """Flags every prompt of the task, and no text that goes on behind it."""

        threshold = 0.0

        def log_odds(self, model, tokenizer, questions):
            return torch.tensor([1.0 if text.endswith("Answer:") else -1.0 for text in questions])

    model, tokenizer = load(run), make_tokenizer()
    folder = write_task(tmp_path / "tasks", OWN)
    tasks = harness.Tasks(TaskSettings("own_facts", str(folder), batch_size=4))
    read = []
    guard = EcoGuard(Asking(), corruption="zero_out", seed=0)
    with guard.attach(model, tokenizer) as attached:
        flags = attached.flags
        attached.flags = lambda questions: read.extend(questions) or flags(questions)
        tasks.evaluate(model, tokenizer, base=False)
    assert len(set(read)) == len(OWN)
    assert all(text.endswith("Answer:") for text in read)
