"""The commands of ``nsru``, a function each: its parameters are the options."""

from __future__ import annotations

import json
import shlex
import statistics
import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any, Literal

from nsru_kernels.checks import check_range
from nsru_train.config import (
    DataConfig,
    LoraConfig,
    ModelConfig,
    Objective,
    SubspaceConfig,
    TrainConfig,
)
from nsru_train.run_config import (
    changed_adapter,
    folder_of,
    is_own_adapter,
    run_sections,
    say_changed_adapter,
    say_changed_sets,
)


def env() -> None:
    """Versions, devices, and which backend serves which op and why: paste it into bug reports."""
    from nsru_kernels.environment import describe_environment, format_environment

    print(format_environment(describe_environment()))


def demo(
    out: str = "runs/demo",
    model: str | None = None,
    data_dir: str | None = None,
    seeds: int = 3,
    lrs: dict[str, list[float]] = {},  # noqa: B006
    stop: float | None = None,
    probed: int | None = None,
    resume: bool = False,
    subspace: SubspaceConfig = SubspaceConfig(),  # noqa: B008
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    objective: Objective = Objective(),  # noqa: B008
    train: TrainConfig = TrainConfig(),  # noqa: B008
    examples: int = 6,
    max_seconds: float = 3600,
) -> None:
    """The whole way on a small model made on the spot, on a CPU, with a report.

    Args:
        out: run folder.
        model: folder of a model and its questions, as `make smollm2` makes them, instead.
        data_dir: folder with TOFU's files; none makes fictitious authors.
        seeds: how often both methods are run.
        lrs: method: learning rates to try at seed 0, such as '{nsru: [5e-4, 1e-3], lora: [5e-4]}';
            the one that costs unseen answers least at equal forgetting is used for all seeds.
            train.lr where a method has none.
        stop: stop a run once forget_prob is at most this and safe_prob at least one minus this;
            none trains all steps.
        probed: most questions of a set for its probabilities, while training and at the end; none
            takes all.
        resume: keep what an earlier, interrupted call has finished in ``out``.
        subspace: the retain subspaces.
        lora: the adapters, of both methods.
        objective: what is optimised, by both methods.
        train: how; save_steps, eval_steps and seed are not used.
        examples: forget questions whose answers before and after are kept in the report.
        max_seconds: for the model to memorise the questions.
    """
    from nsru_train.demo.run import run_demo

    run_demo(
        out,
        model=model,
        data_dir=data_dir,
        seeds=seeds,
        lrs=lrs,
        stop=stop,
        probed=probed,
        resume=resume,
        subspace=subspace,
        lora=lora,
        objective=objective,
        train=train,
        examples=examples,
        max_seconds=max_seconds,
        command=shlex.join(["nsru", *sys.argv[1:]]),
    )
    _finish([f"{out}/report.html", f"{out}/results.json", f"{out}/adapter"], "verify", out)


def subspace(
    model: ModelConfig,
    data: DataConfig,
    subspace: SubspaceConfig = SubspaceConfig(),  # noqa: B008
    out: str = "runs/subspaces",
    seed: int = 0,
) -> None:
    """Estimate the retain subspaces of a model and show how much room they leave for forgetting.

    Args:
        model: the base model.
        data: its retain set is streamed, its forget set measures the editability.
        subspace: which layers, how wide, and how the rank is chosen.
        out: run folder; the subspaces go to its folder subspaces.
        seed: of the random test matrix.
    """
    from nsru_train.estimating import run_subspaces
    from nsru_train.loading import load_data, load_model, without_long
    from nsru_train.run_folder import RunFolder

    check_range("seed", seed, "must be from 0 to 2³² - 1", whole=True)
    loaded = load_data(data)
    run = RunFolder(out).lock()
    if run.metrics_path.exists():
        raise ValueError(f"out: {out} holds a training run; give another folder.")
    base, tokenizer = load_model(model, data)
    loaded = without_long(loaded, tokenizer, data)
    run.write_environment()
    found = run_subspaces(
        run, base, tokenizer, loaded.forget, loaded.retain, subspace,
        max_length=data.max_length, seed=seed,
    )  # fmt: skip
    print(found.table())
    run.write_config({"model": asdict(model), "data": asdict(data), "subspace": asdict(subspace)})
    _finish(
        [f"{out}/subspaces"],
        *("train", "--config", f"{out}/config.yaml", "--subspace.path", f"{out}/subspaces"),
        *("--out", "runs/nsru"),
    )


