"""Train a byte-level language model on the Python standard library, with packed documents.

    python examples/train_lm.py                        # under 3 minutes on 2 CPU cores
    python examples/train_lm.py --implementation xla   # the same model with jax.nn's attention
    python examples/train_lm.py --size base            # for a GPU

The text is on every machine that runs Python: thousands of source files from ten bytes to hundreds
of kilobytes. grain packs them into rows, and `segment_ids` keep the documents of a row apart: no
byte attends to, or is predicted from, another document.

Written to --out: loss_curve.png, summary.json and checkpoints/ (for --resume).
"""

import dataclasses
import functools
import itertools
import json
import math
import pathlib
import statistics
import sysconfig
import time
from collections.abc import Sequence

import grain
import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
import tqdm
from absl import app, flags, logging
from byte_lm import (
    SIZES,
    VOCABULARY,
    Config,
    init_state,
    loss_and_count,
    make_config,
    make_train_step,
    model_graph,
)
from flax import nnx
from grain.experimental import FirstFitPackIterDataset
from matplotlib.figure import Figure

IMPLEMENTATIONS = ("kernel", "xla")
EVAL_BATCHES = 32
CHECKPOINT_EVERY = 100  # steps
PROMPT = b"def "


# --- Text ---


def read_corpus() -> tuple[list[np.ndarray], list[np.ndarray]]:
    """Returns the standard library's files as uint8 [bytes]: (training, held out)."""
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if "site-packages" not in path.parts)
    documents = [np.frombuffer(path.read_bytes(), np.uint8) for path in paths]
    documents = [document for document in documents if document.size]
    if len(documents) < 20:
        raise FileNotFoundError(f"{root} holds {len(documents)} .py files; 20 or more are needed")
    return [doc for n, doc in enumerate(documents) if n % 20], documents[::20]


def entropies(documents: Sequence[np.ndarray]) -> tuple[float, float]:
    """Returns the unigram entropy H(x_t) and the bigram entropy H(x_t | x_{t-1}), in bits per byte.

    They are the losses of the best models that look at no and at one earlier byte, fitted to this
    very text. Pairs are counted within documents.
    """
    pairs = np.zeros(VOCABULARY**2, np.int64)
    for document in documents:
        pair = document[:-1].astype(np.int32) * VOCABULARY + document[1:]
        pairs += np.bincount(pair, minlength=pairs.size)
    joint = pairs.reshape(VOCABULARY, VOCABULARY) / pairs.sum()

    def entropy(p):
        return float(-np.sum(p[p > 0] * np.log2(p[p > 0])))

    return entropy(joint.sum(axis=0)), entropy(joint) - entropy(joint.sum(axis=1))


def packed_batches(documents: Sequence[np.ndarray], config: Config) -> grain.DatasetIterator:
    """Packs documents (uint8 [bytes]) into rows, without end, in an order drawn from the seed.

    A file longer than half a row is cut into consecutive pieces, each a document of its own, so
    that every row holds several documents.

    Returns:
        an iterator, with get_state and set_state, of int32 [batch, seq_len] in a dict: `tokens`,
        `segment_ids` (1, 2, ..., and 0 for padding), `positions` (from 0 in every document).
    """
    size = config.seq_len // 2
    pieces = [doc[start : start + size] for doc in documents for start in range(0, doc.size, size)]
    data = grain.MapDataset.source(pieces).shuffle(seed=config.seed).repeat()
    data = data.map(lambda piece: {"tokens": piece.astype(np.int32)})
    # No reader threads: the text is in memory, and the cores are better spent on the model.
    options = grain.ReadOptions(num_threads=0, prefetch_buffer_size=0)
    rows = FirstFitPackIterDataset(
        data.to_iter_dataset(options),
        length_struct={"tokens": config.seq_len},
        num_packing_bins=64,
        seed=config.seed,
    )
    rows = rows.map(lambda row: {name.removeprefix("tokens_"): row[name] for name in row})
    return iter(rows.batch(config.batch))


# --- Training ---


@functools.cache
def compile_train_step(config: Config, implementation: str) -> jax.stages.Compiled:
    """Compiles the train step, once per process."""
    row = jax.ShapeDtypeStruct((config.batch, config.seq_len), jnp.int32)
    batch = dict.fromkeys(["tokens", "segment_ids", "positions"], row)
    state = jax.eval_shape(lambda: init_state(config))
    return make_train_step(config, implementation).lower(state, batch).compile()


