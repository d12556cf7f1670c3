"""CPU speed against torch and jax.nn, dispatch overhead, and memory."""

import resource
import statistics
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from jax_flashattn import flash_attention

HEAD_DIMS = (64, 128)
LENGTHS = (512, 1024, 2048, 4096, 8192)
DTYPES = ("float32", "bfloat16")
JAX_NN_LENGTHS = (2048, 4096, 8192)
HEADS = 4


def _torch_calls(arrays, dtype: str, causal: bool):
    import torch

    attention = torch.nn.functional.scaled_dot_product_attention
    q, k, v, g = (
        torch.from_numpy(x).transpose(1, 2).contiguous().to(getattr(torch, dtype)) for x in arrays
    )
    leaves = [x.clone().requires_grad_() for x in (q, k, v)]

    def forward():
        with torch.no_grad():
            attention(q, k, v, is_causal=causal)

    def both():
        for x in leaves:
            x.grad = None
        attention(*leaves, is_causal=causal).backward(g)

    return {"forward": forward, "forward+backward": both}


def _jax_calls(function, arrays, dtype: str):
    q, k, v, g = (jnp.asarray(x, dtype) for x in arrays)
    forward = jax.jit(function)

    @jax.jit
    def both(q, k, v, g):
        out, vjp = jax.vjp(function, q, k, v)
        return out, vjp(g)

    return {
        "forward": lambda: jax.block_until_ready(forward(q, k, v)),
        "forward+backward": lambda: jax.block_until_ready(both(q, k, v, g)),
    }


def _cell(dtype: str, d: int, s: int, causal: bool, seconds: float) -> list[dict]:
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, s, HEADS, d), np.float32) for _ in range(4)]
    peers = {
        "ours": _jax_calls(lambda *x: flash_attention(*x, causal=causal), arrays, dtype),
        "torch": _torch_calls(arrays, dtype, causal),
    }
    if s in JAX_NN_LENGTHS:
        peers["jax.nn"] = _jax_calls(
            lambda *x: jax.nn.dot_product_attention(*x, is_causal=causal), arrays, dtype
        )
    rows = []
    for mode, factor in (("forward", 1.0), ("forward+backward", 3.5)):
        times = record.interleaved_medians({n: c[mode] for n, c in peers.items()}, seconds)
        flop = factor * 4 * HEADS * s * s * d * (0.5 if causal else 1)
        rows.append(
            {
                "dtype": dtype,
                "d": d,
                "s": s,
                "heads": HEADS,
                "causal": causal,
                "mode": mode,
                "milliseconds": {n: round(t * 1e3, 3) for n, t in times.items()},
                "gflops": {n: round(flop / t / 1e9, 1) for n, t in times.items()},
                "vs torch": round(times["torch"] / times["ours"], 3),
                "vs jax.nn": round(times["jax.nn"] / times["ours"], 3)
                if s in JAX_NN_LENGTHS
                else None,
            }
        )
    return rows


def speed(seconds: float) -> None:
    """The grid of figures: a line per cell and the medians; writes results/cpu(_amx).json."""
    import torch

    torch.set_num_threads(record.environment()["cores"])
    rows = []
    for dtype in DTYPES:
        for d in HEAD_DIMS:
            for s in LENGTHS:
                for causal in (False, True):
                    for row in _cell(dtype, d, s, causal, seconds):
                        rows.append(row)
                        print(
                            f"{dtype:9} d={d:<4} s={s:<5} {'causal' if causal else 'full':6} "
                            f"{row['mode']:17} {row['gflops']['ours']:7.1f} GFLOP/s  "
                            f"torch x{row['vs torch']:<6} jax.nn x{row['vs jax.nn']}",
                            flush=True,
                        )
    print_summary(rows)
    print("written", record.write_cpu("cpu", rows))


def print_summary(rows: list[dict]) -> None:
    """Median and worst ratio for each dtype."""
    for dtype in DTYPES:
        for peer in ("vs torch", "vs jax.nn"):
            ratios = [r[peer] for r in rows if r["dtype"] == dtype and r[peer] is not None]
            print(
                f"{dtype:9} {peer:10} median x{statistics.median(ratios):.2f}, "
                f"worst x{min(ratios):.2f}, best x{max(ratios):.2f}"
            )


def dispatch(seconds: float) -> None:
    """Time per jitted call at S = 16, where nothing but overhead counts."""
    rng = np.random.default_rng(0)
    arrays = [rng.standard_normal((1, 16, HEADS, 64), np.float32) for _ in range(4)]
    rows = []
    for causal in (False, True):
        ours = _jax_calls(lambda *x, c=causal: flash_attention(*x, causal=c), arrays, "float32")
        theirs = _jax_calls(
            lambda *x, c=causal: jax.nn.dot_product_attention(*x, is_causal=c), arrays, "float32"
        )
        for mode in ours:
            calls = {"ours": ours[mode], "jax.nn": theirs[mode]}
            times = record.interleaved_medians(calls, seconds)
            microseconds = {n: round(t * 1e6, 1) for n, t in times.items()}
            ratio = round(times["ours"] / times["jax.nn"], 3)
            rows.append(
                {"causal": causal, "mode": mode, "microseconds": microseconds, "ratio": ratio}
            )
            print(rows[-1])
    print("written", record.write("cpu_dispatch", rows))


MEMORY_PROGRAM = """
import resource, jax, jax.numpy as jnp
from jax_flashattn import flash_attention
q, k, v = (jax.random.normal(jax.random.key(i), (1, 65536, 1, 64)) for i in range(3))
f = jax.jit(jax.grad(lambda *x: flash_attention(*x, causal=True).sum(), (0, 1, 2)))
jax.block_until_ready(f(q, k, v))
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
"""


def memory() -> None:
    """Peak resident memory of a process: S = 65,536, one head, causal, forward and backward."""
    run = subprocess.run(
        [sys.executable, "-c", MEMORY_PROGRAM], capture_output=True, text=True, check=True
    )
    rows = [{"s": 65536, "heads": 1, "d": 64, "peak_rss_mb": round(int(run.stdout) / 1024)}]
    print(rows[0], "children", resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss // 1024, "MB")
    print("written", record.write("cpu_memory", rows))
