"""Attacks on a finished run: what comes back, what is kept, and what is refused."""

import importlib.util
import json
import shutil

import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file
from samples import FORGET, make_model, make_tokenizer, save_tiny

from nsru_train import attack as attacks
from nsru_train.answering import greedy_answers
from nsru_train.attack import OPENING, QUANTISED, Attacker, add_robustness
from nsru_train.cli import main
from nsru_train.data import encode_qa
from nsru_train.demo.authors import author_splits
from nsru_train.demo.tiny_model import memorise
from nsru_train.metrics.robustness import relearning_robustness, stability
from nsru_train.sources import save_records

pytestmark = pytest.mark.usefixtures("without_figures")

QUICK = ("--steps=6", "--lr=0.02", "--samples=3", "--max_new_tokens=6", "--share=0.5")
ASKING = ("paraphrase", "prefix", "24 tokens", "best of 3")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run that has unlearnt what its model knew by heart, and a model that never knew it."""
    folder = tmp_path_factory.mktemp("run")
    splits = author_splits(authors=4, forget=1)
    sets = {"forget": splits.forget[:6], "retain": splits.retain[:6]}
    sizes = {"heads": 2, "kv_heads": 1, "hidden_size": 64, "intermediate_size": 96}
    for name, records in (("model", [*sets["forget"], *sets["retain"]]), ("kept", sets["retain"])):
        model, tokenizer = save_tiny(folder / name, (*splits.forget, *splits.retain), **sizes)
        memorise(model, tokenizer, records, epochs=60, batch_size=6, lr=5e-3, progress=False)
        model.save_pretrained(folder / name)
    for name, records in sets.items():
        save_records(folder / f"{name}.jsonl", records)
    main([
        "train", f"--model.path={folder / 'model'}", f"--data.forget={folder / 'forget.jsonl'}",
        f"--data.retain={folder / 'retain.jsonl'}", "--method=npo", "--train.steps=30",
        "--train.lr=0.005", "--train.batch_size=6", f"--out={folder / 'nsru'}",
    ])  # fmt: skip
    return folder / "nsru"


@pytest.fixture(scope="module")
def attacked(run):
    main(["attack", str(run), *QUICK, f"--retain_model={run.parent / 'kept'}"])
    return json.loads((run / "attack" / "results.json").read_text())


def rows_of(results):
    return {(row["model"], row["attack"]): row for row in results["attacks"]}


def test_relearning_brings_back_what_was_forgotten(run, attacked):
    rows = rows_of(attacked)
    plain = rows["unlearned", "none"]
    trained = json.loads((run / "results.json").read_text())["methods"][1]
    assert plain["forget_prob"] == pytest.approx(trained["forget_prob"], rel=1e-3)
    for name in ("relearned", "relearned in its own LoRA"):
        row = rows["unlearned", name]
        # Thrice on one kind of CPU, 2.97 times on another, which rounds otherwise.
        assert row["forget_prob"] > 2 * plain["forget_prob"]
        path = [point for point in attacked["frontier"] if point["method"] == name]
        assert [point["step"] for point in path] == list(range(7))
        assert path[0]["forget_prob"] == pytest.approx(plain["forget_prob"], rel=1e-3)
        assert path[-1]["forget_prob"] == pytest.approx(row["forget_prob"], rel=1e-5)
        # Those that were taught come back further than the others.
        assert plain["forget_prob"] < row["forget_rest_prob"] < row["forget_prob"]
        retain = rows["retain model", "relearned"], rows["retain model", "none"]
        after, before = (one["forget_prob"] for one in retain)
        expected = relearning_robustness(plain["forget_prob"], row["forget_prob"], before, after)
        assert row["robustness"] == pytest.approx(expected)


def test_the_run_stays_as_it_is_and_the_report_has_every_attack(run, attacked):
    assert not (run / "attack" / "merged").exists()
    names = [row["method"] for row in attacked["methods"]]
    assert names[:2] == ["before", "unlearned"]
    assert names[-2:] == ["retain model", "retain model, relearned"]
    page = (run / "attack" / "report.html").read_text()
    assert "collapsed" not in page  # what an attack does to retain answers is the attacker's loss
    for row in attacked["attacks"]:
        assert f'<th scope="row">{row["name"]}</th>' in page
    rows = rows_of(attacked)
    for victim in ("unlearned", "retain model"):
        assert {(victim, name) for name in ("none", *ASKING)} <= rows.keys()
        for name in ASKING:
            row = rows[victim, name]
            key = "forget_prob" if name == "paraphrase" else "forget_rougeL_recall"
            assert row["robustness"] == pytest.approx(
                stability(rows[victim, "none"][key], row[key])
            )
        best = rows[victim, "best of 3"]["forget_rougeL_recall"]
        assert 0 <= best <= 1
    assert rows["retain model", "none"]["forget_exact_memorisation"] > 0


@pytest.mark.parametrize("form", QUANTISED)
def test_a_quantised_model_is_nearly_the_same(attacked, form):
    if importlib.util.find_spec(QUANTISED[form]) is None:
        assert any(
            note == f"{form}: left out, {QUANTISED[form]} is not installed: pip install "
            f"{QUANTISED[form]}"
            for note in attacked["notes"]
        )
        pytest.skip(f"{QUANTISED[form]} is not installed")
    for victim in ("unlearned", "retain model"):
        rows = rows_of(attacked)
        plain, quantised = (rows[victim, name]["forget_prob"] for name in ("none", form))
        assert plain != quantised == pytest.approx(plain, rel=0.2)
    row = attacked["methods"][1]
    assert row["robustness_quantisation"] <= rows["unlearned", form]["robustness"] < 1
    both = row["robustness_quantisation"], row["robustness_relearning"]
    assert row["robustness"] == pytest.approx(2 / sum(1 / value for value in both))


def test_an_interrupted_attack_keeps_what_it_has(run, attacked, monkeypatch, capsys):
    out = run / "attack"
    (out / "results.json").unlink()
    shutil.rmtree(out / "attacks" / "prefix")
    done = []
    for name in ("known", "relearn"):
        monkeypatch.setattr(Attacker, name, lambda *args: pytest.fail("carried out again"))
    whole = Attacker.said
    monkeypatch.setattr(Attacker, "said", lambda *args, **kw: done.append(kw) or whole(*args, **kw))
    again = ["attack", str(run), *QUICK, f"--retain_model={run.parent / 'kept'}", "--resume=true"]
    with pytest.raises(SystemExit):
        main([*again, "--steps=7"])
    assert "attack.steps was 6 and is 7" in capsys.readouterr().err
    weights = run / "adapter" / "adapter_model.safetensors"
    whole_file = weights.read_bytes()
    tensors = load_file(weights)
    save_file({name: 2 * tensor for name, tensor in tensors.items()}, weights)
    with pytest.raises(SystemExit):
        main(again)
    assert "run.adapter was" in capsys.readouterr().err
    weights.write_bytes(whole_file)
    main(again)
    assert done == [{"opening": OPENING}]
    found = json.loads((out / "results.json").read_text())
    assert found["attacks"] == attacked["attacks"]
    assert found["frontier"] == attacked["frontier"]


def test_one_attack_alone(run, tmp_path, monkeypatch, caplog):
    records = tmp_path / "forget.jsonl"
    lines = (run.parent / "forget.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    del first["paraphrased_question"]
    records.write_text("\n".join([json.dumps(first), *lines[1:]]))
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("attack"))
    config = yaml.safe_load((copy / "config.yaml").read_text())
    config["data"]["forget"] = str(records)
    (copy / "config.yaml").write_text(yaml.safe_dump(config))
    monkeypatch.setattr(attacks, "find_spec", lambda name: None)
    main(["attack", str(copy), "--attacks=[paraphrase, quantise]", "--max_new_tokens=2"])
    found = json.loads((copy / "attack" / "results.json").read_text())
    assert [row["name"] for row in found["attacks"]] == ["unlearned"]
    assert found["notes"] == [
        "paraphrase: left out, 1 of 6 forget records have no paraphrased_question",
        "int8: left out, bitsandbytes is not installed: pip install bitsandbytes",
        "NF4: left out, bitsandbytes is not installed: pip install bitsandbytes",
        "int4: left out, torchao is not installed: pip install torchao",
        "robustness: needs a quantisation, and relearning with --retain_model, a model trained on "
        "the retain data only.",
    ]
    assert all(note in caplog.text for note in found["notes"])


def test_robustness_by_hand():
    assert stability(0.2, 0.6) == pytest.approx(0.5)
    assert stability(0.0, 0.0) == 1.0
    assert stability(0.0, 0.1) == 0.0
    # Learns .3 where a model that never knew learns .1.
    assert relearning_robustness(0.1, 0.4, 0.2, 0.3) == pytest.approx(0.5)
    assert relearning_robustness(0.1, 0.4, 0.3, 0.2) == 0.0
    assert relearning_robustness(0.1, 0.1, 0.3, 0.3) == 1.0

    def row(model, attack, **values):
        return {"model": model, "attack": attack, **values}

    rows = [
        row("unlearned", "none", forget_prob=0.1, forget_rougeL_recall=0.5),
        row("unlearned", "NF4", forget_prob=0.15),
        row("unlearned", "int8", forget_prob=0.1),
        row("unlearned", "prefix", forget_rougeL_recall=0.75),
        row("unlearned", "relearned", forget_prob=0.4),
        row("retain model", "none", forget_prob=0.2),
        row("retain model", "relearned", forget_prob=0.3),
        row("retain model", "NF4", forget_prob=0.0),
    ]
    alone = [dict(one) for one in rows[:5]]
    assert "robustness" not in add_robustness(alone)
    assert "robustness" not in alone[-1]
    assert add_robustness(rows) == pytest.approx({
        "robustness_quantisation": 0.8, "robustness_asking": 0.8, "robustness_relearning": 0.5,
        "robustness": 2 / (1 / 0.8 + 1 / 0.5),
    })  # fmt: skip
    assert rows[7]["robustness"] == 0.0


def test_an_answer_goes_on_from_its_opening():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).eval()
    questions = [qa.question for qa in FORGET[:3]]
    answers = greedy_answers(model, tokenizer, questions, opening="In Oslo", max_new_tokens=5)
    assert answers != greedy_answers(model, tokenizer, questions, max_new_tokens=5)
    for question, answer in zip(questions, answers, strict=True):
        ids = encode_qa(tokenizer, question, "In Oslo").input_ids[:-1]
        start = len(ids)
        for _ in range(5):
            token = model(torch.tensor([ids])).logits[0, -1].argmax().item()
            if token == tokenizer.eos_token_id:
                break
            ids.append(token)
        assert answer == tokenizer.decode(ids[start:], skip_special_tokens=True).strip()


def test_samples_are_drawn():
    tokenizer = make_tokenizer()
    model = make_model(tokenizer).eval()

    def drawn(seed):
        torch.manual_seed(seed)
        return greedy_answers(model, tokenizer, [FORGET[0].question], max_new_tokens=8, sample=True)

    assert drawn(0) == drawn(0)
    assert len({drawn(seed)[0] for seed in range(4)}) > 1


def test_mistakes_are_named_before_any_work(run, tmp_path, capsys):
    def refuse(*options):
        with pytest.raises(SystemExit):
            main(["attack", str(run), f"--out={tmp_path / 'never'}", *options])
        return capsys.readouterr().err

    assert "expected some of relearn, quantise" in refuse("--attacks=[relearn, distil]")
    assert "got distil" in refuse("--attacks=[relearn, distil]")
    assert "got none" in refuse("--attacks=[]")
    assert "share must be a share above 0" in refuse("--share=0")
    assert "steps must be ≥ 1" in refuse("--steps=0")
    assert "lr must be positive" in refuse("--lr=0")
    assert not (tmp_path / "never").exists()
    save_tiny(tmp_path / "other", FORGET, vocab_size=300)
    assert "another tokenizer" in refuse(f"--retain_model={tmp_path / 'other'}")
    assert "no folder" in refuse(f"--retain_model={tmp_path / 'none'}")
    assert not (tmp_path / "never" / "attacks").exists()