def fit(config, implementation, state, losses, batches, manager) -> tuple[dict, float]:
    """Trains from step `len(losses)` to `config.steps` and saves checkpoints.

    Args:
        state: from `init_state`; donated.
        losses: bits per byte of the steps so far; the new ones are appended.
        batches: from `packed_batches`.
        manager: from `open_checkpoints`.

    Returns:
        (state, tokens per second, with padding and without compilation).
    """
    train_step = compile_train_step(config, implementation)
    first, speed, start = len(losses), 0.0, time.perf_counter()
    with tqdm.tqdm(total=config.steps, initial=first, unit="step") as bar:
        for step in range(first + 1, config.steps + 1):
            state, loss = train_step(state, next(batches))
            losses.append(float(loss))
            if not math.isfinite(losses[-1]):
                raise FloatingPointError(f"the loss of step {step} is {losses[-1]}")
            seconds = time.perf_counter() - start
            speed = (step - first) * config.batch * config.seq_len / seconds
            bar.set_postfix_str(f"{losses[-1]:.3f} bits/byte, {speed:,.0f} tokens/s", refresh=False)
            bar.update()
            if step % CHECKPOINT_EVERY == 0 or step == config.steps:
                save_checkpoint(manager, config, state, losses, batches)
    return state, speed


# --- Checkpoints ---


def open_checkpoints(out: pathlib.Path) -> ocp.CheckpointManager:
    """Opens `out`/checkpoints, where the latest checkpoint is kept."""
    options = ocp.CheckpointManagerOptions(max_to_keep=1)
    return ocp.CheckpointManager((out / "checkpoints").resolve(), options=options)


def save_checkpoint(manager, config, state, losses, batches) -> None:
    """Saves the arrays, and as JSON the config, the losses and the place in the data."""
    settings = dataclasses.asdict(config)
    progress = {"config": settings, "losses": losses, "data": batches.get_state()}
    items = {"state": ocp.args.StandardSave(state), "progress": ocp.args.JsonSave(progress)}
    manager.save(len(losses), args=ocp.args.Composite(**items))


def restore_checkpoint(manager, config, batches) -> tuple[Config, dict, list[float]]:
    """Winds `batches` forward; returns (config with the saved schedule, state, losses)."""
    step = manager.latest_step()
    if step is None:
        raise app.UsageError(f"--resume: {manager.directory} holds no checkpoint")
    items = ocp.args.Composite(progress=ocp.args.JsonRestore())
    progress = manager.restore(step, args=items).progress
    config = dataclasses.replace(config, schedule_steps=progress["config"]["schedule_steps"])
    for name, saved in progress["config"].items():
        if name != "steps" and getattr(config, name) != saved:
            raise app.UsageError(
                f"--resume: {name} is {getattr(config, name)} and was {saved} when the checkpoint "
                f"in {manager.directory} was made; use the same flags or another --out"
            )
    if config.steps < step:
        raise app.UsageError(f"--resume: --steps={config.steps}, but {step} steps are done already")
    abstract = jax.eval_shape(lambda: init_state(config))
    items = ocp.args.Composite(state=ocp.args.StandardRestore(abstract))
    state = manager.restore(step, args=items).state
    batches.set_state(progress["data"])
    return config, state, progress["losses"]


# --- Report ---


def evaluate(config: Config, params, documents: Sequence[np.ndarray], implementation: str) -> float:
    """Returns bits per byte on EVAL_BATCHES batches, the same ones for every seed."""
    loss = jax.jit(functools.partial(loss_and_count, config=config, implementation=implementation))
    batches = packed_batches(documents, dataclasses.replace(config, seed=0))
    sums = [loss(params, batch) for batch in itertools.islice(batches, EVAL_BATCHES)]
    bits, count = np.sum(np.array(sums), axis=0)
    return float(bits / count)


