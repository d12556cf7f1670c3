"""Generate with the language model of train_lm.py, from a paged cache that requests share.

    python examples/decode.py               # trains the model first if --base is empty
    python examples/decode.py --base runs/train_lm_tiny_kernel  # a run of train_lm.py

All prompts begin with the same text. Its keys and values are computed once and lie in pages that
every request's block table names; behind them each request has pages of its own. A batch of
requests of different lengths then decodes together, one byte of each at a time, inside lax.scan:
the cache is never copied.

Every byte's logits are held against a full forward pass over the finished text: printed is the
largest difference, and one above TOLERANCE is an error.
"""

import argparse
import functools
import json
import math
import pathlib
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from absl import logging
from byte_lm import Config, make_config, model_graph
from flax import nnx
from long_lora import base_model
from train_lm import read_corpus

from jax_flashattn import flash_attn_with_kvcache

PAGE = 16  # positions
TOLERANCE = {"float32": 2e-4, "bfloat16": 5e-2}  # of a logit, as a part of the largest one
PREFIX = b'''"""Tools for files and text."""

import os
import re
import sys


def read(path):
    with open(path) as file:
        return file.read()


'''
PROMPTS = (b"def ", b"class Reader:\n    def __init__(self", b"for name in ", b"if __name__ ==")


class Request(NamedTuple):
    """Where a batch of requests keeps its keys.

    Attributes:
      table: int32 [b, pages], the shared pages first.
      caches: for each layer keys and values [pages in all, PAGE, hk, d].
      shared: positions in the shared pages.
    """

    table: np.ndarray
    caches: list[tuple[jax.Array, jax.Array]]
    shared: int


def open_cache(config: Config, b: int, shared: int, own: int, seed: int = 0) -> Request:
    """Empty pages for `shared` positions of all and `own` of each of b requests, in any order."""
    shared_pages, own_pages = shared // PAGE, math.ceil(own / PAGE)
    count = shared_pages + b * own_pages
    pages = np.random.default_rng(seed).permutation(count).astype(np.int32)
    first = np.tile(pages[:shared_pages], (b, 1))
    table = np.concatenate([first, pages[shared_pages:].reshape(b, own_pages)], axis=1)
    shape = (count, PAGE, config.kv_heads, config.head_dim)
    zeros = functools.partial(jnp.zeros, shape, config.dtype)
    return Request(table, [(zeros(), zeros()) for _ in range(config.layers)], shared)


def rotary_tables(config: Config, positions: int) -> tuple[jax.Array, jax.Array]:
    """cos and sin [positions, d / 2] of byte_lm.rotate."""
    half = config.head_dim // 2
    frequency = 10_000.0 ** (-jnp.arange(half, dtype=jnp.float32) / half)
    angle = jnp.arange(positions)[:, None] * frequency
    return jnp.cos(angle).astype(config.dtype), jnp.sin(angle).astype(config.dtype)


def extend(config: Config, params, tokens, caches, lengths, table):
    """Logits [b, s, 256] of tokens int32 [b, s] behind `lengths` int32 [b]; and the caches."""
    model = nnx.merge(model_graph(config), params)
    tables = rotary_tables(config, table.shape[1] * PAGE)
    x, updated = model.embedded(tokens), []
    for block, cache in zip(model.blocks, caches, strict=True):
        query, key, value = block.before_attention(x)
        out, *cache = flash_attn_with_kvcache(
            *(query, *cache, key, value, *tables),
            cache_seqlens=lengths,
            block_table=table,
            causal=True,
            window_size=(-1 if block.window is None else block.window, -1),
            rotary_interleaved=False,
        )
        updated.append(tuple(cache))
        x = block.after_attention(x, out)
    return model.logits(x), updated


def padded(texts: list[bytes]) -> tuple[np.ndarray, np.ndarray]:
    """int32 [b, longest], zeros behind each text, and lengths [b]."""
    lengths = np.array([len(text) for text in texts], np.int32)
    rows = np.zeros((len(texts), lengths.max()), np.int32)
    for row, text in zip(rows, texts):
        row[: len(text)] = list(text)
    return rows, lengths


