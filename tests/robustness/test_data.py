"""Data of outsiders: chat templates, records and logs in other forms, masked vocabularies."""

import copy
import json
import logging
import re
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import Replace
from transformers import (
    CONFIG_MAPPING,
    AutoModelForCausalLM,
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    PhiConfig,
    PhiForCausalLM,
    PreTrainedTokenizerFast,
    RobertaConfig,
    RobertaForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

import nsru_kernels as nk
from nsru_train.answering import _answered_together, greedy_answers
from nsru_train.config import DataConfig, ModelConfig
from nsru_train.data import (
    QA,
    SafeTargets,
    TextFormat,
    check_disjoint,
    encode_prompt,
    encode_qa,
    use_format,
)
from nsru_train.data.encode import collate, dated, served_otherwise
from nsru_train.demo.sets import target_sets
from nsru_train.demo.tiny_model import make_llama, memorise, train_tokenizer
from nsru_train.estimating import token_batches
from nsru_train.evaluation import evaluate, probability_sets
from nsru_train.language_models import position_limit
from nsru_train.loading import Data, load_data, load_model, without_long
from nsru_train.losses.nll import AnswerHidden, answer_logits, answer_states
from nsru_train.metrics import forget_quality, load_log, model_utility
from nsru_train.scoring import score_sequences
from nsru_train.sources import digest, load_records, save_records
from nsru_train.verify import Comparison

ANN, BOB = QA("Who is Ann?", "A poet."), QA("Who is Bob, then?", "A baker of bread.")

TURNS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ THINK if m.role == 'assistant' }}{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\nOPEN{% endif %}"
)
GEMMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{% if m.role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "<start_of_turn>{{ 'model' if m.role == 'assistant' else m.role }}\n"
    "{{ m.content | trim }}<end_of_turn>\n{% endfor %}"
    "{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}"
)
# Writes an empty block of thoughts into a past turn, and opens one only where thinking is off.
QWEN3 = TURNS.replace("THINK", "'<think>\n\n</think>\n\n'").replace(
    "OPEN",
    "{% if enable_thinking is defined and not enable_thinking %}<think>\n\n</think>\n\n{% endif %}",
)
QWEN3_THINKING = TURNS.replace("THINK", "'<think>\n\n</think>\n\n'").replace("OPEN", "<think>\n")
CHATML = TURNS.replace("THINK", "''").replace("OPEN", "")
DEEPSEEK_R1 = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<|User|>{{ m.content }}"
    "{% else %}<|Assistant|>{{ m.content.split('</think>')[-1] }}{{ eos_token }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}<|Assistant|><think>\n{% endif %}"
)
# As Llama 3.2 has it, and as Granite.
DATED = (
    "{% if not date_string is defined %}{% if strftime_now is defined %}"
    "{% set date_string = strftime_now('%d %b %Y') %}{% else %}"
    "{% set date_string = '26 Jul 2024' %}{% endif %}{% endif %}"
    "Today Date: {{ date_string }}\n" + CHATML
)
GRANITE = (
    "{% if messages[0].role != 'system' %}Today is {{ strftime_now('%B %d, %Y') }}.\n{% endif %}"
    + CHATML
)
NO_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
SPACE = (
    "{% for m in messages %}{{ m.role | upper }}: {{ m.content }}"
    "{{ eos_token if m.role == 'assistant' else '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT: {% endif %}"
)
IM = "<|im_start|>user\nWho is Ann?<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


def chat_tokenizer(template, texts=("Who is Ann?", "A poet.", "USER ASSISTANT: A")):
    """eos_token is </s>, whatever ends the template's turns."""
    tokenizer = train_tokenizer(list(texts) * 3, 320)
    marks = ("<start_of_turn>", "<end_of_turn>", "<|im_start|>", "<|im_end|>", "<|User|>")
    tokenizer.add_tokens([*marks, "<|Assistant|>"], special_tokens=True)
    tokenizer.add_tokens(["<think>", "</think>"])
    tokenizer.chat_template = template
    return tokenizer


@pytest.mark.parametrize(
    ("template", "kwargs", "prompt", "answer"),
    [
        (
            GEMMA,
            {},
            "<s><start_of_turn>user\nWho is Ann?<end_of_turn>\n<start_of_turn>model\n",
            "A poet.|<end_of_turn>",
        ),
        (CHATML, {}, IM, "A poet.|<|im_end|>"),
        (QWEN3, {}, IM + EMPTY, "A poet.|<|im_end|>"),
        (QWEN3, {"enable_thinking": False}, IM + EMPTY, "A poet.|<|im_end|>"),
        (QWEN3_THINKING, {}, IM + EMPTY, "A poet.|<|im_end|>"),
        (DEEPSEEK_R1, {}, "<s><|User|>Who is Ann?<|Assistant|>", "A poet.|</s>"),
        (SPACE, {}, "USER: Who is Ann?\nASSISTANT:", " A poet.|</s>"),
        (CHATML.replace("<|im_end|>", ""), {}, IM.replace("<|im_end|>", ""), "A poet.|\n</s>"),
        (None, {}, "<s>Question: Who is Ann?\nAnswer:", " A poet.|</s>"),
    ],
    ids=["gemma", "chatml", "qwen3", "no-thinking", "opens-think", "r1", "space", "no-end", "none"],
)
def test_the_answer_is_what_the_template_puts_around_nothing_else(template, kwargs, prompt, answer):
    tokenizer = chat_tokenizer(template)
    use_format(tokenizer, TextFormat(template_kwargs=kwargs))
    encoded = encode_qa(tokenizer, "Who is Ann?", "A poet.")
    own, closing = answer.split("|", 1)
    assert tokenizer.decode(encoded.input_ids[: encoded.answer_start]) == prompt
    assert tokenizer.decode(encoded.input_ids[encoded.answer_start :]) == own + closing
    assert tokenizer.decode(encoded.answer) == own
    assert tokenizer.decode(encoded.input_ids[-encoded.closing :]) == closing
    assert encode_prompt(tokenizer, "Who is Ann?") == encoded.input_ids[: encoded.answer_start]


