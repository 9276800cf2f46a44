"""A small program with the shape of OpenUnlearning's: registries, configuration tree, two mains.

Its losses, datasets and evaluation are a few lines; what is of the original are the names that
the bridge relies on, and the three places where the original breaks away from a GPU or on
transformers 5: warm-up by device count, tokenizer=, compute_loss without num_items_in_batch.
"""

from pathlib import Path
from textwrap import dedent

FILES = {
    "src/train.py": """
        import hydra
        from data import get_collators, get_data
        from evals import get_evaluators
        from model import get_model
        from trainer import load_trainer


        @hydra.main(version_base=None, config_path="../configs", config_name="train.yaml")
        def main(cfg):
            template = cfg.model.template_args
            model, tokenizer = get_model(cfg.model)
            data = get_data(cfg.data, cfg.mode, tokenizer=tokenizer, template_args=template)
            trainer, args = load_trainer(
                trainer_cfg=cfg.trainer, model=model, train_dataset=data["train"],
                eval_dataset=None, tokenizer=tokenizer,
                data_collator=get_collators(cfg.collator, tokenizer=tokenizer),
                evaluators=get_evaluators(cfg.eval), template_args=template,
            )
            trainer.train()
            trainer.save_state()
            trainer.save_model(args.output_dir)
            if args.do_eval:
                trainer.evaluate(metric_key_prefix="eval")
    """,
    "src/eval.py": """
        import hydra
        from evals import get_evaluators
        from model import get_model


        @hydra.main(version_base=None, config_path="../configs", config_name="eval.yaml")
        def main(cfg):
            model, tokenizer = get_model(cfg.model)
            for evaluator in get_evaluators(cfg.eval).values():
                evaluator.evaluate(
                    model=model, tokenizer=tokenizer, template_args=cfg.model.template_args
                )
    """,
    "src/model/__init__.py": """
        import torch
        from omegaconf import open_dict
        from transformers import AutoModelForCausalLM, AutoTokenizer


        def get_model(cfg):
            with open_dict(cfg.model_args):
                dtype = cfg.model_args.pop("torch_dtype", None)
            if cfg.model_args.get("attn_implementation") == "flash_attention_2":
                assert dtype == "bfloat16"
            model = AutoModelForCausalLM.from_pretrained(
                torch_dtype=getattr(torch, dtype or "float32"), **cfg.model_args
            )
            return model, get_tokenizer(cfg.tokenizer_args)


        def get_tokenizer(args):
            return AutoTokenizer.from_pretrained(**args)
    """,
    "src/data/__init__.py": """
        import datasets
        import torch
        from torch.nn.utils.rnn import pad_sequence


        class QADataset:
            def __init__(self, hf_args, template_args, tokenizer, question_key="question",
                         answer_key="answer", few_shot_dataset_hf_args=None):
                self.data = datasets.load_dataset(**hf_args)
                self.template, self.tokenizer, self.fs_data = template_args, tokenizer, None
                self.question_key, self.answer_key = question_key, answer_key
                if few_shot_dataset_hf_args is not None:
                    rows = datasets.load_dataset(**few_shot_dataset_hf_args)
                    self.fs_data = {key: rows[key] for key in (question_key, answer_key)}

            def __len__(self):
                return len(self.data)

            def _process_sample(self, question, answer, index=-1):
                shots = [] if self.fs_data is None else self.fs_data[self.question_key] + []
                start, end = self.template["user_start_tag"], self.template["user_end_tag"]
                prompt = "".join(shots) + start + question + end + self.template["asst_start_tag"]
                before = self.tokenizer(prompt)["input_ids"]
                ids = self.tokenizer(prompt + answer)["input_ids"] + [self.tokenizer.eos_token_id]
                labels = [-100] * len(before) + ids[len(before):]
                item = {"input_ids": ids, "labels": labels, "attention_mask": [1] * len(ids)}
                return {name: torch.tensor(values) for name, values in item.items()}

            def __getitem__(self, i):
                row = self.data[i]
                return self._process_sample(row[self.question_key], row[self.answer_key], i)


        class ForgetRetainDataset:
            def __init__(self, forget, retain, anchor="forget"):
                self.forget, self.retain, self.anchor = forget, retain, anchor

            def __len__(self):
                return len(self.forget)

            def __getitem__(self, i):
                other = torch.randint(0, len(self.retain), (1,)).item()
                return {"forget": self.forget[i], "retain": self.retain[other]}


        def get_datasets(cfgs, **kwargs):
            [cfg] = cfgs.values()
            assert cfg.handler == "QADataset"
            return QADataset(**cfg.args, **kwargs)


        def get_data(cfg, mode, **kwargs):
            assert mode == "unlearn"
            forget, retain = (get_datasets(cfg[name], **kwargs) for name in ("forget", "retain"))
            return {"train": ForgetRetainDataset(forget, retain, cfg.anchor)}


        def get_collators(cfg, tokenizer):
            def pad(items, name, value):
                return pad_sequence([item[name] for item in items], True, value)

            def collate(items):
                if "input_ids" not in items[0]:
                    return {key: collate([item[key] for item in items]) for key in items[0]}
                return {
                    "input_ids": pad(items, "input_ids", tokenizer.pad_token_id),
                    "attention_mask": pad(items, "attention_mask", 0),
                    "labels": pad(items, "labels", -100),
                }

            return collate
    """,
    "src/evals/__init__.py": """
        import json
        from pathlib import Path

        import torch
        from data import get_collators, get_datasets


        class TOFUEvaluator:
            def __init__(self, cfg):
                self.cfg = cfg

            def evaluate(self, model, tokenizer, template_args, output_dir=None):
                model.eval()
                data = get_datasets(self.cfg.datasets, tokenizer=tokenizer,
                                    template_args=template_args)
                batch = get_collators(None, tokenizer)([data[i] for i in range(len(data))])
                with torch.no_grad():
                    loss = model(**batch).loss.item()
                folder = Path(output_dir or self.cfg.output_dir)
                folder.mkdir(parents=True, exist_ok=True)
                (folder / "TOFU_SUMMARY.json").write_text(json.dumps({"forget_loss": loss}))
                return {"forget_loss": loss}


        def get_evaluators(cfgs, **kwargs):
            return {name: TOFUEvaluator(cfg) for name, cfg in cfgs.items()}
    """,
    "src/trainer/__init__.py": """
        import json

        import torch
        from transformers import TrainingArguments
        from trainer.base import FinetuneTrainer
        from trainer.unlearn.methods import NPO, RMU

        TRAINER_REGISTRY = {made.__name__: made for made in (FinetuneTrainer, NPO, RMU)}


        def load_trainer_args(trainer_args, dataset):
            trainer_args = dict(trainer_args)
            epochs = trainer_args.pop("warmup_epochs", None)
            if epochs:
                step = trainer_args["per_device_train_batch_size"]
                step *= trainer_args["gradient_accumulation_steps"]
                trainer_args["warmup_steps"] = int(
                    (epochs * len(dataset)) // (step * torch.cuda.device_count())
                )
            json.dumps(trainer_args)  # as reports do
            return TrainingArguments(**trainer_args)


        def load_trainer(trainer_cfg, model, train_dataset, **kwargs):
            args = load_trainer_args(trainer_cfg.args, train_dataset)
            made = TRAINER_REGISTRY[trainer_cfg.handler](
                model=model, train_dataset=train_dataset, args=args, **kwargs,
                **trainer_cfg.get("method_args", {}),
            )
            return made, args
    """,
    "src/trainer/base.py": """
        from transformers import Trainer


        class FinetuneTrainer(Trainer):
            def __init__(self, evaluators=None, template_args=None, *args, **kwargs):
                self.evaluators, self.template_args = evaluators, template_args
                super().__init__(*args, **kwargs)

            def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix="eval"):
                metrics = {}
                for evaluator in self.evaluators.values():
                    folder = f"{self.args.output_dir}/checkpoint-{self.state.global_step}/evals"
                    metrics.update(evaluator.evaluate(
                        model=self.model, tokenizer=self.tokenizer,
                        template_args=self.template_args, output_dir=folder,
                    ))
                self.log(metrics)
                return metrics
    """,
    "src/trainer/unlearn/base.py": """
        from trainer.base import FinetuneTrainer


        class UnlearnTrainer(FinetuneTrainer):
            pass
    """,
    "src/trainer/unlearn/methods.py": """
        import copy

        import torch
        from trainer.unlearn.base import UnlearnTrainer


        def summed(model, inputs):
            logits = model(**inputs).logits[:, :-1].transpose(1, 2)
            losses = torch.nn.functional.cross_entropy(
                logits, inputs["labels"][:, 1:], reduction="none"
            )
            return losses.sum(-1)


        class NPO(UnlearnTrainer):
            def __init__(self, beta=1.0, gamma=1.0, alpha=1.0, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.beta, self.gamma, self.alpha = beta, gamma, alpha
                self.ref_model = self._prepare_ref_model(self.model)

            def _prepare_ref_model(self, model):
                return copy.deepcopy(model).to(self.accelerator.device).eval()

            def compute_loss(self, model, inputs, return_outputs=False):
                forget = inputs["forget"]
                with torch.no_grad():
                    reference = summed(self.ref_model, forget)
                margin = self.beta * (summed(model, forget) - reference)
                forgotten = -2 / self.beta * torch.nn.functional.logsigmoid(margin).mean()
                return self.gamma * forgotten + self.alpha * model(**inputs["retain"]).loss


        class RMU(NPO):
            def __init__(self, trainable_params_regex, *args, **kwargs):
                super().__init__(*args, **kwargs)
                self.trainable_params_regex = trainable_params_regex

            def create_optimizer(self):
                raise AssertionError("would train whole weights")
    """,
    "configs/unlearn.yaml": """
        defaults:
          - model: phi-1_5
          - trainer: finetune
          - data: unlearn
          - collator: padded
          - eval: tofu
          - experiment: null
          - _self_

        mode: unlearn
        task_name: ???
        forget_split: forget10
        trainer:
          args:
            remove_unused_columns: False
        hydra:
          run:
            dir: saves/unlearn/${task_name}
    """,
    "configs/eval.yaml": """
        defaults:
          - _self_
          - model: phi-1_5
          - eval: tofu
          - experiment: null

        model:
          model_args:
            device_map: cuda
        mode: eval
        task_name: ???
        forget_split: forget10
        hydra:
          run:
            dir: saves/eval/${task_name}
    """,
    "configs/model/phi-1_5.yaml": """
        model_args:
          pretrained_model_name_or_path: microsoft/phi-1_5
          attn_implementation: flash_attention_2
          torch_dtype: bfloat16
        tokenizer_args:
          pretrained_model_name_or_path: microsoft/phi-1_5
        template_args:
          apply_chat_template: False
          user_start_tag: "Question: "
          user_end_tag: "\\n"
          asst_start_tag: "Answer: "
          asst_end_tag: "\\n\\n"
    """,
    "configs/data/unlearn.yaml": """
        anchor: forget
        forget:
          TOFU_QA_forget:
            handler: QADataset
            args:
              hf_args:
                name: ${forget_split}
                split: train
                path: locuslab/TOFU
        retain:
          TOFU_QA_retain:
            handler: QADataset
            args:
              hf_args:
                name: retain90
                split: train
                path: locuslab/TOFU
    """,
    "configs/collator/padded.yaml": "handler: padded\n",
    "configs/eval/tofu.yaml": """
        tofu:
          handler: TOFUEvaluator
          output_dir: saves/${mode}/${task_name}
          datasets:
            TOFU_QA_forget:
              handler: QADataset
              args:
                hf_args:
                  name: ${forget_split}_perturbed
                  split: train
                  path: locuslab/TOFU
    """,
    "configs/experiment/unlearn/tofu/default.yaml": """
        # @package _global_
        retain_split: retain90
        holdout_split: holdout10
        data:
          retain:
            TOFU_QA_retain:
              args:
                hf_args:
                  name: ${retain_split}
        trainer:
          args:
            warmup_epochs: 1.0
            learning_rate: 1e-5
    """,
    "configs/experiment/eval/tofu/default.yaml": """
        # @package _global_
        holdout_split: holdout10
    """,
    "configs/trainer/finetune.yaml": """
        handler: FinetuneTrainer
        args:
          per_device_train_batch_size: 8
          gradient_accumulation_steps: 4
          learning_rate: 1e-5
          bf16: True
          bf16_full_eval: True
          output_dir: saves/${mode}/${task_name}
          logging_dir: ${trainer.args.output_dir}/logs
          report_to: none
          ddp_find_unused_parameters: None
          gradient_checkpointing: False
          optim: paged_adamw_32bit
          save_strategy: 'no'
          do_eval: True
          eval_on_start: True
          eval_strategy: epoch
          num_train_epochs: 10
          seed: 0
    """,
    "configs/trainer/NPO.yaml": """
        defaults:
          - finetune

        handler: NPO
        method_args:
          beta: 0.1
    """,
    "configs/trainer/RMU.yaml": """
        defaults:
          - finetune

        handler: RMU
        method_args:
          trainable_params_regex:
            - model\\\\.layers\\\\.(0|1)\\\\.mlp\\\\.down_proj\\\\.weight
    """,
}


def write_stand_in(folder: Path) -> Path:
    """Write the program into a folder; returns it."""
    for name, text in FILES.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dedent(text).lstrip())
    return folder
