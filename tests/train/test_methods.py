"""Methods: values and gradients of public code in fp64, limits, and how they push."""

import dataclasses
import math
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import nsru_kernels as nk
from nsru_train.data import QA
from nsru_train.losses import FORGET, RETAIN, SAFE, Answers, ScoredBatch
from nsru_train.losses import nll as nll_module
from nsru_train.losses.batch import Everywhere
from nsru_train.losses.nll import AnswerHidden, AnswerLogits
from nsru_train.methods import METHODS, Objective, find_method
from nsru_train.methods.method import say_once
from nsru_train.methods.nsru import SUPPRESSIONS
from nsru_train.methods.unlikelihood import unlikelihood

ROOT = Path(__file__).parents[2]
NLL = torch.tensor([0.0, 1e-4, 0.3, 12.0, 400.0], dtype=torch.float64)
LENGTHS = torch.tensor([1, 4, 7, 20, 40])
REFERENCE = torch.tensor([0.0, 0.5, 0.1, 3.0, 5.0], dtype=torch.float64)


class Sums(Answers):
    """Answers of which no more than the NLL is known."""

    def __init__(self, sums, lengths, ref_nll):
        self.sums, self.lengths, self.ref_nll = sums, lengths, ref_nll


def suppress(name, nll, **options):
    objective = Objective(suppression=name, **options)
    return objective.suppress(Sums(nll, LENGTHS[: len(nll)], REFERENCE.to(nll)[: len(nll)]))


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x)) if x > 0 else x - math.log1p(math.exp(x))


FORMULAS = {
    "npo": lambda nll, n, ref, beta, delta: -2 / beta * log_sigmoid(beta * (nll - ref)),
    "simnpo": lambda nll, n, ref, beta, delta: -2 / beta * log_sigmoid(beta * (nll / n - delta)),
    "unlikelihood": lambda nll, n, ref, beta, delta: -math.log(1 - math.exp(-(nll / n + 1e-3))),
    "gradient_ascent": lambda nll, n, ref, beta, delta: -nll,
}
READ = {"npo": ("beta",), "simnpo": ("beta", "delta")}


@pytest.mark.parametrize("name", SUPPRESSIONS)
@pytest.mark.parametrize(("beta", "delta"), [(0.1, 0.0), (4.5, 0.7)])
def test_formula(name, beta, delta):
    options = {"beta": beta, "delta": delta}
    loss = suppress(name, NLL, **{key: options[key] for key in READ.get(name, ())})
    expected = [
        FORMULAS[name](*row, beta, delta)
        for row in zip(NLL.tolist(), LENGTHS.tolist(), REFERENCE.tolist(), strict=True)
    ]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


