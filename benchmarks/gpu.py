"""GPU kernel time of attention by CUPTI, with cuDNN in the same process where it has the option."""

import statistics
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental.mosaic.gpu import profiler

from benchmarks import record
from jax_flashattn import flash_attention

TOKENS, WIDTH = 16384, 2048  # batch * sequence, heads * head_dim
HEAD_DIMS = (64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)
FORWARD_KERNELS = ("forward_kernel", "fprop")  # in the names of ours and cuDNN's


def milliseconds(function: Callable, arguments, iterations: int, backward: bool) -> float:
    """Median kernel time of a call: all it launches, but of a gradient not the forward pass."""
    found = profiler.measure(function, iterations=iterations, aggregate=False)(*arguments)[1]
    calls = found if iterations > 1 else [found]
    skipped = FORWARD_KERNELS if backward else ()
    return statistics.median(
        sum(ms for name, ms in kernels if not any(s in name for s in skipped)) for kernels in calls
    )


def gradient(attention: Callable) -> Callable:
    """Of (q, k, v, dout): dq, dk, dv."""
    return lambda q, k, v, dout: jax.vjp(attention, q, k, v)[1](dout)


def measure(functions: dict[str, Callable], arrays, mode: str, rounds: int, iterations: int):
    """Milliseconds of each function, in turns."""
    backward = mode == "backward"
    programs = {n: jax.jit(gradient(f) if backward else f) for n, f in functions.items()}
    arguments = arrays if backward else arrays[:3]
    samples: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(rounds):
        for name, program in programs.items():
            samples[name].append(milliseconds(program, arguments, iterations, backward))
    return {name: statistics.median(x) for name, x in samples.items()}


def make_arrays(b: int, s: int, hq: int, hk: int, d: int):
    """Normal q, k, v and dout in bfloat16."""
    shapes = ((b, s, hq, d), (b, s, hk, d), (b, s, hk, d), (b, s, hq, d))
    keys = jax.random.split(jax.random.key(0), 4)
    return [jax.random.normal(key, x, jnp.bfloat16) for key, x in zip(keys, shapes)]


def ours(**given) -> Callable:
    """Our attention of q, k and v."""
    return lambda q, k, v: flash_attention(q, k, v, **given)


def _cudnn(causal: bool) -> Callable:
    return lambda q, k, v: jax.nn.dot_product_attention(
        q, k, v, is_causal=causal, implementation="cudnn"
    )


def peers(causal: bool) -> dict[str, Callable]:
    """Our attention and cuDNN's, of q, k and v."""
    return {"ours": ours(causal=causal), "cudnn": _cudnn(causal)}


def count_flop(scores: float, d: int, mode: str) -> float:
    """Floating-point operations of a pass over that many visible scores."""
    return scores * d * (10 if mode == "backward" else 4)


