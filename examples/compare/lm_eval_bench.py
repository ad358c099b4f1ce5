"""Times `cl eval` beside lm-eval on the same model, documents and machine, in turn, and prints medians and ratios.

Run:  python lm_eval_bench.py CL LM_EVAL MODEL DATA OUT [RUNS] [choices] [gsm8k_cot] [gsm8k]

CL and LM_EVAL are the programs, DATA a folder as `cl eval --data` takes it (DATA/hellaswag/validation.jsonl …; gsm8k beside it),
OUT a folder for both programs' results, which `lm_eval_parity.py OUT/lm-eval-… OUT/cl-…` then compares. lm-eval runs in f32, at
batch size 1 on log-likelihoods, its default, and with all documents in one batch on generation; its model time is that of its own
progress bar, ours what `cl eval` says. The names of settings select some of the three.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import time

import lm_eval

HARNESS = os.path.join(os.path.dirname(lm_eval.__file__), "tasks")
CHOICES = {
    "hellaswag": ("hellaswag/hellaswag.yaml", "validation"),
    "arc_challenge": ("arc/arc_challenge.yaml", "test"),
    "piqa": ("piqa/piqa.yaml", "validation"),
    "openbookqa": ("openbookqa/openbookqa.yaml", "test"),
    "winogrande": ("winogrande/default.yaml", "validation"),
    "commonsense_qa": ("commonsense_qa/default.yaml", "validation"),
}
WRITTEN = {"gsm8k": "gsm8k/gsm8k.yaml", "gsm8k_cot": "gsm8k/gsm8k-cot.yaml"}


def describe(data, folder):
    """The harness's own tasks over local files."""
    os.makedirs(folder, exist_ok=True)
    for name, (include, split) in CHOICES.items():
        path = os.path.join(data, name, f"{split}.jsonl")
        splits = "".join(f"{s}_split: {split if s == split else 'null'}\n" for s in ("training", "validation", "test"))
        write(folder, name, include, f"    {split}: {path}\n", splits + f"fewshot_split: {split}\n")
    for name, include in WRITTEN.items():
        root = next(d for d in (data, os.path.join(data, "..")) if os.path.isdir(os.path.join(d, "gsm8k")))
        files = "".join(f"    {split}: {os.path.join(root, 'gsm8k', split)}.jsonl\n" for split in ("train", "test"))
        write(folder, name, include, files, "")


def write(folder, name, include, files, more):
    head = f"include: {os.path.join(HARNESS, include)}\ntask: local_{name}\ntag: []\ndataset_path: json\ndataset_name: null\n"
    with open(os.path.join(folder, f"local_{name}.yaml"), "w") as out:
        out.write(f"{head}dataset_kwargs:\n  data_files:\n{files}{more}")


def timed(command, log):
    start = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"})
    wall = time.perf_counter() - start
    with open(log, "w") as out:
        out.write(done.stdout + done.stderr)
    if done.returncode:
        sys.exit(f"{command[0]} failed; see {log}")
    return wall, done.stderr


def theirs(program, model, tasks, limit, batch, folder, out):
    args = [program, "--model", "hf", "--model_args", f"pretrained={model},dtype=float32", "--include_path", folder]
    args += ["--tasks", ",".join(f"local_{t}" for t in tasks), "--device", "cpu", "--limit", str(limit)]
    args += ["--batch_size", str(batch), "--log_samples", "--output_path", out]
    wall, log = timed(args, out + ".log")
    bars = re.findall(r"Running (?:loglikelihood|generate_until) requests: 100%[^\[]*\[([\d:]+)<", log)
    seconds = [sum(60**i * int(part) for i, part in enumerate(reversed(bar.split(":")))) for bar in bars]
    return wall, max(seconds)


def ours(program, model, tasks, limit, precision, data, out):
    shutil.rmtree(out, ignore_errors=True)
    args = [program, "eval", model, "--tasks", ",".join(tasks), "--data", data, "--limit", str(limit), "--out", out]
    wall, log = timed(args + ["--precision", precision, "--no-cache"], out + ".log")
    return wall, float(re.search(r"documents in ([\d.]+) s", log).group(1))


def main():
    cl, harness, model, data, out = sys.argv[1:6]
    runs = int(sys.argv[6]) if len(sys.argv) > 6 else 3
    folder = os.path.join(out, "tasks")
    describe(os.path.abspath(data), folder)
    settings = [("six multiple-choice tasks, 60 documents each", list(CHOICES), 60, 1), ("gsm8k_cot, 10 documents", ["gsm8k_cot"], 10, 10)]
    settings += [("gsm8k, 10 documents", ["gsm8k"], 10, 10)]
    for what, tasks, limit, batch in settings:
        name = tasks[0] if len(tasks) == 1 else "choices"
        if sys.argv[7:] and name not in sys.argv[7:]:
            continue
        times = {"lm-eval f32": [], "cl f32": [], "cl bf16": []}
        for _ in range(runs):
            shutil.rmtree(f"{out}/lm-eval-{name}", ignore_errors=True)
            times["lm-eval f32"].append(theirs(harness, model, tasks, limit, batch, folder, f"{out}/lm-eval-{name}"))
            for precision in ("f32", "bf16"):
                times[f"cl {precision}"].append(ours(cl, model, tasks, limit, precision, data, f"{out}/cl-{name}-{precision}"))
        base = [statistics.median(t[i] for t in times["lm-eval f32"]) for i in (0, 1)]
        print(f"{what}; {runs} runs in turn, medians: seconds of the whole command and of the model")
        for who, pairs in times.items():
            wall, in_model = (statistics.median(p[i] for p in pairs) for i in (0, 1))
            spread = f"{min(p[1] for p in pairs):.1f}–{max(p[1] for p in pairs):.1f}"
            print(f"  {who:12} {wall:6.1f} {in_model:6.1f} ({spread})  {base[0] / wall:.1f}x {base[1] / in_model:.1f}x")


main()
