"""Checks `cl-engine` on a GPU and measures it beside Transformers and PEFT.

usage: python3 gpu_check.py [--device cuda|cpu] [--small] [--model DIR] [--data FILE] [--tasks DIR] [--minutes 8]
                            [--out DIR] [--engine FILE] [--only NAME,NAME]

Needs Linux, PyTorch 2.11.0 and, for the rows beside them, transformers and peft; downloads nothing. Makes random
models, runs the same configurations on a CPU in f32 and on the device, then measures training and generation. Each
check is one or several rows: `ok`, `failed` or `left out`, with the reason. A row is printed and appended to
OUT/results.jsonl as soon as it is known; OUT/table.md has the whole table. A failure never ends the run. The exit
status is 1 if a row failed.

`--device cpu --small` rehearses the whole run on a CPU, with tiny models; its speeds mean nothing. The environment
variable GPU_CHECK_HIDE=transformers,peft rehearses a Python without these packages.
"""

import argparse
import contextlib
import ctypes
import importlib.util
import json
import math
import os
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path

TORCH = "2.11.0"
# Sizes of random models. `135m` has the shape of SmolLM2-135M, `1b` that of Llama-3.2-1B.
SHAPES = {
    "tiny": dict(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=128, vocabulary=512, std=0.1),
    "135m": dict(hidden=576, layers=30, heads=9, kv_heads=3, intermediate=1536, vocabulary=49152, std=0.02),
    "1b": dict(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocabulary=128256, std=0.02),
    "135m-small": dict(hidden=64, layers=2, heads=4, kv_heads=2, intermediate=160, vocabulary=1024, std=0.02),
    "1b-small": dict(hidden=96, layers=3, heads=4, kv_heads=2, intermediate=256, vocabulary=1024, std=0.02),
}
BOS, EOS = 1, 2


class LeftOut(Exception):
    """A check that cannot be made here; the message is the reason."""


class Failed(Exception):
    """A check that failed, in one line."""


# ---------------------------------------------------------------- files


def write_safetensors(path, tensors):
    """Writes `(name, tensor)` pairs. Without the package safetensors, which the device's Python may lack."""
    import torch

    names = {torch.float32: "F32", torch.bfloat16: "BF16"}
    header, offset = {"__metadata__": {"format": "pt"}}, 0
    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        header[name] = dict(dtype=names[tensor.dtype], shape=list(tensor.shape), data_offsets=[offset, offset + size])
        offset += size
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for _, tensor in tensors:
            # Not through NumPy, which may also be missing in this Python.
            tensor = tensor.contiguous()
            size = tensor.numel() * tensor.element_size()
            file.write((ctypes.c_char * size).from_address(tensor.data_ptr()))