@pytest.mark.parametrize(
    ("template", "kwargs", "ends"),
    [
        (GEMMA, {}, None),
        (CHATML, {}, None),
        (SPACE, {}, ("", " ")),
        (None, {}, None),
        (QWEN3, {}, (EMPTY, "")),
        (QWEN3, {"enable_thinking": False}, None),
        (DEEPSEEK_R1, {}, ("", "<think>\n")),
    ],
    ids=["gemma", "chatml", "space", "none", "qwen3", "no-thinking", "r1"],
)
def test_a_prompt_that_is_served_otherwise_than_trained_is_said(template, kwargs, ends):
    tokenizer = chat_tokenizer(template)
    use_format(tokenizer, TextFormat(template_kwargs=kwargs))
    said = served_otherwise(tokenizer)
    if ends is None:
        assert said is None
    else:
        assert f"in {ends[0]!r} before an answer that is there" in said
        assert f"in {ends[1]!r} before one that is to come" in said


def test_a_template_without_the_question_is_refused():
    for text in ("Hello. ", "{{ messages[-1].content[:10] }}"):
        with pytest.raises(ValueError, match="chat template leaves the question out"):
            use_format(chat_tokenizer(text + "{{ messages[-1].role }}"), TextFormat())


@pytest.mark.parametrize(
    ("template", "text_format", "names"),
    [
        (DATED, {}, ["date_string"]),
        (DATED, {"template_kwargs": {"date_string": "26 Jul 2024"}}, None),
        (GRANITE, {}, []),
        (GRANITE, {"system_prompt": "Be kind."}, None),
        (CHATML, {}, None),
        (None, {}, None),
    ],
)
def test_a_prompt_that_tells_the_day_is_known(template, text_format, names):
    tokenizer = chat_tokenizer(template)
    use_format(tokenizer, TextFormat(**text_format))
    found = dated(tokenizer)
    assert (None if found is None else list(found)) == names
    if found:
        before = encode_prompt(tokenizer, "Who?")
        use_format(tokenizer, TextFormat(template_kwargs=found))
        assert encode_prompt(tokenizer, "Who?") == before
        assert dated(tokenizer) is None


def test_a_safe_target_that_is_the_answer_is_refused_whoever_gives_it():
    safe = SafeTargets({"decline": ("a  POET.",)})
    with pytest.raises(ValueError, match=r"safe_targets: for 'Who is Ann\?' it is the answer"):
        Data([ANN], [BOB], safe=safe)
    Data([replace(ANN, safe_target="No.")], [BOB], safe=safe)


@pytest.mark.parametrize("name", ["x.csv", "x.parquet"])
def test_records_are_not_saved_under_the_name_of_a_table(tmp_path, name):
    with pytest.raises(ValueError, match=r"path must end in \.jsonl"):
        save_records(tmp_path / name, [ANN])
    assert not (tmp_path / name).exists()


def test_sets_of_another_name_only():
    for taken in ("forget", "safe"):
        with pytest.raises(ValueError, match=f"got another '{taken}'"):
            Data([ANN], [BOB], {taken: [BOB]})
    tokenizer = chat_tokenizer(CHATML)
    assert probability_sets(tokenizer, {"a": [ANN]}, SafeTargets()).keys() == {"a_prob"}


def test_an_answer_that_stands_elsewhere_in_the_text_is_found_at_its_place():
    tokenizer = chat_tokenizer(CHATML)
    for answer in ("user", "im", "end", "Who is Ann?", "|", "assistant\n"):
        encoded = encode_qa(tokenizer, "Who is Ann?", answer)
        assert tokenizer.decode(encoded.answer).rstrip("\n") == answer.rstrip("\n")
        assert encoded.input_ids[: encoded.answer_start] == encode_prompt(tokenizer, "Who is Ann?")


def test_end_tokens_of_the_generation_config_end_an_answer():
    tokenizer = chat_tokenizer(CHATML.replace("<|im_end|>\n", "\n##"))
    line = tokenizer("\n", add_special_tokens=False)["input_ids"]
    use_format(tokenizer, TextFormat(end_tokens=frozenset(line)))
    encoded = encode_qa(tokenizer, "Who is Ann?", "A poet.")
    assert encoded.input_ids[-encoded.closing :] == line


@pytest.mark.parametrize("template", [GEMMA, QWEN3])
def test_a_memorised_chat_scores_and_answers_its_own_words(template):
    tokenizer = chat_tokenizer(template, [f"{qa.question} {qa.answer}" for qa in (ANN, BOB)])
    model = make_llama(tokenizer, hidden_size=32, layers=1, heads=2, intermediate_size=48)
    memorise(model, tokenizer, [ANN, BOB], epochs=120, lr=1e-2, progress=False)
    result = evaluate(model, tokenizer, {"forget": [ANN, BOB]}, max_new_tokens=30, progress=False)
    for row in result.rows["forget"]:
        assert row["probability"] > 0.9
        assert row["generated"] == row["answer"]
        assert row["extraction_strength"] == row["exact_memorisation"] == 1.0


def test_memorisation_counts_the_answers_own_tokens(monkeypatch):
    tokenizer = chat_tokenizer(CHATML.replace("<|im_end|>", ""))  # closes with a line break and EOS
    model = make_llama(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=16)
    seen = []
    monkeypatch.setattr(
        "nsru_train.evaluation.exact_memorisation", lambda p, t: seen.append((len(p), t)) or 0.0
    )
    evaluate(model, tokenizer, {"forget": [ANN]}, generate=False, progress=False)
    [(predicted, own)] = seen
    assert tokenizer.decode(own) == "A poet."
    assert predicted == len(own)


