"""Where the time of a step goes: Ekiden's compiled step and the floor (`benchmarks/step.py`) by parts, side by side.

    python benchmarks/step_parts.py --model gpt2-10m|gemma3-10m [--rounds 6] [--num-threads 1] [--kernels 20]

Both run in turn in this process under torch.profiler, compiled loops counted one by one, and every operator's least time
of all rounds counts. `outside` is what no operator covers: Python, the compiled wrapper, the allocator. The last line is one
JSON object, in milliseconds a step; --kernels prints the largest single operators before it.
"""

from __future__ import annotations

import argparse
import collections
import json
import time

import step as whole
import torch
import torch._inductor.config

# Part: words in the names of its operators; the first that fits. Products are told apart by their shapes.
PARTS = {
    "attention": ("attention", "scaled_dot_product"),
    "softmax of the loss": ("CrossEntropy", "softmax", "aten::exp_", "aten::gather", "aten::scatter"),
    "GELU": ("gelu", "sigmoid", "tanh"),
    "norms": ("norm_backward", "layer_norm", "rsqrt"),
    "bias gradients": ("column_sums",),
    "embedding": ("embedding", "index"),
    "joining and turning": ("cat", "clone", "transpose"),
    "AdamW": ("adamw", "AdamW"),
    "clipping": ("vector_norm", "foreach", "stack", "aten::mul_"),
    "other compiled loops": ("graph_",),
}


def part_of(name: str, shapes: list[list[int]], vocab: int) -> str:
    """Return the part that an operator belongs to."""
    if name in ("aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm"):
        return (
            "products with the head" if any(vocab in shape for shape in shapes) else "products of the layers"
        )
    return next((part for part, words in PARTS.items() if any(word in name for word in words)), "rest")


def profiled(call: whole.Step, vocab: int) -> tuple[float, dict[tuple[str, str], float]]:
    """Return the wall milliseconds of `call`, and those of its operators by (part, name and shapes)."""
    with torch.profiler.profile(
        activities=[torch.profiler.ProfilerActivity.CPU], record_shapes=True
    ) as profile:
        began = time.perf_counter()
        call()
        wall = 1e3 * (time.perf_counter() - began)
    found: dict[tuple[str, str], float] = collections.Counter()
    for event in profile.events():
        shapes = [shape for shape in event.input_shapes if shape]
        part = part_of(event.name, shapes, vocab)
        name = f"{event.name} {shapes}" if part.startswith("products") else event.name
        found[part, name] += event.self_cpu_time_total / 1e3
    return wall, found


def main() -> None:
    """Measure, print a table, and one JSON object last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(whole.SHAPES), default="gpt2-10m")
    parser.add_argument("--num-threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--kernels", type=int, default=0, help="single operators to print")
    options = parser.parse_args()
    options.precision, options.batch_size, options.set, options.nanogpt = "fp32", None, [], None
    torch.set_num_threads(options.num_threads)
    torch._inductor.config.cpp.enable_kernel_profile = True
    setting = whole.Setting(options)
    steps = {"ekiden": whole.ekiden_step(setting, True), "floor": whole.floor_step(setting, own=False)}
    least: dict[str, dict[tuple[str, str], float]] = {name: {} for name in steps}
    walls = dict.fromkeys(steps, float("inf"))
    for index in range(options.rounds + 2):
        for name, call in steps.items():
            wall, found = profiled(call, setting.vocab)
            if index < 2:  # the first compiles
                continue
            walls[name] = min(walls[name], wall)
            for key, value in found.items():
                least[name][key] = min(least[name].get(key, value), value)
    table: dict[str, dict[str, float]] = {}
    for name, found in least.items():
        sums: dict[str, float] = collections.Counter()
        for (part, _operator), value in found.items():
            sums[part] += value
        table[name] = dict(sums) | {"outside": walls[name] - sum(sums.values()), "step": walls[name]}
    for (part, operator), value in sorted(least["ekiden"].items(), key=lambda item: -item[1])[
        : options.kernels
    ]:
        print(f"{value:8.2f} ms  {part}: {operator[:110]}")
    for part in sorted(table["ekiden"], key=lambda part: -table["ekiden"][part]):
        print(f"{part:<24} {table['ekiden'][part]:9.1f} {table['floor'].get(part, 0):9.1f}")
    rounded = {name: {part: round(value, 1) for part, value in sums.items()} for name, sums in table.items()}
    print(
        json.dumps(
            {"model": options.model, "threads": options.num_threads, "rounds": options.rounds, **rounded}
        )
    )


if __name__ == "__main__":
    main()