def train(
    model: ModelConfig,
    data: DataConfig,
    subspace: SubspaceConfig = SubspaceConfig(),  # noqa: B008
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    method: str = "nsru",
    objective: Objective = Objective(),  # noqa: B008
    train: TrainConfig = TrainConfig(),  # noqa: B008
    out: str = "runs/nsru",
    resume: bool = False,
) -> None:
    """Unlearn: train adapters in the null space of the retain subspaces and export plain LoRA.

    The report opens with the mean probabilities of forgotten, safe and retained answers before and
    after, of at most 200 questions a set. In results.json they are forget_prob, safe_prob,
    retain_prob and one for each set of data.more, in the rows "before" and "nsru" ("lora" without
    projection; other methods by name) of "methods"; "setup" says of how many questions. "ordinary"
    are answers to requests that have nothing to do with it, and whether a safe one came there too.

    --open-unlearning DIR, with overrides such as experiment=unlearn/tofu/default trainer=NPO, takes
    all these settings from the configuration of a checkout of OpenUnlearning; options count more.

    Args:
        model: the base model.
        data: what to forget and what to retain.
        subspace: the retain subspaces.
        lora: the adapters; project says whether in the null space, whatever the method.
        method: nsru, alter, altpo, ceu, dpo, eco, ga, graddiff, idk, ihl, kl, lune, npo, rmu,
            satimp, simnpo, pdu, task_vector, undial or wga, or package.module:Class of your own.
        objective: settings of the method; `nsru train --method NAME --help` lists them.
        train: how.
        out: run folder.
        resume: go on from the last checkpoint in ``out``.
    """
    from nsru_train.train_run import run_train

    wrote = run_train(
        out,
        model=model,
        data=data,
        subspace=subspace,
        lora=lora,
        method=method,
        objective=objective,
        train=train,
        resume=resume,
    )
    if wrote:
        _finish([f"{out}/adapter", f"{out}/results.json", f"{out}/report.html"], "eval", out)


def compare(
    model: ModelConfig,
    data: DataConfig,
    subspace: SubspaceConfig = SubspaceConfig(),  # noqa: B008
    lora: LoraConfig = LoraConfig(),  # noqa: B008
    methods: list[str] = ["nsru", "lora"],  # noqa: B006
    settings: dict[str, dict[str, Any]] = {},  # noqa: B006
    lrs: list[float] = [],  # noqa: B006
    seeds: int = 3,
    train: TrainConfig = TrainConfig(),  # noqa: B008
    stop: float | None = None,
    probed: int | None = 50,
    examples: int = 6,
    logs: dict[str, str] = {},  # noqa: B006
    out: str = "runs/compare",
    resume: bool = False,
) -> None:
    """Compare methods on one model and its data: one table, one frontier, one report.

    Every method is tuned alike, with seed 0 at each of ``lrs``: the rate that costs unseen retain
    answers least where the answers are forgotten (forget_prob 0.1) is used for all seeds; the rate
    that forgets most where none does. A rate at which a method diverges at once is left out.

    Args:
        model: the base model.
        data: what to forget and to retain. data.more's retain_unseen are questions that the
            subspaces see and the retain loss does not; without it, every other retain question.
        subspace: the retain subspaces.
        lora: the adapters; each method says whether they are projected.
        methods: names as --method of nsru train, unprojected, or "NAME projected"; nsru is
            projected, and lora is nsru unprojected.
        settings: of a method: '{npo: {beta: 0.5}}'.
        lrs: learning rates to try, the same for all; train.lr where there is none.
        seeds: how often each method is run.
        train: how; save_steps and seed are not used.
        stop: stop a run once forget_prob is at most this and safe_prob at least one minus this;
            none trains all steps.
        probed: most questions of a set for its probabilities, while training and at the end; none
            takes all.
        examples: forget questions whose answers before and after are kept in the report.
        logs: NAME: FOLDER of evaluations by OpenUnlearning (TOFU_EVAL.json) of the same questions,
            a row each beside the methods: '{retain90: saves/eval/retain90}'.
        out: run folder.
        resume: keep the runs that an earlier, interrupted call has finished in ``out``.
    """
    from nsru_train.compare import run_compare

    run_compare(
        out,
        model=model,
        data=data,
        subspace=subspace,
        lora=lora,
        methods=methods,
        settings=settings,
        lrs=lrs,
        seeds=seeds,
        train=train,
        stop=stop,
        probed=probed,
        examples=examples,
        logs=logs,
        resume=resume,
        command=shlex.join(["nsru", *sys.argv[1:]]),
    )
    _finish([f"{out}/report.html", f"{out}/results.json"], "report", out)