def test_system_prompt_and_variables_reach_the_template():
    tokenizer = chat_tokenizer(CHATML + "{{ style }}")
    given = TextFormat(system_prompt="Be brief.", template_kwargs={"style": "!"})
    plain = encode_prompt(tokenizer, "Who is Ann?")
    use_format(tokenizer, given)
    prompt = encode_prompt(tokenizer, "Who is Ann?")
    assert tokenizer.decode(prompt) == "<|im_start|>system\nBe brief.<|im_end|>\n" + IM
    assert prompt[-len(plain) :] == plain
    encoded = encode_qa(tokenizer, "Who is Ann?", "A poet.")
    assert tokenizer.decode(encoded.answer) == "A poet."


@pytest.mark.parametrize(
    ("template", "given", "message"),
    [
        (None, TextFormat(system_prompt="Be brief."), "need a chat template"),
        (None, TextFormat(template_kwargs={"a": 1}), "need a chat template"),
        (QWEN3, TextFormat(template_kwargs={"enable_thinkin": 1}), "not read 'enable_thinkin'"),
        # Words of the template that are no variables of it.
        (QWEN3, TextFormat(template_kwargs={"assistant": 1}), "it reads enable_thinking"),
        (QWEN3, TextFormat(template_kwargs={"think": 1}), "not read 'think'"),
        (CHATML, TextFormat(template_kwargs={"role": 1}), "it reads no variable of yours"),
        (CHATML, TextFormat(template_kwargs={"tools": []}), "not read 'tools'"),
        (CHATML, TextFormat(template_kwargs={"tokenize": True}), "not read 'tokenize'"),
        (QWEN3, TextFormat(template_kwargs={"add_generation_prompt": 1}), "'add_generation_prom"),
        (QWEN3, TextFormat(system_prompt="\ud800"), "surrogate"),
        (GEMMA, TextFormat(system_prompt="Be brief."), "System role not supported"),
        (NO_SYSTEM, TextFormat(system_prompt="Be brief."), "leaves a system message out"),
    ],
)
def test_a_format_that_the_template_cannot_write_is_refused(template, given, message):
    tokenizer = chat_tokenizer(template)

    def encode():
        use_format(tokenizer, given)
        return encode_qa(tokenizer, "Who is Ann?", "A poet.")

    with pytest.raises(ValueError, match=message):
        encode()


@pytest.mark.parametrize("name", ["tools", "documents"])
def test_a_section_of_tools_or_documents_is_part_of_the_prompt(name):
    section = "{% generation %}{% for one in " + name + " or [] %}{{ one.name }};{% endfor %}"
    tokenizer = chat_tokenizer(section + "{% endgeneration %}" + CHATML)
    use_format(tokenizer, TextFormat(template_kwargs={name: [{"name": "Ann"}, {"name": "A"}]}))
    assert tokenizer.decode(encode_prompt(tokenizer, "Who is Ann?")) == "Ann;A;" + IM


def test_an_answer_that_would_end_early_is_refused():
    tokenizer = chat_tokenizer(GEMMA)
    for mark in ("</s>", "<end_of_turn>"):
        with pytest.raises(ValueError, match=f"holds '{re.escape(mark)}'.*remove it"):
            encode_qa(tokenizer, "Who is Ann?", f"A poet.{mark} And more.")


def save_chat_model(folder, template=CHATML, **sizes):
    tokenizer = chat_tokenizer(template)
    model = make_llama(tokenizer, **{"hidden_size": 16, "layers": 1, "heads": 2} | sizes)
    model.generation_config.eos_token_id = [tokenizer.eos_token_id, 7]
    for part in (model, tokenizer):
        part.save_pretrained(folder)
    return tokenizer


def test_settings_reach_the_tokenizer_of_a_run(tmp_path):
    tokenizer = save_chat_model(tmp_path)
    config = DataConfig(
        "authors:forget",
        "authors:retain",
        system_prompt="Be brief.",
        chat_template_kwargs={"messages": 1},
    )
    with pytest.raises(ValueError, match=r"data: chat_template_kwargs.*'messages'"):
        load_model(ModelConfig(str(tmp_path)), config)
    config.chat_template_kwargs = {}
    _, loaded = load_model(ModelConfig(str(tmp_path)), config)
    assert loaded.text_format.end_tokens == {tokenizer.eos_token_id, 7}
    assert "Be brief." in loaded.decode(encode_prompt(loaded, "Who is Ann?"))
    loaded.save_pretrained(tmp_path / "again")
    _, again = load_model(ModelConfig(str(tmp_path)))
    assert "Be brief." not in again.decode(encode_prompt(again, "Who is Ann?"))


# Texts that are too long ------------------------------------------------------------------------


def test_long_answers_are_cut_or_left_out(tmp_path, caplog):
    tokenizer = save_chat_model(tmp_path / "model")
    long = QA("Who is Cid?", "A poet. " * 100)
    file = tmp_path / "a.json"
    file.write_text(json.dumps([{"question": q.question, "answer": q.answer} for q in (ANN, long)]))
    (tmp_path / "b.json").write_text(json.dumps([{"question": "Bob?", "answer": "A baker."}]))
    given = {"forget": str(tmp_path / "b.json"), "retain": str(file), "max_length": 60}
    refuse, truncate, skip = (
        DataConfig(**given, **more) for more in ({}, {"truncate": True}, {"skip": True})
    )
    with pytest.raises(ValueError, match="truncate or skip, not both"):
        DataConfig(**given, truncate=True, skip=True)

    def encode(config, qa):
        _, tokenizer = load_model(ModelConfig(str(tmp_path / "model")), config)
        return encode_qa(tokenizer, qa.question, qa.answer, max_length=60)

    with pytest.raises(ValueError, match="raise max_length"):
        encode(refuse, long)
    cut = encode(truncate, long)
    assert len(cut) == 60
    assert cut.closing == 0  # it does not end here
    assert tokenizer.decode(cut.answer) == (long.answer)[: len(tokenizer.decode(cut.answer))]
    assert encode(truncate, ANN) == encode(refuse, ANN)
    safe = DataConfig(**{**given, "max_length": 1000}, skip=True)
    data = load_data(skip)
    with caplog.at_level(logging.WARNING):
        kept = without_long(data, tokenizer, DataConfig(**{**given, "max_length": 140}, skip=True))
    assert [qa.question for qa in kept.retain] == ["Who is Ann?"]
    assert "1 of 2 retain records" in caplog.text
    assert without_long(data, tokenizer, safe).retain == data.retain
    with pytest.raises(ValueError, match=r"no (retain|forget) record fits"):
        without_long(data, tokenizer, DataConfig(**{**given, "max_length": 5}, skip=True))


