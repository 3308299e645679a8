"""Ekiden's training step beside nanoGPT's model, Hugging Face's, and the least that any program has to compute.

    git clone https://github.com/karpathy/nanoGPT
    python benchmarks/step.py --model gpt2-10m --precision fp32 --nanogpt nanoGPT

One optimizer step (forward, backward, clipping, fused AdamW) on the same random tokens, fp32 weights, in one process,
taking turns: in each round everyone does one step, and the fastest of all rounds counts, so that a busy machine is
busy for all. Process CPU seconds are given beside it: they depend less on who else is there.

* ekiden: `training.step`, the decoder compiled. ekiden_eager: the same without torch.compile.
* nanogpt: `model.py` from --nanogpt, compiled, its loss, the same fused AdamW (its own choice on a CPU is slower).
* hf: transformers with sdpa and its own loss, what Trainer's default does in a step: autocast, clipping, fused AdamW.
* floor: the matrix products of every linear layer and of the head, forward and twice backward, and
  scaled_dot_product_attention forward and backward, on the same shapes, and nothing else.

The last line printed is one JSON object; `tokens_per_s` is tokens / fastest wall seconds.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
import transformers

from ekiden.config import TrainConfig, build_config
from ekiden.modeling.build import body, build_model, parameter_counts
from ekiden.modeling.device import Precision, peak_flops, select_device, select_precision
from ekiden.modeling.flops import flops_per_token
from ekiden.training.facts import cpu_name
from ekiden.training.optimizer import build_optimizer
from ekiden.training.step import accumulate_gradients, apply_update

Step = Callable[[], float]
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
    model, config, scaler = setting.model(), setting.config, setting.scaler()
    if compiled:
        body(model).compile()
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


def huggingface_step(setting: Setting) -> Step:
    """Return what Trainer does with the same model: the logits whole, in fp32, and their loss."""
    model = setting.model()
    model.set_attn_implementation("sdpa")
    inputs, targets = setting.tensors()
    # transformers shifts labels itself; shift_labels are taken as they are.
    return usual_step(
        setting,
        model,
        lambda: model(input_ids=inputs, labels=targets, shift_labels=targets, use_cache=False).loss,
    )


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


def floor_step(setting: Setting) -> Step:
    """Return the products and the attention alone."""
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
    products = [
        tuple(
            torch.randn(shape, device=device, dtype=dtype)
            for shape in ((setting.tokens, i), (i, o), (setting.tokens, o))
        )
        for i, o in [*block, (width, setting.vocab)]
    ]
    shape = (config.batch_size, heads, config.max_length, head_dim)
    q, k, v = (torch.randn(shape, device=device, dtype=dtype, requires_grad=True) for _ in range(3))
    upstream = torch.randn(shape, device=device, dtype=dtype)

    def step() -> float:
        for index, (x, w, y) in enumerate(products):
            for _ in range(1 if index == len(block) else config.num_hidden_layers):
                x @ w, y @ w.T, x.T @ y
        for _ in range(config.num_hidden_layers):
            F.scaled_dot_product_attention(q, k, v, is_causal=True).backward(upstream)
            q.grad = k.grad = v.grad = None
        return math.nan

    return step


def contenders(setting: Setting, options: argparse.Namespace) -> dict[str, Step]:
    """Return everyone's step by name, each tried once (which compiles)."""
    steps: dict[str, Step] = {
        "floor": floor_step(setting),
        "ekiden": ekiden_step(setting, compiled=not options.no_compile),
        "hf": huggingface_step(setting),
    }
    if not options.no_compile:
        steps["ekiden_eager"] = ekiden_step(setting, compiled=False)
    if setting.config.model_type == "gpt2" and setting.nanogpt:
        steps["nanogpt"] = nanogpt_step(setting)
    for name, step in steps.items():
        began = time.perf_counter()
        loss = [step() for _ in range(2)][0]
        print(f"{name}: first loss {loss:.4f}, start-up {time.perf_counter() - began:.0f} s", flush=True)
    return steps


def measure(steps: dict[str, Step], rounds: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Return each one's fastest wall seconds and least process CPU seconds; the order turns from round to round."""
    wall: dict[str, list[float]] = {name: [] for name in steps}
    cpu: dict[str, list[float]] = {name: [] for name in steps}
    for index in range(rounds):
        names = list(steps)
        for name in names[index % len(names) :] + names[: index % len(names)]:
            began, cpu_began = time.perf_counter(), time.process_time()
            steps[name]()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            wall[name].append(time.perf_counter() - began)
            cpu[name].append(time.process_time() - cpu_began)
    return {name: {"seconds": min(wall[name]), "cpu_seconds": min(cpu[name])} for name in steps}


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
    options = parser.parse_args()
    torch.set_num_threads(options.num_threads)
    setting = Setting(options)
    steps = contenders(setting, options)
    figures = measure(steps, options.rounds, setting.device)
    rates: dict[str, float | None] = {
        f"{name}_tokens_per_s": round(setting.tokens / figures[name]["seconds"]) if name in figures else None
        for name in ("ekiden", "ekiden_eager", "nanogpt", "hf", "floor")
    }
    for name, figure in figures.items():
        print(f"{name:<13} {figure['seconds']:7.3f} s  {figure['cpu_seconds']:7.3f} CPU s")
    cuda = setting.device.type == "cuda"
    own = figures["ekiden"]
    result: dict[str, Any] = {
        "model": options.model,
        "precision": options.precision,
        "device": torch.cuda.get_device_name(setting.device) if cuda else cpu_name(),
        "threads": options.num_threads,
        "rounds": options.rounds,
        "tokens_per_step": setting.tokens,
        **rates,
        "speedup_wall": {n: f["seconds"] / own["seconds"] for n, f in figures.items()},
        "speedup_cpu": {n: f["cpu_seconds"] / own["cpu_seconds"] for n, f in figures.items()},
        "seconds": figures,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
    if cuda:
        result |= gpu_figures(setting, steps["ekiden"], setting.tokens / own["seconds"])
    print(json.dumps(result))


if __name__ == "__main__":
    main()
