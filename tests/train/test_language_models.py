"""Models that are no causal language models go through the commands as those do."""

import json

import architectures
import pytest
import torch
import transformers
from architectures import SEQ2SEQ
from safetensors.torch import load_file
from samples import FORGET, RETAIN, SIZES, make_tokenizer

import nsru_kernels as nk
from nsru_train.answering import greedy_answers
from nsru_train.cli import main
from nsru_train.data.encode import TextFormat, collate, encode_prompt, encode_qa, use_format
from nsru_train.demo.tiny_model import make_llama
from nsru_train.language_models import load_language_model
from nsru_train.losses.nll import answer_nll
from nsru_train.scoring import score_sequences
from nsru_train.sources import save_records

pytestmark = pytest.mark.usefixtures("without_figures")


def make(kind, tokenizer, monkeypatch):
    """A tiny model of this kind for the tokenizer."""
    sizes = {"vocab_size": len(tokenizer) + 1, "max_position_embeddings": 256}
    sizes = {**architectures.SIZES, **sizes, "initializer_range": 0.1}
    monkeypatch.setattr(architectures, "SIZES", sizes)
    options = architectures.FAMILIES[kind]
    if "text_config" in options:
        image = {f"image_token_{end}": len(tokenizer) for end in ("id", "index")}
        text = {"text_config": {**options["text_config"], **sizes}}
        monkeypatch.setitem(architectures.FAMILIES, kind, {**options, **image, **text})
    return architectures.make(kind)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_an_encoder_reads_the_question_and_a_decoder_writes_the_answer(kind, monkeypatch):
    tokenizer = make_tokenizer()
    model = make(kind, tokenizer, monkeypatch)
    use_format(tokenizer, TextFormat(apart=True))
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in FORGET]
    nll, rows = answer_nll(model, collate(encoded, 0))
    scores = score_sequences(model, tokenizer, encoded)
    for row, item in enumerate(encoded):
        prompt, answer = item.input_ids[: item.answer_start], item.input_ids[item.answer_start :]
        assert prompt == encode_prompt(tokenizer, FORGET[row].question)
        assert answer == [*tokenizer(FORGET[row].answer).input_ids, tokenizer.eos_token_id]
        with torch.no_grad():
            own = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).loss
        torch.testing.assert_close(nll[rows == row].mean(), own)
        assert scores[row].loss == pytest.approx(own.item(), rel=1e-5)


def test_a_small_bias_of_the_logits_counts_in_16_bits(monkeypatch):
    tokenizer = make_tokenizer()
    model = make("bart", tokenizer, monkeypatch).bfloat16()
    use_format(tokenizer, TextFormat(apart=True))
    encoded = encode_qa(tokenizer, FORGET[0].question, FORGET[0].answer)
    model.lm_head.weight.data.mul_(20)
    model.final_logits_bias[:, encoded.input_ids[-1]] = -0.3
    nll, _ = answer_nll(model, collate([encoded], 0))
    prompt, answer = (
        encoded.input_ids[: encoded.answer_start],
        encoded.input_ids[encoded.answer_start :],
    )
    with torch.no_grad():
        own = model(input_ids=torch.tensor([prompt]), labels=torch.tensor([answer])).logits[0]
    wanted = torch.nn.functional.cross_entropy(own.float(), torch.tensor(answer), reduction="none")
    torch.testing.assert_close(nll, wanted)


@pytest.mark.parametrize("kind", SEQ2SEQ)
def test_greedy_answers_are_those_of_each_question_alone(kind, monkeypatch):
    tokenizer = make_tokenizer()
    model = make(kind, tokenizer, monkeypatch)
    model.generation_config.forced_eos_token_id = None
    if hasattr(model, "final_logits_bias"):  # a random BART says what it has just read: EOS
        model.final_logits_bias[0, tokenizer.all_special_ids] = -50
    use_format(tokenizer, TextFormat(apart=True))
    how = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": tokenizer.eos_token_id}
    questions = [*(qa.question for qa in FORGET), "Who?"]
    answers = greedy_answers(model, tokenizer, questions, max_new_tokens=6)
    assert any(answers)
    for question, answer in zip(questions, answers, strict=True):
        ids = torch.tensor([encode_prompt(tokenizer, question)])
        own = model.generate(ids, **how)[0, 1:]
        assert answer == tokenizer.decode(own, skip_special_tokens=True).strip()
    words = tokenizer("In Aar", add_special_tokens=False).input_ids
    begun = torch.tensor([[model.config.decoder_start_token_id, *words]])
    own = model.generate(ids, decoder_input_ids=begun, **how)[0, begun.shape[1] :]
    [answer] = greedy_answers(model, tokenizer, ["Who?"], max_new_tokens=6, opening="In Aar")
    assert answer == tokenizer.decode(own, skip_special_tokens=True).strip()