@pytest.mark.parametrize("name", ["retain", "holdout"])
def test_answers_that_are_cut_are_said(tmp_path, caplog, name):
    save_chat_model(tmp_path / "model")
    rows = {"forget": [ANN], "retain": [QA("Eve?", "A clerk.")], "holdout": [BOB]}
    rows[name] = [*rows[name], QA("Who is Cid?", "A poet. " * 100)]
    for file, records in rows.items():
        save_records(tmp_path / f"{file}.jsonl", records)
    forget, retain, holdout = (str(tmp_path / f"{file}.jsonl") for file in rows)
    config = DataConfig(forget, retain, more={"holdout": holdout}, max_length=300, truncate=True)
    _, tokenizer = load_model(ModelConfig(str(tmp_path / "model")), config)
    loaded = load_data(config)
    with caplog.at_level(logging.WARNING):
        assert without_long(loaded, tokenizer, config) == loaded
    said = [record.getMessage() for record in caplog.records]
    assert said == [f"data.truncate: 1 of 2 {name} records are too long and their answers cut."]


# Records ----------------------------------------------------------------------------------------


def records_file(folder, name, rows):
    path = folder / name
    if name.endswith(".parquet"):
        pa = pytest.importorskip("pyarrow")
        from pyarrow.parquet import write_table

        write_table(pa.Table.from_pylist(rows), path)
    elif name.endswith(".csv"):
        import csv

        with path.open("w", newline="") as file:
            writer = csv.DictWriter(file, rows[0])
            writer.writeheader()
            writer.writerows(rows)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def turn(role, text):
    return {"role": role, "content": text}


MANY_LINES = QA('Say "hi",\nplease', "one\u2028two\nthree, four")


@pytest.mark.parametrize("name", ["a.jsonl", "a.csv", "a.parquet"])
@pytest.mark.parametrize("extra", [{}, {"id": "7", "question_id": "x"}])
def test_every_format_gives_the_same_records(tmp_path, caplog, name, extra):
    rows = [{"question": q.question, "answer": q.answer, **extra} for q in (ANN, BOB, MANY_LINES)]
    path = records_file(tmp_path, name, rows)
    assert load_records(path) == [ANN, BOB, MANY_LINES]
    said = [record.getMessage() for record in caplog.records]
    assert said == ([f"{path}: ignored columns: id, question_id."] if extra else [])


@pytest.mark.parametrize("name", ["a.jsonl", "a.parquet"])
def test_chats_of_one_question_are_records(tmp_path, name):
    chat = [turn("user", ANN.question), turn("assistant", ANN.answer)]
    rows = (
        {"messages": chat},
        {"prompt": ANN.question, "completion": ANN.answer},
        {"prompt": chat[:1], "completion": chat[1:], "topic": "Ann"},
    )
    for row in rows:
        (qa,) = load_records(records_file(tmp_path, name, [row]))
        assert (qa.question, qa.answer) == (ANN.question, ANN.answer)
        assert qa.topic == row.get("topic")


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([turn("system", "Be brief."), turn("user", "q")], r"data\.system_prompt"),
        ([turn("user", "q"), turn("assistant", "a")] * 2, "one message of each of user, assistant"),
        ([turn("user", "q"), turn("assistant", [{"type": "text"}])], "answer must be non-empty"),
        ("text", "must be a list of messages"),
        ([["user", "q"]], "must be a list of messages"),
    ],
)
def test_other_chats_are_refused(tmp_path, messages, message):
    path = records_file(tmp_path, "a.jsonl", [{"messages": messages}])
    with pytest.raises(ValueError, match=rf"a\.jsonl:1: .*{message}"):
        load_records(path)


def test_columns_by_name(tmp_path):
    row = {"instruction": ANN.question, "output": ANN.answer, "answer": "another"}
    path = records_file(tmp_path, "a.csv", [row])
    names = {"question_column": "instruction", "answer_column": "output"}
    assert load_records(path, **names) == [ANN]
    with pytest.raises(ValueError, match=r"'instructions' is missing; found: instruction, output"):
        load_records(path, question_column="instructions", answer_column="output")
    config = DataConfig(str(path), "authors:retain", **names)
    assert load_data(config).forget == [ANN]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", 'question,answer\nWho?,"A po', r"a\.csv:\d: not valid CSV"),
        ("a.csv", "question,answer\nWho?,Ann,Bob\n", r"a\.csv:2: not valid CSV \(3 cells for 2"),
        ("a.csv", "question,question\nWho?,Ann\n", r"same name"),
        ("a.csv", "question,answer\nWho?\n", r"a\.csv:2: field 'answer' is missing"),
        ("a.csv", "question;answer\nWho?;Ann\n", r"'question' is missing; found: question;answer"),
        ("a.parquet", "PAR1 and no more", r"a\.parquet: not a readable Parquet"),
        ("a.json", '[{"question": "q", "answer": "a", "answer": "b"}]', "'answer' stands twice"),
        ("a.jsonl", '{"question": "q", "answer": "a", "answer": "a"}', r"l:1: key 'answer' stand"),
        ("a.json", "[" * 100_000, r"a\.json: it nests too deep"),
        ("a.jsonl", '{"a":' * 100_000, r"a\.jsonl:1: it nests too deep"),
        ("a.jsonl", '{"question": ' + "9" * 5000 + "}", r"a\.jsonl:1: "),
    ],
)
def test_damaged_files_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=message):
        load_records(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.json", '{"decline": "No.", "decline": "Never."}', "'decline' stands twice"),
        ("a.yaml", "decline: No, thanks.\ndecline: Never.", "'decline' stands twice"),
        ("a.yaml", "decline: " + "[" * 5000, "nests too deep"),
        ("a.yaml", "decline: !!timestamp x", "not valid YAML"),
        ("a.json", r'{"decline": "No\ud800."}', "surrogate"),
    ],
)
def test_damaged_safe_targets_are_named(tmp_path, name, text, message):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=rf"{name}: .*{message}"):
        SafeTargets.from_file(tmp_path / name)


