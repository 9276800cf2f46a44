"""Training and resuming under what users do to them: every fault has its right value here."""

import sys
from pathlib import Path

import pytest
import torch

import nsru_kernels as nk
from nsru_train.data.encode import collate, encode_qa
from nsru_train.losses.nll import answer_logits, answer_states
from nsru_train.losses.objective import SAFE
from nsru_train.run_folder import RunFolder

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "train"))
import samples


@pytest.fixture(scope="module")
def tokenizer():
    return samples.make_tokenizer()


@pytest.fixture
def batch(tokenizer):
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in samples.FORGET]
    return collate(encoded, tokenizer.pad_token_id)


@pytest.mark.parametrize("back", ["merge", "peft"])
def test_a_head_that_changes_after_scoring_is_scored_as_it_is(tokenizer, batch, back):
    """Swapped, wrapped by PEFT, or merged again: what was learnt of the old head must not stay."""
    model = samples.make_llama(tokenizer, **samples.SIZES).requires_grad_(False)
    answer_states(model, batch)
    if back == "peft":
        import peft

        config = peft.LoraConfig(target_modules=["lm_head"], init_lora_weights=False)
        model = peft.get_peft_model(model, config)
    else:
        nk.swap_linears(model, ["lm_head"], rank=2, alpha=4)
        torch.nn.init.normal_(model.lm_head.lora_B)
    nll = answer_states(model, batch).nll()
    torch.testing.assert_close(nll, answer_logits(model, batch).nll())
    nll.sum().backward()
    assert all(p.grad.any() for p in model.parameters() if p.requires_grad)
    if back == "merge":
        nk.merge_adapters(model)
        states = answer_states(model, batch)
        assert not hasattr(states, "logits")
        torch.testing.assert_close(states.nll(), nll)


def first_step(folder, questions, batch, accumulate):
    """Adapters after one step of plain SGD, and the row of metrics.jsonl."""
    tokenizer = samples.make_tokenizer()
    model = samples.make_model(tokenizer)
    for module in model.modules():  # at B = 0 only one of the two factors has a gradient
        if isinstance(module, nk.NSRULinear):
            torch.nn.init.normal_(module.lora_B, std=0.1)
    trainer = samples.make_trainer(
        folder,
        model=model,
        forget=samples.RECORDS[:questions],
        max_steps=1,
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
        optim="sgd",
        max_grad_norm=1e9,
    )
    trainer.train()
    [row] = RunFolder(folder).read_metrics()
    return samples.adapters(model), row


@pytest.mark.parametrize(("batch", "accumulate"), [(4, 3), (9, 2), (7, 2)])
def test_uneven_micro_batches_equal_the_one_big_batch(tmp_path, batch, accumulate):
    whole, expected = first_step(tmp_path / "whole", 10, 10, 1)
    parts, row = first_step(tmp_path / "parts", 10, batch, accumulate)
    for name, tensor in whole.items():
        torch.testing.assert_close(parts[name], tensor)
    for part in ("safe", "suppress", "retain", "total", "grad_norm"):
        assert row[part] == pytest.approx(expected[part], rel=1e-5), part


def questions_of_each_step(folder, **arguments):
    """(forget question, retain questions) of each step, in order."""
    trainer = samples.make_trainer(folder, **arguments)
    steps = [[]]
    compute = trainer.compute_loss

    def note(model, inputs, **kwargs):
        per_question = len(inputs["kind"]) // int((inputs["kind"] == SAFE).sum())
        for rows in inputs["input_ids"].split(per_question):
            forget, *retain = (tuple(ids.tolist()) for ids in rows[1:])
            steps[-1].append((trim(forget), [trim(ids) for ids in retain]))
        return compute(model, inputs, **kwargs)

    class NewStep(samples.TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            steps.append([])

    trainer.compute_loss = note
    trainer.add_callback(NewStep())
    trainer.train()
    return steps[:-1]


def trim(ids):
    pad = samples.make_tokenizer().pad_token_id
    return tuple(id for id in ids if id != pad)


@pytest.mark.parametrize(
    ("questions", "batch", "accumulate", "sizes"),
    [
        (4, 4, 8, [32, 32]),
        (5, 2, 2, [4, 3, 3, 4, 3, 3]),  # 2 + 2, 1 + 2, 2 + 1
        (5, 8, 3, [15]),
    ],
)
def test_accumulation_goes_on_over_the_end_of_an_epoch(
    tmp_path, questions, batch, accumulate, sizes
):
    forget = samples.RECORDS[:questions]
    steps = questions_of_each_step(
        tmp_path,
        forget=forget,
        max_steps=len(sizes),
        per_device_train_batch_size=batch,
        gradient_accumulation_steps=accumulate,
    )
    assert [len(step) for step in steps] == sizes
    asked = [question for step in steps for question, _ in step]
    epochs = [asked[i : i + questions] for i in range(0, len(asked), questions)]
    assert all(len(set(epoch)) == questions for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1 or len(epochs) == 1


def test_epochs_asked_for_are_those_of_the_questions(tmp_path):
    steps = questions_of_each_step(
        tmp_path,
        forget=samples.RECORDS[:4],
        max_steps=-1,
        num_train_epochs=16,
        per_device_train_batch_size=4,
        gradient_accumulation_steps=8,
    )
    assert [len(step) for step in steps] == [32, 32]


def test_resume_inside_accumulated_epochs_is_bit_identical(tmp_path):
    arguments = {"max_steps": 5, "gradient_accumulation_steps": 2}
    whole = samples.resumable(tmp_path / "whole", **arguments)
    whole.train()
    first = samples.resumable(tmp_path / "parts", **arguments)
    first.train()
    resumed = samples.resumable(tmp_path / "parts", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "parts" / "checkpoint-4"))
    theirs = samples.adapters(whole.model)
    for name, tensor in samples.adapters(resumed.model).items():
        assert torch.equal(tensor, theirs[name]), name


@pytest.mark.parametrize("persistent", [False, True])
def test_workers_deal_what_the_main_process_deals(tmp_path, persistent):
    arguments = {"max_steps": 7, "per_device_train_batch_size": 3}
    alone = questions_of_each_step(tmp_path / "alone", **arguments)
    workers = questions_of_each_step(
        tmp_path / "workers",
        dataloader_num_workers=2,
        dataloader_persistent_workers=persistent,
        **arguments,
    )
    assert workers == alone
    dealt = {ids for step in alone for _, retain in step for ids in retain}
    assert len(dealt) == len(samples.RETAIN)


def test_dropping_the_last_batch_must_leave_one(tmp_path):
    arguments = {"dataloader_drop_last": True, "max_steps": 2}
    kept = questions_of_each_step(tmp_path, per_device_train_batch_size=4, **arguments)
    assert [len(step) for step in kept] == [4, 4]
    with pytest.raises(ValueError, match="drop_last leaves no batch of 8 out of 5"):
        samples.make_trainer(tmp_path, per_device_train_batch_size=8, **arguments).train()