def _gradients64(q, k, v, dout, causal: bool) -> list[np.ndarray]:
    """Output and gradients in float64, on the CPU."""
    q, k, v, dout = (np.asarray(x, np.float64).swapaxes(1, 2) for x in (q, k, v, dout))
    scores = q @ k.swapaxes(2, 3) * q.shape[-1] ** -0.5
    if causal:
        scores = np.where(np.tri(scores.shape[-1], dtype=bool), scores, -np.inf)
    p = np.exp(scores - scores.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    out, dp = p @ v, dout @ v.swapaxes(2, 3)
    ds = p * (dp - (dout * out).sum(-1, keepdims=True)) * q.shape[-1] ** -0.5
    results = (out, ds @ k, ds.swapaxes(2, 3) @ q, p.swapaxes(2, 3) @ dout)
    return [x.swapaxes(1, 2) for x in results]


def _errors(d: int, causal: bool) -> dict:
    """Relative errors (2-norms) of output and gradients against float64."""
    arrays = make_arrays(1, 1024, 4, 4, d)
    exact = _gradients64(*arrays, causal)
    row = {"case": "relative error", "d": d, "causal": causal}
    for name, attention in peers(causal).items():
        q, k, v, dout = arrays
        out, vjp = jax.vjp(jax.jit(attention), q, k, v)
        got = [np.asarray(x, np.float64) for x in (out, *vjp(dout))]
        row[name] = {
            x: float(np.linalg.norm(a - b) / np.linalg.norm(b))
            for x, a, b in zip(("out", "dq", "dk", "dv"), got, exact)
        }
    print(row, flush=True)
    return row


def _matmul(rounds: int, iterations: int) -> float:
    """TFLOP/s of a bfloat16 matrix product of this run."""
    n = 8192
    x, y = (jax.random.normal(jax.random.key(i), (n, n), jnp.bfloat16) for i in range(2))
    product = jax.jit(jnp.matmul)
    ms = [milliseconds(product, (x, y), iterations, False) for _ in range(rounds)]
    return round(2 * n**3 / statistics.median(ms) / 1e9, 1)


def dense(rounds: int, iterations: int) -> None:
    """The grid of lengths, head dims and masks, both passes: results/gpu_dense.json."""
    rows = []
    matmul = _matmul(rounds, iterations)
    print("matmul 8192^3", matmul, flush=True)
    for d in HEAD_DIMS:
        for s in LENGTHS:
            b, h = TOKENS // s, WIDTH // d
            arrays = make_arrays(b, s, h, h, d)
            for causal in (False, True):
                functions = peers(causal)
                for mode in ("forward", "backward"):
                    flop = count_flop(b * h * s * s * (0.5 if causal else 1), d, mode)
                    times = measure(functions, arrays, mode, rounds, iterations)
                    rows.append(
                        {
                            "d": d,
                            "s": s,
                            "causal": causal,
                            "mode": mode,
                            "dtype": "bfloat16",
                            "tflops": {n: round(flop / t / 1e9, 1) for n, t in times.items()},
                            "vs cudnn": round(times["cudnn"] / times["ours"], 3),
                        }
                    )
                    print(rows[-1], flush=True)
    for mode in ("forward", "backward"):
        ratios = [row["vs cudnn"] for row in rows if row["mode"] == mode]
        print(f"{mode} vs cudnn: median x{statistics.median(ratios):.3f}, worst x{min(ratios):.3f}")
    rows.append({"case": "matmul 8192^3", "tflops": matmul})
    again = _matmul(rounds, iterations)  # with the board as warm as at the grid's end
    rows.append({"case": "matmul 8192^3, after the grid", "tflops": again})
    rows += [_errors(d, causal) for d in HEAD_DIMS for causal in (False, True)]
    print("written", record.write("gpu_dense", rows))


def documents(tokens: int = 32768) -> list[int]:
    """39 lengths of a pack: lognormal with median 600, none over 3,930, the last cut off."""
    rng = np.random.default_rng(178)
    lengths: list[int] = []
    while sum(lengths) < tokens:
        length = int(min(rng.lognormal(np.log(600), 0.8), 3930))
        lengths.append(min(length, tokens - sum(lengths)))
    return lengths


def options(heads: int) -> dict[str, dict]:
    """What is measured beside plain causal attention, by name."""
    return {
        "softcap": {"softcap": 30.0},
        "alibi": {"alibi_slopes": 2.0 ** -jnp.arange(1, heads + 1, dtype=jnp.float32)},
        "sinks": {"sinks": jnp.zeros(heads)},
        "dropout": {"dropout_rate": 0.1, "dropout_key": jax.random.key(0)},
        "deterministic": {"deterministic": True},
    }


def features(rounds: int, iterations: int) -> None:
    """What each option costs against plain causal attention: results/gpu_features.json."""
    d, s, h = 128, 4096, 16
    arrays = make_arrays(TOKENS // s, s, h, h, d)
    functions = {"causal": ours(causal=True)}
    functions |= {name: ours(causal=True, **given) for name, given in options(h).items()}
    rows = []
    for mode in ("forward", "backward"):
        times = measure(functions, arrays, mode, rounds, iterations)
        costs = {n: round(t / times["causal"], 3) for n, t in times.items()}
        rows.append({"d": d, "s": s, "mode": mode, "ms": times, "cost": costs})
        print(mode, costs, flush=True)
    for mode in ("forward", "backward"):
        rows += [_packed(mode, rounds, iterations), _window(mode, rounds, iterations)]
        rows.append(_grouped(mode, rounds, iterations))
    print("written", record.write("gpu_features", rows))


def _cudnn_packed(lengths: list[int]) -> Callable:
    """cuDNN's packed layout, which JAX has in a private module only."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    seqlen = jnp.asarray([lengths], jnp.int32)
    offsets = jnp.asarray([np.cumsum([0, *lengths])], jnp.int32)
    return lambda q, k, v: cudnn.dot_product_attention(
        *(q, k, v, None, None, seqlen, seqlen, offsets, offsets),
        scale=q.shape[-1] ** -0.5,
        mask_type=cudnn.MaskType.PADDING_CAUSAL,
    )


def segment_ids(lengths: list[int]) -> jax.Array:
    """[1, tokens] of a pack."""
    return jnp.asarray(np.repeat(np.arange(len(lengths)) + 1, lengths)[None], jnp.int32)


def _packed(mode: str, rounds: int, iterations: int) -> dict:
    lengths = documents()
    ids = segment_ids(lengths)
    arrays = make_arrays(1, sum(lengths), 16, 16, 128)
    flop = count_flop(16 * sum(n * n for n in lengths) / 2, 128, mode)
    functions = {"ours": ours(causal=True, segment_ids=ids), "cudnn": _cudnn_packed(lengths)}
    times = measure(functions, arrays, mode, rounds, iterations)
    tflops = {name: round(flop / ms / 1e9, 1) for name, ms in times.items()}
    row = {"case": f"{len(lengths)} documents", "mode": mode, "tflops": tflops}
    print(row, flush=True)
    return row


def _window(mode: str, rounds: int, iterations: int) -> dict:
    s, w = 16384, 1024
    functions = {
        "causal": ours(causal=True),
        "window": ours(causal=True, window=(w - 1, 0)),
    }
    times = measure(functions, make_arrays(1, s, 16, 16, 128), mode, rounds, iterations)
    share = (s * w - w * (w - 1) / 2) / (s * (s + 1) / 2)
    row = {
        "case": f"window {w} of {s}",
        "mode": mode,
        "ms": times,
        "vs ideal share": times["window"] / times["causal"] / share,
    }
    print(row, flush=True)
    return row


def _grouped(mode: str, rounds: int, iterations: int) -> dict:
    s, hq, hk = 4096, 32, 8
    q, k, v, dout = make_arrays(4, s, hq, hq, 128)
    few = [q, k[:, :, :hk], v[:, :, :hk], dout]
    times = measure({"32": ours(causal=True)}, [q, k, v, dout], mode, rounds, iterations)
    times |= measure({"32/8": ours(causal=True)}, few, mode, rounds, iterations)
    row = {"case": "key heads", "mode": mode, "ms": times, "cost": times["32/8"] / times["32"]}
    print(row, flush=True)
    return row