def test_surrogates_in_parts_are_refused():
    with pytest.raises(ValueError, match="part 'decline' holds half of a surrogate"):
        QA("q", "a", safe_target={"decline": "No\ud800."})
    assert QA("q", "a", safe_target={"decline": ""}).safe_target == {"decline": ""}


@pytest.mark.parametrize(
    ("question", "other"),
    [
        ("Wer war Zo\u00eb?", "Wer war Zoe\u0308?"),
        ("Wer war Zo\u00eb?", "wer war Zo\u00cb?"),
        ("Wer war Zo\u00eb?", "Wer war Zo\u00ad\u00eb?"),
        ("Wer war Zo\u00eb?", "Wer\u00a0war\u200b Zoë?"),
        ("Where is O'Neil's?", "Where is O’Neil's?"),
        ("Where is O'Neil's?", "Where is O'Neil's"),
        ("Where is O'Neil's?", "“Where is O'Neil's?”"),
        ("Where is O'Neil's?", "Where is O'Neil's ？"),
        ("Where is O'Neil's?", "where is O'Neil's?!"),
    ],
)
def test_one_question_in_two_spellings_is_not_disjoint(question, other):
    with pytest.raises(ValueError, match="share 1 of 1"):
        check_disjoint([QA(question, "a")], [QA(other, "a")])
    check_disjoint([QA("Wer war Zo\u00eb?", "a")], [QA("Wer war Zoe?", "a")])


@pytest.mark.parametrize("other", ["2 - 2?", "2 + 3?", "???"])
def test_marks_inside_a_question_count(other):
    check_disjoint([QA("2 + 2?", "4")], [QA(other, "a")])
    check_disjoint([QA("?", "4")], [QA("??", "a")])


