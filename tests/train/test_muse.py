"""MUSE against loops of one text at a time, written by the rules of both public codes."""

import json

import pytest
import torch
import yaml
from rouge_score.rouge_scorer import RougeScorer
from samples import FORGET, RECORDS, RETAIN, SIZES, make_tokenizer

import nsru_kernels as nk
from nsru_kernels.hf.peft_format import save_lora_adapter
from nsru_train import muse
from nsru_train.cli import main
from nsru_train.demo.tiny_model import make_llama
from nsru_train.guard import without_update
from nsru_train.metrics.muse import benchmark, first_answer, to_log
from nsru_train.muse import Muse
from nsru_train.sources import save_records

LONG = [f"{qa.question} {qa.answer} " * (1 + i % 3) for i, qa in enumerate(RECORDS)]
QA = [{"question": qa.question, "answer": qa.answer} for qa in RECORDS]
SETS = {
    ("verbmem", "forget"): [{"prompt": t[:40], "gt": t[40:]} for t in LONG[1:3]],
    ("knowmem", "forget_qa"): QA[:4],
    ("knowmem", "forget_qa_icl"): QA[4:6],
    ("knowmem", "retain_qa"): QA[6:9],
    ("knowmem", "retain_qa_icl"): QA[9:11],
    ("privleak", "forget"): [{"text": text} for text in LONG[:6]],
    ("privleak", "holdout"): [{"text": text.replace("live", "dine")} for text in LONG[6:]],
}


def write(folder, sets=SETS):
    """As muse_bench's load_data.py does: texts alone are no objects."""
    for (config, split), rows in sets.items():
        (folder / config).mkdir(parents=True, exist_ok=True)
        texts = [row["text"] for row in rows] if config == "privleak" else rows
        (folder / config / f"{split}.json").write_text(json.dumps(texts))
    return str(folder)


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    """In fp64, so that no argmax hangs on rounding, with adapters that change what it says."""
    model = make_llama(tokenizer, **SIZES).double()
    model.get_output_embeddings().weight.data.mul_(20)
    torch.manual_seed(1)
    nk.swap_linears(model, "all-linear", rank=2, alpha=8)
    for name, parameter in model.named_parameters():
        if name.endswith("lora_B"):
            torch.nn.init.normal_(parameter)
    return model.eval()


def generate(model, tokenizer, prompt, count):
    ids = tokenizer(prompt, return_tensors="pt").input_ids
    eos = tokenizer.eos_token_id
    out = model.generate(ids, max_new_tokens=count, do_sample=False, pad_token_id=eos)
    return tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)


@torch.no_grad()
def log_probs(model, tokenizer, text, most):
    ids = tokenizer(text).input_ids
    ids = ids[: len(tokenizer("").input_ids) + most]
    log_p = model(torch.tensor([ids])).logits[0].log_softmax(-1)
    return [log_p[i - 1, ids[i]].item() for i in range(1, len(ids))]


def lowest(values, share=0.4):
    count = int(len(values) * share)
    return sum(sorted(values)[:count]) / count


def naive(model, tokenizer):
    """(numbers of the benchmark, numbers of OpenUnlearning)"""
    plain, stemmed = (RougeScorer(["rougeL"], use_stemmer=flag) for flag in (False, True))

    def mean(scorer, pairs):
        scores = [scorer.score(truth, said)["rougeL"].fmeasure for truth, said in pairs]
        return sum(scores) / len(scores)

    rows = SETS["verbmem", "forget"]
    said = [generate(model, tokenizer, row["prompt"], 128) for row in rows]
    ids = [tokenizer(row["gt"]).input_ids[:128] for row in rows]
    short = tokenizer.batch_decode(ids, skip_special_tokens=True)
    one = {"verbmem_f": 100 * mean(plain, zip(short, said, strict=True))}
    # OpenUnlearning takes the prompt away wherever it stands, also where the text repeats it.
    truths = [f"{row['prompt']} {row['gt']}".replace(row["prompt"], "") for row in rows]
    two = {"forget_verbmem_ROUGE": mean(stemmed, zip(truths, said, strict=True))}
    for side in ("forget", "retain"):
        shots = "".join(
            f"Question: {row['question']}\nAnswer: {row['answer']}\n\n"
            for row in SETS["knowmem", f"{side}_qa_icl"]
        )
        pairs = []
        for row in SETS["knowmem", f"{side}_qa"]:
            prompt = f"{shots}Question: {row['question']}\nAnswer: "
            text = generate(model, tokenizer, prompt, 32)
            for stop in ("\n\n", "\nQuestion", "Question:"):
                text = text.split(stop)[0]
            pairs.append((row["answer"], text))
        one[f"knowmem_{side[0]}"] = 100 * mean(plain, pairs)
        two[f"{side}_knowmem_ROUGE"] = mean(stemmed, pairs)
    scores = {
        side: [
            (
                lowest(log_probs(model, tokenizer, row["text"], 10**6)),
                lowest(log_probs(model, tokenizer, row["text"], 2048)[:-1]),
            )
            for row in SETS["privleak", side]
        ]
        for side in ("forget", "holdout")
    }

    def share(way):  # of pairs in which the holdout text is the likelier one
        pairs = [(f[way], h[way]) for f in scores["forget"] for h in scores["holdout"]]
        return sum((h > f) + (h == f) / 2 for f, h in pairs) / len(pairs)

    one["privleak"] = 100 * (share(0) - 0.4772) / 0.4772
    two["privleak"] = 100 * (share(1) - 0.5) / (0.5 + 1e-10)
    return one, two