def read_safetensors(path):
    """All tensors of a file by name, in f32."""
    import torch

    types = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
    data = bytearray(Path(path).read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    header.pop("__metadata__", None)
    tensors = {}
    for name, info in header.items():
        begin, end = info["data_offsets"]
        dtype = types[info["dtype"]]
        count = (end - begin) // dtype.itemsize
        flat = torch.frombuffer(data, dtype=dtype, count=count, offset=start + begin)
        tensors[name] = flat.reshape(info["shape"]).float()
    return tensors


def read_lines(path):
    """The complete lines of a JSONL file."""
    if not Path(path).exists():
        return []
    return [json.loads(line) for line in Path(path).read_text().split("\n")[:-1] if line.strip()]


def write_model(folder, shape, seed, dtype, device):
    """Writes a random Llama with a tokenizer whose tokens are the words w3, w4, ...; returns its parameter count."""
    import torch

    s = SHAPES[shape]
    head_dim = s["hidden"] // s["heads"]
    generator = torch.Generator(device=device).manual_seed(seed)

    def normal(*size):
        return (torch.randn(size, generator=generator, device=device) * s["std"]).to(dtype).cpu()

    tensors = [("model.embed_tokens.weight", normal(s["vocabulary"], s["hidden"]))]
    for i in range(s["layers"]):
        layer = f"model.layers.{i}."
        for name, rows, columns in [
            ("self_attn.q_proj", s["heads"] * head_dim, s["hidden"]),
            ("self_attn.k_proj", s["kv_heads"] * head_dim, s["hidden"]),
            ("self_attn.v_proj", s["kv_heads"] * head_dim, s["hidden"]),
            ("self_attn.o_proj", s["hidden"], s["heads"] * head_dim),
            ("mlp.gate_proj", s["intermediate"], s["hidden"]),
            ("mlp.up_proj", s["intermediate"], s["hidden"]),
            ("mlp.down_proj", s["hidden"], s["intermediate"]),
        ]:
            tensors.append((f"{layer}{name}.weight", normal(rows, columns)))
        for name in ["input_layernorm", "post_attention_layernorm"]:
            tensors.append((f"{layer}{name}.weight", torch.ones(s["hidden"], dtype=dtype)))
    tensors.append(("model.norm.weight", torch.ones(s["hidden"], dtype=dtype)))
    folder.mkdir(parents=True)
    write_safetensors(folder / "model.safetensors", tensors)
    config = dict(
        architectures=["LlamaForCausalLM"],
        model_type="llama",
        hidden_size=s["hidden"],
        num_hidden_layers=s["layers"],
        num_attention_heads=s["heads"],
        num_key_value_heads=s["kv_heads"],
        head_dim=head_dim,
        intermediate_size=s["intermediate"],
        vocab_size=s["vocabulary"],
        tie_word_embeddings=True,
        hidden_act="silu",
        max_position_embeddings=2048,
        rms_norm_eps=1e-5,
        rope_theta=10000.0,
        attention_bias=False,
        mlp_bias=False,
        initializer_range=0.02,
        bos_token_id=BOS,
        eos_token_id=EOS,
        torch_dtype="float32" if dtype == torch.float32 else "bfloat16",
    )
    (folder / "config.json").write_text(json.dumps(config, indent=2))
    write_tokenizer(folder, min(s["vocabulary"], 1024))
    return sum(t.numel() for _, t in tensors)


def write_tokenizer(folder, words):
    names = ["<unk>", "<s>", "</s>"] + [f"w{i}" for i in range(3, words)]
    special = [
        dict(id=i, content=names[i], single_word=False, lstrip=False, rstrip=False, normalized=False, special=True)
        for i in range(3)
    ]
    tokenizer = dict(
        version="1.0",
        truncation=None,
        padding=None,
        added_tokens=special,
        normalizer=None,
        pre_tokenizer=dict(type="WhitespaceSplit"),
        post_processor=dict(
            type="TemplateProcessing",
            single=[dict(SpecialToken=dict(id="<s>", type_id=0)), dict(Sequence=dict(id="A", type_id=0))],
            pair=[dict(Sequence=dict(id="A", type_id=0)), dict(Sequence=dict(id="B", type_id=1))],
            special_tokens={"<s>": dict(id="<s>", ids=[BOS], tokens=["<s>"])},
        ),
        decoder=None,
        model=dict(type="WordLevel", vocab={name: i for i, name in enumerate(names)}, unk_token="<unk>"),
    )
    config = dict(
        tokenizer_class="PreTrainedTokenizerFast",
        unk_token="<unk>",
        bos_token="<s>",
        eos_token="</s>",
        model_max_length=2048,
        clean_up_tokenization_spaces=False,
    )
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def words(rng, count, limit=500):
    return " ".join(f"w{rng.randrange(3, limit)}" for _ in range(count))


def make_rows(path, count, longest, seed):
    """Rows of 1/16 of `longest` to `longest` tokens, spread evenly on a log scale: a quarter is the answer."""
    rng = random.Random(seed)
    rows = []
    for _ in range(count):
        length = int(longest * 16 ** -rng.random()) - 2
        answer = max(1, length // 4)
        rows.append(dict(prompt=words(rng, max(1, length - answer)), answer=words(rng, answer)))
    path.write_text(json.dumps(rows))
    return path


# ---------------------------------------------------------------- processes


class MemoryWatch(threading.Thread):
    """Samples the memory in use on the GPU, by all processes, above what was in use before."""

    def __init__(self, device):
        super().__init__(daemon=True)
        self.device, self.peak, self.stopped = device, 0, threading.Event()
        self.before = self.used()

    def used(self):
        import torch

        free, total = torch.cuda.mem_get_info(self.device)
        return total - free

    def run(self):
        while not self.stopped.wait(0.02):
            self.peak = max(self.peak, self.used() - self.before)

    def stop(self):
        self.stopped.set()
        self.join()
        return self.peak


def execute(run, command, budget, until=None):
    """Runs a command: seconds, peak memory in bytes, output. It is ended early, as a success, when `until()` holds."""
    budget = min(budget, run.left())
    if budget < 2:
        raise LeftOut("no time left")
    watch = None
    if run.device == "cuda":
        # The check itself still counts if memory cannot be measured.
        with contextlib.suppress(Exception):
            watch = MemoryWatch(0)
            watch.start()
    started = time.monotonic()
    stdout, stderr = run.out / "stdout.txt", run.out / "stderr.txt"
    with open(stdout, "wb") as out, open(stderr, "wb") as err:
        process = subprocess.Popen(
            [str(c) for c in command],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            env=run.environment,
            start_new_session=True,
        )
    ended = late = False
    try:
        while True:
            pid, status, usage = os.wait4(process.pid, os.WNOHANG)
            if pid:
                break
            late = time.monotonic() - started > budget
            ended = not late and until is not None and until()
            if late or ended:
                os.killpg(process.pid, signal.SIGKILL)
                _, status, usage = os.wait4(process.pid, 0)
                break
            time.sleep(0.02)
        process.returncode = os.waitstatus_to_exitcode(status)
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        peak = watch.stop() if watch else None
    seconds = time.monotonic() - started
    if run.device == "cpu":
        peak = usage.ru_maxrss * 1024
    if late or (not ended and process.returncode != 0):
        kept = run.results / f"failed-{len(list(run.results.glob('failed-*.txt'))) + 1}.txt"
        kept.write_text(" ".join(str(c) for c in command) + "\n" + stderr.read_text(errors="replace"))
    if late:
        raise Failed(f"not done after {budget:.0f} s: {tail(stderr)}")
    if not ended and process.returncode != 0:
        raise Failed(f"exit status {process.returncode}: {tail(stderr)}")
    return dict(seconds=seconds, peak=peak, stdout=stdout.read_text(errors="replace"))


def tail(path):
    lines = [line.strip() for line in path.read_text(errors="replace").splitlines() if line.strip()]
    # An error message of the command itself is more informative than what libtorch prints after it.
    errors = [line for line in lines if line.startswith("error") or "Error:" in line]
    return " / ".join((errors or lines)[-2:])[:400]


def config(**settings):
    """A configuration of `cl train` as TOML; `train__x` is a key of [train], `lora` and `full` are tables."""
    lora, full = settings.pop("lora", None), settings.pop("full", False)
    data = settings.pop("data")
    top = {k: v for k, v in settings.items() if not k.startswith("train__")}
    train = {k.removeprefix("train__"): v for k, v in settings.items() if k.startswith("train__")}
    lines = [f"{k} = {json.dumps(v)}" for k, v in top.items()]
    lines += ["[data]", f"train = {json.dumps(str(data))}", "[train]"]
    lines += [f"{k} = {json.dumps(v)}" for k, v in train.items()]
    if lora:
        lines += ["[train.lora]"] + [f"{k} = {json.dumps(v)}" for k, v in lora.items()]
    if full:
        lines += ["[train.full]"]
    return "\n".join(lines) + "\n"


class Run:
    """Settings of this run, its folder, and its rows."""

    def __init__(self, args):
        self.args, self.device, self.small = args, args.device, args.small
        self.results = Path(args.out).absolute()
        # Models take gigabytes; only the results are kept.
        self.out = Path(tempfile.mkdtemp(prefix="gpu-check-"))
        self.started = time.monotonic()
        self.deadline = self.started + args.minutes * 60
        self.rows, self.models, self.names, self.rates = [], {}, {}, {}
        self.engine = Path(args.engine).absolute()
        self.libraries = torch_libraries()
        self.environment = dict(
            os.environ,
            CL_CACHE=str(self.out / "cache"),
            HF_HUB_OFFLINE="1",
            TOKENIZERS_PARALLELISM="false",
            HF_HUB_DISABLE_PROGRESS_BARS="1",
            PYTHONWARNINGS="ignore",
        )
        self.environment.pop("PYTHONSTARTUP", None)
        if self.libraries:
            old = os.environ.get("LD_LIBRARY_PATH")
            self.environment["LD_LIBRARY_PATH"] = str(self.libraries) + (f":{old}" if old else "")
            # With an explicit directory, a CUDA library that fails to load is an error instead of being ignored.
            if (self.libraries / "libtorch_cuda.so").exists():
                self.environment["CL_LIBTORCH_CUDA"] = str(self.libraries)

    def left(self):
        return self.deadline - time.monotonic()

    def row(self, check, status, detail, goal="", **values):
        row = dict(check=check, status=status, detail=detail, goal=goal, **values)
        self.rows.append(row)
        with open(self.results / "results.jsonl", "a") as file:
            file.write(json.dumps(row) + "\n")
        print(
            f"[{time.monotonic() - self.started:5.0f} s] {status:8} {check}: {detail}{'; ' + goal if goal else ''}",
            flush=True,
        )

    def compare(self, check, difference, tolerance, what, **values):
        good = difference <= tolerance  # false for NaN
        detail = f"{what}: {difference:.1e}, tolerance {tolerance:.0e}"
        self.row(check, "ok" if good else "failed", detail, difference=difference, tolerance=tolerance, **values)

    def cl(self, command, budget=40, until=None):
        return execute(self, [self.engine, *command], budget, until)

    def train(self, name, budget=40, until_steps=None, **settings):
        """Runs `cl train`; returns its folder, its log and what `execute` returns."""
        folder = self.out / "runs" / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.parent.mkdir(parents=True, exist_ok=True)
        file = folder.with_suffix(".toml")
        file.write_text(config(**settings))
        log = folder / "log.jsonl"
        until = None
        if until_steps:
            # The model is not needed, so the command does not have to write it.
            until = lambda: log.exists() and log.read_bytes().count(b"\n") >= until_steps
        done = self.cl(["train", file, "--out", folder], budget, until)
        return folder, read_lines(log), done

    def model(self, shape):
        """The folder and parameter count of a random model, made on first use."""
        import torch

        if shape not in self.models:
            dtype = torch.float32 if shape == "tiny" else torch.bfloat16
            device = self.device if shape in ("135m", "1b") else "cpu"
            folder = self.out / "models" / shape
            shutil.rmtree(folder, ignore_errors=True)
            self.models[shape] = (folder, write_model(folder, shape, 1, dtype, device))
            if device == "cuda":
                torch.cuda.empty_cache()
        return self.models[shape]


def torch_libraries():
    """`torch/lib` of this Python, without importing torch, which may fail."""
    spec = importlib.util.find_spec("torch")
    folder = Path(spec.origin).parent / "lib" if spec and spec.origin else None
    return folder if folder and folder.is_dir() else None


def importable(*names):
    hidden = os.environ.get("GPU_CHECK_HIDE", "").split(",")
    missing = [n for n in names if n in hidden or importlib.util.find_spec(n) is None]
    if missing:
        raise LeftOut(f"no {' and no '.join(missing)} in this Python")


# ---------------------------------------------------------------- checks of results


def check_environment(run):
    import torch

    version = torch.__version__.split("+")[0]
    facts = dict(torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0], cores=os.cpu_count())
    if run.device == "cuda":
        if not torch.cuda.is_available():
            run.row("PyTorch", "failed", f"torch {torch.__version__} sees no GPU", **facts)
            return
        facts["gpu"] = torch.cuda.get_device_name(0)
        facts["memory_gib"] = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1)
    detail = ", ".join(f"{k} {v}" for k, v in facts.items())
    if version != TORCH:
        detail = f"torch {version}, but the engine is made for {TORCH}; " + detail
    run.row("PyTorch", "ok" if version == TORCH else "failed", detail, **facts)