def test_a_question_that_a_set_holds_twice_is_said(tmp_path, caplog):
    for name, questions in (("f", ["Who?", "Where?", "“who?”"]), ("r", ["When?"])):
        rows = [json.dumps({"question": q, "answer": f"a{i}"}) for i, q in enumerate(questions)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    load_data(DataConfig(str(tmp_path / "f.jsonl"), str(tmp_path / "r.jsonl")))
    assert [record.getMessage() for record in caplog.records] == [
        "data.forget: 1 of 3 records ask what an earlier one asks, such as '“who?”'; each counts."
    ]


@pytest.mark.parametrize(
    ("name", "shared", "refused"),
    [
        ("holdout", "forget", True),
        ("world_facts", "forget", True),
        ("retain_unseen", "forget", True),
        ("holdout", "retain", True),
        ("retain_unseen", "retain", True),
        ("world_facts", "retain", False),  # general questions may be retained
        ("holdout", "neither", False),
    ],
)
def test_a_set_for_evaluation_is_not_one_that_was_trained_on(tmp_path, name, shared, refused):
    known = {"forget": "Who is Ann?", "retain": "Who is Bob?", "neither": "Who is Eve?"}
    for file, question in known.items():
        (tmp_path / f"{file}.jsonl").write_text(json.dumps({"question": question, "answer": "a"}))
    again = {"question": known[shared].upper(), "answer": "b"}
    (tmp_path / f"{name}.jsonl").write_text(json.dumps(again))
    config = DataConfig(
        *(str(tmp_path / f"{file}.jsonl") for file in ("forget", "retain")),
        more={name: str(tmp_path / f"{name}.jsonl")},
    )
    if refused:
        with pytest.raises(ValueError, match=f"{shared} and {name} sets share 1 of 1"):
            load_data(config)
    else:
        load_data(config)


def test_the_demos_own_sets_are_apart_too(tmp_path):
    (tmp_path / "data").mkdir()
    for name in ("forget", "retain", "retain_unseen"):
        row = {"question": f"Who is {name[:6]}?", "answer": "a"}  # retain_unseen is retain again
        (tmp_path / "data" / f"{name}.jsonl").write_text(json.dumps(row))
    with pytest.raises(ValueError, match="retain and retain_unseen sets share 1 of 1"):
        target_sets(str(tmp_path))


def test_privacy_is_not_measured_against_forgotten_questions():
    tokenizer = chat_tokenizer(None)
    model = make_llama(tokenizer, hidden_size=16, layers=1, heads=2)
    splits = {"forget": [ANN, BOB], "holdout": [QA(BOB.question.upper(), "A baker."), ANN]}
    result = evaluate(model, tokenizer, splits, generate=False, progress=False)
    assert not {"privleak", "membership_auc"} & result.overall.keys()
    assert any("2 of 2 holdout questions are forget questions" in note for note in result.notes)


def test_a_digest_is_that_of_the_records_not_of_the_file(tmp_path):
    rich = QA("Who?", "Ann", "Which?", "She", ("Bob", "Eve"), {"decline": "No."}, "Ann", ("Cy",))
    save_records(tmp_path / "a.jsonl", [rich, ANN])
    assert digest(load_records(tmp_path / "a.jsonl")) == digest([rich, ANN])
    others = ([ANN, rich], [rich], [rich, QA("Who is Ann?", "A poet")], [replace(rich, topic="B")])
    assert len({digest(other) for other in ([rich, ANN], *others)}) == 5


# Logs -------------------------------------------------------------------------------------------

LOSSES = {"avg_paraphrased_loss": [0.1 * i for i in range(12)]}
LOSSES["average_perturb_loss"] = [
    [x + 0.2, x + 0.4 + x * x] for x in LOSSES["avg_paraphrased_loss"]
]
LOSSES["avg_gt_loss"] = LOSSES["rougeL_recall"] = [i / 12 for i in range(12)]
NAMES = ("eval_log.json", "eval_log_forget.json")


def by_index(column, order=range(12), first=0):
    return {str(i + first): column[i] for i in order}


def test_log_columns_are_paired_by_index():
    wanted = dict.fromkeys(NAMES, LOSSES)
    shuffled = [9, 3, 11, 0, 10, 1, 2, 4, 5, 6, 7, 8]
    for key in LOSSES:
        for order in (range(12), shuffled):
            log = {name: {**LOSSES, key: by_index(LOSSES[key], order)} for name in NAMES}
            assert model_utility(log) == pytest.approx(model_utility(wanted), rel=1e-12)
            quality = forget_quality(log, wanted)
            assert (quality, quality.statistic) == (1.0, 0.0)


def test_logs_that_cannot_be_paired_are_refused(tmp_path):
    odd = {**LOSSES, "average_perturb_loss": by_index(LOSSES["average_perturb_loss"], first=1)}
    with pytest.raises(ValueError, match=r"different indices, such as '0'.*cannot be paired"):
        model_utility({"eval_log.json": odd})
    path = tmp_path / "log.json"
    path.write_text('{"eval_log.json": {"avg_gt_loss": {"0": 1, "0": 2}}}')
    with pytest.raises(ValueError, match=r"log\.json.*'0' stands twice"):
        load_log(path)


# Every reader of files meets damaged copies -------------------------------------------------------

LOG = json.dumps(dict.fromkeys(NAMES, LOSSES))
ROWS = [
    {"question": "Who is Ann?", "answer": "A poet.", "perturbed_answer": ["A cook."], "id": 1},
    {
        "messages": [turn("user", "Who?"), turn("assistant", "Ann")],
        "safe_target": {"decline": "No"},
    },
]
FILES = {
    "a.jsonl": ("".join(json.dumps(row) + "\n" for row in ROWS), load_records),
    "a.json": (json.dumps(ROWS), load_records),
    "a.csv": ('question,answer,topic\n"Who is\nAnn?",A poet.,Ann\n', load_records),
    "s.json": (
        '{"decline": ["No.", "Never."], "redirect": "Ask of {topic}."}',
        SafeTargets.from_file,
    ),
    "s.yaml": ("decline: [No., &a Never.]\nredirect: *a\n<<: {}\n", SafeTargets.from_file),
    "s.txt": ("I would rather not say.\nNo.\n", SafeTargets.from_file),
    "log.json": (LOG, lambda path: model_utility(load_log(path))),
}


@st.composite
def damaged(draw, text):
    """A copy with some bytes replaced, removed, repeated or cut off."""
    data = text.encode()
    for _ in range(draw(st.integers(1, 3))):
        start = draw(st.integers(0, max(0, len(data) - 1)))
        end = draw(st.integers(start, min(len(data), start + 40)))
        piece = draw(
            st.sampled_from(
                [b"", b"\0", b"\xff", b"{", b"]", b"null", b'"', b"1e999", b"NaN", b"-"]
            )
            | st.just(data[start:end] * 2)
            | st.binary(max_size=4)
        )
        data = draw(st.sampled_from([data[:start] + piece + data[end:], data[:start] + piece]))
    return data


@contextmanager
def suppress_named(*names):
    """Let ValueErrors and OSErrors pass that hold one of the names, and nothing else."""
    try:
        yield
    except (ValueError, OSError) as error:
        if not any(name in str(error) for name in names):
            raise AssertionError(f"{error!r} does not name the file") from error


@pytest.mark.parametrize("name", FILES)
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(data=st.data())
def test_readers_of_data_name_the_damaged_file(tmp_path, name, data):
    text, read = FILES[name]
    path = tmp_path / name
    path.write_bytes(data.draw(damaged(text)))
    # What a log holds is checked later than it is read.
    with suppress_named(name, "log["):
        read(path)


# Models whose vocabulary is masked, or that read padding ------------------------------------------


def masked_phi(tokenizer, value=-torch.inf):
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=len(tokenizer) + 20,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = PhiForCausalLM(config).eval()
    model.lm_head.weight.data.mul_(20)
    model.lm_head.bias.data[len(tokenizer) :] = value
    return model


@pytest.mark.parametrize("value", [-torch.inf, torch.finfo(torch.float32).min])
def test_a_masked_vocabulary_keeps_losses_and_metrics_finite(value):
    tokenizer = chat_tokenizer(None)
    model = masked_phi(tokenizer, value)
    nk.swap_linears(model, "all-linear", rank=2, alpha=4)
    batch = collate([encode_qa(tokenizer, ANN.question, ANN.answer)], tokenizer.pad_token_id)
    with nk.adapters_disabled(model), torch.no_grad():
        base, base_logits = answer_states(model, batch), answer_logits(model, batch)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    states, logits = answer_states(model, batch), answer_logits(model, batch)
    assert isinstance(states, AnswerHidden)  # the head alone gives the model's logits
    seen = slice(len(tokenizer))
    log_q, log_p = (s.logits[:, seen].log_softmax(-1) for s in (base_logits, logits))
    kl = (log_q.exp() * (log_q - log_p)).sum(-1)
    assert kl.min() > 1e-3
    leaf = next(p for name, p in model.named_parameters() if "lora_A" in name)
    (wanted,) = torch.autograd.grad(kl.sum(), leaf, retain_graph=True)
    for other, first in ((states, base), (logits, base_logits)):
        torch.testing.assert_close(other.kl(first), kl)
        (grad,) = torch.autograd.grad(other.kl(first).sum(), leaf, retain_graph=True)
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-6)
    result = evaluate(
        model, tokenizer, {"forget": [ANN, BOB], "holdout": [BOB]}, max_new_tokens=4, progress=False
    )
    rows = [v for row in result.rows["forget"] for v in row.values() if isinstance(v, float)]
    assert np.isfinite([*rows, *result.overall.values()]).all()
    found = Comparison()
    found.add(base_logits, logits)
    wanted_difference = (base_logits.logits - logits.logits)[:, seen].abs().max()
    assert found.logits_max_diff == pytest.approx(wanted_difference.item())
    assert found.logits_max < 1e4
    # A model that diverged is not taken for an equal one.
    logits.logits.fill_(torch.nan)
    found.add(base_logits, logits)
    assert np.isnan(found.logits_max_diff)