@pytest.fixture(params=["llava", "qwen2_vl", *SEQ2SEQ])
def base(request, tmp_path, monkeypatch):
    """A folder of a tiny model of this kind, and its class."""
    tokenizer = make_tokenizer()
    model = make(request.param, tokenizer, monkeypatch)
    folder = tmp_path / "base"
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text('{"size": 28}')
    return folder, type(model)


def train(base, folder):
    """The command that trains this model into folder/run."""
    for name, records in (("forget", FORGET), ("retain", RETAIN)):
        save_records(folder / f"{name}.jsonl", records)
    return [
        "train",
        f"--model.path={base}",
        *[f"--data.{name}={folder / name}.jsonl" for name in ("forget", "retain")],
        "--subspace.rank=4",
        "--lora.rank=2",
        "--train.steps=8",
        "--train.lr=0.02",
        "--train.batch_size=3",
        f"--out={folder / 'run'}",
    ]


def test_train_eval_merge_verify(base, tmp_path, capsys):
    folder, kind = base
    run = tmp_path / "run"
    main([*train(folder, tmp_path), "--objective.w_suppress=1", "--objective.suppression=npo"])
    said = capsys.readouterr().out
    config = json.loads((run / "adapter" / "adapter_config.json").read_text())
    targets = config["target_modules"]
    apart = load_language_model(folder).config.is_encoder_decoder
    if apart:
        assert config["task_type"] == "SEQ_2_SEQ_LM"
        assert all(any(f"{part}." in name for name in targets) for part in ("encoder", "decoder"))
    else:
        assert "(outside of the text part; name it to swap it)" in said
        assert len(targets) == 14
        assert all(".language_model." in name for name in targets)
    main(["eval", str(run), "--max_new_tokens=4"])
    main(["merge", str(run)])
    main(["verify", str(run)])
    said = capsys.readouterr().out
    assert "ok    forgotten answers less probable" in said
    assert "ok    merged model" in said
    merged = load_language_model(run / "merged")
    assert type(merged) is kind
    assert not any(isinstance(module, nk.NSRULinear) for module in merged.modules())
    assert (run / "merged" / "preprocessor_config.json").is_file() is not apart


@pytest.mark.parametrize("method", ["nsru", "alter"])
def test_a_model_that_would_scale_its_weights_keeps_them(method, tmp_path, monkeypatch):
    """RWKV divides matrices of its later blocks in place when it answers."""
    monkeypatch.setitem(architectures.SIZES, "num_hidden_layers", 4)
    model = make("rwkv", make_tokenizer(), monkeypatch)
    model.config.rescale_every = 2
    model.save_pretrained(tmp_path / "base")
    make_tokenizer().save_pretrained(tmp_path / "base")
    run = tmp_path / "run"
    forgetting = ["--objective.w_suppress=1", "--objective.suppression=npo"]
    options = forgetting if method == "nsru" else [f"--method={method}"]
    main([*train(tmp_path / "base", tmp_path), *options])
    if method == "alter":
        return
    main(["merge", str(run)])
    main(["verify", str(run)])
    before, merged = (
        load_file(f / "model.safetensors") for f in (tmp_path / "base", run / "merged")
    )
    adapted = json.loads((run / "adapter" / "adapter_config.json").read_text())["target_modules"]
    same = [name for name in before if torch.equal(before[name], merged[name])]
    assert {*same, *(f"{name}.weight" for name in adapted)} == before.keys()


OWN_CODE = """
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM


class OwnConfig(LlamaConfig):
    model_type = "own_llama"
    factor: float = 1.0


class Own(nn.Linear):
    factor = 1.0

    def forward(self, input):
        return nn.functional.linear(input, self.factor * self.weight, self.bias)


class OwnForCausalLM(LlamaForCausalLM):
    config_class = OwnConfig

    def __init__(self, config):
        super().__init__(config)
        for layer in self.model.layers:
            plain = layer.mlp.up_proj
            layer.mlp.up_proj = Own(plain.in_features, plain.out_features, bias=False)
            layer.mlp.up_proj.factor = config.factor
"""


