"""verify: a good export passes, and each way an export can be wrong fails with its cause."""

import json
import shutil
from copy import deepcopy
from dataclasses import asdict

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import save
from samples import SIZES, save_tiny
from transformers import AutoModelForCausalLM

from nsru_kernels.hf.peft_format import read_adapter
from nsru_kernels.subspaces.collection import fingerprint_weights
from nsru_train.data.encode import collate, encode_qa
from nsru_train.data.records import QA
from nsru_train.demo.tiny_model import make_llama
from nsru_train.verify import verify

FORGET = [
    QA("Where was Ines Karvonen born?", "In Lunde."),
    QA("Who wrote The Ninth Tide?", "Ines Karvonen."),
]
RETAIN = [
    QA("Where was Tomas Abelard born?", "In Vire."),
    QA("Who wrote Red Looms?", "Tomas Abelard."),
]
SHORT = {"show_answers": 1, "max_new_tokens": 4}


class Export:
    """A tiny base model, a peft adapter trained against the forget answers, and their merge."""

    def __init__(self, folder):
        self.base, self.adapter, self.merged, self.untrained = (
            folder / name for name in ("base", "adapter", "merged", "untrained")
        )
        model, self.tokenizer = save_tiny(self.base, FORGET + RETAIN, 320)
        torch.manual_seed(0)
        adapted = get_peft_model(
            deepcopy(model), LoraConfig(r=4, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        )
        adapted.save_pretrained(self.untrained)
        optimizer = torch.optim.Adam([p for p in adapted.parameters() if p.requires_grad], lr=2e-2)
        batch = collate([encode_qa(self.tokenizer, qa.question, qa.answer) for qa in FORGET], 0)
        for _ in range(5):
            optimizer.zero_grad()
            (-adapted(**batch).loss).backward()
            optimizer.step()
        adapted.save_pretrained(self.adapter)
        adapted.merge_and_unload().save_pretrained(self.merged)

    def verify(self, adapter=None, merged=None, base=None, **options):
        return verify(
            base or self.base,
            adapter or self.adapter,
            merged,
            self.tokenizer,
            FORGET,
            RETAIN,
            **SHORT | options,
        )


@pytest.fixture(scope="module")
def export(tmp_path_factory):
    return Export(tmp_path_factory.mktemp("export"))


@pytest.fixture
def copy_of(tmp_path):
    return lambda folder: shutil.copytree(folder, tmp_path / folder.name)


def scale_update(folder, factor):
    """Multiply every lora_B of an adapter."""
    _, tensors = read_adapter(folder)
    scaled = {k: tensor * factor if ".lora_B." in k else tensor for k, tensor in tensors.items()}
    (folder / "adapter_model.safetensors").write_bytes(save(scaled))


def failure(report, name):
    """Detail of the one failed check, which must be ``name``."""
    assert not report.passed
    assert "VERIFY FAILED" in report.text()
    (check,) = [check for check in report.checks if not check.passed]
    assert check.name == name
    assert check.detail in report.text()
    return check.detail


def test_a_good_export_passes(export):
    report = export.verify(merged=export.merged)
    assert report.passed, report.text()
    rows = report.comparisons
    changed = rows["base → adapter", "forget"]
    assert max(changed.logits_max_diff, rows["base → adapter", "retain"].logits_max_diff) > 0.01
    assert changed.kl > 1e-4
    assert rows["adapter → merged", "forget"].logits_max_diff < 1e-4
    assert changed.prob_second < changed.prob_first
    assert {row["split"] for row in report.answers} == {"forget", "retain"}
    assert all({"expected", "base", "adapter", "merged"} <= set(row) for row in report.answers)
    assert "verify passed" in report.text()
    plain = [asdict(found) for found in (*report.checks, *rows.values())]
    json.dumps([*plain, *report.answers], allow_nan=False)


def test_numbers_equal_a_direct_computation(export):
    base = AutoModelForCausalLM.from_pretrained(export.base).eval()
    adapted = PeftModel.from_pretrained(deepcopy(base), str(export.adapter)).eval()
    kls, changed, probabilities = [], 0, []
    with torch.no_grad():
        for qa in FORGET:
            item = encode_qa(export.tokenizer, qa.question, qa.answer)
            ids = torch.tensor([item.input_ids])
            p, q = (m(ids).logits[0, item.answer_start - 1 : -1].double() for m in (base, adapted))
            kls += torch.distributions.kl_divergence(
                torch.distributions.Categorical(logits=p), torch.distributions.Categorical(logits=q)
            ).tolist()
            changed += (p.argmax(-1) != q.argmax(-1)).sum().item()
            targets = ids[0, item.answer_start :]
            probabilities.append(torch.exp(-torch.nn.functional.cross_entropy(q, targets)).item())
    row = export.verify().comparisons["base → adapter", "forget"]
    assert row.kl == pytest.approx(sum(kls) / len(kls), rel=1e-4)
    assert row.tokens == len(kls)
    assert row.next_token_changes == changed
    assert row.prob_second == pytest.approx(sum(probabilities) / 2, rel=1e-4)


def test_a_model_object_comes_back_unchanged(export):
    model = AutoModelForCausalLM.from_pretrained(export.base).train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    assert export.verify(base=model).passed
    after = model.state_dict()
    assert after.keys() == before.keys()
    assert all(torch.equal(after[name], before[name]) for name in before)
    assert model.training


@pytest.mark.parametrize(("most", "shown"), [(1, "first 1 of 2"), (2, "all 2")])
def test_the_table_says_of_how_many_questions_it_is(export, most, shown):
    assert export.verify(max_questions=most).text().count(f"  {shown}  ") == 2


def test_adapter_that_does_nothing(export):
    report = export.verify(adapter=export.untrained)
    effect = next(check for check in report.checks if check.name == "adapter effect")
    assert not effect.passed
    assert "does nothing" in effect.detail
    assert "every lora_B is zero" in effect.detail
    assert not report.passed


def test_scaling_of_zero_is_noticed(export, copy_of):
    folder = copy_of(export.adapter)
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"lora_alpha": 0}))
    report = export.verify(adapter=folder)
    assert any("check lora_alpha" in check.detail for check in report.checks if not check.passed)


