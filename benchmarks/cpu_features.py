"""What each feature costs on the CPU against plain causal attention."""

from collections.abc import Callable, Iterator

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from jax_flashattn import flash_attention

S, HEADS, D = 4096, 4, 64
DTYPES = ("float32", "bfloat16")
MODES = ("forward", "forward+backward")
FIXED = ("segment_ids", "dropout_key", "alibi_slopes")  # without gradients


def documents(tokens: int = S) -> np.ndarray:
    """Lengths of a pack: lognormal with median 500, the last cut off."""
    rng = np.random.default_rng(0)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = int(min(rng.lognormal(np.log(500), 0.6), 2000))
        lengths.append(min(length, tokens - sum(lengths)))
    return np.array(lengths)


def cases(dtype: str, chosen: str) -> Iterator[tuple[str, dict, dict, float]]:
    """(name, static options, array arguments, visible scores against causal) with the name part."""
    lengths = documents()
    ids = jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None], jnp.int32)
    packed = float((lengths * (lengths + 1)).sum() / (S * (S + 1)))
    arrays: dict[str, Callable[[], dict]] = {
        "softcap": dict,
        "alibi": lambda: {"alibi_slopes": 2.0 ** -jnp.arange(1, HEADS + 1, dtype=jnp.float32)},
        "sinks": lambda: {"sinks": jnp.zeros(HEADS)},
        "dropout": lambda: {"dropout_key": jax.random.key(0)},
        "bias": lambda: {"bias": _normal((1, HEADS, S, S), dtype)},
        "bias of all heads": lambda: {"bias": _normal((1, 1, S, S), dtype)},
        "bias of keys": lambda: {"bias": _normal((1, 1, 1, S), dtype)},
        "packed": lambda: {"segment_ids": ids},
    }
    options = {"softcap": {"softcap": 30.0}, "dropout": {"dropout_rate": 0.1}}
    for name, make in arrays.items():
        if chosen in name:
            yield name, options.get(name, {}), make(), packed if name == "packed" else 1.0


def _normal(shape: tuple, dtype: str) -> jax.Array:
    return jax.random.normal(jax.random.key(1), shape, jnp.dtype(dtype))


def calls(dtype: str, options: dict, arguments: dict) -> dict[str, Callable]:
    """Both modes of a causal call, with gradients of all that has them."""
    rng = np.random.default_rng(0)
    q, k, v, g = (
        jnp.asarray(rng.standard_normal((1, S, HEADS, D), np.float32), dtype) for _ in range(4)
    )
    fixed = {n: x for n, x in arguments.items() if n in FIXED}
    learned = {n: x for n, x in arguments.items() if n not in FIXED}

    def attention(q, k, v, learned, fixed):
        return flash_attention(q, k, v, causal=True, **options, **learned, **fixed)

    def gradients(q, k, v, g, learned, fixed):
        out, pullback = jax.vjp(lambda *x: attention(*x, fixed), q, k, v, learned)
        return out, pullback(g)

    forward, both = jax.jit(attention), jax.jit(gradients)
    return {
        "forward": lambda: jax.block_until_ready(forward(q, k, v, learned, fixed)),
        "forward+backward": lambda: jax.block_until_ready(both(q, k, v, g, learned, fixed)),
    }


def features(seconds: float, chosen: str = "") -> None:
    """Time over causal per visible score: results/cpu_features(_amx).json if all are run."""
    rows = []
    for dtype in DTYPES:
        plain = calls(dtype, {}, {})
        for name, options, arguments, scores in cases(dtype, chosen):
            given = calls(dtype, options, arguments)
            for mode in MODES:
                peers = {"causal": plain[mode], "feature": given[mode]}
                times = record.interleaved_medians(peers, seconds)
                milliseconds = {n: round(t * 1e3, 2) for n, t in times.items()}
                cost = round(times["feature"] / times["causal"] / scores, 3)
                rows.append({"dtype": dtype, "feature": name, "mode": mode, "cost": cost})
                rows[-1] |= {"s": S, "d": D, "heads": HEADS, "visible": round(scores, 4)}
                rows[-1] |= {"milliseconds": milliseconds}
                print(f"{dtype:9} {name:18} {mode:17} x{cost:<6} {milliseconds}", flush=True)
    if not chosen:
        print("written", record.write_cpu("cpu_features", rows))