def check_load(run):
    """The engine starts over this Python's libtorch, and finds the device."""
    version = run.cl(["--version"])["stdout"].strip()
    folder, _ = run.model("tiny")
    done = run.cl(["generate", folder, "--prompt", "w5 w6", "--max-new-tokens", "2", "--device", run.device])
    cuda = "libtorch_cuda.so loaded" if "CL_LIBTORCH_CUDA" in run.environment else "no libtorch_cuda.so in this torch"
    if run.device == "cuda" and "CL_LIBTORCH_CUDA" not in run.environment:
        raise Failed(cuda)
    run.row(
        "engine starts",
        "ok",
        f"{version} over {run.libraries}; {cuda}; generates on {run.device} after {done['seconds']:.1f} s",
        seconds=done["seconds"],
    )


def variants(run):
    """Device and precision compared with a CPU in f32. Tolerances are relative or, for log-probabilities, absolute.

    f32: sums in other orders, 24 bits of mantissa. bf16: 8 bits of mantissa, so 0.4 % a value, and several layers."""
    return [("f32", run.device, 1), ("bf16", run.device, 0)]


def evaluate(run, name, task, precision, device):
    folder, _ = run.model("tiny")
    out = run.out / "runs" / name
    shutil.rmtree(out, ignore_errors=True)
    run.cl(["eval", folder, "--tasks", task, "--out", out, "--no-cache", "--precision", precision, "--device", device])
    lines = read_lines(out / f"{task.stem}.jsonl")
    sums = [[float(x) for x in line["response"]["loglikelihoods"]] for line in lines]
    accuracy = json.loads((out / "scores.json").read_text())[0]["metrics"]["acc"]
    return sums, accuracy


def largest_difference(a, b):
    return max(abs(x - y) for left, right in zip(a, b, strict=True) for x, y in zip(left, right, strict=True))