def generate(config: Config, params, implementation: str, length: int = 256) -> str:
    """Continues PROMPT up to `length` bytes, at temperature 0.7.

    Every byte costs a forward pass over all `length` positions; good enough for a short sample.
    """

    @jax.jit
    def continue_prompt(params, tokens, key):
        model = nnx.merge(model_graph(config), params)
        segment_ids, positions = jnp.ones_like(tokens), jnp.arange(length)[None]

        def add_byte(n, tokens):  # the bytes from n on are zeros, which causal attention hides
            logits = model(tokens, segment_ids, positions, implementation=implementation)
            byte = jax.random.categorical(jax.random.fold_in(key, n), logits[0, n - 1] / 0.7)
            return tokens.at[0, n].set(byte)

        return jax.lax.fori_loop(len(PROMPT), length, add_byte, tokens)

    tokens = jnp.zeros((1, length), jnp.int32).at[0, : len(PROMPT)].set(jnp.array(list(PROMPT)))
    tokens = continue_prompt(params, tokens, jax.random.key(config.seed))
    return np.array(tokens[0], np.uint8).tobytes().decode(errors="replace")


def compare_implementations(config: Config, state: dict, batches, steps: int = 6) -> dict:
    """Takes the same train steps from the same state with both implementations, in turn.

    Returns:
        {implementation: {"seconds": median of a step, "temporary_bytes": int, "losses": [steps]}}.
    """
    compiled = {name: compile_train_step(config, name) for name in IMPLEMENTATIONS}
    states = {name: jax.tree.map(jnp.copy, state) for name in IMPLEMENTATIONS}
    seconds, losses = ({name: [] for name in IMPLEMENTATIONS} for _ in range(2))
    for batch in itertools.islice(batches, steps):
        for name in IMPLEMENTATIONS:
            start = time.perf_counter()
            states[name], loss = jax.block_until_ready(compiled[name](states[name], batch))
            seconds[name].append(time.perf_counter() - start)
            losses[name].append(float(loss))
    return {
        name: {
            "seconds": statistics.median(seconds[name][1:]),  # the first one warms up
            "temporary_bytes": compiled[name].memory_analysis().temp_size_in_bytes,
            "losses": losses[name],
        }
        for name in IMPLEMENTATIONS
    }