@pytest.mark.parametrize("name", SUPPRESSIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_pushes_nll_up_with_finite_gradients(name, dtype):
    nll = NLL.to(dtype).requires_grad_()
    suppress(name, nll).sum().backward()
    assert torch.isfinite(nll.grad).all()
    assert (nll.grad <= 0).all()
    assert (nll.grad[:3] < 0).all(), "a known answer must always be pushed"


def test_default_betas():
    for name, beta in (("npo", 0.1), ("simnpo", 4.5)):
        torch.testing.assert_close(suppress(name, NLL), suppress(name, NLL, beta=beta))


def test_npo_starts_as_gradient_ascent_and_fades():
    nll = (REFERENCE[:2] + torch.tensor([0.0, 100.0])).requires_grad_()
    suppress("npo", nll).sum().backward()
    assert nll.grad[0] == pytest.approx(-1.0)
    assert -1e-4 < nll.grad[1] < 0


def test_unlikelihood_is_bounded():
    loss = unlikelihood(torch.tensor([0.0, 1e4]), torch.tensor([5, 5]))
    assert loss[0] == pytest.approx(6.908, abs=1e-3)
    assert loss[1] == 0


# A deterministic toy: 2 answers of 5 and 4 tokens, 7 positions, a vocabulary of 11.
B, T, V = 2, 7, 11
IDS = (3 * torch.arange(B).unsqueeze(1) + 5 * torch.arange(T) + 1) % V
LABELS, OTHERS = IDS.clone(), IDS.flip(1).clone()
LABELS[:, :2] = OTHERS[:, :2] = -100
LABELS[1, 6] = -100


def toy_logits(a, b, c, d, e):
    row, place, word = (torch.arange(n, dtype=torch.float64) for n in (B, T, V))
    phase = a + b * row[:, None, None] + c * place[:, None] + d * word + e * word**2
    return 2 * torch.sin(phase)


BASE = toy_logits(2, 5, 2, 3, 0.25)


def states(logits_BTV, labels, whole):
    rows, places = (labels[:, 1:] != -100).nonzero(as_tuple=True)
    logits, targets = logits_BTV[rows, places], labels[rows, places + 1]
    if whole:
        return AnswerLogits(logits, targets, rows)
    # As if the toy's logits were hidden states of a model whose head changes nothing.
    head = {"head_weight": torch.eye(V, dtype=torch.float64), "head_bias": None, "chunk": 2}
    return AnswerHidden(logits, targets, rows, head)


def toy_answers(logits, labels=LABELS, whole=False):
    found, base = states(logits, labels, whole), states(BASE, labels, True)
    reference = torch.zeros(B, dtype=torch.float64).index_add_(0, base.rows, base.nll())
    # A label at each place, of all T positions, as the model's own batch has them.
    every = torch.cat([torch.zeros(B, 1, dtype=torch.int64), IDS], 1)
    following = torch.cat([labels[:, 1:], torch.full((B, 1), -100)], 1).flatten()
    return Answers(
        lambda: found,
        found.rows,
        B,
        reference,
        base=lambda: states(BASE, labels, whole),
        everywhere=lambda: Everywhere(
            dataclasses.replace(states(logits, every, whole), targets=following),
            states(BASE, every, whole),
            labels,
        ),
    )


class Toy(dict):
    """A batch of toy answers, as at the first step."""

    def __init__(self, method, answers):
        super().__init__({kind: answers[kind] for kind in method.rows})
        self.state = method.start()


# Loss, norm of its gradient in the logits, and the gradient of the first three logits of the first
# answer's first token: public code (OpenUnlearning d3d7cf9, LoKU), run in fp64.
GOLDEN = [
    (
        "ga",
        {},
        -4.283967834179543,
        0.3504693615363656,
        [0.1103643769437796, -0.0052163553153601406, -0.0011428404024100111],
    ),
    (
        "npo",
        {},
        7.680885840845556,
        0.9769146337239337,
        [0.23705329038449746, -0.01120428733947997, -0.002454723936090738],
    ),
    (
        "simnpo",
        {"beta": 2.5},
        8.432133814492468e-05,
        0.00010420006206084069,
        [7.463518828309749e-07, -3.527620704203902e-08, -7.72859059901662e-09],
    ),
    (
        "wga",
        {},
        -0.09059098489976278,
        0.02551758314451425,
        [0.0007417156600815619, -3.50570766862865e-05, -7.68058178657797e-06],
    ),
    (
        "satimp",
        {},
        -0.0001100669341973406,
        6.541284779188797e-05,
        [1.5029447110112786e-12, -7.103645079217719e-14, -1.5563227790495285e-14],
    ),
    (
        "ceu",
        {"skip": 0},
        1.8079361529499838,
        0.03296196297276942,
        [0.0007467341673315043, -3.529427566020755e-05, -7.732549214872521e-06],
    ),
    (
        "undial",
        {},
        3.41192010196289,
        0.16514870641442878,
        [0.0007466914303321006, -0.016966533825929227, 0.0005640535147500404],
    ),
    (
        "ihl",
        {},
        0.7880604525660522,
        0.07824504381090899,
        [0.0009057363706181589, 0.001110719215155596, 0.00024334515539521206],
    ),
    ("dpo", {}, 12.571135836533669, 1.8108032706323411, [0.5166073771624267, 0.0, 0.0]),
    ("pdu", {}, 3.79403402217166, 1.238120769255276, [-0.03637365370813769] * 3),
]
VALUES = [
    ("npo", {"beta": 0.5}, 0.21182484509758667),
    ("simnpo", {"beta": 4.5}, 5.201260417209776e-08),
    ("simnpo", {"beta": 4.5, "delta": 1.0}, 4.681976716087034e-06),
    ("wga", {"beta": 0.5}, -0.4803856372743096),
    ("wga", {"beta": 2.0}, -0.012039720637829342),
    ("undial", {"beta": 3.0}, 3.4149675805083164),
    ("ceu", {}, 1.7966359846434494),
    ("pdu", {"compat": "open-unlearning"}, 3.8349544412152863),
]


def forget_term(name, options, logits, whole):
    method = METHODS[name](**options)
    batch = {
        SAFE: toy_answers(logits, OTHERS, whole),
        FORGET: toy_answers(logits, LABELS, whole),
        RETAIN: toy_answers(BASE, LABELS, whole),
    }
    return method.loss(Toy(method, batch))["forget"]


@pytest.mark.parametrize("whole", [True, False], ids=["logits", "chunks of logits"])
@pytest.mark.parametrize(("name", "options", "loss", "norm", "first"), GOLDEN)
def test_values_and_gradients_of_public_code(name, options, loss, norm, first, whole):
    logits = toy_logits(1, 7, 3, 2, 0.5).requires_grad_()
    term = forget_term(name, options, logits, whole)
    term.backward()
    assert term.item() == pytest.approx(loss, rel=1e-9)
    assert logits.grad.norm().item() == pytest.approx(norm, rel=1e-9)
    assert logits.grad[0, 1, :3].tolist() == pytest.approx(first, rel=1e-9, abs=1e-15)


@pytest.mark.parametrize(("name", "options", "loss"), VALUES)
def test_settings_give_the_values_of_public_code(name, options, loss):
    term = forget_term(name, options, toy_logits(1, 7, 3, 2, 0.5), whole=False)
    assert term.item() == pytest.approx(loss, rel=1e-9)


def test_kl_from_the_base_is_that_of_public_code():
    logits = toy_logits(1, 7, 3, 2, 0.5).requires_grad_()
    answers = toy_answers(logits)
    method = METHODS["kl"](compat="open-unlearning")
    retain = method.loss({FORGET: answers, RETAIN: answers})["retain"]
    retain.backward()
    assert retain.item() == pytest.approx(1.4003717640530116, rel=1e-9)
    assert logits.grad.norm().item() == pytest.approx(0.1220874456925605, rel=1e-9)


@pytest.mark.parametrize(("beta", "loss"), [(3.0, 3.167498381758912), (10.0, 3.1649502834000622)])
def test_self_distillation_at_all_positions_is_that_of_public_code(beta, loss):
    method = METHODS["undial"](beta=beta, compat="open-unlearning")
    for whole in (False, True):
        term = method.forget(toy_answers(toy_logits(1, 7, 3, 2, 0.5), IDS, whole))
        assert term.item() == pytest.approx(loss, rel=1e-9)


def test_self_distillation_lowers_a_logit_of_the_vocabulary_where_there_is_no_answer():
    """Public code indexes logits by the label -100."""
    z = torch.randn(3, 130, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([[7, 3, -100, 9]])
    rows = torch.zeros(4, dtype=torch.int64)
    found = AnswerLogits(torch.cat([z, z[:1]]), torch.tensor([3, -100, 9, -100]), rows)
    method = METHODS["undial"](compat="open-unlearning")
    answers = Answers(lambda: found, rows, 1, everywhere=lambda: Everywhere(found, found, labels))
    wanted = z.clone()
    for place, token in enumerate((3, 30, 9)):
        wanted[place, token] -= 10
    expected = -(wanted.softmax(1) * z.log_softmax(1)).sum(1).mean()
    torch.testing.assert_close(method.forget(answers), expected)


@pytest.mark.parametrize("whole", [False, True])
def test_all_positions_of_a_batch_are_those_of_the_model(whole, monkeypatch):
    if whole:
        monkeypatch.setattr(nll_module, "_head_of", lambda *_: None)
    model, batch = small_model_and_batch()
    every = ScoredBatch(model, batch)[FORGET].everywhere()
    inputs = {name: batch[name][:1, :5] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        adapted = model(**inputs).logits[0]
        with nk.adapters_disabled(model):
            plain = model(**inputs).logits[0]
    assert every.labels.tolist() == [[-100, -100, 7, 8, 2]]
    assert every.labelled.tolist() == [False, False, True, True, True]

    def both(z, targets, base):
        assert targets.tolist() == [-100, 7, 8, 2]
        torch.testing.assert_close(z, adapted[:4])
        torch.testing.assert_close(base, plain[:4])
        return z.sum(1)

    every.score(both).sum().backward()
    kl = (plain.softmax(1) * (plain.log_softmax(1) - adapted.log_softmax(1))).sum(1)
    torch.testing.assert_close(every.kl(), kl, rtol=1e-4, atol=1e-6)
    assert any(p.grad is not None and p.grad.any() for p in model.parameters())


def test_a_multiplier_follows_how_far_retain_answers_are_from_their_bound():
    method = METHODS["pdu"](bound=0.3, dual_lr=5.0, dual_warmup=2)
    assert method.after_step({"multiplier": 100.0}, 1.9, {"retain": 9.0}) == {"multiplier": 100.0}
    assert method.after_step({"multiplier": 100.0}, 2.0, {"retain": 0.5}) == {"multiplier": 101.0}
    assert method.after_step({"multiplier": 1.0}, 7.0, {"retain": 0.0}) == {"multiplier": 0.0}


def test_hidden_states_are_compared_as_in_public_code_per_answer():
    logits = toy_logits(1, 7, 3, 2, 0.5)
    rows, places = (LABELS != -100).nonzero(as_tuple=True)
    answers = Answers(lambda: None, rows, B)
    states, base = (z[rows, places, :6] for z in (logits, BASE))
    goal = torch.full((6,), 2 / math.sqrt(6), dtype=torch.float64)
    for compat, value in ((None, 2.964200663694197), ("open-unlearning", 2.9411701054094856)):
        found = METHODS["rmu"](compat=compat).distance(answers, states, goal)
        assert found.item() == pytest.approx(value, rel=1e-9)
    found = METHODS["rmu"]().distance(answers, states, base)
    assert found.item() == pytest.approx(4.931705033386611, rel=1e-9)


def small_model_and_batch():
    config = LlamaConfig(
        vocab_size=40, hidden_size=16, intermediate_size=24, num_hidden_layers=6,
        num_attention_heads=2, num_key_value_heads=2,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    nk.swap_linears(model, METHODS["rmu"](layer=4).targets(model), rank=2, alpha=4)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    labels = torch.tensor([[-100, -100, 7, 8, 2, -100], [-100, 5, 2, -100, -100, -100]])
    batch = {
        "input_ids": labels.clamp(min=0),
        "attention_mask": torch.tensor([[1] * 5 + [0], [1] * 3 + [0] * 3]),
        "labels": labels,
        "kind": torch.tensor([FORGET, RETAIN]),
        "ref_nll": torch.zeros(2),
    }
    return model, batch


def test_rmu_adapts_the_mlps_below_its_layer_and_runs_no_other():
    method = METHODS["rmu"](layer=4)
    model, batch = small_model_and_batch()
    assert METHODS["rmu"]().prepare(model).layer == 1
    adapted = [name for name, m in model.named_modules() if isinstance(m, nk.NSRULinear)]
    assert adapted == [f"model.layers.{i}.mlp.down_proj" for i in (2, 3, 4)]
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with torch.no_grad():
        adapted = model.model(**inputs, output_hidden_states=True).hidden_states[5]
        with nk.adapters_disabled(model):
            plain = model.model(**inputs, output_hidden_states=True).hidden_states[5]
    model.model.layers[5].register_forward_hook(lambda *_: pytest.fail("not needed"))
    parts = method.loss(ScoredBatch(model, batch))
    goal = 2 * method.direction(adapted[0])
    forget = (adapted[0, 2:5] - goal).square().mean()
    retain = (adapted[1, 1:3] - plain[1, 1:3]).square().mean()
    torch.testing.assert_close(parts["forget"], forget)
    torch.testing.assert_close(parts["retain"], retain)
    parts["total"].backward()
    assert all(p.grad.any() for n, p in model.named_parameters() if "lora_B" in n)


def test_methods_say_what_records_lack():
    bare, full = QA("Q?", "A."), QA("Q?", "A.", safe_target="No.", alternatives=("B.",), topic="t")
    for name, field in (
        ("altpo", "alternatives"),
        ("lune", "alternatives"),
        ("dpo", "safe_target"),
    ):
        said = METHODS[name]().lacks([bare, full])
        assert said.startswith(f"1 of 2 forget records have no {field};")
        assert METHODS[name]().lacks([full]) is None
    assert "one domain for all records" in METHODS["alter"]().lacks([bare, full])
    for name in ("nsru", "npo", "rmu"):
        assert METHODS[name]().lacks([bare]) is None


def test_lune_says_where_there_is_nothing_to_guard(caplog):
    say_once.cache_clear()
    lune = METHODS["lune"]()
    results = {"forget_prob": 0.5, "retain_accuracy": 0.9}
    assert lune.score(results, results | {"forget_prob": 0.4}) == -0.4
    assert lune.score(results, results | {"retain_accuracy": 0.8}) is None
    assert not caplog.text
    assert lune.score(results | {"retain_accuracy": 0.0}, results) == -0.5
    assert "no retain answer word for word at the start" in caplog.text


def test_lune_takes_the_base_models_states_out_of_what_is_forgotten():
    lune = METHODS["lune"]
    assert (lune().rows, lune().parts) == ((SAFE,), ("safe",))
    model, batch = small_model_and_batch()
    batch["kind"] = torch.tensor([FORGET, SAFE])
    method = lune(suppress_states=0.5).prepare(model)
    assert (method.rows, method.parts, method.layer) == ((SAFE, FORGET), ("safe", "states"), 3)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    with nk.adapters_disabled(model):
        base = model.model(**inputs, output_hidden_states=True).hidden_states[4][0, 2:5].detach()
    output = model(**inputs, output_hidden_states=True)
    now = output.hidden_states[4][0, 2:5]
    states = ((now * base).sum(1) / (base * base).sum(1)).square().mean()
    safe = torch.nn.functional.cross_entropy(output.logits[1, :2], batch["labels"][1, 1:3])
    parts = method.loss(ScoredBatch(model, batch))
    torch.testing.assert_close(parts["states"], states)
    torch.testing.assert_close(parts["safe"], safe)
    torch.testing.assert_close(parts["total"], safe + 0.5 * states)
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.zeros_(parameter)
    start = method.loss(ScoredBatch(model, batch))["states"]
    start.backward()
    assert start.item() == pytest.approx(1, rel=1e-5)
    pushed = {n for n, p in model.named_parameters() if p.grad is not None and p.grad.any()}
    assert pushed == {f"model.layers.{i}.mlp.down_proj.lora_B" for i in (2, 3)}
    for wrong in ({"layer": 2}, {"suppress_states": -1.0}):
        with pytest.raises(ValueError, match=rf"objective\.{next(iter(wrong))}"):
            lune(**wrong)
    with pytest.raises(ValueError, match="one of the model's 6 decoder layers"):
        lune(suppress_states=1.0, layer=6).prepare(model)


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.trains and n != "rmu"])
def test_total_is_the_weighted_sum_of_the_parts(name):
    def loss(**weights):
        logits = toy_logits(1, 7, 3, 2, 0.5)
        batch = {kind: toy_answers(logits, LABELS) for kind in (SAFE, FORGET, RETAIN)}
        method = METHODS[name](**weights)
        return method.loss(Toy(method, batch))

    parts = loss()
    weights = [f.name for f in dataclasses.fields(METHODS[name]) if f.name[:2] == "w_"]
    assert set(parts) == {*METHODS[name].parts, "total"}
    for weight in weights:
        if (part := weight[2:]) in parts and part != "kl":
            changed = loss(**{weight: 3.0})
            assert changed[part] == parts[part]
            less = loss(**{weight: 0.0})
            assert (changed["total"] - less["total"]).item() == pytest.approx(
                3 * parts[part].item(), abs=1e-9
            )


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.by_logits])
def test_masked_vocabulary_rows_keep_losses_finite(name):
    logits = toy_logits(1, 7, 3, 2, 0.5)
    logits[..., 6] = -torch.inf
    rows, places = (LABELS[:, 1:] != -100).nonzero(as_tuple=True)
    assert (LABELS[rows, places + 1] != 6).all()
    base = BASE.clone()
    base[..., 6] = -torch.inf
    hidden = logits.clone().requires_grad_()
    found, before = (states(z, LABELS, whole=True) for z in (hidden, base))
    answers = Answers(lambda: found, found.rows, B, base=lambda: before)
    loss = METHODS[name]().forget(answers)
    loss.backward()
    assert torch.isfinite(loss)
    assert torch.isfinite(hidden.grad).all()


