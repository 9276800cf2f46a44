"""Our methods inside a checkout of OpenUnlearning: of a stand-in, and of the real one where it is.

OPEN_UNLEARNING names a checkout of locuslab/open-unlearning at d3d7cf9.
"""

import copy
import json
import logging
import os
import sys
from pathlib import Path

import pytest
import safetensors.torch
import torch
from samples import save_tiny
from stand_in_checkout import write_stand_in
from torch.nn.functional import logsigmoid
from transformers import AutoModelForCausalLM, TrainingArguments

import nsru_kernels as nk
from nsru_train.config import LoraConfig, SubspaceConfig
from nsru_train.data import SafeTargets
from nsru_train.data.encode import encode_qa
from nsru_train.demo.authors import author_splits
from nsru_train.open_unlearning.checkout import use_checkout
from nsru_train.open_unlearning.items import encode, encode_safe
from nsru_train.open_unlearning.trainers import AdaptersOff, put_adapters, why_not

REAL = os.environ.get("OPEN_UNLEARNING")
MODULES = ("data", "model", "trainer", "evals", "train", "eval")
SPLITS = {
    "forget01": "forget", "forget01_perturbed": "forget", "retain99": "retain",
    "retain_perturbed": "retain", "holdout01": "holdout", "real_authors_perturbed": "holdout",
    "world_facts_perturbed": "holdout",
}  # fmt: skip
QUICK = (
    "trainer.args.learning_rate=5e-3", "trainer.args.num_train_epochs=2",
    "trainer.args.per_device_train_batch_size=2", "trainer.args.gradient_accumulation_steps=1",
    "trainer.args.eval_on_start=false", "trainer.args.eval_strategy=no",
)  # fmt: skip
NARROW = ("trainer.method_args.lora.rank=2", "trainer.method_args.subspace.width=24")


@pytest.fixture(scope="module")
def records():
    splits = author_splits(authors=8, forget=1, holdout=2)
    return {name: getattr(splits, name)[:6] for name in ("forget", "retain", "holdout")}


@pytest.fixture(scope="module")
def folder(tmp_path_factory, records):
    """A tiny model, and files with the names of TOFU's."""
    root = tmp_path_factory.mktemp("open-unlearning")
    save_tiny(root / "model", [qa for found in records.values() for qa in found])
    (root / "tofu").mkdir()
    for name, split in SPLITS.items():
        rows = (
            {
                "question": qa.question, "answer": qa.answer,
                "paraphrased_answer": qa.paraphrased_answer,
                "perturbed_answer": qa.perturbed_answers[:2],
            }
            for qa in records[split]
        )  # fmt: skip
        text = "".join(json.dumps(row) + "\n" for row in rows)
        (root / "tofu" / f"{name}.json").write_text(text)
    return root


def forget_checkout():
    for name in [m for m in sys.modules if m.partition(".")[0] in MODULES]:
        del sys.modules[name]


@pytest.fixture(
    scope="module",
    params=[
        "stand-in",
        pytest.param(
            "real",
            marks=pytest.mark.skipif(REAL is None, reason="OPEN_UNLEARNING names no checkout"),
        ),
    ],
)
def run(request, tmp_path_factory, folder):
    """run(*overrides): the program with the tiny model; returns where it saves."""
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    from nsru_train.open_unlearning.__main__ import main

    work = tmp_path_factory.mktemp("work")
    real = request.param == "real"
    checkout = Path(REAL) if real else write_stand_in(tmp_path_factory.mktemp("checkout"))

    def run(*overrides, model=folder / "model", experiment="unlearn/tofu/default", config=None):
        arguments = [
            "--repo", str(checkout), "--data-dir", str(folder / "tofu"),
            *(() if config is None else ("--config-name", config)),
            f"experiment={experiment}", "model=phi-1_5", "forget_split=forget01",
            "holdout_split=holdout01",
            f"model.model_args.pretrained_model_name_or_path={model}",
            f"model.tokenizer_args.pretrained_model_name_or_path={folder / 'model'}",
            *(("retain_split=retain99",) if config is None else ()), *overrides,
        ]  # fmt: skip
        main(arguments)
        return work / "saves"

    run.real = real
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(work)
        patch.setenv("HYDRA_FULL_ERROR", "1")
        patch.setattr(sys, "path", list(sys.path))
        yield run
    forget_checkout()


def lora_b(folder):
    tensors = safetensors.torch.load_file(Path(folder, "adapter", "adapter_model.safetensors"))
    return {name: t for name, t in tensors.items() if "lora_B" in name}


