import pytest
import torch

from nsru_train.data.encode import Encoded, collate, encode_prompt, encode_qa, length_batches
from nsru_train.demo.tiny_model import make_llama, train_tokenizer

CHAT = (
    "{% for m in messages %}<s>{{ m.role }}:{{ m.content }}"
    "{{ '</s>' if m.role == 'assistant' }}{{ '\\n' }}{% endfor %}"
    "{{ '<s>assistant:' if add_generation_prompt }}"
)


@pytest.fixture
def tokenizer():
    return train_tokenizer(["Question: Who is Ann?\nAnswer: Ann is a poet."] * 2, 300)


def test_chat_template_ends_at_eos_without_what_follows(tokenizer):
    tokenizer.chat_template = CHAT
    encoded = encode_qa(tokenizer, "Who is Ann?", "A poet.")
    prompt = encode_prompt(tokenizer, "Who is Ann?")
    assert tokenizer.decode(prompt) == "<s>user:Who is Ann?\n<s>assistant:"
    assert encoded.input_ids[: encoded.answer_start] == prompt
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == "A poet.</s>"


def test_prompt_that_depends_on_the_answer_is_refused(tokenizer):
    tokenizer.chat_template = "{{ messages | length }}" + CHAT
    with pytest.raises(ValueError, match="not a proper prefix"):
        encode_qa(tokenizer, "Who is Ann?", "A poet.")


def test_too_long_names_both_lengths(tokenizer):
    length = len(encode_qa(tokenizer, "Who is Ann?", "A poet."))
    encode_qa(tokenizer, "Who is Ann?", "A poet.", max_length=length)
    with pytest.raises(ValueError, match=f"takes {length} tokens.*max_length is {length - 1}"):
        encode_qa(tokenizer, "Who is Ann?", "A poet.", max_length=length - 1)


def test_tokenizer_without_eos_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="no eos_token"):
        encode_qa(tokenizer, "Who is Ann?", "A poet.")


def test_collate_pads_right_and_labels_the_answer_only():
    batch = collate([Encoded([5, 6, 7, 2], 2), Encoded([5, 2], 1)], pad_token_id=0)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 2], [5, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 2], [-100, 2, -100, -100]]
    assert {t.dtype for t in batch.values()} == {torch.long}


def test_collate_pads_on_to_a_multiple():
    batch = collate([Encoded([5, 6, 2], 1), Encoded([5, 2], 1)], pad_token_id=0, multiple=4)
    assert batch["input_ids"].tolist() == [[5, 6, 2, 0], [5, 2, 0, 0]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 0], [1, 1, 0, 0]]
    assert batch["labels"].tolist() == [[-100, 6, 2, -100], [-100, 2, -100, -100]]
    assert collate([Encoded([5, 6, 2], 1)], 0, multiple=3)["input_ids"].shape == (1, 3)


def test_collate_pad_equal_to_eos_keeps_the_real_eos():
    batch = collate([Encoded([5, 6, 2], 1), Encoded([5, 2], 1)], pad_token_id=2)
    assert batch["labels"].tolist() == [[-100, 6, 2], [-100, 2, -100]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1], [1, 1, 0]]


def test_collate_refuses_nothing_and_no_pad():
    with pytest.raises(ValueError, match="no sequences"):
        collate([], 0)
    with pytest.raises(ValueError, match="pad_token_id is None"):
        collate([Encoded([1], 0)], None)


def test_labels_give_transformers_loss_over_answer_tokens(tokenizer):
    model = make_llama(tokenizer, hidden_size=16, layers=1, heads=2, kv_heads=1)
    encoded = encode_qa(tokenizer, "Who is Ann?", "A poet.")
    batch = collate([encoded], tokenizer.pad_token_id)
    with torch.no_grad():
        output = model(**batch)
    ids, start = torch.tensor(encoded.input_ids), encoded.answer_start
    expected = torch.nn.functional.cross_entropy(output.logits[0, start - 1 : -1], ids[start:])
    torch.testing.assert_close(output.loss, expected)


def test_length_batches_cover_all_within_the_limit():
    lengths = [3, 9, 1, 4, 9, 2, 5, 5]
    encoded = [Encoded([1] * n, 0) for n in lengths]
    batches = length_batches(encoded, max_tokens=12)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(len(b) * max(lengths[i] for i in b) <= 12 for b in batches)
    flat = [lengths[i] for batch in batches for i in batch]
    assert flat == sorted(lengths, reverse=True)
    assert len(batches) == 5
    assert length_batches([], 12) == []


def test_length_batches_give_a_sequence_over_the_limit_its_own():
    lengths = [1, 9, 3, 11]
    batches = length_batches([Encoded([1] * n, 0) for n in lengths], 8)
    assert batches == [[3], [1], [2, 0]]