def check_logits(run):
    """Log-probabilities of 64 single tokens after each of 16 prompts: logits up to the constant of a softmax."""
    rng, task = random.Random(3), run.out / "next_token.jsonl"
    choices = [f"w{i}" for i in range(3, 67)]
    rows = [dict(query=words(rng, 3 + 5 * i), choices=choices, gold=0) for i in range(16)]
    task.write_text("".join(json.dumps(r) + "\n" for r in rows))
    reference, _ = evaluate(run, "logits-cpu", task, "f32", "cpu")
    for precision, device, exact in variants(run):
        sums, _ = evaluate(run, f"logits-{precision}", task, precision, device)
        run.compare(
            f"logits, {precision}",
            largest_difference(reference, sums),
            1e-3 if exact else 0.1,
            "largest difference of 16 x 64 log-probabilities from CPU f32",
        )


def check_scoring(run):
    """Log-likelihoods of multiple-choice questions, whose choices share a prefix, and greedy texts."""
    rng, task = random.Random(4), run.out / "questions.jsonl"
    rows = [
        dict(query=words(rng, 10 + 3 * i), choices=[words(rng, 1 + j) for j in range(4)], gold=i % 4) for i in range(16)
    ]
    task.write_text("".join(json.dumps(r) + "\n" for r in rows))
    reference, expected = evaluate(run, "scoring-cpu", task, "f32", "cpu")
    for precision, device, exact in variants(run):
        sums, accuracy = evaluate(run, f"scoring-{precision}", task, precision, device)
        # Each sum is over up to four tokens.
        run.compare(
            f"scoring, {precision}",
            largest_difference(reference, sums),
            4e-3 if exact else 0.4,
            f"accuracy {accuracy:.4f}, on the CPU {expected:.4f}; largest difference of 64 sums from CPU f32",
        )
    folder, _ = run.model("tiny")
    prompts = run.out / "prompts.jsonl"
    prompts.write_text("".join(json.dumps(dict(prompt=words(rng, 4 + i))) + "\n" for i in range(16)))
    texts = [
        run.cl(["generate", folder, "--prompts", prompts, "--max-new-tokens", "16", "--device", d])["stdout"]
        for d in ["cpu", run.device]
    ]
    equal = sum(a == b for a, b in zip(*(t.splitlines() for t in texts), strict=True))
    # Two tokens can be equally likely within f32 rounding, but a difference in more than one of 16 texts is a failure.
    run.row(
        "greedy texts, f32", "ok" if equal >= 15 else "failed", f"{equal} of 16 equal those of the CPU", equal=equal
    )


def tiny_training(run, device, precision, **settings):
    folder, _ = run.model("tiny")
    rows = run.out / "tiny.json"
    if not rows.exists():
        make_rows(rows, 64, 96, 5)
    defaults = dict(
        model=str(folder),
        device=device,
        data=rows,
        train__precision=precision,
        train__max_steps=4,
        train__micro_batch_size=8,
        train__max_length=512,
        train__shuffle=False,
        train__learning_rate=1e-3,
    )
    return defaults | settings


def relative(a, b, base=None):
    """Norm of the difference of two models, over that of the update of the first (from `base`, or from zero)."""
    change = sum(float((a[n] - (base[n] if base else 0)).square().sum()) for n in a)
    difference = sum(float((a[n] - b[n]).square().sum()) for n in a)
    return math.sqrt(difference / change) if change > 0 else math.nan


def check_losses(run):
    """Losses and gradient norms of four steps, LoRA and full."""
    for name, method in [("LoRA", dict(lora=dict(r=4, lora_alpha=8))), ("full", dict(full=True))]:
        _, reference, _ = run.train(f"loss-{name}-cpu", **tiny_training(run, "cpu", "f32", **method))
        for precision, device, exact in variants(run):
            _, log, _ = run.train(f"loss-{name}-{precision}", **tiny_training(run, device, precision, **method))
            for key, loose in [("loss", 5e-3), ("grad_norm", 3e-2)]:
                difference = max(abs(a[key] - b[key]) / abs(a[key]) for a, b in zip(reference, log, strict=True))
                run.compare(
                    f"{key}, {name}, {precision}",
                    difference,
                    1e-3 if exact else loose,
                    "largest relative difference of 4 steps from CPU f32",
                )


def check_gradients(run):
    """Every gradient of one step: with learning rate and epsilon 1, AdamW's first update is g / (|g| + 1)."""
    settings = dict(
        full=True, train__max_steps=1, train__learning_rate=1.0, train__adam_epsilon=1.0, train__max_grad_norm=0
    )
    base = read_safetensors(run.model("tiny")[0] / "model.safetensors")

    def gradients(name, device, precision):
        folder, log, _ = run.train(name, **tiny_training(run, device, precision, **settings))
        model = read_safetensors(folder / "model" / "model.safetensors")
        updates = {n: base[n] - model[n] for n in base}
        found = {n: u / (1 - u.abs()) for n, u in updates.items()}
        norm = math.sqrt(sum(float(g.square().sum()) for g in found.values()))
        if not abs(norm / log[0]["grad_norm"] - 1) < 0.05:
            raise Failed(f"gradients from the update have the norm {norm:.4g}, the log has {log[0]['grad_norm']:.4g}")
        return found

    reference = gradients("gradients-cpu", "cpu", "f32")
    for precision, device, exact in variants(run):
        found = gradients(f"gradients-{precision}", device, precision)
        worst = max(reference, key=lambda n: relative({n: reference[n]}, {n: found[n]}))
        difference = relative({worst: reference[worst]}, {worst: found[worst]})
        run.compare(
            f"gradients, {precision}",
            difference,
            1e-3 if exact else 0.2,
            f"{len(reference)} tensors, relative to each one's norm in CPU f32, the worst ({worst})",
        )