def test_our_method_trains_and_is_evaluated_by_path(run, folder):
    saves = run("trainer=NSRU", "task_name=ours", *QUICK, *NARROW)
    made = saves / "unlearn" / "ours"
    assert all(b.any() for b in lora_b(made).values())
    assert list(made.glob("checkpoint-*/evals/TOFU_SUMMARY.json"))
    # The saved model is an ordinary one: what its adapter makes of the base.
    merged, base = (AutoModelForCausalLM.from_pretrained(f) for f in (made, folder / "model"))
    assert type(merged.model.layers[0].mlp.up_proj) is torch.nn.Linear
    nk.load_lora_adapter(base, made / "adapter")
    ids = torch.arange(12)[None]
    torch.testing.assert_close(merged(ids).logits, base(ids).logits, atol=1e-5, rtol=1e-5)
    report = json.loads((made / "adapter" / "nsru.json").read_text())
    assert report["fingerprint"]
    run("task_name=again", model=made, experiment="eval/tofu/default", config="eval.yaml")
    [ends] = made.glob("checkpoint-*/evals/TOFU_SUMMARY.json")
    again = json.loads((saves / "eval" / "again" / "TOFU_SUMMARY.json").read_text())
    for name, value in json.loads(ends.read_text()).items():
        assert again[name] == pytest.approx(value, rel=1e-4), name


@pytest.mark.parametrize("reentrant", ["true", "false"])
def test_their_method_on_our_adapters_under_checkpointing(run, reentrant):
    saves = run(
        "trainer=NPO_LoRA", f"task_name=npo-{reentrant}", *QUICK, NARROW[0],
        "trainer.args.gradient_checkpointing=true", "trainer.args.do_eval=false",
        f"+trainer.args.gradient_checkpointing_kwargs.use_reentrant={reentrant}",
    )  # fmt: skip
    trained = lora_b(saves / "unlearn" / f"npo-{reentrant}")
    assert len(trained) == 14  # of 2 layers
    assert all(b.any() for b in trained.values())


def test_their_method_in_the_null_space(run, folder):
    """And its reference is the model itself."""
    import trainer

    made = []

    class Watched(trainer.TRAINER_REGISTRY["NPO_LoRA"]):
        def __init__(self, **kwargs):
            super().__init__(**kwargs)
            linears = [m for m in self.model.modules() if isinstance(m, nk.NSRULinear)]
            made.append((self.ref_model, [m.basis.shape[1] for m in linears]))

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(trainer.TRAINER_REGISTRY, "NPO_LoRA", Watched)
        saves = run(
            "trainer=NPO_LoRA", "task_name=projected", *QUICK, *NARROW,
            "trainer.method_args.lora.project=true", "trainer.args.do_eval=false",
        )  # fmt: skip
    [(reference, ranks)] = made
    assert isinstance(reference, AdaptersOff)
    assert len(ranks) == 14
    assert all(ranks)
    report = json.loads((saves / "unlearn/projected/adapter/nsru.json").read_text())
    assert max(report["leakage"].values()) < 1e-5


def test_their_choice_of_weights_is_adapted_alone(run):
    pattern = r"['model\.layers\.0\.mlp\.down_proj\.weight']"
    more = [r"trainer.method_args.module_regex='model\.layers\.0'"] if run.real else []
    saves = run(
        "trainer=RMU_LoRA", "task_name=rmu", *QUICK, *NARROW, "trainer.args.do_eval=false",
        f"trainer.method_args.trainable_params_regex={pattern}", *more,
    )  # fmt: skip
    [name] = lora_b(saves / "unlearn" / "rmu")
    assert "layers.0.mlp.down_proj" in name


def test_checkpoints_are_read_by_path(run, folder):
    saves = run(
        "trainer=NSRU_npo", "task_name=steps", *QUICK, *NARROW, "trainer.args.do_eval=false",
        "trainer.args.save_strategy=epoch", "trainer.method_args.objective.beta=0.3",
    )  # fmt: skip
    made = saves / "unlearn" / "steps"
    *_, last = sorted(made.glob("checkpoint-*"), key=lambda path: int(path.name[11:]))
    read, final = (AutoModelForCausalLM.from_pretrained(path) for path in (last, made))
    ids = torch.arange(12)[None]
    torch.testing.assert_close(read(ids).logits, final(ids).logits, atol=1e-4, rtol=1e-4)


def test_a_method_of_other_means_is_refused(run):
    with pytest.raises(ValueError, match="eco is left to nsru train: it trains no adapters"):
        run("trainer=NSRU", "task_name=eco", "trainer.method_args.method=eco", *QUICK)


