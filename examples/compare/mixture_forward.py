"""Seconds of a forward pass through mixtures of LoRA adapters in PEFT, beside the base model alone.

usage: python mixture_forward.py MODEL

Seven random adapters of rank 8 on every linear layer: PEFT's Arrow (each token through all seven, and through two), and X-LoRA, whose
scalings come from a forward pass of their own and whose layers are a loop over the adapters. 512 tokens, f32, the logits of the last
token only, 7 times in turns. The counterpart is `cargo test -p cl-lab --test lab blend::time -- --ignored --nocapture`.
"""
import statistics
import sys
import tempfile
import time

import torch
from peft import ArrowConfig, LoraConfig, XLoraConfig, create_arrow_model, get_peft_model
from transformers import AutoModelForCausalLM


def load():
    return AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32).eval()


with tempfile.TemporaryDirectory() as folder:
    paths = []
    for i in range(7):
        torch.manual_seed(i)
        config = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
        get_peft_model(load(), config).save_pretrained(f"{folder}/{i}")
        paths.append(f"{folder}/{i}")
    arrow = lambda k: create_arrow_model(load(), paths, ArrowConfig(top_k=k)).eval()
    base = load()
    base.config.use_cache = False
    xlora = XLoraConfig(task_type="CAUSAL_LM", hidden_size=base.config.hidden_size, xlora_depth=1,
                        adapters={str(i): path for i, path in enumerate(paths)})
    models = {"base": load(), "Arrow, all seven": arrow(7), "Arrow, two": arrow(2),
              "X-LoRA": get_peft_model(base, xlora).eval()}
    ids = torch.tensor([[i * 97 % 49152 for i in range(512)]])
    times = {name: [] for name in models}
    with torch.no_grad():
        for run in range(8):
            for name, model in models.items():
                start = time.perf_counter()
                model(input_ids=ids, use_cache=False, logits_to_keep=1)
                if run > 0:
                    times[name].append(time.perf_counter() - start)
    for name, seconds in times.items():
        median = statistics.median(seconds)
        print(f"{name:18} median {median:.3f} s ({median / statistics.median(times['base']):.2f} times the base), "
              f"fastest {min(seconds):.3f} s")