def check_optimizer(run):
    """Weights after eight steps of AdamW with decay, warm-up and clipping."""
    settings = dict(
        full=True, train__max_steps=8, train__weight_decay=0.1, train__warmup_steps=2, train__max_grad_norm=0.5
    )
    base = read_safetensors(run.model("tiny")[0] / "model.safetensors")
    weights = []
    for name, device in [("adamw-cpu", "cpu"), ("adamw-device", run.device)]:
        folder, _, _ = run.train(name, **tiny_training(run, device, "f32", **settings))
        weights.append(read_safetensors(folder / "model" / "model.safetensors"))
    # Where a gradient is nearly zero, AdamW's first step depends only on its sign, which rounding can flip.
    run.compare(
        "fused AdamW, f32",
        relative(*weights, base),
        1e-2,
        "difference of the weights from CPU f32, relative to the update of 8 steps",
    )


def check_packing(run):
    """Rows packed into one variable-length attention, against the same rows one at a time."""
    for precision, tolerance in [("f32", 1e-3), ("bf16", 2e-2)]:
        packed = tiny_training(run, run.device, precision, full=True)
        single = packed | dict(train__micro_batch_size=1, train__gradient_accumulation_steps=8)
        (_, a, _), (_, b, _) = run.train(f"packed-{precision}", **packed), run.train(f"single-{precision}", **single)
        difference = max(
            abs(x[key] - y[key]) / abs(y[key]) for x, y in zip(a, b, strict=True) for key in ["loss", "grad_norm"]
        )
        run.compare(
            f"packed attention, {precision}",
            difference,
            tolerance,
            "losses and gradient norms of 8 packed rows against one at a time, largest relative difference",
        )


# ---------------------------------------------------------------- speed


def peer(run, name, budget, **settings):
    """Runs this file as the other side of a measurement; returns what it measured."""
    spec, result = run.out / f"{name}.spec.json", run.out / f"{name}.result.json"
    result.unlink(missing_ok=True)
    settings = settings | dict(device=run.device, result=str(result))
    spec.write_text(json.dumps(settings, default=str))
    done = execute(run, [sys.executable, Path(__file__).absolute(), "--peer", spec], budget)
    return json.loads(result.read_text()) | dict(peak=done["peak"])


def check_rate(run):
    run.rates["matrix"] = rate = peer(run, "matrix", 60, kind="matrix", size=512 if run.small else 8192)["flops"]
    run.row("matrix rate, bf16", "ok", f"{rate / 1e12:.3g} TFLOP/s, measured by PyTorch", flops=rate)


def speed(steps):
    """Tokens per second: the median of the steps after the first."""
    return statistics.median(s["tokens"] / s["seconds"] for s in steps[1:])


def gib(size):
    return "unknown" if size is None else f"{size / 2**30:.2f} GiB"


def goal(run, text, value, least=None, most=None):
    if run.small or run.device == "cpu":
        return f"goal {text}, not judged in a rehearsal"
    return f"goal {text}: {'reached' if (value >= least if least is not None else value <= most) else 'missed'}"


def side_budget(run):
    """Seconds for one side of a measurement; a CPU may be busy with something else."""
    return 90 if run.device == "cuda" else 240


def label(run, which):
    """Name of a measured model in the table."""
    return Path(run.args.model).name if which == "135m" and run.args.model else sizes(run, which)["shape"]


def sizes(run, which):
    """Shape, rows per step, longest row, steps and turns of a measured model."""
    if run.small:
        return dict(shape=f"{which}-small", batch=4, longest=64, steps=3, turns=1)
    if which == "135m":
        return dict(shape=which, batch=32, longest=1024, steps=12, turns=2)
    return dict(shape=which, batch=16, longest=1024, steps=8, turns=2)


def measured_model(run, which):
    """Folder, parameter count, and whether the tokenizer is the one that this file writes."""
    size = sizes(run, which)
    if which == "135m" and run.args.model:
        folder = Path(run.args.model).absolute()
        count = (folder / "model.safetensors").stat().st_size // 2
        return folder, count, False
    return *run.model(size["shape"]), True