def test_what_is_no_checkout_is_named(tmp_path, capsys):
    from nsru_train.open_unlearning.__main__ import main

    with pytest.raises(SystemExit) as stopped:
        main(["--repo", str(tmp_path), "trainer=NSRU"])
    assert stopped.value.code == 2
    assert "has no src/train.py; give a checkout" in capsys.readouterr().err


def test_a_missing_package_is_named(tmp_path, monkeypatch):
    pytest.importorskip("hydra", reason="hydra-core is not installed")
    monkeypatch.setattr(sys, "path", list(sys.path))
    checkout = write_stand_in(tmp_path)
    (checkout / "src/trainer/base.py").write_text("import no_such_package\n")
    forget_checkout()
    try:
        with pytest.raises(ValueError, match="needs no_such_package, which is not installed"):
            use_checkout(checkout)
    finally:
        forget_checkout()


def test_settings_fit_the_machine(caplog, monkeypatch):
    conf = pytest.importorskip("omegaconf", reason="hydra-core is not installed").OmegaConf
    from nsru_train.open_unlearning import settings

    def config():
        return conf.create({
            "model": {"model_args": {"attn_implementation": "flash_attention_2",
                                     "torch_dtype": "bfloat16", "device_map": "cuda"}},
            "trainer": {"args": {"bf16": True, "optim": "paged_adamw_32bit", "lr": 1.0}},
            "eval": {"tofu": {"metrics": {"gibberish": {"device": "cuda", "path": "???"}}}},
        })  # fmt: skip

    changed = config()
    monkeypatch.setattr(settings, "default_device", lambda: torch.device("cpu"))
    with caplog.at_level(logging.INFO, settings.__name__):
        settings.fit_to_machine(changed, ["model.model_args.torch_dtype=bfloat16"])
    assert conf.to_container(changed) == {
        "model": {"model_args": {"attn_implementation": "sdpa", "torch_dtype": "bfloat16",
                                 "device_map": "cpu"}},
        "trainer": {"args": {"bf16": False, "optim": "adamw_torch", "lr": 1.0}},
        "eval": {"tofu": {"metrics": {"gibberish": {"device": "cpu", "path": "???"}}}},
    }  # fmt: skip
    assert "trainer.args.bf16: False instead of True, for there is no GPU" in caplog.text
    changed = config()
    monkeypatch.setattr(settings, "default_device", lambda: torch.device("cuda"))
    monkeypatch.setattr(settings, "is_flash_attn_2_available", lambda: False)
    settings.fit_to_machine(changed)
    assert changed.model.model_args == {
        "attn_implementation": "sdpa", "torch_dtype": "bfloat16", "device_map": "cuda"
    }  # fmt: skip
    assert changed.trainer.args.bf16


def test_missing_file_of_tofu_is_named(tmp_path):
    conf = pytest.importorskip("omegaconf", reason="hydra-core is not installed").OmegaConf
    from nsru_train.open_unlearning.settings import read_tofu_from

    given = {"data": {"args": {"hf_args": {"path": "locuslab/TOFU", "name": "forget05"}}}}
    with pytest.raises(ValueError, match=r"no file .*forget05.json, .* data.args.hf_args"):
        read_tofu_from(conf.create(given), tmp_path)


# -- Without hydra -----------------------------------------------------------------------------


@pytest.fixture
def tiny(tmp_path, records):
    return save_tiny(tmp_path, [qa for found in records.values() for qa in found])


def rows_of(tokenizer, records):
    return [encode_qa(tokenizer, qa.question, qa.answer) for qa in records]


def arguments(tmp_path, **settings):
    return TrainingArguments(str(tmp_path), learning_rate=1e-3, use_cpu=True, **settings)


