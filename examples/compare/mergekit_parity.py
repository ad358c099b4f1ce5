"""Compare cl-merge with mergekit on whole models: both read the same YAML, outputs are compared in steps of bf16.

    python mergekit_parity.py BASE MODEL MODEL MODEL --cl-merge PATH [--mergekit PATH] [--work DIR]

Needs torch, safetensors and mergekit 0.1.5. Differences are taken in float32 by both (`dtype: float32`), outputs are bfloat16.

Where a method cuts a list of magnitudes, mergekit keeps an arbitrary choice of the entries exactly at the cut and cl-merge those
with the lowest index. Entries at which any model is exactly at such a cut are left out of the comparison and counted.
"""

import argparse
import os
import shutil
import subprocess
import sys

import torch
from safetensors.torch import load_file

CASES = {
    "linear": ("linear", False, {"weight": [0.2, 0.5, 1.1]}, {}),
    "task_arithmetic": ("task_arithmetic", True, {"weight": [0.4, 0.3, 0.2]}, {"lambda": 0.7}),
    "ties": ("ties", True, {"weight": [1.0, 1.0, 1.0], "density": [0.2] * 3}, {}),
    "ties, weighted": ("ties", True, {"weight": [0.2, 0.9, 0.5], "density": [0.2, 0.5, 0.8]}, {}),
    "della, density 1": ("della", True, {"weight": [0.2, 0.9, 0.5], "density": [1.0] * 3}, {}),
    "breadcrumbs": ("breadcrumbs", True, {"weight": [0.5] * 3, "density": [0.6] * 3, "gamma": [0.05] * 3}, {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", True, {"weight": [0.5] * 3, "density": [0.6] * 3, "gamma": [0.05] * 3}, {}),
    "sce, all": ("sce", True, {}, {"select_topk": 1.0}),
    "sce, a tenth": ("sce", True, {}, {"select_topk": 0.1}),
    "slerp": ("slerp", True, None, {"t": 0.3}),
    "nuslerp": ("nuslerp", True, {"weight": [0.3, 0.7]}, {}),
    "multislerp": ("multislerp", True, {"weight": [0.2, 0.5, 0.3]}, {}),
    "karcher": ("karcher", False, {}, {}),
    "model_stock": ("model_stock", True, {}, {}),
    "nearswap": ("nearswap", True, None, {"t": 0.001}),
}


def yaml(method, base, models, per_model, shared):
    lines = [f"merge_method: {method}"]
    if base:
        lines.append(f"base_model: {base}")
    if shared:
        lines.append("parameters: {" + ", ".join(f"{k}: {v}" for k, v in shared.items()) + "}")
    lines.append("models:")
    for i, model in enumerate(models):
        lines.append(f"  - model: {model}")
        own = {k: v[i] for k, v in (per_model or {}).items()}
        if own:
            lines.append("    parameters: {" + ", ".join(f"{k}: {v}" for k, v in own.items()) + "}")
    return "\n".join(lines + ["dtype: float32", "out_dtype: bfloat16", ""])


def tied(method, per_model, shared, base, models, name):
    """Entries at which a model is exactly at a cut of its list."""
    deltas = [m[name].float() - base[name].float() for m in models]
    mask = torch.zeros_like(deltas[0], dtype=torch.bool)

    def cut(values, k):
        nonlocal mask
        if 0 < k < values.numel():
            mask |= values == torch.topk(values.flatten(), k).values[-1]

    n = mask.numel()
    if method == "ties":
        for delta, density in zip(deltas, per_model["density"]):
            cut(delta.abs(), max(1, int(density * n)))
    elif method.startswith("breadcrumbs"):
        for delta, density, gamma in zip(deltas, per_model["density"], per_model["gamma"]):
            keep, top = int(density * n), int(gamma * n)
            top = min(top, n - keep)
            cut(delta.abs(), top)
            cut(delta.abs(), top + keep)
    elif method == "sce" and shared["select_topk"] < 1:
        variance = torch.stack(deltas).var(dim=0, unbiased=False)
        threshold = torch.topk(variance.flatten(), int(int((variance > 0).sum()) * shared["select_topk"])).values[-1]
        # Variances are sums that the two tools round differently.
        mask |= (variance - threshold).abs() <= threshold * 1e-5
    return mask


def steps(a, b):
    """How many values of bf16 lie between two, sign included."""
    def order(x):
        bits = x.view(torch.int16).to(torch.int32) & 0xFFFF
        return torch.where(bits >= 0x8000, 0x8000 - bits, bits)
    return (order(a) - order(b)).abs()


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("base")
    parser.add_argument("models", nargs=3)
    parser.add_argument("--cl-merge", default="cl-merge")
    parser.add_argument("--mergekit", default=os.path.join(os.path.dirname(sys.executable), "mergekit-yaml"))
    parser.add_argument("--work", default="mergekit-parity")
    args = parser.parse_args()
    load = lambda d: load_file(os.path.join(d, "model.safetensors"))
    base, models = load(args.base), [load(m) for m in args.models]
    os.makedirs(args.work, exist_ok=True)
    print("| method | entries compared | at a cut, left out | equal | one step of bf16 | more | of the scale of weights |")
    print("| --- | --- | --- | --- | --- | --- | --- |")
    for title, (method, with_base, per_model, shared) in CASES.items():
        chosen = args.models[:1] if per_model is None else args.models[:2] if method == "nuslerp" else args.models
        text = yaml(method, args.base if with_base else None, chosen, per_model, shared)
        if per_model is None:
            text = text.replace("models:\n", f"models:\n  - model: {args.base}\n", 1)
        path = os.path.join(args.work, "merge.yaml")
        open(path, "w").write(text)
        outs = []
        for tool in ("theirs", "ours"):
            out = os.path.join(args.work, tool)
            shutil.rmtree(out, ignore_errors=True)
            command = [args.mergekit, path, out, "--allow-crimes"] if tool == "theirs" else [args.cl_merge, "run", path, "--out", out]
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
            outs.append(load(out))
        left_out = compared = equal = one = more = 0
        worst = 0.0
        for name, theirs in outs[0].items():
            ours = outs[1][name]
            free = ~tied(method, per_model, shared, base, models, name)
            apart = steps(ours, theirs)[free]
            left_out += int((~free).sum())
            compared += apart.numel()
            equal += int((apart == 0).sum())
            one += int((apart == 1).sum())
            more += int((apart > 1).sum())
            beyond = (ours.float() - theirs.float()).abs()[free][apart > 1]
            if beyond.numel():
                scale = float(base[name].float().abs().mean())
                worst = max(worst, float(beyond.max()) / scale)
        note = f"at most {worst:.1e}" if more else ""
        print(f"| {title} | {compared:,} | {left_out:,} | {equal:,} | {one:,} | {more:,} | {note} |", flush=True)


if __name__ == "__main__":
    main()