def test_numbers_are_those_of_both_codes(model, tokenizer, tmp_path):
    found = Muse("news", write(tmp_path)).evaluate(model, tokenizer, base=True, progress=False)
    with without_update(model):
        before = naive(model, tokenizer)
    after = naive(model, tokenizer)
    assert before != after
    for way, task in enumerate(("MUSE-News", "MUSE-News, OpenUnlearning")):
        rows = {row["metric"]: row for row in found if row["task"] == task}
        for label, wanted in (("before", before[way]), ("after", after[way])):
            assert {name: row[label] for name, row in rows.items()} == pytest.approx(wanted)
    asked = {row["metric"]: row["questions"] for row in found}
    assert asked["retain_knowmem_ROUGE"] == asked["knowmem_r"] == 3
    assert asked["privleak"] == 6


def test_texts_are_cut_for_openunlearning_alone(model, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(muse, "MOST_TOKENS", 12)
    items = Muse("news", write(tmp_path)).items(model, tokenizer)
    for side in ("forget", "holdout"):
        for item, row in zip(items[side], SETS["privleak", side], strict=True):
            whole, cut = (log_probs(model, tokenizer, row["text"], most) for most in (10**6, 12))
            assert len(cut) == 12 < len(whole)
            assert item["min_k"] == pytest.approx(lowest(whole))
            assert item["min_k_cut"] == pytest.approx(lowest(cut[:-1]))


def test_a_text_without_enough_tokens_is_named(model, tokenizer, tmp_path):
    tests = Muse("news", write(tmp_path))
    tests.sets["privleak", "holdout"][1] = ("a",)
    with pytest.raises(ValueError, match=r"privleak/holdout: row 2 has 2 tokens, .*'a'; remove it"):
        tests.items(model, tokenizer)


def test_an_answer_that_begins_with_a_stop_is_empty():
    assert first_answer("\n\nIn Aar.") == ""
    assert first_answer(" In Aar.\nQuestion: Where?") == " In Aar."


def test_privleak_by_the_constants_and_by_a_retain_log(tmp_path):
    sure = [{"min_k": -1.0, "min_k_cut": -1.0}] * 3
    rare = [{"min_k": -2.0, "min_k_cut": -2.0}] * 3
    said = [{"truth": "a", "generated": "a"}]
    texts = {"verbmem_f": said, "knowmem_f": said, "knowmem_r": said}
    known, gone = ({**texts, "forget": f, "holdout": h} for f, h in ((sure, rare), (rare, sure)))
    assert benchmark(known, 0.5393)["privleak"] == pytest.approx(-100)
    assert benchmark(gone, 0.5393)["privleak"] == pytest.approx(100 * (1 - 0.5393) / 0.5393)
    log = to_log(known)
    assert log["mia_min_k"]["agg_value"] == 1
    assert log["privleak"]["agg_value"] == pytest.approx(-100)
    even = to_log({**texts, "forget": sure + rare, "holdout": sure + rare})
    assert to_log(gone, even)["privleak"]["agg_value"] == pytest.approx(100)
    assert [row["score"] for row in log["mia_min_k"]["forget"]["value_by_index"].values()] == [
        1
    ] * 3


def test_hub_and_parquet_hold_the_same_sets(tmp_path, monkeypatch):
    import datasets

    asked = []

    def hub(repo, config, *, split):
        asked.append(repo)
        return datasets.Dataset.from_list(SETS[config, split])

    monkeypatch.setattr(datasets, "load_dataset", hub)
    from_hub = Muse("books").sets
    assert set(asked) == {"muse-bench/MUSE-Books"}
    for (config, split), rows in SETS.items():
        (tmp_path / config).mkdir(exist_ok=True)
        name = f"{split}-00000-of-00001.parquet"
        datasets.Dataset.from_list(rows).to_parquet(tmp_path / config / name)
    assert Muse("books", str(tmp_path)).sets == from_hub


@pytest.fixture(scope="module")
def run(model, tokenizer, tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    save_lora_adapter(model, folder / "adapter")
    base = make_llama(tokenizer, **SIZES)
    base.get_output_embeddings().weight.data.mul_(20)
    for part in (base, tokenizer):
        part.save_pretrained(folder / "model")
    for name, records in (("forget", FORGET), ("retain", RETAIN)):
        save_records(folder / f"{name}.jsonl", records)
    data = {name: str(folder / f"{name}.jsonl") for name in ("forget", "retain")}
    sections = {"model": {"path": str(folder / "model"), "dtype": "float32"}, "data": data}
    (folder / "config.yaml").write_text(yaml.safe_dump(sections))
    return folder


def test_the_command_writes_rows_and_a_log_that_serves_as_retain_log(run, tmp_path, capsys):
    options = ["eval", str(run), "--generate=false", "--muse=news", f"--muse_dir={write(tmp_path)}"]
    main([*options, f"--out={tmp_path / 'first'}"])
    results = json.loads((tmp_path / "first" / "results.json").read_text())
    rows = {(row["task"], row["metric"]): row for row in results["tasks"]}
    assert len(rows) == 8
    assert all({"before", "after"} <= row.keys() for row in rows.values())
    assert any("0.4772" in note for note in results["notes"])
    assert "forget_verbmem_ROUGE" in capsys.readouterr().out
    log = json.loads((tmp_path / "first" / "MUSE_EVAL.json").read_text())
    summary = json.loads((tmp_path / "first" / "MUSE_SUMMARY.json").read_text())
    for name in ("forget_verbmem_ROUGE", "retain_knowmem_ROUGE", "privleak"):
        assert summary[name] == log[name]["agg_value"]
        assert summary[name] == rows["MUSE-News, OpenUnlearning", name]["after"]
    main([*options, f"--out={tmp_path / 'second'}", f"--muse_retain_log={tmp_path / 'first'}"])
    results = json.loads((tmp_path / "second" / "results.json").read_text())
    leaks = [row["after"] for row in results["tasks"] if row["metric"] == "privleak"]
    assert leaks == pytest.approx([0, 0], abs=1e-6)


def test_an_encoder_decoder_continues_no_texts(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nsru_train.language_models.is_encoder_decoder", lambda model: True)
    with pytest.raises(SystemExit):
        main(["eval", str(run), "--muse=news", f"--muse_dir={write(tmp_path)}"])
    assert "muse needs a decoder that reads the prompt itself" in capsys.readouterr().err


def test_what_cannot_be_read_is_named_before_the_model_is(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("nsru_train.loading.load_model", lambda *_: pytest.fail("too late"))
    own = f"--muse_dir={tmp_path}"

    def refused(*options):
        with pytest.raises(SystemExit):
            main(["eval", str(run), f"--out={tmp_path / 'no'}", *options])
        assert not (tmp_path / "no").exists()
        return capsys.readouterr().err

    assert "give --muse too" in refused(own)
    assert "verbmem/forget: no such file" in refused("--muse=news", own)
    write(tmp_path, {**SETS, ("knowmem", "retain_qa"): [{"question": "Where?"}]})
    assert "knowmem/retain_qa: row 1 has no 'answer'" in refused("--muse=news", own)
    write(tmp_path, {**SETS, ("privleak", "holdout"): []})
    assert "privleak/holdout is empty" in refused("--muse=news", own)
    write(tmp_path)
    assert "no file" in refused("--muse=news", own, f"--muse_retain_log={tmp_path}")
    (tmp_path / "MUSE_EVAL.json").write_text("{}")
    said = {"value_by_index": {"0": {"ground_truth": "In Rome."}}}
    log = {"mia_min_k": {"agg_value": 0.4}, "forget_knowmem_ROUGE": said}
    (tmp_path / "other.json").write_text(json.dumps(log))
    error = refused("--muse=news", own, f"--muse_retain_log={tmp_path / 'other.json'}")
    assert "is of other questions: 1, the first one answered 'In Rome.', not 4" in error
    assert "has no mia_min_k" in refused("--muse=news", own, f"--muse_retain_log={tmp_path}")
    assert "news" in refused("--muse=papers", own)