def test_the_reference_without_adapters_is_a_second_model(tiny, records, tmp_path):
    """Loss and gradients of NPO, to the last digit, and the model is left in training."""
    model, tokenizer = tiny
    second = copy.deepcopy(model).eval()
    forget, retain = (rows_of(tokenizer, records[name]) for name in ("forget", "retain"))
    put_adapters(
        model, arguments(tmp_path), tokenizer, forget, retain,
        lora=LoraConfig(rank=2), subspace=SubspaceConfig(width=24),
    )  # fmt: skip
    for module in model.modules():
        if isinstance(module, nk.NSRULinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    ids = torch.tensor([forget[0].input_ids])
    found = []
    for reference in (AdaptersOff(model), second):
        model.train()
        model.zero_grad()
        loss = model(input_ids=ids, labels=ids).loss
        with torch.no_grad():
            before = reference(input_ids=ids, labels=ids).loss
        assert model.training
        total = -20 * logsigmoid(0.1 * (loss - before))
        total.backward()
        gradients = [p.grad.clone() for p in model.parameters() if p.requires_grad]
        found.append([before, total.detach(), *gradients])
    assert loss != before
    for own, theirs in zip(*found, strict=True):
        torch.testing.assert_close(own, theirs, atol=0, rtol=0)


def test_weights_of_no_linear_are_refused(tiny, records, tmp_path):
    model, tokenizer = tiny
    rows = rows_of(tokenizer, records["forget"])
    with pytest.raises(ValueError, match="fits the weight of no linear layer"):
        put_adapters(
            model, arguments(tmp_path), tokenizer, rows, rows,
            lora=LoraConfig(), subspace=SubspaceConfig(), weights=[r"model\.norm\.weight"],
        )  # fmt: skip


def test_deepspeed_is_refused(tiny, records, tmp_path, monkeypatch):
    model, tokenizer = tiny
    rows = rows_of(tokenizer, records["forget"])
    args = arguments(tmp_path)
    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    with pytest.raises(ValueError, match="do not run under it"):
        put_adapters(
            model, args, tokenizer, rows, rows,
            lora=LoraConfig(), subspace=SubspaceConfig(),
        )  # fmt: skip


class Items:
    """A dataset as theirs: items of tensors."""

    question_key, answer_key = "question", "answer"

    def __init__(self, tokenizer, records):
        self.tokenizer = tokenizer
        self.data = [{"question": qa.question, "answer": qa.answer} for qa in records]

    def __len__(self):
        return len(self.data)

    def _process_sample(self, question, answer):
        row = encode_qa(self.tokenizer, question, answer)
        ids = torch.tensor(row.input_ids)
        labels = ids.clone()
        labels[: row.answer_start] = -100
        return {"input_ids": ids, "labels": labels, "attention_mask": torch.ones_like(ids)}

    def __getitem__(self, index):
        return self._process_sample(**self.data[index])


def test_items_become_the_same_sequences(tiny, records, caplog):
    _, tokenizer = tiny
    data = Items(tokenizer, records["forget"])
    expected = rows_of(tokenizer, records["forget"])
    for index, item in encode(data, "forget").items():
        assert item.input_ids == expected[index].input_ids
        assert item.answer_start == expected[index].answer_start

    class Untrainable(Items):
        def __getitem__(self, index):
            item = super().__getitem__(index)
            if index == 1:
                item["labels"][:] = -100
            return item

    assert list(encode(Untrainable(tokenizer, records["forget"]), "forget")) == [0, 2, 3, 4, 5]
    assert "data.forget: 1 of 6 items have no token to train" in caplog.text


def test_safe_targets_are_those_of_the_dataset_or_templates(tiny, records):
    _, tokenizer = tiny
    templates = SafeTargets({"decline": ("I cannot say.",)})
    data = Items(tokenizer, records["forget"])
    [[safe]] = encode_safe(data, [2], templates, draws=3)
    question = records["forget"][2].question
    assert safe.input_ids == encode_qa(tokenizer, question, "I cannot say.").input_ids

    class WithAlternate(Items):
        drawn = 0

        def __getitem__(self, index):
            WithAlternate.drawn += 1
            other = self._process_sample(self.data[index]["question"], f"No {self.drawn}.")
            return {"original": super().__getitem__(index), "alternate": other}

    data = WithAlternate(tokenizer, records["forget"])
    assert len(encode(data, "forget")) == 6
    [some] = encode_safe(data, [0], templates, draws=3)
    assert len({tuple(row.input_ids) for row in some}) == 3
    data.return_original = False
    with pytest.raises(ValueError, match="return_original must be true"):
        encode_safe(data, [0], templates, draws=1)


def test_texts_without_questions_have_no_safe_target():
    class PretrainingDataset(list):
        pass

    with pytest.raises(ValueError, match=r"PretrainingDataset has no questions .* NSRU_npo"):
        encode_safe(PretrainingDataset(), [], SafeTargets({"decline": ("No.",)}), draws=1)


def test_which_methods_run_there():
    assert [name for name in ("nsru", "npo", "rmu", "pdu", "ihl", "dpo") if why_not(name)] == []
    assert why_not("lune") == "it chooses among its evaluations, and theirs give it no numbers"
    assert why_not("task_vector") == "what it trains is no plain update of the weights"
    assert why_not("alter") == "what it trains is no plain update of the weights"