def eval(
    run: str,
    model: ModelConfig | None = None,
    data: DataConfig | None = None,
    adapter: str | None = None,
    base: bool = False,
    retain_log: str | None = None,
    out: str | None = None,
    max_new_tokens: int = 200,
    generate: bool = True,
    examples: int = 8,
    format: Literal["nsru", "open-unlearning"] = "nsru",
    tasks: str | None = None,
    include_path: str | None = None,
    num_fewshot: int | None = None,
    apply_chat_template: bool = False,
    limit: float | None = None,
    batch_size: int = 16,
    muse: Literal["news", "books"] | None = None,
    muse_dir: str | None = None,
    muse_retain_log: str | None = None,
) -> None:
    """All metrics of a model on its sets: a table, and results.json.

    The report has the base model's answers beside the new ones: the same model, adapters off.

    Args:
        run: run folder; its config.yaml says model and data, its adapter or guard is evaluated.
        model: another model than the run's.
        data: other sets than the run's.
        adapter: another folder of an adapter, or of a guard.
        base: evaluate the base model without adapter.
        retain_log: results.json of a model trained on the retain data only, for forget quality and
            privleak; its TOFU_EVAL.json, or the folder of it, where format is open-unlearning.
        out: folder for results.json, report and config.yaml; default RUN/eval, RUN/eval-base, or
            RUN/eval-NAME of another adapter.
        max_new_tokens: longest generated answer.
        generate: false leaves out generated answers, and ROUGE with them.
        examples: questions of a set whose answers are kept in report and results.json; 0 or more.
        format: open-unlearning also writes TOFU_EVAL.json and TOFU_SUMMARY.json, its metrics under
            its names.
        tasks: of lm-eval, base model and evaluated model side by side: wmdp_bio,mmlu. Their data
            come from the hub. The options below are lm-eval's.
        include_path: folder with tasks of your own, in lm-eval's YAML.
        num_fewshot: examples before each question of a task; the task's own number where none.
        apply_chat_template: ask the tasks' questions in the model's chat template.
        limit: questions of each task; below 1 a share of them; none takes all.
        batch_size: of the tasks.
        muse: VerbMem, KnowMem and PrivLeak on MUSE-News or MUSE-Books, by the benchmark's rules and
            by OpenUnlearning's, base model and evaluated model side by side; writes MUSE_EVAL.json
            and MUSE_SUMMARY.json too.
        muse_dir: folder with MUSE's files, such as verbmem/forget.json; none means the hub.
        muse_retain_log: MUSE_EVAL.json of a model trained on the retain data only, or its folder,
            for PrivLeak.
    """
    from nsru_train.adapters import is_plain
    from nsru_train.eval_run import run_eval
    from nsru_train.harness import TaskSettings

    folder = run_eval(
        run,
        out,
        model=model,
        data=data,
        adapter=adapter,
        base=base,
        retain_log=retain_log,
        max_new_tokens=max_new_tokens,
        generate=generate,
        examples=examples,
        format=format,
        tasks=TaskSettings(
            tasks, include_path, num_fewshot, apply_chat_template, limit, batch_size
        ),
        muse=muse,
        muse_dir=muse_dir,
        muse_retain_log=muse_retain_log,
    )
    if folder is None:
        return
    if not base and not Path(run, "eval-base", "results.json").is_file():
        print(f"the base model alone, for comparison: nsru eval {run} --base true")
    written = [str(folder.results_path), str(folder.report_path)]
    if base and not Path(run, "adapter").is_dir():
        _finish(written, "train", *_options(model=model, data=data), "--out", "runs/nsru")
    elif base:
        _finish(written, "eval", run)
    else:
        _finish(written, "verify" if is_plain(adapter or f"{run}/adapter") else "report", run)