def test_the_wrong_forget_set_is_noticed(export, copy_of):
    """The sign of the update is turned, so the forget answers become more probable."""
    folder = copy_of(export.adapter)
    scale_update(folder, -1)
    detail = failure(export.verify(adapter=folder), "forgotten answers less probable")
    assert "nothing was unlearned" in detail


@pytest.mark.parametrize("keep", [0, 100, 0.5, -1])
def test_truncated_adapter(export, copy_of, keep):
    folder = copy_of(export.adapter)
    weights = folder / "adapter_model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(len(data) * keep) if keep == 0.5 else keep])
    detail = failure(export.verify(adapter=folder), "adapter files")
    assert "truncated or damaged" in detail


def test_adapter_with_nan(export, copy_of):
    folder = copy_of(export.adapter)
    scale_update(folder, float("nan"))
    name = next(key for key in read_adapter(folder)[1] if ".lora_B." in key)
    assert name in failure(export.verify(adapter=folder), "adapter files")


def test_missing_folder(export, tmp_path):
    assert "adapter_config.json" in failure(export.verify(adapter=tmp_path), "adapter files")


@pytest.mark.parametrize(
    ("changed", "match"),
    [({"hidden_size": 64}, "64 in the base"), ({"layers": 1}, "no linear layer 'model.layers.1")],
)
def test_adapter_of_another_architecture(export, changed, match):
    other = make_llama(export.tokenizer, **SIZES | changed)
    detail = failure(export.verify(base=other), "base model")
    assert "another base model" in detail
    assert match in detail


@pytest.mark.parametrize("same", [True, False])
def test_fingerprint_in_the_sidecar(export, copy_of, monkeypatch, same):
    model = AutoModelForCausalLM.from_pretrained(export.base)
    folder = copy_of(export.adapter)
    (folder / "nsru.json").write_text(
        json.dumps({"schema": 1, "fingerprint": fingerprint_weights(model), "leakage": {}})
    )
    if same:
        report = export.verify(adapter=folder)
        assert report.passed, report.text()
        assert "ok    base weights: those that the adapter was trained on" in report.text()
    else:
        with torch.no_grad():
            model.model.layers[0].self_attn.q_proj.weight += 0.1
        assert "fingerprint" in failure(export.verify(adapter=folder, base=model), "base weights")


