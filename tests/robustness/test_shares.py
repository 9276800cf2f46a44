"""Evaluation in two processes: what one gives, and who is to blame where it ends."""

import json
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
import yaml

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import save_lora_adapter
from nsru_train import evaluation
from nsru_train.cli import main
from nsru_train.config import ModelConfig
from nsru_train.data import QA
from nsru_train.loading import load_model
from nsru_train.membership import add_attack_scores
from nsru_train.shares import Shares, from_first
from nsru_train.sources import load_records, save_records

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))
import samples
import test_harness
import test_muse
from ranks import Ranks

# Many small batches, for each process to have some.
SMALL = "import nsru_train.evaluation as e; e.evaluate.__kwdefaults__['max_tokens'] = 64\n"
BAD = """
import os, signal
def bad(*args, **kwargs):
    if os.environ["RANK"] == "1":
        if os.environ["BAD"] == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        raise ValueError("of all numbers, NaN")
    return {}
e.score_share = bad
"""
RUN = "from nsru_train.cli import main; main()\n"


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run folder with an adapter that changes what its model says."""
    folder = tmp_path_factory.mktemp("shares")
    model, _ = samples.save_tiny(folder / "model", samples.RECORDS)
    torch.manual_seed(0)
    nk.swap_linears(model, "all-linear", rank=2, alpha=8)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    save_lora_adapter(model, folder / "adapter")
    wrong = [
        QA(qa.question, qa.answer, perturbed_answers=(f"{qa.answer} Not.", "Nowhere."))
        for qa in samples.RECORDS
    ]
    sets = {"forget": wrong[:5], "retain": wrong[5:9], "holdout": wrong[9:]}
    for name, records in sets.items():
        save_records(folder / f"{name}.jsonl", records)
    paths = {name: str(folder / f"{name}.jsonl") for name in sets}
    data = {**paths, "more": {"holdout": paths.pop("holdout")}, "max_length": 160}
    data.pop("holdout")
    sections = {"model": {"path": str(folder / "model")}, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder


def evaluated(rank, run, world=2):
    """Every row of the run's model, with the attacks on membership of its base."""
    model, tokenizer = load_model(ModelConfig(str(run / "model")))
    splits = {name: load_records(run / f"{name}.jsonl") for name in ("forget", "retain", "holdout")}
    together = {"progress": False, "shares": Shares(rank, world)}
    found = evaluation.evaluate(
        model, tokenizer, splits, max_length=160, max_tokens=160, max_new_tokens=6, **together
    )
    add_attack_scores(found.rows, model, tokenizer, **together)
    return found.rows


def spoilt(rank, kind):
    def work():
        if rank == 1 and kind:
            raise kind("of all numbers, NaN")
        return rank

    try:
        return Shares(rank, 2).gather(work)
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def sampled(rank):
    return from_first([f"of rank {rank}"])


def test_each_row_is_the_same_in_two_processes(run):
    ranks = Ranks()
    try:
        first, second = ranks.run(evaluated, run)
        assert first == second == evaluated(0, run, world=1)
        assert {"gradnorm", "generated", "extraction_strength"} <= first["forget"][0].keys()
        assert ranks.run(spoilt, None) == [[0, 1]] * 2
        assert ranks.run(sampled) == [["of rank 0"]] * 2
        assert ranks.run(spoilt, ValueError) == [
            "ChildProcessError: rank 1 of 2: ValueError: of all numbers, NaN",
            "ValueError: of all numbers, NaN",
        ]
    finally:
        ranks.stop()


@pytest.mark.slow
def test_two_processes_give_what_one_gives(run, tmp_path, monkeypatch):
    texts = {(config, split): rows[:3] for (config, split), rows in test_muse.SETS.items()}
    options = [
        *("eval", str(run), "--format=open-unlearning", "--max_new_tokens=6"),
        *("--muse=books", f"--muse_dir={test_muse.write(tmp_path / 'muse', texts)}"),
    ]
    if find_spec("lm_eval"):
        tasks = test_harness.write_task(tmp_path / "tasks", test_harness.OWN)
        options += ["--tasks=own_group", f"--include_path={tasks}"]
    monkeypatch.setitem(evaluation.evaluate.__kwdefaults__, "max_tokens", 64)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    main([*options, f"--out={tmp_path / 'one'}"])
    torch.set_num_threads(threads)
    script = tmp_path / "small.py"
    script.write_text(SMALL + RUN)
    printed, silent = samples.torchrun(
        tmp_path, *options, f"--out={tmp_path / 'two'}", script=[script]
    )
    assert silent == ""
    assert "next: nsru verify" in printed

    def read(folder, name):
        return json.loads((tmp_path / folder / f"{name}.json").read_text())

    one, two = (read(folder, "results") for folder in ("one", "two"))
    assert one.pop("seconds") != two.pop("seconds")
    assert len(one["tasks"]) == 8 + 2 * bool(find_spec("lm_eval"))
    assert two == one
    for name in ("TOFU_EVAL", "MUSE_EVAL"):
        assert read("two", name) == read("one", name), name
    assert "mia_gradnorm" in read("two", "TOFU_EVAL")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "codes", "said"),
    [
        ("dies", (2, -9), "nsru: rank 1 of 2 ended before its share was done"),
        ("fails", (2, 2), "nsru: rank 1 of 2: ValueError: of all numbers, NaN"),
    ],
)
def test_a_rank_that_ends_is_named(run, tmp_path, how, codes, said):
    script = tmp_path / "bad.py"
    script.write_text(SMALL + BAD + RUN)
    options = ("eval", str(run), "--generate=false", f"--out={tmp_path / 'out'}")
    first, second = samples.torchrun(tmp_path, *options, script=[script], codes=codes, BAD=how)
    assert said in first[1]
    assert "Traceback" not in first[1]
    if how == "fails":
        assert "nsru: of all numbers, NaN" in second[1]
    assert not (tmp_path / "out" / "results.json").exists()


def test_one_process_has_all_the_work():
    assert sampled(3) == ["of rank 3"]
    shares = Shares()
    assert shares.of([1, 2, 3]) == [1, 2, 3]
    assert shares.gather(lambda: 5) == [5]
    assert [Shares(rank, 2).of([1, 2, 3]) for rank in (0, 1)] == [[1, 3], [2]]
