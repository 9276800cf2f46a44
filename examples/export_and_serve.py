"""Take a finished run to PEFT, transformers and vLLM: load it back, merge, verify, serve.

    python examples/export_and_serve.py [RUN]

RUN is a folder that `nsru train` wrote, runs/paris of unlearn_cli.sh by default. Its adapter is
plain LoRA, so every server of LoRA takes it as it is, beside the base model or merged into it:

    vllm serve runs/smollm2/base --enable-lora --lora-modules paris=runs/paris/adapter
    vllm serve runs/paris/merged
"""

import sys
from pathlib import Path

import torch
import yaml
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

import nsru_train as nt
from nsru_train.cli import main

run = Path(sys.argv[1] if sys.argv[1:] else "runs/paris")
config = yaml.safe_load((run / "config.yaml").read_text())
base = config["model"]["path"]
question = nt.load_records(config["data"]["forget"])[0].question

main(["merge", str(run)])  # the command `nsru merge RUN`
main(["verify", str(run)])

load = AutoModelForCausalLM.from_pretrained
models = {
    "base": load(base),
    "PEFT": PeftModel.from_pretrained(load(base), run / "adapter"),
    "transformers": load(run / "adapter"),
    "merged": load(run / "merged"),
}
tokenizer = AutoTokenizer.from_pretrained(base)
batch = tokenizer(question, return_tensors="pt")
with torch.no_grad():
    logits = {name: model.eval()(**batch).logits for name, model in models.items()}
print(question)
for name, model in models.items():
    difference = (logits[name] - logits["PEFT"]).abs().max().item()
    (answer,) = nt.greedy_answers(model, tokenizer, [question], max_new_tokens=30)
    print(f"  {name:12}  logits differ from PEFT's by {difference:.1e}  {answer}")