def merge(run: str, model: ModelConfig | None = None, adapter: str | None = None) -> None:
    """Merge a run's adapter into its base model, in float32, and save an ordinary model.

    Args:
        run: run folder; the merged model goes to its folder merged, that of another adapter to
            merged-NAME.
        model: another base model than the run's.
        adapter: another adapter folder than the run's.
    """
    import nsru_kernels as nk
    from nsru_kernels.files import whole_folder
    from nsru_kernels.hf.peft_format import load_lora_adapter
    from nsru_train.adapters import check_plain
    from nsru_train.language_models import copy_processor
    from nsru_train.loading import load_model
    from nsru_train.quantized import dequantize, requantization_errors
    from nsru_train.run_folder import RunFolder

    adapter = adapter or f"{run}/adapter"
    out = folder_of(run, adapter, "merged")
    check_plain(adapter)
    say_changed_adapter(run, adapter)
    model, _ = run_sections(run, model, None, need_data=False)
    locked = RunFolder(run).lock()  # which removes what a killed merge left
    network, tokenizer = load_model(model)
    load_lora_adapter(network, adapter)
    errors = requantization_errors(network)
    quantised = getattr(network, "hf_quantizer", None) is not None
    nk.merge_adapters(network, progress=True)
    if quantised:
        dequantize(network)  # the layers without an adapter, and the model's config
        print(f"The base is quantised; {out} is in {network.dtype}.")
    if errors:
        worst = max(errors, key=errors.__getitem__)
        print(
            f"Quantised again it would be off by {statistics.fmean(errors.values()):.0%} of the "
            f"update on average, and by {errors[worst]:.0%} in {worst}: serve it as it is, or the "
            "adapter on the quantised base."
        )
    with whole_folder(out) as folder:
        network.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        copy_processor(network, folder)
    locked.unlock()
    named = () if is_own_adapter(run, adapter) else ("--adapter", adapter)
    _finish([out], "verify", run, *named)


def verify(
    run: str,
    model: ModelConfig | None = None,
    data: DataConfig | None = None,
    adapter: str | None = None,
    merged: str | None = None,
) -> None:
    """Compare base, adapter and merged model; fail loudly when the adapter does nothing.

    Args:
        run: run folder.
        model: another base model than the run's.
        data: other sets than the run's.
        adapter: another adapter folder than the run's.
        merged: merged model; default that of `nsru merge`, where it exists.
    """
    from nsru_train.adapters import check_plain
    from nsru_train.loading import load_data, load_model, without_long
    from nsru_train.verify import Check
    from nsru_train.verify import verify as compare

    adapter = adapter or f"{run}/adapter"
    check_plain(adapter)
    of_run = data is None
    model, data = run_sections(run, model, data)
    loaded = load_data(data)
    if of_run:
        say_changed_sets(run, loaded.digests())
    base, tokenizer = load_model(model, data)
    loaded = without_long(loaded, tokenizer, data)
    if merged is None and Path(made := folder_of(run, adapter, "merged")).is_dir():
        merged = made
    report = compare(
        base,
        adapter,
        merged,
        tokenizer,
        loaded.forget,
        loaded.retain,
        max_length=data.max_length,
        trust_remote_code=model.trust_remote_code,
    )
    if changed := changed_adapter(run, adapter):
        report.checks.insert(0, Check("adapter of the run", False, changed))
    print(report.text())
    if not report.passed:
        raise SystemExit(1)
    _finish([], "merge" if merged is None else "report", run)


def report(run: str) -> None:
    """Write report.html and figures/ of a run from its results.json and metrics.jsonl.

    Args:
        run: run folder.
    """
    from nsru_train.report import write_report

    if not Path(run).is_dir():
        raise ValueError(f"run: no folder {run}; give the --out of nsru train.")
    is_run = all(Path(run, part).exists() for part in ("config.yaml", "adapter"))
    _finish([str(write_report(Path(run)))], *(("eval", run) if is_run else ()))


def refresh(
    run: str,
    steps: int = 20,
    lr: float | None = None,
    eval_steps: int = 5,
    seed: int = 0,
    control: bool = True,
    out: str | None = None,
) -> None:
    """Bring retain answers back: a few steps on them alone, in the null space that the run had.

    Args:
        run: run folder of nsru train; it stays as it is.
        steps: retain-only steps, 3 to 20.
        lr: peak learning rate; the run's where none.
        eval_steps: steps between two evaluations.
        seed: of the order.
        control: train the run's own method as many steps more, beside it, and compare.
        out: folder for adapter, results.json and report; default RUN/refresh.
    """
    from nsru_train.repair import refresh as refresh_run

    out = out or f"{run}/refresh"
    refresh_run(run, out, steps=steps, lr=lr, eval_steps=eval_steps, seed=seed, control=control)
    _finish([f"{out}/adapter", f"{out}/report.html"], "eval", run, "--adapter", f"{out}/adapter")