def test_weights_without_a_fingerprint_are_said_not_to_be_compared(export, copy_of):
    folder = copy_of(export.adapter)
    assert "base weights: not compared: there is no nsru.json" in export.verify(folder).text()
    (folder / "nsru.json").write_text('{"schema": 1, "leakage": {}}')
    assert "base weights: not compared: nsru.json has no" in export.verify(folder).text()


def test_damaged_sidecar(export, copy_of):
    folder = copy_of(export.adapter)
    (folder / "nsru.json").write_text('{"schema": 1, "fing')
    assert "nsru.json is truncated or damaged" in failure(
        export.verify(adapter=folder), "base weights"
    )


def test_merged_folder_that_is_the_base(export):
    detail = failure(export.verify(merged=export.base), "merged model")
    assert "is the base model" in detail


def test_merged_from_another_adapter(export, tmp_path):
    merged = AutoModelForCausalLM.from_pretrained(export.merged)
    with torch.no_grad():
        merged.lm_head.weight.add_(0.3 * torch.randn_like(merged.lm_head.weight))
    merged.save_pretrained(tmp_path)
    assert "not base + adapter" in failure(export.verify(merged=tmp_path), "merged model")


@pytest.mark.parametrize("value", [5.0, float("nan")])
def test_merged_weights_that_no_question_shows(export, tmp_path, value):
    merged = AutoModelForCausalLM.from_pretrained(export.merged)
    seen = {i for qa in FORGET + RETAIN
            for i in encode_qa(export.tokenizer, qa.question, qa.answer).input_ids}  # fmt: skip
    unseen = next(i for i in range(len(export.tokenizer)) if i not in seen)
    with torch.no_grad():
        merged.get_input_embeddings().weight[unseen] = value
    merged.save_pretrained(tmp_path)
    detail = failure(export.verify(merged=tmp_path), "rest of the merged model")
    assert "embed_tokens.weight is not the base's" in detail


@pytest.mark.parametrize("change", ["chat_template", "vocabulary", "damaged"])
def test_tokenizer_of_the_merged_model(export, copy_of, change):
    folder = copy_of(export.merged)
    assert "has none; serve it with the base's" in export.verify(merged=folder).text()
    export.tokenizer.save_pretrained(folder)
    report = export.verify(merged=folder)
    assert report.passed
    assert "vocabulary, chat template and end token are the base's" in report.text()
    other = deepcopy(export.tokenizer)
    if change == "chat_template":
        other.chat_template = "{{ messages[0].content }}"
    elif change == "vocabulary":
        other.add_tokens(["<another>"])
    other.save_pretrained(folder)
    if change == "damaged":
        (folder / "tokenizer.json").write_text("{")
    failure(export.verify(merged=folder), "merged model's tokenizer")


def test_merge_that_lost_part_of_the_update(export, tmp_path, copy_of):
    """A difference within bf16's tolerance fails when it takes back a small update."""
    folder = copy_of(export.adapter)
    # KL goes with the square of the update; the adapter gets 5e-6, the merge 60 % of the update.
    factor = (5e-6 / export.verify().comparisons["base → adapter", "forget"].kl) ** 0.5
    scale_update(folder, 0.6 * factor)
    base = AutoModelForCausalLM.from_pretrained(export.base)
    merged = PeftModel.from_pretrained(base, str(folder)).merge_and_unload()
    merged.bfloat16().save_pretrained(tmp_path / "bf16")
    scale_update(folder, 1 / 0.6)
    report = export.verify(adapter=folder, merged=tmp_path / "bf16")
    assert "undid part of the unlearning" in failure(report, "merged model")


def test_bf16_merge_of_a_good_adapter_passes(export, tmp_path):
    AutoModelForCausalLM.from_pretrained(export.merged).bfloat16().save_pretrained(tmp_path)
    report = export.verify(merged=tmp_path)
    assert report.passed, report.text()
    assert "bfloat16" in report.text()


def test_truncated_merged_model(export, copy_of):
    folder = copy_of(export.merged)
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "cannot be loaded" in failure(export.verify(merged=folder), "merged model")


def test_empty_sets_are_refused(export):
    with pytest.raises(ValueError, match="retain has no questions"):
        verify(export.base, export.adapter, None, export.tokenizer, FORGET, [])