def prefill(config: Config, params, request: Request, prefix: bytes, prompts: list[bytes]):
    """Logits [b, 256] behind each prompt, the caches with prefix and prompts, and the lengths.

    The prefix is computed once. Prompts are padded: what follows a shorter one in the cache is
    never seen, and overwritten by what it generates.
    """
    run = jax.jit(functools.partial(extend, config), donate_argnums=2)
    start = np.zeros(1, np.int32)
    shared = request.table[:1, : request.shared // PAGE]
    _, caches = run(params, padded([prefix])[0], request.caches, start, shared)
    tokens, lengths = padded(prompts)
    at = np.full(len(prompts), request.shared, np.int32)
    logits, caches = run(params, tokens, caches, at, request.table)
    last = jnp.take_along_axis(logits, jnp.asarray(lengths - 1)[:, None, None], axis=1)[:, 0]
    return last, caches, at + lengths


def make_generator(config: Config, table: np.ndarray, count: int, temperature: float):
    """The jitted `generate(params, logits, caches, lengths, key)`; the caches are donated.

    Returns:
        (bytes int32 [count, b], the logits float32 [count, b, 256] each was drawn from), caches.
    """

    def generate(params, logits, caches, lengths, key):
        def step(carry, n):
            logits, caches, lengths = carry
            drawn = jax.random.categorical(jax.random.fold_in(key, n), logits / temperature)
            following, caches = extend(config, params, drawn[:, None], caches, lengths, table)
            return (following[:, 0], caches, lengths + 1), (drawn, logits)

        carry, results = jax.lax.scan(step, (logits, caches, lengths), jnp.arange(count))
        return results, carry[1]

    return jax.jit(generate, donate_argnums=2)


def largest_difference(config: Config, params, texts: list[bytes], logits: np.ndarray) -> float:
    """How far logits [count, b, 256] of the last bytes are from those of one full forward pass.

    Raises:
        AssertionError: farther than TOLERANCE, or not a number.
    """
    tokens, lengths = padded(texts)
    model = nnx.merge(model_graph(config), params)
    real = jnp.asarray(np.arange(tokens.shape[1]) < lengths[:, None], jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    whole = np.asarray(model(tokens, real, positions, implementation="kernel"))
    count = len(logits)
    wanted = np.stack([w[n - count - 1 : n - 1] for w, n in zip(whole, lengths)], axis=1)
    difference = float(np.max(np.abs(wanted - logits)))
    limit = TOLERANCE[config.dtype] * float(np.max(np.abs(wanted)))
    if not difference <= limit:
        raise AssertionError(f"logits differ by {difference:.2e}, more than {limit:.2e}")
    return difference


def run(
    config: Config, params, prefix: bytes, prompts: list[bytes], count: int, temperature=0.7
) -> dict:
    """Generates `count` bytes for each prompt behind the prefix and checks every byte's logits.

    Returns:
        texts, tokens_per_second, difference (the largest, of a logit), pages (in the cache),
        unshared_pages (there would be without sharing).
    """
    shared = len(prefix) // PAGE * PAGE
    prompts = [prefix[shared:] + prompt for prompt in prompts]  # what does not fill a page is own
    prefix = prefix[:shared]
    own = max(map(len, prompts)) + count
    request = open_cache(config, len(prompts), shared, own)
    pages = len(request.caches[0][0])
    logits, caches, lengths = prefill(config, params, request, prefix, prompts)
    arguments = (params, logits, caches, lengths, jax.random.key(config.seed))
    generator = make_generator(config, request.table, count, temperature)
    generator = generator.lower(*arguments).compile()
    begin = time.perf_counter()
    (tokens, steps), _ = jax.block_until_ready(generator(*arguments))
    seconds = time.perf_counter() - begin
    generated = np.asarray(tokens, np.uint8).T
    texts = [prefix + p + g.tobytes() for p, g in zip(prompts, generated)]
    return {
        "texts": texts,
        "tokens_per_second": tokens.size / seconds,
        "difference": largest_difference(config, params, texts, np.asarray(steps)),
        "pages": pages,
        "unshared_pages": len(prompts) * request.table.shape[1],
    }


def main() -> None:
    """Runs what the flags say and prints the texts."""
    parser = argparse.ArgumentParser(description="Decode with a paged cache that requests share.")
    parser.add_argument("--size", default="tiny", help="preset of train_lm.py")
    parser.add_argument("--context", type=int, default=512, help="bytes of a row in training")
    parser.add_argument("--base_steps", type=int, default=600, help="train steps of the model")
    parser.add_argument("--base", default="runs/long_lora/base", help="a run of train_lm.py")
    parser.add_argument("--tokens", type=int, default=160, help="bytes to generate per prompt")
    flags = parser.parse_args()
    logging.set_verbosity(logging.WARNING)  # orbax tells every move at INFO
    dtype = "float32" if jax.default_backend() == "cpu" else "bfloat16"
    config = make_config(flags.size, steps=flags.base_steps, seq_len=flags.context, dtype=dtype)
    base = pathlib.Path(flags.base)
    if (base / "summary.json").exists():  # a run of train_lm.py says what its model is
        config = Config(**json.loads((base / "summary.json").read_text())["config"])
    params = base_model(config, read_corpus()[0], base)
    found = run(config, params, PREFIX, list(PROMPTS), flags.tokens)
    for text in found["texts"]:
        print("-" * 80 + "\n" + text[len(PREFIX) :].decode(errors="replace"))
    print("-" * 80)
    print(
        f"{found['tokens_per_second']:,.0f} tokens/s, {len(PROMPTS)} requests at once; "
        f"{found['pages']} pages, {found['unshared_pages']} without sharing; logits differ from a "
        f"full forward pass by at most {found['difference']:.1e}"
    )


if __name__ == "__main__":
    main()
