"""The other side of a comparison: LoRA fine-tuning with Transformers and PEFT, as `cl train` does it.

usage: python transformers_lora.py MODEL DATA.json STEPS BATCH MAX_LENGTH INIT

Makes an adapter (r 8, alpha 16, every linear layer but the head), saves it to INIT, trains it on the first STEPS x BATCH
rows of DATA ({"prompt", "answer"}, in file order, rows longer than MAX_LENGTH left out) in f32 with padded batches, AdamW
at 2e-4, gradients clipped at 1, and prints loss and gradient norm of each step, then tokens a second. Then

    cl train examples/compare/lora.toml --out runs/compare --set model=MODEL --set data.train=DATA.json
             --set train.initial_adapter=INIT --set train.max_steps=STEPS --set train.micro_batch_size=BATCH

takes the same steps; runs/compare/log.jsonl has its losses, norms, tokens and seconds.
"""
import json
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

model_dir, data, steps, batch, max_length, init = sys.argv[1:7]
steps, batch, max_length = int(steps), int(batch), int(max_length)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
model = get_peft_model(model, config)
model.save_pretrained(init)
model.train()

examples = []
for row in json.load(open(data)):
    source = tokenizer(row["prompt"])["input_ids"]
    target = tokenizer(row["answer"] + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    if len(source) + len(target) <= max_length:
        examples.append((source, target))
examples = examples[: steps * batch]

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4, weight_decay=0.0)
tokens, started = 0, time.perf_counter()
for step in range(steps):
    rows = examples[step * batch: (step + 1) * batch]
    width = max(len(s) + len(t) for s, t in rows)
    ids = torch.full((len(rows), width), tokenizer.pad_token_id or 0)
    labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
    for i, (source, target) in enumerate(rows):
        n = len(source) + len(target)
        ids[i, :n] = torch.tensor(source + target)
        labels[i, len(source):n] = torch.tensor(target)
        mask[i, :n] = 1
        tokens += n
    loss = model(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
    loss.backward()
    norm = torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    print(f"step {step + 1} loss {loss.item():.6f} grad_norm {float(norm):.6f}", flush=True)
seconds = time.perf_counter() - started
print(f"{tokens / seconds:.1f} tokens/s, {seconds:.1f} s")