def plot(summary: dict, path: pathlib.Path) -> None:
    """Draws the loss curve beside the entropies of the text."""
    losses = np.array(summary["losses"])
    tokens = np.arange(1, losses.size + 1) * summary["tokens_per_step"]
    window = max(1, losses.size // 20)
    smooth = np.convolve(losses, np.ones(window) / window, mode="valid")
    figure = Figure(figsize=(8, 5), layout="constrained")
    axes = figure.subplots()
    axes.plot(tokens, losses, "C0", alpha=0.3, label="training, every step")
    axes.plot(tokens[window - 1 :], smooth, "C0", label=f"training, mean of {window} steps")
    axes.plot(tokens[-1], summary["held_out"], "C3o", label="held-out documents")
    axes.axhline(summary["unigram"], color="gray", ls=":", label="unigram entropy of the text")
    axes.axhline(summary["bigram"], color="black", ls="--", label="bigram entropy of the text")
    axes.set(xlabel="bytes trained on", ylabel="bits per byte", title=summary["title"])
    axes.legend()
    figure.savefig(path, dpi=120)


def describe(summary: dict) -> str:
    """Returns what a person wants to know of the summary."""
    kernel, xla = (summary["comparison"][name] for name in IMPLEMENTATIONS)
    seconds = [side["seconds"] for side in (kernel, xla)]
    ratio = seconds[1] / seconds[0]
    gap = np.max(np.abs(np.subtract(kernel["losses"], xla["losses"])))
    megabytes = [side["temporary_bytes"] / 1e6 for side in (kernel, xla)]
    return (
        f"held out: {summary['held_out']:.3f} bits per byte; entropy of the text: unigram "
        f"{summary['unigram']:.3f}, bigram {summary['bigram']:.3f}\n"
        f"attention kernel {ratio:.2f}x {'faster' if ratio > 1 else 'the speed'} per step "
        f"{'than' if ratio > 1 else 'of'} XLA ({seconds[0]:.3f} s vs {seconds[1]:.3f} s, "
        f"temporary memory {megabytes[0]:.0f} MB vs {megabytes[1]:.0f} MB)\n"
        f"losses of {len(xla['losses'])} steps taken with both differ by at most {gap:.1e} bits\n"
        f"{summary['tokens_per_second']:,.0f} tokens/s; {summary['seconds']:.0f} s in all"
    )


# --- The run ---


def run(config: Config, out: pathlib.Path, implementation: str, resume: bool = False) -> dict:
    """Trains, evaluates, compares, and writes everything to `out`.

    Returns:
        what summary.json holds: `losses` and `held_out` (bits per byte, of every step and at the
        end), `unigram`, `bigram`, `comparison`, `sample`, `tokens_per_second`, `seconds`, ...

    Raises:
        app.UsageError: `out` holds a checkpoint that is not resumed, or none that fits.
    """
    start = time.perf_counter()
    training, held_out = read_corpus()
    unigram, bigram = entropies(training + held_out)
    batches = packed_batches(training, config)
    with open_checkpoints(out) as manager:
        if resume:
            config, state, losses = restore_checkpoint(manager, config, batches)
        elif manager.latest_step() is not None:
            raise app.UsageError(f"{out} holds a run: --resume it or choose another --out")
        else:
            state, losses = init_state(config), []
        size = sum(leaf.size for leaf in jax.tree.leaves(state["params"]))
        title = f"{size:,} parameters, {implementation} attention in {config.dtype}"
        print(f"{len(training + held_out):,} documents; {title}, on {jax.devices()[0].device_kind}")
        state, speed = fit(config, implementation, state, losses, batches, manager)
    params = state["params"]
    summary = {
        "title": title,
        "config": dataclasses.asdict(config),
        "implementation": implementation,
        "unigram": unigram,
        "bigram": bigram,
        "held_out": evaluate(config, params, held_out, implementation),
        "losses": losses,
        "tokens_per_step": config.batch * config.seq_len,
        "tokens_per_second": speed,
        "sample": generate(config, params, implementation),
        "comparison": compare_implementations(config, state, batches),
    }
    plot(summary, out / "loss_curve.png")
    summary["seconds"] = time.perf_counter() - start
    (out / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


_IMPLEMENTATION = flags.DEFINE_enum("implementation", "kernel", IMPLEMENTATIONS, "Attention.")
_SIZE = flags.DEFINE_enum("size", "tiny", list(SIZES), "Preset; the next four change parts of it.")
_STEPS = flags.DEFINE_integer("steps", None, "Train steps in all.", 1)
_BATCH = flags.DEFINE_integer("batch", None, "Rows of a step.", 1)
_SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Bytes of a row.", 16)
_LEARNING_RATE = flags.DEFINE_float("learning_rate", None, "Peak of the schedule.", 0.0)
_SEED = flags.DEFINE_integer("seed", 0, "Of the parameters, the data's order and the sample.", 0)
_DTYPE = flags.DEFINE_enum(
    "dtype", None, ["float32", "bfloat16"], "Of activations; else float32 on CPU, bfloat16 on GPU."
)
_OUT = flags.DEFINE_string("out", None, "Directory; else runs/train_lm_SIZE_IMPLEMENTATION.")
_RESUME = flags.DEFINE_bool("resume", False, "Continue from the checkpoint in --out.")


def main(argv: Sequence[str]) -> None:
    """Runs what the flags say and prints the result."""
    if len(argv) > 1:
        raise app.UsageError(f"unexpected arguments {argv[1:]}: every setting is a --flag")
    logging.set_verbosity(logging.WARNING)  # orbax tells every move at INFO
    config = make_config(
        _SIZE.value,
        steps=_STEPS.value,
        batch=_BATCH.value,
        seq_len=_SEQ_LEN.value,
        learning_rate=_LEARNING_RATE.value,
        seed=_SEED.value,
        dtype=_DTYPE.value or ("float32" if jax.default_backend() == "cpu" else "bfloat16"),
    )
    out = pathlib.Path(_OUT.value or f"runs/train_lm_{_SIZE.value}_{_IMPLEMENTATION.value}")
    out.mkdir(parents=True, exist_ok=True)
    summary = run(config, out, _IMPLEMENTATION.value, _RESUME.value)
    print(f"--- sample ---\n{summary['sample']}\n--------------\n{describe(summary)}")
    print(f"written to {out}: loss_curve.png, summary.json, checkpoints/")


if __name__ == "__main__":
    app.run(main)