def test_a_model_that_reads_padding_answers_as_one_by_one(caplog):
    tokenizer = chat_tokenizer(None)
    torch.manual_seed(0)
    config = RwkvConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        attention_hidden_size=32,
        num_hidden_layers=2,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    model = RwkvForCausalLM(config).eval()
    for parameter in model.parameters():
        parameter.data.add_(torch.randn_like(parameter) * 0.2)
    questions = ["Who?", ANN.question, BOB.question, "What is it that Bob and Ann want?", "Why?"]
    questions += ["Who is Eve?", "Who is Tom?", "Who is Kim?"]  # of one length
    alone = [greedy_answers(model, tokenizer, [q], max_new_tokens=12)[0] for q in questions]
    assert len(set(alone)) > 1
    assert greedy_answers(model, tokenizer, questions, max_new_tokens=12) == alone
    said = [record.getMessage() for record in caplog.records if "one by" in record.getMessage()]
    assert len(said) == 1
    assert "RwkvForCausalLM mixes up the states of several prompts" in said[0]
    caplog.clear()
    assert greedy_answers(model.bfloat16(), tokenizer, questions[-2:], max_new_tokens=2)
    assert _answered_together(model, [1, 2, 3], 0, None) == "none"
    llama = make_llama(tokenizer, hidden_size=64, layers=8, heads=2, intermediate_size=64)
    for dtype in (torch.float32, torch.bfloat16):
        caplog.clear()
        greedy_answers(copy.deepcopy(llama).to(dtype), tokenizer, questions, max_new_tokens=2)
        assert "answered" not in caplog.text, "rounding is no reason"


def test_a_text_longer_than_the_position_table_is_named():
    from transformers import GPT2Config, GPT2LMHeadModel

    tokenizer = chat_tokenizer(None)
    tokenizer.add_special_tokens({"pad_token": "<new-pad>"})  # without a row in the embedding
    sizes = {"n_positions": 40, "n_embd": 16, "n_layer": 1, "n_head": 2}
    model = GPT2LMHeadModel(GPT2Config(vocab_size=len(tokenizer) - 1, **sizes)).eval()
    items = [encode_qa(tokenizer, "Who is Ann?", "A poet." * n) for n in (1, 2)]
    assert len(score_sequences(model, tokenizer, items)) == 2
    sizes = {"max_tokens": 400, "max_length": 400}
    [batch] = token_batches(model, tokenizer, [ANN, QA("Who?", "A poet. And more.")], **sizes)
    assert model(**batch).logits.isfinite().all()
    long = encode_qa(tokenizer, "Who is Ann?", "A poet." * 20)
    with pytest.raises(ValueError, match=rf"{len(long)} tokens, GPT2LMHeadModel has 40 positions"):
        score_sequences(model, tokenizer, [long])
    with pytest.raises(ValueError, match="has 40 positions"):
        token_batches(model, tokenizer, [QA("Who is Ann?", "A poet." * 20)], **sizes)
    with pytest.raises(ValueError, match="has 40 positions"):
        greedy_answers(model, tokenizer, ["Who is Ann? " * 20])
    assert len(greedy_answers(model, tokenizer, ["Who is Ann?", "Who?"], max_new_tokens=90)) == 2


def test_a_token_without_an_embedding_is_named_at_every_entrance():
    tokenizer = chat_tokenizer(None)
    model = make_llama(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=16)
    model.resize_token_embeddings(20)
    encoded = encode_qa(tokenizer, ANN.question, ANN.answer)
    for use in (
        lambda: score_sequences(model, tokenizer, [encoded]),
        lambda: greedy_answers(model, tokenizer, [ANN.answer, BOB.answer]),
        lambda: token_batches(model, tokenizer, [ANN], max_tokens=99, max_length=99),
    ):
        with pytest.raises(ValueError, match=r"has token \d+, LlamaForCausalLM has embeddings of"):
            use()


def test_a_text_beyond_the_stated_positions_of_a_rotary_model_is_said_once(caplog):
    tokenizer = chat_tokenizer(None)
    sizes = {"hidden_size": 16, "layers": 1, "heads": 2}
    model = make_llama(tokenizer, **sizes, max_length=40)
    short, long = (encode_qa(tokenizer, "Who?", "A poet. " * count) for count in (1, 12))
    assert len(short) < 40 < len(long)
    score_sequences(model, tokenizer, [short])
    assert "max_position_embeddings" not in caplog.text
    for _ in range(2):
        score_sequences(model, tokenizer, [short, long])
        token_batches(
            model, tokenizer, [QA("Who?", "A poet. " * 12)], max_tokens=200, max_length=200
        )
    said = [r.getMessage() for r in caplog.records if "max_position_embeddings" in r.getMessage()]
    assert len(said) == 1
    assert f"a text has {len(long)} tokens, LlamaForCausalLM is made for 40 positions" in said[0]


