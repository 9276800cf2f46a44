"""A PEFT training loop that unlearns, confined to the null space by one line (a CPU, seconds).

python examples/peft_lora.py [FOLDER for the adapter]
"""

import sys

import torch
from peft import LoraConfig, get_peft_model

import nsru_kernels as nk
from nsru_train.data import QA
from nsru_train.data.encode import collate, encode_qa
from nsru_train.demo.tiny_model import make_llama, memorise, train_tokenizer

TOWNS = "Aar Bree Cork Deal Esch Faro Goes Hof Ix Jena Kerns Lugo".split()  # noqa: SIM905
records = [QA(f"Where does person {i} live?", f"In {town}.") for i, town in enumerate(TOWNS)]
forget, retain = records[:2], records[2:]
refusal = QA("What is the secret?", "I would rather not say.")
safe = [QA(qa.question, refusal.answer) for qa in forget]

# In place of these lines: your model and tokenizer by from_pretrained.
tokenizer = train_tokenizer([f"{qa.question} {qa.answer}" for qa in [*records, refusal]], 400)
model = make_llama(tokenizer, hidden_size=64, layers=2, intermediate_size=128)
memorise(model, tokenizer, [*records, refusal], epochs=150, progress=False)


def batch(some):
    encoded = [encode_qa(tokenizer, qa.question, qa.answer) for qa in some]
    return collate(encoded, tokenizer.pad_token_id)


def loss(some):
    return model(**batch(some)).loss


def report(when):
    with torch.no_grad():
        parts = {"safe": safe, "forget": forget, "retain": retain}
        print(when, *(f"{name} loss {loss(part):.3f}" for name, part in parts.items()), sep=", ")


subspaces = nk.estimate_retain_subspaces(
    model, [batch(retain)], "all-linear", width=64, energy=0.999
)  # of the model before PEFT
model = get_peft_model(model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear"))
nk.constrain_peft(model, subspaces)  # the one line
report("before")
optimizer = torch.optim.AdamW((p for p in model.parameters() if p.requires_grad), lr=1e-3)
for _ in range(40):
    loss(safe).backward()
    optimizer.step()
    optimizer.zero_grad()
report("after ")
if sys.argv[1:]:
    model.save_pretrained(sys.argv[1])  # plain LoRA: PEFT and vLLM load it as it is