def measured_rows(run, which):
    """File of rows for one of the measured models."""
    size, file = sizes(run, which), run.out / f"{which}.json"
    if file.exists():
        return file
    count = size["batch"] * size["steps"]
    if which == "135m" and run.args.model and run.args.data:
        # No row may be longer than the model's maximum length; a token has about four letters.
        rows = [{k: r[k] for k in ("prompt", "answer")} for r in json.loads(Path(run.args.data).read_text())]
        rows = [r for r in rows if len(r["prompt"]) + len(r["answer"]) <= 3 * size["longest"]][:count]
        file.write_text(json.dumps(rows))
    else:
        # A different tokenizer splits the synthetic words into several tokens.
        foreign = which == "135m" and run.args.model
        make_rows(file, count, size["longest"] // 4 if foreign else size["longest"], 6)
    return file


def check_training(run, which, method):
    """Trains with cl and with Transformers (and PEFT) in turns."""
    size = sizes(run, which)
    folder, count, own = measured_model(run, which)
    rows = measured_rows(run, which)
    settings = dict(
        model=str(folder),
        device=run.device,
        data=rows,
        train__precision="bf16",
        train__max_steps=size["steps"],
        train__micro_batch_size=size["batch"],
        train__max_length=2048,
        train__shuffle=False,
    )
    settings |= (
        dict(lora=dict(r=8, lora_alpha=16), train__learning_rate=2e-4)
        if method == "lora"
        else dict(full=True, train__learning_rate=2e-5)
    )
    spec = dict(kind=method, model=folder, own_tokenizer=own, rows=rows, batch=size["batch"], steps=size["steps"])
    name = f"{label(run, which)} {method}"
    reason = None
    try:
        importable("transformers", *(["peft"] if method == "lora" else []))
    except LeftOut as missing:
        reason = str(missing)
    ours, theirs = [], []
    for turn in range(size["turns"]):
        # A second turn must not use up the time of other rows.
        if turn and run.left() < 0.4 * run.args.minutes * 60:
            break
        try:
            _, log, done = run.train(f"{which}-{method}", side_budget(run), until_steps=size["steps"], **settings)
        except (Failed, LeftOut):
            if not ours:
                raise
            break  # the measurements of the first turn are kept
        ours.append(dict(log=log, peak=done["peak"]))
        if reason is None:
            try:
                theirs.append(peer(run, f"{which}-{method}", side_budget(run), **spec))
            except (Failed, LeftOut) as error:
                reason = str(error)
    speeds = [speed(o["log"]) for o in ours]
    rate, peak = statistics.median(speeds), max((o["peak"] for o in ours if o["peak"] is not None), default=None)
    # Per token and parameter: two operations forward, two for the gradients of activations, two for those of weights.
    flops = (4 if method == "lora" else 6) * count * rate
    share = flops / run.rates["matrix"] if "matrix" in run.rates else None
    text = f"{rate:,.0f} tokens/s ({', '.join(f'{s:,.0f}' for s in speeds)}), {gib(peak)}"
    judged = ""
    if share is not None:
        text += f", {100 * share:.1f} % of the matrix rate"
        if (which, method) == ("1b", "full"):
            judged = goal(run, "45 % of the matrix rate", share, least=0.45)
    run.row(
        f"{name}, cl",
        "ok",
        text,
        judged,
        tokens_per_second=rate,
        all_speeds=speeds,
        peak_bytes=peak,
        matrix_share=share,
        loss=ours[0]["log"][0]["loss"],
    )
    compare_training(run, name, method, spec, ours, theirs, rate, peak, reason)


def compare_training(run, name, method, spec, ours, theirs, rate, peak, reason):
    other = "Transformers + PEFT" if method == "lora" else "Transformers"
    if not theirs:
        status = "left out" if reason.startswith("no ") else "failed"
        run.row(f"{name}, {other} eager", status, reason)
        return
    speeds = [speed(t["steps"]) for t in theirs]
    their_rate, their_peak = statistics.median(speeds), max(
        (t["peak"] for t in theirs if t["peak"] is not None), default=None
    )
    padding = 1 - sum(s["tokens"] for s in theirs[0]["steps"]) / sum(s["computed"] for s in theirs[0]["steps"])
    all_speeds = ", ".join(f"{s:,.0f}" for s in speeds)
    text = f"{their_rate:,.0f} tokens/s ({all_speeds}), {gib(their_peak)}, {100 * padding:.0f} % padding"
    run.row(
        f"{name}, {other} eager",
        "ok",
        text,
        tokens_per_second=their_rate,
        all_speeds=speeds,
        peak_bytes=their_peak,
        allocated_bytes=theirs[0]["allocated"],
        padding=padding,
    )
    ratio = rate / their_rate
    judged = goal(run, "3 x", ratio, least=3) if method == "lora" else ""
    run.row(f"{name}, speed ratio", "ok", f"{ratio:.2f} x", judged, ratio=ratio)
    if peak and their_peak:
        memory = peak / their_peak
        run.row(f"{name}, memory ratio", "ok", f"{memory:.2f} x", goal(run, "0.6 x", memory, most=0.6), ratio=memory)
    # Both must have done the same work: the same tokens, and the same first loss from the same weights.
    a, b = ours[0]["log"], theirs[0]["steps"]
    tokens = [s["tokens"] for s in a][: len(b)] == [s["tokens"] for s in b]
    difference = abs(a[0]["loss"] - b[0]["loss"]) / abs(b[0]["loss"])
    good = tokens and difference <= 2e-2
    run.row(
        f"{name}, same work",
        "ok" if good else "failed",
        f"tokens {'equal' if tokens else 'differ'}; first loss differs by {difference:.1e}, tolerance 2e-02",
        difference=difference,
    )


def check_compiled(run, which):
    """torch.compile on the other side, once, if there is time: compilation takes a minute."""
    importable("transformers", "peft")
    if run.device == "cpu":
        raise LeftOut("torch.compile is only measured on a GPU")
    if run.left() < 100:
        raise LeftOut("no time left")
    size = sizes(run, which)
    folder, _, own = measured_model(run, which)
    rows = measured_rows(run, which)
    found = peer(
        run,
        f"{which}-compiled",
        90,
        kind="lora",
        model=folder,
        own_tokenizer=own,
        rows=rows,
        batch=size["batch"],
        steps=size["steps"],
        compile=True,
    )
    # The first steps include compilation, and every new length causes another one.
    rate = statistics.median(s["tokens"] / s["seconds"] for s in found["steps"][len(found["steps"]) // 2 :])
    run.row(
        f"{label(run, which)} lora, Transformers + PEFT compiled",
        "ok",
        f"{rate:,.0f} tokens/s, {gib(found['peak'])}; second half of the steps",
        tokens_per_second=rate,
        peak_bytes=found["peak"],
    )


def check_generation(run, which):
    """Greedy generation of 32 texts in bf16; the difference between a long and a short run leaves out loading."""
    folder, _, own = measured_model(run, which)
    name = f"{label(run, which)} generation"
    lengths = [8, 40] if run.small else [16, 272]
    rng, prompts = random.Random(7), run.out / "generation.jsonl"
    texts = [words(rng, 16 + 2 * i) for i in range(32)]
    prompts.write_text("".join(json.dumps(dict(prompt=t)) + "\n" for t in texts))
    seconds, counts, peaks = [], [], []
    for length in lengths:
        done = run.cl(
            [
                "generate",
                folder,
                "--prompts",
                prompts,
                "--max-new-tokens",
                length,
                "--precision",
                "bf16",
                "--device",
                run.device,
            ],
            side_budget(run),
        )
        lines = [json.loads(line) for line in done["stdout"].splitlines()]
        seconds.append(done["seconds"])
        peaks.append(done["peak"])
        counts.append(sum(len(line["tokens"]) for line in lines))
    tokens, time_taken = counts[1] - counts[0], seconds[1] - seconds[0]
    rate = tokens / time_taken if time_taken > 0.05 else None
    peak = max((p for p in peaks if p is not None), default=None)
    text = f"{rate:,.0f} tokens/s" if rate else "too short to measure"
    run.row(f"{name}, cl", "ok", f"{text}, {gib(peak)}, {tokens} tokens", tokens_per_second=rate, peak_bytes=peak)
    try:
        importable("transformers")
        found = peer(
            run,
            f"{which}-generate",
            side_budget(run),
            kind="generate",
            model=folder,
            own_tokenizer=own,
            prompts=texts,
            lengths=lengths,
        )
    except LeftOut as reason:
        run.row(f"{name}, Transformers", "left out", str(reason))
        return
    their_rate = found["tokens"] / found["seconds"] if found["seconds"] > 0.05 else None
    judged = f"cl {rate / their_rate:.2f} x" if rate and their_rate else ""
    text = f"{their_rate:,.0f} tokens/s" if their_rate else "too short to measure"
    run.row(
        f"{name}, Transformers",
        "ok",
        f"{text}, {gib(found['peak'])}",
        judged,
        tokens_per_second=their_rate,
        peak_bytes=found["peak"],
    )


def check_study(run):
    """A study with the settings of `smol`, as far as the time allows: on the data of --tasks, or on made-up tasks."""
    folder, _, _ = measured_model(run, "135m")
    # The time is limited, so that the table can be written before the end.
    seconds = min(run.left() - 5, 25 if run.small else 600)
    if seconds < 15:
        raise LeftOut("no time left")
    if run.args.tasks:
        data, names, old = (
            Path(run.args.tasks).absolute(),
            ["C-STANCE", "FOMC", "MeetingBank", "Py150", "ScienceQA", "20Minuten"],
            [],
        )
    else:
        data, names, old = run.out / "tasks", ["first", "second", "third"], []
        for i, name in enumerate(names):
            (data / name).mkdir(parents=True, exist_ok=True)
            for split, count in [("train", 100), ("test", 20)]:
                make_rows(data / name / f"{split}.json", 8 if run.small else count, 64, 10 + i)
    file, out = run.out / "study.toml", run.out / "study"
    shutil.rmtree(out, ignore_errors=True)
    file.write_text(
        f'name = "smol"\nmodel = {json.dumps(str(folder))}\n'
        f"data = {json.dumps(str(data))}\ntasks = {json.dumps(names)}\n"
        f'seeds = [1]\ncompare = ["one_round", "sequence", "merge"]\nmembers = [2]\ndevice = "{run.device}"\n'
        "[limit]\ntrain = 100\ntest = 50\nnew_tokens = 16\n"
        '[train]\nprecision = "bf16"\nmicro_batch_size = 4\nmax_length = 192\n'
        "[lora]\nlearning_rate = 1e-3\nlora = { r = 8, lora_alpha = 16 }\n[full]\nlearning_rate = 1e-4\n"
        f'[eval]\nprecision = "bf16"\nmax_length = 256\nbatch_sequences = 64\nold = {json.dumps(old)}\n'
    )
    plan = run.cl(["study", file, "--out", out, "--dry-run"])["stdout"]
    end = time.monotonic() + seconds
    done = run.cl(["study", file, "--out", out], seconds + 30, until=lambda: time.monotonic() > end)
    stages = sum(1 for _ in out.rglob("scores.json"))
    complete = (out / "report").exists() or (out / "tables.md").exists()
    planned = next((line.strip() for line in plan.splitlines() if "stages" in line), "")
    if not stages:
        raise Failed(f"no stage was scored within {seconds:.0f} s: {tail(run.out / 'stderr.txt')}")
    run.row(
        "smol study",
        "ok",
        f"{'complete' if complete else 'cut off'} after {done['seconds']:.0f} s with {stages} scored models; {planned}",
        scored=stages,
        complete=complete,
    )


# ---------------------------------------------------------------- the other side, in a process of its own


def peer_main(spec_file):
    spec = json.loads(Path(spec_file).read_text())
    import torch

    found = dict(matrix=peer_matrix, lora=peer_train, full=peer_train, generate=peer_generate)[spec["kind"]](
        spec, torch
    )
    Path(spec["result"]).write_text(json.dumps(found))


def wait(spec, torch):
    if spec["device"] == "cuda":
        torch.cuda.synchronize()


def allocated(spec, torch):
    return torch.cuda.max_memory_allocated() if spec["device"] == "cuda" else None


def peer_matrix(spec, torch):
    n, best = spec["size"], 0.0
    a, b = (torch.randn(n, n, device=spec["device"]).to(torch.bfloat16) for _ in range(2))
    for _ in range(5):
        wait(spec, torch)
        started = time.perf_counter()
        for _ in range(10):
            a @ b
        wait(spec, torch)
        best = max(best, 20 * n**3 / (time.perf_counter() - started))
    return dict(flops=best)


def encoder(spec):
    """Functions that tokenize a prompt and a continuation."""
    if spec["own_tokenizer"]:
        ids = lambda text: [int(word[1:]) for word in text.split()]
        return lambda text: [BOS] + ids(text), lambda text: ids(text) + [EOS]
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(spec["model"])
    return (
        lambda text: tokenizer(text)["input_ids"],
        lambda text: tokenizer(text + tokenizer.eos_token, add_special_tokens=False)["input_ids"],
    )


def peer_train(spec, torch):
    """Padded batches, AdamW, clipping. LoRA on bf16 weights, all weights in f32 under autocast to bf16."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    device, lora = spec["device"], spec["kind"] == "lora"
    dtype = torch.bfloat16 if lora else torch.float32
    model = AutoModelForCausalLM.from_pretrained(spec["model"], dtype=dtype, attn_implementation="sdpa").to(device)
    if lora:
        from peft import LoraConfig, get_peft_model

        model = get_peft_model(
            model, LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
        )
    model.train()
    forward = torch.compile(model) if spec.get("compile") else model
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=2e-4 if lora else 2e-5, weight_decay=0.0, fused=device == "cuda")
    prompt, continuation = encoder(spec)
    examples = [(prompt(r["prompt"]), continuation(r["answer"])) for r in json.loads(Path(spec["rows"]).read_text())]
    steps = []
    for step in range(spec["steps"]):
        rows = examples[step * spec["batch"] : (step + 1) * spec["batch"]]
        if not rows:
            break
        wait(spec, torch)
        started = time.perf_counter()
        width = max(len(s) + len(t) for s, t in rows)
        ids = torch.full((len(rows), width), EOS)
        labels, mask = torch.full_like(ids, -100), torch.zeros_like(ids)
        for i, (source, target) in enumerate(rows):
            n = len(source) + len(target)
            ids[i, :n] = torch.tensor(source + target)
            labels[i, len(source) : n] = torch.tensor(target)
            mask[i, :n] = 1
        tokens = int(mask.sum())
        ids, labels, mask = ids.to(device), labels.to(device), mask.to(device)
        with torch.autocast(device, torch.bfloat16, enabled=not lora):
            loss = forward(input_ids=ids, attention_mask=mask, labels=labels, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        value = loss.item()
        wait(spec, torch)
        steps.append(dict(tokens=tokens, computed=ids.numel(), seconds=time.perf_counter() - started, loss=value))
    return dict(steps=steps, allocated=allocated(spec, torch))


def peer_generate(spec, torch):
    from transformers import AutoModelForCausalLM

    device = spec["device"]
    model = (
        AutoModelForCausalLM.from_pretrained(spec["model"], dtype=torch.bfloat16, attn_implementation="sdpa")
        .to(device)
        .eval()
    )
    prompt, _ = encoder(spec)
    rows = [prompt(text) for text in spec["prompts"]]
    width = max(map(len, rows))
    ids = torch.tensor([[EOS] * (width - len(r)) + r for r in rows], device=device)
    mask = torch.tensor([[0] * (width - len(r)) + [1] * len(r) for r in rows], device=device)

    def seconds(length):
        wait(spec, torch)
        started = time.perf_counter()
        model.generate(
            ids, attention_mask=mask, do_sample=False, max_new_tokens=length, min_new_tokens=length, pad_token_id=EOS
        )
        wait(spec, torch)
        return time.perf_counter() - started

    short, long = spec["lengths"]
    with torch.inference_mode():
        seconds(2)
        taken = -seconds(short) + seconds(long)
    return dict(tokens=len(rows) * (long - short), seconds=taken, allocated=allocated(spec, torch))


# ---------------------------------------------------------------- the run

# In order of importance, because time may run out.
CHECKS = [
    ("environment", check_environment),
    ("load", check_load),
    ("logits", check_logits),
    ("losses", check_losses),
    ("gradients", check_gradients),
    ("packing", check_packing),
    ("optimizer", check_optimizer),
    ("scoring", check_scoring),
    ("rate", check_rate),
    ("135m-lora", lambda run: check_training(run, "135m", "lora")),
    ("1b-full", lambda run: check_training(run, "1b", "full")),
    ("1b-lora", lambda run: check_training(run, "1b", "lora")),
    ("135m-full", lambda run: check_training(run, "135m", "full")),
    ("135m-generation", lambda run: check_generation(run, "135m")),
    ("1b-generation", lambda run: check_generation(run, "1b")),
    ("135m-compiled", lambda run: check_compiled(run, "135m")),
    ("study", check_study),
]


def table(run):
    lines = ["| check | result | value | goal |", "| --- | --- | --- | --- |"]
    for row in run.rows:
        cells = [row["check"], row["status"], row["detail"], row["goal"]]
        lines.append("| " + " | ".join(c.replace("|", "/").replace("\n", " ") for c in cells) + " |")
    return "\n".join(lines) + "\n"


def arguments():
    here = Path(__file__).absolute().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda")
    parser.add_argument("--small", action="store_true", help="tiny models: a rehearsal")
    parser.add_argument("--model", help="bf16 model directory of SmolLM2-135M; default: random weights of its shape")
    parser.add_argument("--data", help='rows {"prompt", "answer"} (JSON) for --model; default: random words')
    parser.add_argument("--tasks", help="TRACE's task directories, for the study; default: random words")
    parser.add_argument("--minutes", type=float, default=8)
    parser.add_argument("--out", default="gpu-check")
    parser.add_argument("--engine", default=here / "cl-engine")
    parser.add_argument("--only", help=f"some of the checks: {','.join(name for name, _ in CHECKS)}")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    args = parser.parse_args()
    unknown = set((args.only or "").split(",")) - {""} - {name for name, _ in CHECKS}
    if unknown:
        parser.error(f"--only: no check named {', '.join(sorted(unknown))}")
    return args


def main():
    args = arguments()
    if args.peer:
        peer_main(args.peer)
        return 0
    run = Run(args)
    run.results.mkdir(parents=True, exist_ok=True)
    for old in [run.results / "results.jsonl", run.results / "table.md", *run.results.glob("failed-*.txt")]:
        old.unlink(missing_ok=True)
    # Also write the table if an external time limit stops the run.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        run_checks(run)
    except KeyboardInterrupt:
        run.row("the run", "left out", "interrupted")
    finally:
        shutil.rmtree(run.out, ignore_errors=True)
    text = table(run)
    (run.results / "table.md").write_text(text)
    print("\n" + text)
    counts = {status: sum(r["status"] == status for r in run.rows) for status in ["ok", "failed", "left out"]}
    print(
        ", ".join(f"{n} {status}" for status, n in counts.items())
        + f"; {run.results}/table.md, {run.results}/results.jsonl"
    )
    return 1 if counts["failed"] else 0


def run_checks(run):
    if not run.libraries:
        run.row("PyTorch", "failed", f"{sys.executable} has no torch; it needs {TORCH}")
    elif not run.engine.is_file():
        run.row(
            "engine starts",
            "failed",
            f"{run.engine}: no such file; `cargo xtask dist` makes it, --engine names another",
        )
    else:
        for name, check in CHECKS:
            if run.args.only and name not in run.args.only.split(","):
                continue
            try:
                if run.left() < 5:
                    raise LeftOut("no time left")
                check(run)
            except LeftOut as reason:
                run.row(name, "left out", str(reason))
            except Failed as error:
                run.row(name, "failed", str(error))
            except Exception as error:  # a check that crashes is reported as a row, too
                traceback.print_exc()
                run.row(name, "failed", f"{type(error).__name__}: {error}"[:400])


if __name__ == "__main__":
    sys.exit(main())
