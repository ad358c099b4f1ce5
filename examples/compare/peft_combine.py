"""Compare `cl-merge adapter combine` with PEFT's `add_weighted_adapter`: results, loading, and time, in one run.

    python peft_combine.py BASE ADAPTER ADAPTER ... --cl-merge PATH [--rank 8] [--runs 3] [--work DIR]

BASE is a model directory, ADAPTERs are PEFT adapters for it. Needs torch, transformers and peft 0.19 or newer.

1. `linear`, `ties` and `magnitude_prune` on factors (`--space factors`) are held against PEFT's, module by module; adapters of
   different ranks cannot be combined that way, and the step is left out for them.
2. PEFT loads what `combine` and `extract` write, and computes the update that was to be written.
3. PEFT's `svd` and `combine --method linear --rank` are timed in turns. PEFT's time is that of `add_weighted_adapter` alone, with
   all adapters loaded; ours is that of the whole command, from files to files.
"""

import argparse
import statistics
import subprocess
import tempfile
import time
import warnings
from pathlib import Path

import peft
import torch
import transformers

warnings.filterwarnings("ignore")
transformers.utils.logging.set_verbosity_error()


def layers(model):
    return {name: layer for name, layer in model.base_model.model.named_modules()
            if isinstance(layer, peft.tuners.lora.LoraLayer)}


def updates(model, adapter):
    return {name: layer.get_delta_weight(adapter).detach().double() for name, layer in layers(model).items()
            if adapter in layer.lora_A or adapter in layer.lora_embedding_A}


def distance(ours, theirs):
    assert ours.keys() == theirs.keys(), "other modules"
    return max(((ours[n] - theirs[n]).norm() / theirs[n].norm().clamp_min(1e-30)).item() for n in theirs)


def run(binary, *arguments):
    done = subprocess.run([binary, "adapter", *map(str, arguments)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"cl-merge {' '.join(map(str, arguments))}\n{done.stdout}{done.stderr}")
    return done.stdout.strip().splitlines()[-1]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("adapters", nargs="+")
    parser.add_argument("--cl-merge", required=True)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--work", type=Path)
    args = parser.parse_args()
    work = args.work or Path(tempfile.mkdtemp())
    work.mkdir(parents=True, exist_ok=True)

    base = transformers.AutoModelForCausalLM.from_pretrained(args.base, dtype=torch.float32)
    names = [f"a{i}" for i in range(len(args.adapters))]
    model = peft.PeftModel.from_pretrained(base, args.adapters[0], adapter_name=names[0])
    for path, name in zip(args.adapters[1:], names[1:]):
        model.load_adapter(path, adapter_name=name)
    weights = [round(1 - 0.15 * i, 2) for i in range(len(names))]
    ours_of = ["--weights", ",".join(map(str, weights)), "--overwrite"]

    def load(path, name):
        result = model.load_adapter(path, adapter_name=name)
        assert not result.unexpected_keys, result.unexpected_keys
        found = updates(model, name)
        model.delete_adapter(name)
        return found

    ranks = {(module, layer.r[name]) for name in names for module, layer in layers(model).items() if name in layer.r}
    if len(ranks) == len({module for module, _ in ranks}):
        for method, more in [("linear", {}), ("ties", {"density": 0.2}), ("magnitude_prune", {"density": 0.3})]:
            model.base_model.add_weighted_adapter(names, weights, "theirs", combination_type=method, **more)
            theirs = updates(model, "theirs")
            model.delete_adapter("theirs")
            arguments = [part for key, value in more.items() for part in (f"--{key}", value)]
            run(args.cl_merge, "combine", *args.adapters, *ours_of, "--space", "factors", "--method", method, *arguments,
                "--out", work / method)
            print(f"factors, {method}: {distance(load(work / method, 'ours'), theirs):.1e} at most, relative")
    else:
        print("factors: adapters of different ranks, which PEFT refuses")

    exact = {}
    for name, weight in zip(names, weights):
        for module, update in updates(model, name).items():
            exact[module] = exact.get(module, 0) + weight * update
    print("cl-merge:", run(args.cl_merge, "combine", *args.adapters, *ours_of, "--method", "cat", "--out", work / "cat"))
    print(f"cat, loaded by PEFT: {distance(load(work / 'cat', 'cat'), exact):.1e} from the exact sum")

    print("cl-merge:", run(args.cl_merge, "fold", args.base, args.adapters[0], "--overwrite", "--out", work / "tuned"))
    extract = ["extract", args.base, work / "tuned", "--rank", args.rank, "--overwrite", "--out", work / "back"]
    print("cl-merge:", run(args.cl_merge, *extract))
    back, first = load(work / "back", "back"), updates(model, names[0])
    common = back.keys() & first.keys()
    apart = distance({n: back[n] for n in common}, {n: first[n] for n in common})
    print(f"extract, loaded by PEFT: {apart:.1e} from the adapter that was folded in, after the base's rounding")

    times = {"PEFT svd": [], "cl-merge linear": []}
    cut = ["combine", *args.adapters, *ours_of, "--method", "linear", "--rank", args.rank, "--out", work / "cut"]
    for i in range(args.runs):
        start = time.perf_counter()
        model.base_model.add_weighted_adapter(names, weights, "svd", combination_type="svd", svd_rank=args.rank)
        times["PEFT svd"].append(time.perf_counter() - start)
        theirs = updates(model, "svd")
        model.delete_adapter("svd")
        start = time.perf_counter()
        last = run(args.cl_merge, *cut)
        times["cl-merge linear"].append(time.perf_counter() - start)
        if i == 0:
            print("cl-merge:", last)
            ours = load(work / "cut", "cut")
            errors = [max(((found[n] - exact[n]).norm() / exact[n].norm()).item() for n in exact) for found in (ours, theirs)]
            print(f"rank {args.rank}: error {errors[0]:.6f} of ours, {errors[1]:.6f} of PEFT's, of the worst module")
    medians = {name: statistics.median(values) for name, values in times.items()}
    for name, values in times.items():
        print(f"{name}: {medians[name]:.3f} s, median of {', '.join(f'{v:.3f}' for v in values)}")
    print(f"{medians['PEFT svd'] / medians['cl-merge linear']:.0f} times as fast")


main()