def test_a_method_of_ones_own_is_found_by_its_import_path(tmp_path, monkeypatch):
    (tmp_path / "my_method.py").write_text("from nsru_train.methods.ihl import IHL\nx = 1\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert find_method("my_method:IHL") is METHODS["ihl"]
    for other, known in (("LoKU", "ihl"), ("GradAscent", "ga"), ("lora", "nsru .with")):
        with pytest.raises(ValueError, match=rf"Did you mean {known}"):
            find_method(other)
    with pytest.raises(ValueError, match="cannot import 'my_method:Other'"):
        find_method("my_method:Other")
    with pytest.raises(ValueError, match=r"must be a subclass of nsru_train\.methods\.Method"):
        find_method("my_method:x")
    sys.modules.pop("my_method")


def test_methods_without_a_retain_term_have_no_weight_for_it():
    for name in ("ga", "ceu"):
        assert {f.name for f in dataclasses.fields(METHODS[name])} <= {"w_forget", "skip"}


def test_bad_arguments():
    with pytest.raises(ValueError, match=r"expected one of nsru, .*got 'NPO'\. Did you mean npo\?"):
        find_method("NPO")
    for name in ("npo", "simnpo", "dpo"):
        with pytest.raises(ValueError, match="beta must be positive, got 0"):
            METHODS[name](beta=0)
    with pytest.raises(ValueError, match=r"objective\.w_safe must not be negative, got -1"):
        METHODS["idk"](w_safe=-1)
    with pytest.raises(ValueError, match="skip must not be negative, got -1"):
        METHODS["ceu"](skip=-1)
    with pytest.raises(ValueError, match=r"objective\.compat changes nothing here but with retain"):
        METHODS["npo"](compat="open-unlearning")
    with pytest.raises(ValueError, match=r"objective\.retain must be one of nll, kl, got 'KL'"):
        METHODS["npo"](retain="KL")
    with pytest.raises(ValueError, match=r"compat must be one of open-unlearning, got 'ou'"):
        METHODS["pdu"](compat="ou")


def test_the_document_of_methods_says_what_each_needs():
    text = (ROOT / "docs" / "methods.md").read_text(encoding="utf-8")
    lines = [line.strip("|\n").split("|") for line in text.splitlines() if line[:3] == "| `"]
    shown = {cells[0].strip(" `"): [cell.strip() for cell in cells[1:]] for cells in lines}
    assert shown.keys() == METHODS.keys()
    kinds = {SAFE: "safe", FORGET: "forget", RETAIN: "retain"}
    for name, (rows, base, _, source) in shown.items():
        method = METHODS[name]
        assert rows == ", ".join(kinds[kind] for kind in method.rows), name
        assert (base == "once") == bool(method.ref_nll), name
        assert source in method.__doc__, name
        assert ("`alternatives`" in " ".join(shown[name])) == method.alternatives, name