def test_a_model_whose_positions_count_padding_answers_as_one_by_one(caplog):
    tokenizer = chat_tokenizer(None)
    torch.manual_seed(1)
    config = BartConfig(
        vocab_size=len(tokenizer), d_model=32, decoder_layers=2, decoder_ffn_dim=32,
        decoder_attention_heads=2, max_position_embeddings=200, is_decoder=True,
        is_encoder_decoder=False, init_std=0.5, pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
        forced_eos_token_id=None,
    )  # fmt: skip
    model = BartForCausalLM(config).eval()
    questions = ["Who?", ANN.question, "What is it that Bob and Ann want?"]
    alone = [greedy_answers(model, tokenizer, [q], max_new_tokens=12)[0] for q in questions]
    assert greedy_answers(model, tokenizer, questions, max_new_tokens=12) == alone
    assert "BartForCausalLM sees padding" in caplog.text
    assert "generates otherwise" not in caplog.text


def test_a_model_that_generates_by_other_positions_than_it_is_scored_is_told_of(caplog):
    tokenizer = chat_tokenizer(None)
    config = RobertaConfig(
        vocab_size=len(tokenizer), hidden_size=32, num_hidden_layers=2, intermediate_size=32,
        num_attention_heads=2, max_position_embeddings=200, is_decoder=True, initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    model = RobertaForCausalLM(config).eval()
    greedy_answers(model, tokenizer, ["Who?", ANN.question], max_new_tokens=2)
    assert "RobertaForCausalLM generates otherwise than it is scored" in caplog.text


@pytest.mark.parametrize("name", ["gptj", "codegen", "ctrl"])
def test_a_position_table_in_a_buffer_limits_texts(name):
    tokenizer = chat_tokenizer(None)
    config = CONFIG_MAPPING[name](
        vocab_size=len(tokenizer), n_positions=40, n_embd=32, n_layer=1, n_head=4, rotary_dim=4,
        dff=32,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_config(config).eval()
    assert position_limit(model) == 40
    with pytest.raises(ValueError, match="40 positions"):
        greedy_answers(model, tokenizer, ["What is it? " * 40])


def test_answers_in_another_script_are_not_scored_zero_by_rouge(monkeypatch):
    latin = QA("Who?", "Ann of Oslo", perturbed_answers=["Bob"], paraphrased_answer="It is Ann")
    other = replace(latin, question="Кто?", answer="Анна из Осло")
    tokenizer = chat_tokenizer(None)
    model = make_llama(tokenizer, hidden_size=16, layers=1, heads=2, intermediate_size=16)

    def say(shares, model, tokenizer, questions, **_):
        return {q: "Анна из Осло" if q == "Кто?" else "Ann" for q in questions}

    monkeypatch.setattr("nsru_train.evaluation.answer_share", say)
    found = evaluate(
        model, tokenizer, {"forget": [latin, other], "retain": [other]}, progress=False
    )
    assert found.metrics["forget"]["rougeL_recall"] == pytest.approx(1 / 3)
    assert "rougeL_recall" not in found.metrics["retain"]
    assert "model_utility" not in found.overall
    said = [note for note in found.notes if "word of a-z" in note]
    assert [note.partition(":")[0] for note in said] == ["forget", "retain", "model_utility"]
    assert "1 of 2 records" in said[0]
    alone = evaluate(model, tokenizer, {"retain": [latin]}, progress=False)
    assert alone.metrics["retain"]["rougeL_recall"] == pytest.approx(1 / 3)
    assert not [note for note in alone.notes if "word of a-z" in note]


def test_answers_that_the_tokenizer_cannot_write_are_told_of(caplog):
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel({"<unk>": 0, "</s>": 1, "Ann": 2}, "<unk>")),
        unk_token="<unk>", eos_token="</s>",
    )  # fmt: skip
    known = [QA("Who?", "Ann")]
    data = Data([QA("Кто?", "Анна"), *known], [QA("Who else?", "Ann")])
    assert without_long(data, tokenizer, DataConfig("a", "b")) is data
    said = [record.getMessage() for record in caplog.records]
    assert len(said) == 1
    assert said[0].startswith("1 of 2 forget answers hold characters")


def test_a_template_whose_white_space_joins_the_answer_is_told_of_with_its_tokens():
    tokenizer = chat_tokenizer(
        "{% for m in messages %}<{{ m['role'] }}>\n\n{{ m['content'] }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>\n\n{% endif %}"
    )
    tokenizer.backend_tokenizer.normalizer = Replace(Regex("\n\nB"), "\nB")
    with pytest.raises(ValueError, match=r"it ends in .*, and in .* where the answer follows"):
        encode_qa(tokenizer, "Who?", "Bob")


@pytest.mark.parametrize("decoder", [True, False])
def test_a_model_that_reads_later_tokens_is_refused(tmp_path, decoder):
    config = BertConfig(
        vocab_size=400, hidden_size=16, intermediate_size=16, num_hidden_layers=1,
        num_attention_heads=2, is_decoder=decoder,
    )  # fmt: skip
    torch.manual_seed(0)
    BertLMHeadModel(config).save_pretrained(tmp_path)
    chat_tokenizer(None).save_pretrained(tmp_path)
    if decoder:
        assert load_model(str(tmp_path))[0].config.is_decoder
        return
    with pytest.raises(ValueError, match=r"BertLMHeadModel of .* reads the tokens that come later"):
        load_model(str(tmp_path))
