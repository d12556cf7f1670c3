"""Fine-tune the language model of train_lm.py to four times its context with LongLoRA.

    python examples/long_lora.py            # under 3 minutes on 2 CPU cores
    python examples/long_lora.py --base runs/train_lm_tiny_kernel --context 1024 --base_steps 1000

LongLoRA (arXiv:2309.12307) trains low-rank updates of the attention weights beside embeddings and
norms, and attends within shifted groups while it trains. The model that comes out attends to
everything: it is evaluated with full attention.

Printed: perplexity per byte of held-out documents before and after, and with full attention in
training for comparison. Written to --out: mask.png and summary.json. The base model is kept in
--base and read from there by later runs.
"""

import argparse
import dataclasses
import functools
import itertools
import json
import pathlib
import statistics
import time

import jax
import jax.numpy as jnp
import numpy as np
import optax
import tqdm
from absl import logging
from byte_lm import Config, init_state, loss_and_count, make_config
from matplotlib.figure import Figure
from train_lm import (
    evaluate,
    fit,
    open_checkpoints,
    packed_batches,
    read_corpus,
    restore_checkpoint,
)

from jax_flashattn import shifted_sparse_attention

STRETCH = 4
RANK = 8
ADAPTED = ("attention_in", "attention_out")  # by low-rank updates
TRAINED = ("embed", "norm")  # as they are; the rest is frozen


def base_model(config: Config, documents: list[np.ndarray], directory: pathlib.Path) -> dict:
    """Parameters of the model of train_lm.py, from `directory` or trained and saved there."""
    batches = packed_batches(documents, config)
    with open_checkpoints(directory) as manager:
        if manager.latest_step() is None:
            state, losses = init_state(config), []
        else:
            config, state, losses = restore_checkpoint(manager, config, batches)
        return fit(config, "kernel", state, losses, batches, manager)[0]["params"]


# --- Low-rank updates ---


def _name(path: tuple) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def init_updates(params: dict, key: jax.Array) -> dict:
    """What is trained: {path: {"down", "up"}} of adapted kernels, {path: array} of whole ones."""
    updates = {}
    for n, (path, x) in enumerate(jax.tree.leaves_with_path(params)):
        name = _name(path)
        if any(word in name for word in ADAPTED) and name.endswith("kernel"):
            down = jax.random.normal(jax.random.fold_in(key, n), (x.shape[0], RANK))
            up = jnp.zeros((RANK, x.shape[1]))  # the first step starts from the base model
            updates[name] = {"down": down / x.shape[0] ** 0.5, "up": up}
        elif any(word in name for word in TRAINED):
            updates[name] = x
    return updates


def updated(params: dict, updates: dict) -> dict:
    """The parameters of the model with its updates."""

    def leaf(path, x):
        update = updates.get(_name(path))
        if isinstance(update, dict):
            return x + 2 * update["down"] @ update["up"]
        return x if update is None else update

    return jax.tree.map_with_path(leaf, params)


def fine_tune(
    config: Config, params: dict, documents: list[np.ndarray], implementation: str
) -> tuple[dict, float]:
    """Trains updates for config.steps steps; returns (parameters, median seconds of a step)."""
    warm_up = max(1, config.steps // 10)
    schedule = optax.warmup_constant_schedule(0.0, config.learning_rate, warm_up)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(schedule, b2=0.98))

    def loss(updates, params, batch):
        total, count = loss_and_count(updated(params, updates), batch, config, implementation)
        return total / jnp.maximum(count, 1)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(updates, opt_state, params, batch):
        bits, gradients = jax.value_and_grad(loss)(updates, params, batch)
        changes, opt_state = optimizer.update(gradients, opt_state, updates)
        return optax.apply_updates(updates, changes), opt_state, bits

    updates = jax.tree.map(jnp.copy, init_updates(params, jax.random.key(config.seed)))
    opt_state, seconds = optimizer.init(updates), []
    batches = itertools.islice(packed_batches(documents, config), config.steps)
    for batch in tqdm.tqdm(batches, desc=implementation, total=config.steps, unit="step"):
        start = time.perf_counter()
        updates, opt_state, bits = jax.block_until_ready(step(updates, opt_state, params, batch))
        seconds.append(time.perf_counter() - start)
    if not np.isfinite(bits):
        raise FloatingPointError(f"the loss of the last step is {bits}")
    return updated(params, updates), statistics.median(seconds)


