"""The other side of a comparison: fine-tuning with Transformers and PEFT, as `cl train` does it.

usage: python transformers_lora.py MODEL DATA.json STEPS BATCH MAX_LENGTH [INIT]

Makes an adapter (r 8, alpha 16, every linear layer but the head), saves it to INIT, trains it on the first STEPS x BATCH
rows of DATA ({"prompt", "answer"} or {"text"}, in file order, rows longer than MAX_LENGTH left out) in f32 with padded batches,
AdamW at 2e-4, gradients clipped at 1, and prints loss and gradient norm of each step, then tokens a second and peak memory. Without
INIT it trains all weights, at 2e-5. Then

    cl train examples/compare/lora.toml --out runs/compare --set model=MODEL --set data.train=DATA.json
             --set train.initial_adapter=INIT --set train.max_steps=STEPS --set train.micro_batch_size=BATCH

takes the same steps; runs/compare/log.jsonl has its losses, norms, tokens and seconds. For all weights, the configuration has no
[train.lora] and no initial_adapter.
"""
import json
import resource
import sys
import time

import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

model_dir, data, steps, batch, max_length = sys.argv[1:6]
init = sys.argv[6] if len(sys.argv) > 6 else None
steps, batch, max_length = int(steps), int(batch), int(max_length)
torch.manual_seed(0)
tokenizer = AutoTokenizer.from_pretrained(model_dir)
model = AutoModelForCausalLM.from_pretrained(model_dir, dtype=torch.float32, attn_implementation="sdpa")
if init:
    config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, config)
    model.save_pretrained(init)
model.train()

examples = []
for row in json.load(open(data)):
    source = tokenizer(row["prompt"])["input_ids"] if "prompt" in row else []
    target = tokenizer(row.get("answer", row.get("text")) + tokenizer.eos_token, add_special_tokens=False)["input_ids"]
    if len(source) + len(target) <= max_length:
        examples.append((source, target))
examples = examples[: steps * batch]

trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.AdamW(trained, lr=2e-4 if init else 2e-5, weight_decay=0.0)
tokens, seconds = 0, []
for step in range(steps):
    started = time.perf_counter()
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
    seconds.append(time.perf_counter() - started)
    of_step = int(mask.sum())
    print(f"step {step + 1} loss {loss.item():.6f} grad_norm {float(norm):.6f} {of_step / seconds[-1]:.1f} tokens/s", flush=True)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6
print(f"{tokens / sum(seconds):.1f} tokens/s, {sum(seconds):.1f} s, {peak:.2f} GB")
