"""trl.SFTTrainer, unlearning in the null space (a CPU, seconds).

python examples/sft_trainer.py [peft | swap] [FOLDER for the adapter]

peft: PEFT's LoRA, confined by constrain_peft. swap: the linear layers swapped for NSRULinear.
"""

import sys
import tempfile

from datasets import Dataset
from peft import LoraConfig, get_peft_model
from trl import SFTConfig, SFTTrainer

import nsru_kernels as nk
from nsru_train.data import QA
from nsru_train.demo.tiny_model import make_llama, memorise, train_tokenizer

way, *folder = sys.argv[1:] or ["peft"]
TOWNS = "Aar Bree Cork Deal Esch Faro Goes Hof Ix Jena Kerns Lugo".split()  # noqa: SIM905
records = [QA(f"Where does person {i} live?", f"In {town}.") for i, town in enumerate(TOWNS)]
forget, retain = records[:2], records[2:]
refusal = QA("What is the secret?", "I would rather not say.")
safe = [QA(qa.question, refusal.answer) for qa in forget]

# In place of these lines: your model and tokenizer by from_pretrained.
tokenizer = train_tokenizer([f"{qa.question} {qa.answer}" for qa in [*records, refusal]], 400)
model = make_llama(tokenizer, hidden_size=64, layers=2, intermediate_size=128)
memorise(model, tokenizer, [*records, refusal], epochs=150, progress=False)


def dataset(some):
    prompts = [f"Question: {qa.question}\nAnswer:" for qa in some]
    return Dataset.from_dict({"prompt": prompts, "completion": [f" {qa.answer}" for qa in some]})


texts = [f"Question: {qa.question}\nAnswer: {qa.answer}" for qa in retain]
keep = [tokenizer(text, return_tensors="pt") for text in texts]
subspaces = nk.estimate_retain_subspaces(model, keep, "all-linear", width=64, energy=0.999)
if way == "peft":
    model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
    nk.constrain_peft(model, subspaces)
else:
    nk.swap_linears(model, "all-linear", rank=8, alpha=16, subspaces=subspaces)

trainer = SFTTrainer(
    model,
    SFTConfig(
        tempfile.mkdtemp(),
        max_steps=60,
        learning_rate=5e-3,
        logging_steps=20,
        save_strategy="no",
        report_to="none",
        use_cpu=True,
        bf16=False,
    ),
    train_dataset=dataset(safe),
    eval_dataset={"forget": dataset(forget), "retain": dataset(retain)},
    processing_class=tokenizer,
)
before = trainer.evaluate()
trainer.train()
after = trainer.evaluate()
for name in ("forget", "retain"):
    key = f"eval_{name}_loss"
    print(f"{name} loss {before[key]:.3f} before, {after[key]:.3f} after")
if folder and way == "peft":
    trainer.save_model(folder[0])
elif folder:
    nk.save_lora_adapter(model, folder[0])