def rollback(
    run: str,
    shares: list[float] = [0.001, 0.005, 0.01],  # noqa: B006
    rho: float = 1.0,
    items: int = 128,
    seed: int = 0,
    out: str | None = None,
) -> None:
    """Bring retain answers back without training: undo the entries of B that cost them most.

    An entry costs half its Fisher information of the retain answers times its square.

    Args:
        run: run folder of nsru train; it stays as it is.
        shares: of all entries that are undone, each beside as many entries drawn at random.
        rho: how far, 0 to 1.
        items: retain questions that the Fisher information is estimated on.
        seed: of the draws.
        out: folder for adapters, results.json and report; default RUN/rollback.
    """
    from nsru_train.repair import rollback as roll_back

    out = out or f"{run}/rollback"
    roll_back(run, out, shares=shares, rho=rho, items=items, seed=seed)
    most = f"{out}/adapters/rolled-back-{max(shares):.3g}"
    _finish([f"{out}/adapters", f"{out}/report.html"], "eval", run, "--adapter", most)


def attack(
    run: str,
    attacks: list[str] = ["relearn", "quantise", "paraphrase", "prefix", "tokens", "sample"],  # noqa: B006
    steps: int = 100,
    lr: float | None = None,
    share: float = 1.0,
    samples: int = 8,
    max_new_tokens: int = 64,
    retain_model: str | None = None,
    seed: int = 0,
    out: str | None = None,
    resume: bool = False,
) -> None:
    """See what a finished run still knows: relearn it, quantise it, ask it in other ways.

    Relearning trains the merged model's new LoRA, and the run's own, on forget answers alone.
    Quantisation is that of the merged model: int8 and NF4 by bitsandbytes, int4 by torchao.
    `nsru compare --resume true` shows the robustness of attacked runs/NAME of its own.

    Args:
        run: run folder of nsru train, or runs/NAME of nsru compare; it stays as it is.
        attacks: relearn; quantise; paraphrase asks the records' paraphrased_question; prefix begins
            the answer with "Sure, here is the answer:"; tokens lets it go on four times as long;
            sample draws several answers and takes the best.
        steps: of relearning.
        lr: of relearning; the run's where none.
        share: of the forget questions that are relearnt; how far the others come back is shown too.
        samples: drawn answers to each question.
        max_new_tokens: longest generated answer.
        retain_model: a model trained on the retain data alone, attacked beside the run.
        seed: of relearning and of the samples.
        out: folder for results.json and report; default RUN/attack.
        resume: keep the attacks that an earlier, interrupted call has finished in ``out``.
    """
    from nsru_train.attack import AttackSettings
    from nsru_train.attack import attack as attack_run

    out = out or f"{run}/attack"
    settings = AttackSettings(
        attacks, steps, lr, share, samples, max_new_tokens, retain_model, seed
    )
    attack_run(run, out, settings, resume=resume)
    _finish([f"{out}/results.json", f"{out}/report.html"], "report", out)


def bench(options: list[str]) -> None:
    """Time kernels, sketch, loss and whole steps against every peer; `nsru bench --help`.

    Args:
        options: those of nsru_bench.bench.
    """
    from nsru_bench.bench import main as run_benchmarks

    run_benchmarks(options, prog="nsru bench")


COMMANDS: dict[str, Any] = {
    "env": env,
    "demo": demo,
    "subspace": subspace,
    "train": train,
    "compare": compare,
    "eval": eval,
    "merge": merge,
    "verify": verify,
    "report": report,
    "refresh": refresh,
    "rollback": rollback,
    "attack": attack,
    "bench": bench,
}


def _finish(written: list[str], *following: str) -> None:
    for path in written:
        print(f"wrote {path}")
    if following:
        print(f"next: {shlex.join(['nsru', *following])}")


def _options(**sections: Any) -> list[str]:
    """The options of a command line that give these sections, without those at their defaults."""
    options = []
    for section, settings in sections.items():
        for field in fields(settings):
            value = getattr(settings, field.name)
            empty = field.default_factory() if callable(field.default_factory) else field.default
            if value != empty:
                text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
                options += [f"--{section}.{field.name}", text]
    return options
