"""Other answers that a model writes: what of its texts is taken, how often, and by whom."""

import dataclasses

import pytest
import torch
from samples import FORGET, make_model, make_tokenizer

import nsru_kernels as nk
from nsru_train import alternatives
from nsru_train.alternatives import add_alternatives, write_alternatives
from nsru_train.config import DataConfig
from nsru_train.data import QA
from nsru_train.methods import METHODS

QUESTION = QA("Where does person 0 live?", "In Aar, at number 0.")


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    return nk.merge_adapters(make_model(tokenizer))


@pytest.fixture
def says(monkeypatch):
    """Let the model say these texts, one after the other, and count how often it is asked."""
    asked = []

    def of(*texts):
        texts = iter(texts)

        def decode(tokenizer, ids, skip_special_tokens):
            asked.append(len(ids))
            return [next(texts) for _ in ids]

        monkeypatch.setattr("transformers.PreTrainedTokenizerBase.batch_decode", decode)
        return asked

    return of


def write(model, tokenizer, records=(QUESTION,), count=2, **options):
    # Only what is said matters here, not its length.
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(alternatives, "NEW_TOKENS", 2)
        return write_alternatives(model, tokenizer, records, count, progress=False, **options)


def test_the_first_line_counts_and_the_answer_itself_does_not(model, tokenizer, says):
    asked = says(
        " In Bree.\nQuestion: And who?", " in AAR, at  number 0.",  # the answer
        "", "In Cork. Question: What", "never asked for",
    )  # fmt: skip
    (found,) = write(model, tokenizer)
    assert found.alternatives == ("In Bree.", "In Cork.")
    assert asked == [2, 2]


def test_repeated_and_long_texts_are_sampled_again_three_times_at_most(model, tokenizer, says):
    asked = says("In Bree.", "In bree.", "In Bree.", "In " + "Aar, " * 40, "", "\n")
    (found,) = write(model, tokenizer, max_length=40)
    assert found.alternatives == ("In Bree.",)
    assert asked == [2, 2, 2]


def test_own_alternatives_stay(model, tokenizer, says):
    says("In Deal.", "In Esch.")
    own = dataclasses.replace(QUESTION, question="Where else?", alternatives=("In Ix.",))
    found = write(model, tokenizer, [own, QUESTION])
    assert [qa.alternatives for qa in found] == [("In Ix.",), ("In Deal.", "In Esch.")]


def test_the_prompt_shows_the_question_and_its_answer(model, tokenizer, monkeypatch):
    seen = []

    def generate(input_ids, attention_mask):
        seen.append(tokenizer.decode(input_ids[0]))
        return torch.cat([input_ids, input_ids[:, :1]], 1)

    monkeypatch.setattr(model, "generate", generate)
    write_alternatives(model, tokenizer, [QUESTION], 3, progress=False)
    end = f"Question: {QUESTION.question}\nAnswer: {QUESTION.answer}\nAnother answer:"
    assert seen[0].endswith(end)


def test_sampling_is_seeded_and_leaves_the_random_state(model, tokenizer):
    state = torch.get_rng_state()
    first, again, other = (write(model, tokenizer, FORGET[:2], seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    assert first == again
    assert first != other


def test_without_room_for_an_answer_it_is_refused(model, tokenizer, monkeypatch):
    monkeypatch.setattr(alternatives, "position_limit", lambda model: 64)
    with pytest.raises(ValueError, match=r"write_alternatives: the prompt takes \d+ tokens.*64"):
        write_alternatives(model, tokenizer, FORGET[:1], 1, progress=False)


def test_a_run_writes_them_once(model, tokenizer, tmp_path, monkeypatch, caplog):
    path, config = tmp_path / "alternatives.jsonl", DataConfig("a", "b", write_alternatives=1)
    other = dataclasses.replace(QUESTION, alternatives=("In Goes.",))
    calls = []
    monkeypatch.setattr(
        alternatives, "write_alternatives", lambda *_, **__: calls.append(1) or [other]
    )

    def add(records, *names):
        methods = [METHODS[name]() for name in names]
        return add_alternatives(model, tokenizer, records, config, methods, path)

    assert add([QUESTION], "npo") == [QUESTION]
    assert "no effect" in caplog.text
    for _ in range(2):
        assert add([QUESTION], "npo", "altpo") == [other]
    assert len(calls) == 1
    with pytest.raises(ValueError, match="written for other questions"):
        add(FORGET, "altpo")