# --- Report ---


def visible(s: int, group: int) -> np.ndarray:
    """bool [2, s, s], what the heads of each half see: read from the function itself."""
    zeros, unit = jnp.zeros((1, s, 2, 16)), jnp.eye(s)[None, :, None]
    out = shifted_sparse_attention(zeros, zeros, jnp.repeat(unit, 2, axis=2), group)
    return np.array(out[0].swapaxes(0, 1) > 0)


def draw_mask(path: pathlib.Path, s: int = 64, group: int = 16) -> None:
    """Draws who sees whom in each half of the heads."""
    figure = Figure(figsize=(9, 4.6), layout="constrained")
    titles = (f"first half of the heads: groups of {group}", "second half: shifted by half a group")
    for axes, matrix, title in zip(figure.subplots(1, 2), visible(s, group), titles):
        axes.imshow(matrix, cmap="Blues", vmin=0, vmax=1.4, extent=(0, s, s, 0))
        axes.set(title=title, xlabel="key", ylabel="query")
        axes.set_xticks(range(0, s + 1, group))
        axes.set_yticks(range(0, s + 1, group))
        axes.grid(color="gray", linewidth=0.5)
    figure.savefig(path, dpi=120)


def run(config: Config, tune_steps: int, base: pathlib.Path, out: pathlib.Path) -> dict:
    """Trains or reads the base model, stretches it, and writes everything to `out`.

    Returns:
        what summary.json holds: `perplexity` by name, `step_seconds`, `contexts`, `seconds`.
    """
    start = time.perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    training, held_out = read_corpus()
    params = base_model(config, training, base)
    changes = {"seq_len": STRETCH * config.seq_len, "learning_rate": config.learning_rate / 4}
    long = dataclasses.replace(config, steps=tune_steps, **changes)

    def perplexity(config, params):
        return 2 ** evaluate(config, params, held_out, "kernel")

    results = {
        f"base model, {config.seq_len} bytes": perplexity(config, params),
        f"base model, {long.seq_len} bytes": perplexity(long, params),
    }
    step_seconds = {}
    for implementation, name in (("shifted", "shifted sparse"), ("kernel", "full")):
        tuned, step_seconds[name] = fine_tune(long, params, training, implementation)
        results[f"fine-tuned with {name} attention, {long.seq_len} bytes"] = perplexity(long, tuned)
    draw_mask(out / "mask.png")
    summary = {
        "perplexity": results,
        "step_seconds": step_seconds,
        "contexts": [config.seq_len, long.seq_len],
        "seconds": time.perf_counter() - start,
    }
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def main() -> None:
    """Runs what the flags say and prints the result."""
    parser = argparse.ArgumentParser(description="LongLoRA on the model of train_lm.py.")
    parser.add_argument("--size", default="tiny", help="preset of train_lm.py")
    parser.add_argument("--context", type=int, default=512, help="bytes of a row of the base model")
    parser.add_argument("--base_steps", type=int, default=600, help="train steps of the base model")
    parser.add_argument("--tune_steps", type=int, default=100, help="train steps at four times it")
    parser.add_argument("--base", default="runs/long_lora/base", help="where its checkpoints are")
    parser.add_argument("--out", default="runs/long_lora", help="where results go")
    flags = parser.parse_args()
    logging.set_verbosity(logging.WARNING)  # orbax tells every move at INFO
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = make_config(flags.size, steps=flags.base_steps, seq_len=flags.context, dtype=dtype)
    summary = run(config, flags.tune_steps, pathlib.Path(flags.base), pathlib.Path(flags.out))
    print("perplexity per byte of held-out documents, evaluated with full attention:")
    for name, value in summary["perplexity"].items():
        print(f"  {value:8.3f}  {name}")
    for name, value in summary["step_seconds"].items():
        print(f"{value * 1e3:.0f} ms per fine-tuning step with {name} attention")
    print(f"{summary['seconds']:.0f} s in all; written to {flags.out}: mask.png, summary.json")


if __name__ == "__main__":
    main()
