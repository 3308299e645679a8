"""Ekiden's training step beside nanoGPT's model, Hugging Face's Trainer, and the least that any program has to compute.

    git clone https://github.com/karpathy/nanoGPT
    pip install accelerate==1.15.0   # for transformers' Trainer
    python benchmarks/step.py --model gpt2-10m --precision fp32 --nanogpt nanoGPT

Each does the same kind of step (forward, backward, clipping to a norm of 1, fused AdamW in fp32) on the same shapes, each
in a process of its own with its own allocator settings. They take turns: in each round everyone does one step while
the others wait, and the fastest of all rounds counts, so that a busy machine is busy for all. Process CPU seconds are
given beside it: they depend less on who else is there.

* ekiden: `training.step`, the decoder compiled, prepared as `training.start` does, with its determinism. ekiden_eager:
  without torch.compile.
* nanogpt: `model.py` from --nanogpt, compiled, its loss, the same fused AdamW (its own choice on a CPU is slower).
* hf: `transformers.Trainer` with TrainingArguments' defaults, sdpa; its own `train()`, from one step's end to the next
  one's, data loader included. hf_compiled: the same with `torch_compile`. hf_loop: the model and its loss without Trainer.
* floor: the matrix products of every linear layer and of the head (1,024 rows at a time), forward and twice backward, into
  memory that is there already, and the attention forward and backward, on the same shapes, and nothing else: no
  optimizer, no norms. PyTorch's attention: layers with a window shorter than a sample in chunks, all others causally.
  floor_own: the same with Ekiden's own attention kernel (on a CPU with AVX-512).
  In half precision on a CPU each is done in the faster of two ways, tried at the start: natively, or in fp32 with inputs
  taken up from the type and results rounded to it (not the logits, which nobody has to keep); it prints which.
  floor_fp32: everything in fp32, no rounding at all.

The last line printed is one JSON object; `tokens_per_s` is tokens / fastest wall seconds. `peak_rss_bytes` is the most memory
that the contender's process has had (Linux), libraries and compiler included. Long samples, of as many tokens a step:

    python benchmarks/step.py --model gemma3-10m --batch-size 1 --set max_length=4096 --only ekiden,ekiden_eager,hf,hf_compiled
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
import json
import math
import os
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from ekiden.config import TrainConfig, build_config
from ekiden.modeling import kernels
from ekiden.modeling.attention import OWN, attend_in_chunks, run_kernel
from ekiden.modeling.attention_choice import CANDIDATES, choose_attention
from ekiden.modeling.build import build_model, parameter_counts
from ekiden.modeling.device import (
    HALVES,
    Precision,
    configure_determinism,
    named_precision,
    peak_flops,
    select_device,
    select_precision,
)
from ekiden.modeling.flops import flops_per_token
from ekiden.modeling.host_memory import keep_freed_memory
from ekiden.modeling.prepare import prepare_model
from ekiden.modeling.vector_math import settle_vector_math
from ekiden.training.facts import cpu_name
from ekiden.training.optimizer import build_optimizer
from ekiden.training.step import accumulate_gradients, apply_update

Step = Callable[[], float]
Turn = Callable[[], None]
"""Waits until it is this contender's turn; called before each step, it also ends the measurement of the one before."""
GEMMA = {"hidden_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1, "head_dim": 64}
SHAPES: dict[str, tuple[str, dict[str, int], int, int]] = {
    # name: preset, its changes, vocabulary, microbatch
    "gpt2-10m": ("gpt2-10m", {"max_length": 512}, 16384, 8),
    "gemma3-10m": ("gemma3-tiny", {**GEMMA, "intermediate_size": 1024, "max_length": 512}, 16384, 8),
    "gpt2-124m": (
        "gpt2-10m",
        {
            "hidden_size": 768,
            "num_hidden_layers": 12,
            "num_attention_heads": 12,
            "num_key_value_heads": 12,
            "intermediate_size": 3072,
            "max_length": 1024,
        },
        50304,
        16,
    ),
    "gemma3-1b": ("gemma3-1b", {"max_length": 2048}, 64000, 4),
}


class Setting:
    """What every contender is given: settings, tokens, arithmetic."""

    def __init__(self, options: argparse.Namespace) -> None:
        preset, changes, self.vocab, microbatch = SHAPES[options.model]
        microbatch = options.batch_size or microbatch
        more = dict(pair.split("=", 1) for pair in options.set)
        self.config: TrainConfig = build_config(
            preset, batch_size=microbatch, **{"optimizer": "adamw", **changes, **more}
        )
        self.device = select_device("auto")
        self.precision: Precision = select_precision(self.device, options.precision)
        ids = np.random.default_rng(0).integers(4, self.vocab, (microbatch, self.config.max_length + 1))
        self.inputs, self.targets = np.ascontiguousarray(ids[:, :-1]), np.ascontiguousarray(ids[:, 1:])
        self.tokens = self.inputs.size
        self.nanogpt: str | None = options.nanogpt

    def autocast(self) -> Any:
        """Return the context of the products' arithmetic."""
        enabled = self.precision.dtype != torch.float32
        return torch.autocast(self.device.type, self.precision.dtype, enabled=enabled)

    def model(self) -> Any:
        """Return the model as Ekiden builds it."""
        return build_model(self.config, self.vocab, 0, 2, 1, seed=0).to(self.device)  # type: ignore[arg-type]

    def scaler(self) -> torch.amp.GradScaler | None:
        """Return a loss scaler where the arithmetic needs one."""
        return torch.amp.GradScaler(self.device.type) if self.precision.use_scaler else None

    def tensors(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Return inputs and targets on the device."""
        return torch.from_numpy(self.inputs).to(self.device), torch.from_numpy(self.targets).to(self.device)


def ekiden_step(setting: Setting, compiled: bool) -> Step:
    """Return Ekiden's own step."""
    configure_determinism(torch.get_num_threads())
    if setting.device.type == "cpu":
        keep_freed_memory()
        settle_vector_math()
    model, config, scaler = setting.model(), setting.config, setting.scaler()
    config.compile = "on" if compiled else "off"
    if prepare_model(model, config, setting.device, setting.precision) != compiled:
        raise SystemExit("the decoder cannot be compiled here; give --no-compile")
    optimizer = build_optimizer(model, config)

    def step() -> float:
        batch = [(setting.inputs, setting.targets)]
        loss = accumulate_gradients(
            model, batch, setting.tokens, setting.precision, scaler, config.loss_chunk_size
        )
        return float(apply_update(optimizer, loss, 1e-4, 1.0, scaler).loss)

    return step


def usual_step(setting: Setting, model: Any, loss_of: Callable[[], torch.Tensor]) -> Step:
    """Return the step that most training loops have."""
    scaler = setting.scaler() or torch.amp.GradScaler(setting.device.type, enabled=False)
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=1e-4, betas=(0.9, 0.95), fused=True)

    def step() -> float:
        with setting.autocast():
            loss = loss_of()
        scaler.scale(loss).backward()
        scaler.unscale_(optimizer)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad(set_to_none=True)
        return float(loss.detach())

    return step


def huggingface_loop(setting: Setting) -> Step:
    """Return transformers' model and its loss without Trainer: the logits whole, in fp32."""
    model = setting.model()
    model.set_attn_implementation("sdpa")
    inputs, targets = setting.tensors()
    # transformers shifts labels itself; shift_labels are taken as they are.
    return usual_step(
        setting,
        model,
        lambda: model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss,
    )


def run_trainer(setting: Setting, compiled: bool, turn: Turn) -> None:
    """Run `transformers.Trainer.train()`, every step a turn. Does not return."""
    model = setting.model()
    model.set_attn_implementation("sdpa")
    rows = [{"input_ids": row, "labels": row} for row in setting.inputs.tolist()] * 1000
    arguments = transformers.TrainingArguments(
        tempfile.mkdtemp(),
        per_device_train_batch_size=setting.config.batch_size,
        bf16=setting.precision.name == "bf16",
        fp16=setting.precision.name == "fp16",
        use_cpu=setting.device.type == "cpu",
        torch_compile=compiled,
        max_steps=1000,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class Turns(transformers.TrainerCallback):
        def on_train_begin(self, *_: Any, **__: Any) -> None:
            turn()

        def on_step_end(self, *_: Any, **__: Any) -> None:
            turn()

    transformers.Trainer(model, arguments, train_dataset=rows, callbacks=[Turns()]).train()


def nanogpt_step(setting: Setting) -> Step:
    """Return nanoGPT's model, compiled, from its own file."""
    path = Path(str(setting.nanogpt))
    path = path / "model.py" if path.is_dir() else path
    spec = importlib.util.spec_from_file_location("nanogpt_model", path)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = setting.config
    shape = module.GPTConfig(
        block_size=config.max_length,
        vocab_size=setting.vocab,
        n_layer=config.num_hidden_layers,
        n_head=config.num_attention_heads,
        n_embd=config.hidden_size,
        dropout=0.0,
        bias=True,
    )
    model = module.GPT(shape).to(setting.device)
    compiled = torch.compile(model)
    inputs, targets = setting.tensors()
    return usual_step(setting, model, lambda: compiled(inputs, targets)[1])


class Products:
    """A layer's product [n, i] x [i, o], forward and twice backward, in memory that is there already.

    Args:
        times: that it is done. rounded: in half precision the result is kept, so that it has to be rounded.
    """

    def __init__(self, x: torch.Tensor, w: torch.Tensor, y: torch.Tensor, times: int, rounded: bool) -> None:
        self.native = x, w, y, torch.empty_like(x), torch.empty_like(w)
        self.single = [tensor.float() for tensor in self.native]
        self.times, self.rounded = times, rounded
        self.way: Callable[[], None] = self.multiply
        if x.device.type == "cpu" and x.dtype in HALVES:
            self.way = faster(self.multiply, self.in_fp32, lambda way: way())
        self.natively = self.way == self.multiply
        if self.natively:
            self.single = []

    def run(self) -> None:
        """Do the products."""
        for _ in range(self.times):
            self.way()

    def multiply(self) -> None:
        x, w, y, x_gradient, w_gradient = self.native
        torch.mm(x, w, out=y)
        torch.mm(y, w.T, out=x_gradient)
        torch.mm(x.T, y, out=w_gradient)

    def in_fp32(self) -> None:
        x, w, y, x_gradient, w_gradient = self.single

        def take(*places: int) -> None:
            for place in places:
                self.single[place].copy_(self.native[place])

        def keep(place: int) -> None:
            self.native[place].copy_(self.single[place])

        take(0, 1)
        torch.mm(x, w, out=y)
        if self.rounded:
            keep(2)
            take(0, 1, 2)  # in the backward pass, with the gradient of y in the place of y
        torch.mm(y, w.T, out=x_gradient)
        keep(3)
        torch.mm(x.T, y, out=w_gradient)
        keep(4)


def faster(one: Any, other: Any, call: Callable[[Any], object]) -> Any:
    """Return which of two ways `call` is done with in less processor time, the better of three each after one that warms up."""
    taken: dict[Any, list[float]] = {one: [], other: []}
    for way in (one, other) * 4:
        began = time.process_time()
        call(way)
        taken[way].append(time.process_time() - began)
    return min(taken, key=lambda way: min(taken[way][1:]))


def floor_step(setting: Setting, own: bool, single: bool = False) -> Step:
    """Return the products and the attention alone, with the same memory settings as Ekiden's.

    Args:
        own: attend with Ekiden's kernel, not PyTorch's. single: in fp32 whatever the precision.
    """
    if single:
        setting.precision = named_precision("fp32")
    if setting.device.type == "cpu":
        keep_freed_memory()
    config, dtype, device = setting.config, setting.precision.dtype, setting.device
    gpt2 = config.model_type == "gpt2"
    heads, head_dim = config.num_attention_heads, config.head_dim
    width, inner = config.hidden_size, config.intermediate_size
    if gpt2:
        head_dim = width // heads
        block = [(width, 3 * width), (width, width), (width, inner), (inner, width)]
    else:
        kv = config.num_key_value_heads * head_dim
        block = [(width, heads * head_dim), (width, kv), (width, kv), (heads * head_dim, width)]
        block += [(width, inner), (width, inner), (inner, width)]
    rows = setting.tokens
    layers = [(rows, i, o, config.num_hidden_layers) for i, o in block]
    layers.append((min(1024, rows), width, setting.vocab, -(-rows // 1024)))
    random = functools.partial(torch.randn, device=device, dtype=dtype)
    products = [
        Products(random(n, i), random(i, o), random(n, o), times, rounded=o != setting.vocab)
        for n, i, o, times in layers
    ]
    query = (config.batch_size, heads, config.max_length, head_dim)
    groups = heads if gpt2 else config.num_key_value_heads
    key = (config.batch_size, groups, config.max_length, head_dim)
    q, k, v = (random(shape, requires_grad=True) for shape in (query, key, key))
    upstream = random(query)
    attention = choose_attention(config, device, setting.precision)
    if own != (attention.causal == OWN):
        if own:
            raise SystemExit("there is no attention kernel of Ekiden's own here; leave floor_own out")
        attention = dataclasses.replace(attention, causal=CANDIDATES[0])
    rest = attention.masks(setting.tensors()[0], dtype)["rest"]

    def native() -> torch.Tensor:
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=groups != heads)

    whole = native
    if device.type == "cpu" and dtype in HALVES:
        run = functools.partial(run_kernel, CANDIDATES[0], q, k, v, None)
        whole = faster(native, run, lambda way: torch.autograd.grad(way(), (q, k, v), upstream))
        raised = [not product.natively for product in products] + [whole != native]
        print(f"floor: {sum(raised)} of {len(raised)} kinds of products and attention in fp32", flush=True)

    def step() -> float:
        for product in products:
            product.run()
        for layer in range(config.num_hidden_layers):
            if own:
                window = config.sliding_window if not gpt2 and (layer + 1) % 6 else None
                made = kernels.attention(q, k, v, window=window)
                torch.autograd.grad(made, (q, k, v), upstream)
                continue
            if rest is not None and (layer + 1) % 6:
                made = attend_in_chunks(attention, q, k, v, config.sliding_window, None, rest, None)
                torch.autograd.grad(made, (q, k, v), upstream.transpose(1, 2))
                continue
            torch.autograd.grad(whole(), (q, k, v), upstream)
        return math.nan

    return step


def names_of(options: argparse.Namespace) -> list[str]:
    """Return who takes part."""
    names = ["floor", "ekiden", "hf", "hf_loop"]
    dtype = named_precision(options.precision).dtype
    cpu = not torch.cuda.is_available()
    if cpu and kernels.attends(torch.device("cpu"), dtype, kernels.LANES):
        names.insert(1, "floor_own")
    if cpu and options.precision != "fp32":
        names.insert(1, "floor_fp32")
    if not options.no_compile:
        names += ["ekiden_eager", "hf_compiled"]
        names += ["nanogpt"] if options.model.startswith("gpt2") and options.nanogpt else []
    return [name for name in names if not options.only or name in options.only.split(",")]


def work(setting: Setting, options: argparse.Namespace) -> None:
    """Be one contender: do a step for every line read, and answer with its figures."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # whatever libraries print
    cuda = setting.device.type == "cuda"
    began: list[float] = []

    def turn() -> None:
        if cuda:
            torch.cuda.synchronize(setting.device)
        if began:
            seconds, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
            figures = {"seconds": seconds, "cpu_seconds": cpu, "peak_rss_bytes": peak_rss()}
            print(json.dumps(figures), file=answers, flush=True)
        line = sys.stdin.readline().strip()
        if line == "figures":
            rate = setting.tokens / float(sys.stdin.readline())
            print(json.dumps(gpu_figures(setting, step, rate)), file=answers, flush=True)
            line = sys.stdin.readline().strip()
        if line != "step":
            os._exit(0)
        began[:] = [time.perf_counter(), time.process_time()]

    if options.worker in ("hf", "hf_compiled"):
        run_trainer(setting, options.worker == "hf_compiled", turn)
    makers: dict[str, Callable[[], Step]] = {
        "floor": lambda: floor_step(setting, own=False),
        "floor_own": lambda: floor_step(setting, own=True),
        "floor_fp32": lambda: floor_step(setting, own=False, single=True),
        "ekiden": lambda: ekiden_step(setting, compiled=not options.no_compile),
        "ekiden_eager": lambda: ekiden_step(setting, compiled=False),
        "hf_loop": lambda: huggingface_loop(setting),
        "nanogpt": lambda: nanogpt_step(setting),
    }
    step = makers[options.worker]()
    while True:
        turn()
        loss = step()
        if math.isnan(loss) and not options.worker.startswith("floor"):
            raise SystemExit(f"{options.worker}: the loss is not a number")


def peak_rss() -> int:
    """Return the most bytes this process has had in memory; ru_maxrss is in KiB on Linux."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class Contender:
    """A process that does a step when it is told to."""

    def __init__(self, name: str) -> None:
        command = [sys.executable, *sys.argv, "--worker", name]
        self.name = name
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def ask(self, *lines: str) -> dict[str, Any]:
        """Send lines and return the answer."""
        assert self.process.stdin and self.process.stdout
        self.process.stdin.write("".join(f"{line}\n" for line in lines))
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise SystemExit(f"{self.name} failed; its words stand above")
        return json.loads(answer)

    def end(self) -> None:
        """Let the process go."""
        self.process.terminate()
        self.process.wait()


def measure(contenders: list[Contender], rounds: int) -> dict[str, dict[str, float]]:
    """Return each one's fastest and median wall seconds, least CPU seconds and most memory; who begins turns with the rounds."""
    taken: dict[str, list[dict[str, float]]] = {contender.name: [] for contender in contenders}
    for index in range(rounds):
        first = index % len(contenders)
        for contender in contenders[first:] + contenders[:first]:
            taken[contender.name].append(contender.ask("step"))
    return {
        name: {
            "seconds": min(step["seconds"] for step in steps),
            "median_seconds": statistics.median(step["seconds"] for step in steps),
            "cpu_seconds": min(step["cpu_seconds"] for step in steps),
            "peak_rss_bytes": steps[-1]["peak_rss_bytes"],
        }
        for name, steps in taken.items()
    }


def gpu_figures(setting: Setting, step: Step, rate: float) -> dict[str, float | None]:
    """Return MFU, the peak memory of Ekiden's step and the plan's prediction of it, on a GPU."""
    from ekiden.planning.trace import traced_peak

    torch.cuda.reset_peak_memory_stats(setting.device)
    others = torch.cuda.memory_allocated(setting.device)
    step()
    peak = peak_flops(torch.cuda.get_device_name(setting.device), setting.precision)
    parameters = sum(parameter_counts(setting.model()))
    planned = traced_peak(setting.config, setting.vocab, setting.precision, setting.config.batch_size)
    return {
        "mfu": rate * flops_per_token(setting.config, parameters) / peak if peak else None,
        "activation_peak_bytes": torch.cuda.max_memory_allocated(setting.device) - others,
        "planned_peak_bytes": planned.total,
    }


def main() -> None:
    """Measure, print a table, and one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(SHAPES), default="gpt2-10m")
    parser.add_argument("--precision", choices=["fp32", "bf16", "fp16"], default="fp32")
    parser.add_argument(
        "--nanogpt", help="folder or model.py of karpathy/nanoGPT; without it that column is empty"
    )
    parser.add_argument("--num-threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--batch-size", type=int, help="samples; default: 8 for the 10M shapes")
    parser.add_argument("--no-compile", action="store_true", help="leave out what needs a C++ compiler")
    parser.add_argument(
        "--set", nargs="*", default=[], help="field=value of TrainConfig, for Ekiden and the shapes"
    )
    parser.add_argument("--only", help="names of contenders, with commas; default: all")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    os.environ["OMP_NUM_THREADS"] = str(options.num_threads)
    setting = Setting(options)
    if options.worker:
        work(setting, options)
    contenders: list[Contender] = []
    more: dict[str, Any] = {}
    try:
        for name in names_of(options):
            began = time.perf_counter()
            contenders.append(Contender(name))
            for _ in range(3):  # the first compiles
                contenders[-1].ask("step")
            print(f"{name}: start-up {time.perf_counter() - began:.0f} s", flush=True)
        figures = measure(contenders, options.rounds)
        if setting.device.type == "cuda":
            own = next(contender for contender in contenders if contender.name == "ekiden")
            more = own.ask("figures", str(figures["ekiden"]["seconds"]))
    finally:
        for contender in contenders:
            contender.end()
    show(setting, options, figures, more)


def show(
    setting: Setting, options: argparse.Namespace, figures: dict[str, dict[str, float]], more: dict[str, Any]
) -> None:
    """Print a table, and one JSON object last."""
    for name, figure in figures.items():
        wall, median, cpu = figure["seconds"], figure["median_seconds"], figure["cpu_seconds"]
        memory = figure["peak_rss_bytes"] / 1e6
        print(f"{name:<13} {wall:7.3f} s  {median:7.3f} s median  {cpu:7.3f} CPU s  {memory:6.0f} MB")
    cuda = setting.device.type == "cuda"
    own = figures.get("ekiden", {})
    result: dict[str, Any] = {
        "model": options.model,
        "precision": options.precision,
        "device": torch.cuda.get_device_name(setting.device) if cuda else cpu_name(),
        "threads": options.num_threads,
        "rounds": options.rounds,
        "tokens_per_step": setting.tokens,
    }
    floors = ("floor", "floor_own", "floor_fp32")
    for name in ("ekiden", "ekiden_eager", "nanogpt", "hf", "hf_compiled", "hf_loop", *floors):
        found = figures.get(name)
        result[f"{name}_tokens_per_s"] = round(setting.tokens / found["seconds"]) if found else None
    for key in ("seconds", "median_seconds", "cpu_seconds") if own else ():
        result[f"ekiden_speedup_{key}"] = {n: round(f[key] / own[key], 3) for n, f in figures.items()}
    versions = {
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    print(json.dumps({**result, "figures": figures, **versions, **more}))


if __name__ == "__main__":
    main()