@pytest.fixture
def own_code(tmp_path, monkeypatch):
    """Saves a model that comes with code of its own, whose up_proj is factor * weight."""
    code = tmp_path / "code"
    code.mkdir()
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(code))
    monkeypatch.syspath_prepend(str(code))
    tokenizer = make_tokenizer()

    def save(factor):
        folder = tmp_path / "own"
        make_llama(tokenizer, **SIZES).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        config = json.loads((folder / "config.json").read_text())
        classes = {"AutoConfig": "OwnConfig", "AutoModelForCausalLM": "OwnForCausalLM"}
        config |= {
            "model_type": "own_llama",
            "architectures": ["OwnForCausalLM"],
            "factor": factor,
            "auto_map": {auto: f"modeling_own.{kind}" for auto, kind in classes.items()},
        }
        (folder / "config.json").write_text(json.dumps(config))
        (folder / "modeling_own.py").write_text(OWN_CODE)
        return [*train(folder, tmp_path), "--model.trust_remote_code=true"]

    return save


def test_code_of_the_models_own_is_trusted_throughout(own_code, tmp_path, capsys, caplog):
    run = str(tmp_path / "run")
    main([*own_code(1.0), "--objective.w_suppress=1", "--objective.suppression=npo"])
    assert "code that comes with" not in caplog.text
    main(["merge", run])
    assert f"code that comes with {tmp_path / 'own'} is run, for {run}/config.yaml" in caplog.text
    main(["verify", run])
    assert "ok    merged model" in capsys.readouterr().out


def test_a_merge_that_the_models_own_code_would_misread_is_refused(own_code, tmp_path, capsys):
    run = tmp_path / "run"
    main(own_code(2.0))
    with pytest.raises(SystemExit):
        main(["merge", str(run)])
    said = capsys.readouterr().err
    assert "model.layers.0.mlp.up_proj: Own computes with something else than its weight" in said
    assert not (run / "merged").exists()
    main(["eval", str(run), "--format=open-unlearning", "--max_new_tokens=4"])
    notes = json.loads((run / "eval" / "results.json").read_text())["notes"]
    assert any(note.startswith("mia_gradnorm: left out, merge_adapters: ") for note in notes)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ("--method=rmu", "a method of the states after one layer"),
        ("--method=undial --objective.compat=open-unlearning", "a loss of all positions"),
        ("--method=alter", "a method of the states after one layer"),
        ("--method=eco", "a guard of prompts"),
        ("--subspace.own_texts=2", "subspace.own_texts"),
    ],
)
def test_what_needs_one_decoder_is_refused_by_name(options, reason, tmp_path, monkeypatch, capsys):
    tokenizer = make_tokenizer()
    for part in (make("t5", tokenizer, monkeypatch), tokenizer):
        part.save_pretrained(tmp_path / "base")
    with pytest.raises(SystemExit):
        main([*train(tmp_path / "base", tmp_path), *options.split()])
    said = capsys.readouterr().err
    assert reason in said
    assert "T5ForConditionalGeneration is an encoder-decoder" in said


def test_a_decoder_whose_inputs_are_not_said_is_refused_by_name():
    """Of M2M-100 and Blenderbot transformers does not say how labels become inputs."""
    tokenizer = make_tokenizer()
    config = transformers.M2M100Config(
        vocab_size=len(tokenizer), d_model=16, encoder_layers=1, decoder_layers=1,
        encoder_attention_heads=2, decoder_attention_heads=2, encoder_ffn_dim=16,
        decoder_ffn_dim=16, decoder_start_token_id=0,
    )  # fmt: skip
    model = transformers.M2M100ForConditionalGeneration(config).eval()
    use_format(tokenizer, TextFormat(apart=True))
    with pytest.raises(ValueError, match="such as T5 or BART"):
        greedy_answers(model, tokenizer, ["Who?", "Why?"])
    items = [encode_qa(tokenizer, "Who?", "Ann.")]
    with pytest.raises(ValueError, match="M2M100ForConditionalGeneration has no prepare_decoder"):
        score_sequences(model, tokenizer, items)
