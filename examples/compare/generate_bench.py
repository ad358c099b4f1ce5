"""Times `cl generate` beside Transformers' `generate` on the same prompts, and compares the texts token by token.

Run:  python generate_bench.py CL MODEL DATA.json [COUNT] [NEW] [LONGEST] [RUNS]

DATA.json is a list of {"prompt", …}, as TRACE's test.json; the first COUNT (24) prompts of at most LONGEST (1024) tokens are
continued greedily by NEW (64) tokens, or up to the end token. Transformers in f32 at batch sizes 1, 4, 8 and 16, prompts sorted
by length and padded on the left; its best batch size, found in a first run over at most 16 prompts, is timed in turn with ours. Its
time is that of `generate` alone; ours is that of the whole command, with loading.
"""

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

cl, path, data = sys.argv[1:4]
count, new, longest, runs = [int(value) for value in sys.argv[4:8]] + [24, 64, 1024, 2][len(sys.argv[4:8]):]
tokenizer = AutoTokenizer.from_pretrained(path, padding_side="left")
tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, attn_implementation="sdpa").eval()
with open(data) as file:
    prompts = [row["prompt"] for row in json.load(file)]
prompts = [p for p in prompts if len(tokenizer(p).input_ids) <= longest][:count]
lengths = [len(tokenizer(p).input_ids) for p in prompts]


def theirs(batch, count=len(prompts)):
    order = sorted(range(count), key=lambda i: -lengths[i])
    texts, start = [None] * count, time.perf_counter()
    for first in range(0, len(order), batch):
        part = order[first : first + batch]
        inputs = tokenizer([prompts[i] for i in part], return_tensors="pt", padding=True)
        with torch.inference_mode():
            out = model.generate(**inputs, max_new_tokens=new, do_sample=False, pad_token_id=tokenizer.pad_token_id)
        for i, row in zip(part, out[:, inputs.input_ids.shape[1] :].tolist()):
            texts[i] = row[: row.index(tokenizer.eos_token_id)] if tokenizer.eos_token_id in row else row
    return time.perf_counter() - start, texts


def ours(precision):
    with tempfile.TemporaryDirectory() as folder:
        file, out = os.path.join(folder, "prompts.jsonl"), os.path.join(folder, "texts.jsonl")
        with open(file, "w") as lines:
            lines.writelines(json.dumps({"prompt": p}) + "\n" for p in prompts)
        args = [cl, "generate", path, "--prompts", file, "--out", out, "--max-new-tokens", str(new), "--precision", precision]
        start = time.perf_counter()
        subprocess.run(args, check=True, capture_output=True)
        seconds = time.perf_counter() - start
        with open(out) as lines:
            return seconds, [json.loads(line)["tokens"] for line in lines]


print(f"{len(prompts)} prompts of {min(lengths)} to {max(lengths)} tokens, {sum(lengths)} in all; at most {new} new tokens each")
first = {batch: theirs(batch, min(16, len(prompts)))[0] for batch in (1, 4, 8, 16) if batch <= count}
best = min(first, key=first.get)
print("Transformers, first run, seconds by batch size:", {batch: round(s, 1) for batch, s in first.items()})
times = {"Transformers f32": [], "cl f32": [], "cl bf16": []}
for _ in range(runs):
    seconds, expected = theirs(best)
    times["Transformers f32"].append(seconds)
    for precision in ("f32", "bf16"):
        seconds, texts = ours(precision)
        times[f"cl {precision}"].append(seconds)
        if precision == "f32":
            same = sum(a == b for a, b in zip(texts, expected))
print(f"batch size {best} of Transformers, {runs} runs in turn, medians; {same} of {len(prompts)} texts of f32 equal")
base = statistics.median(times["Transformers f32"])
for who, seconds in times.items():
    median = statistics.median(seconds)
    print(f"  {who:16} {median:6.1f} s ({min(seconds):.1f}–{max(seconds):.1f})  {base / median:.1f}x")
