"""GPU kernel time of dense attention against cuDNN, measured by CUPTI in one process."""

import statistics

import jax
import jax.numpy as jnp
from jax.experimental.mosaic.gpu import profiler

from benchmarks import record
from jax_flashattn import flash_attention

TOKENS, WIDTH = 16384, 2048  # batch * sequence, heads * head_dim
HEAD_DIMS = (64, 128, 256)
LENGTHS = (512, 1024, 2048, 4096, 8192, 16384)


def _milliseconds(function, arguments, iterations: int) -> float:
    """Median kernel time of one call, everything it launches included."""
    times = profiler.measure(function, iterations=iterations)(*arguments)[1]
    return statistics.median(times if isinstance(times, list) else [times])


def _functions(causal: bool):
    def ours(q, k, v):
        return flash_attention(q, k, v, causal=causal)

    def cudnn(q, k, v):
        return jax.nn.dot_product_attention(q, k, v, is_causal=causal, implementation="cudnn")

    return {"ours": ours, "cudnn": cudnn}


def dense(rounds: int, iterations: int) -> None:
    """Forward over the grid of figures: prints a line per cell, writes results/gpu_forward.json."""
    rows = []
    for d in HEAD_DIMS:
        for s in LENGTHS:
            shape = (TOKENS // s, s, WIDTH // d, d)
            q, k, v = (
                jax.random.normal(x, shape, jnp.bfloat16)
                for x in jax.random.split(jax.random.key(0), 3)
            )
            for causal in (False, True):
                flop = 4 * TOKENS * s * WIDTH * (0.5 if causal else 1)
                peers = {name: jax.jit(f) for name, f in _functions(causal).items()}
                samples = {name: [] for name in peers}
                for _ in range(rounds):
                    for name, f in peers.items():
                        samples[name].append(_milliseconds(f, (q, k, v), iterations))
                times = {name: statistics.median(x) for name, x in samples.items()}
                rows.append(
                    {
                        "d": d,
                        "s": s,
                        "causal": causal,
                        "mode": "forward",
                        "dtype": "bfloat16",
                        "tflops": {n: round(flop / t / 1e9, 1) for n, t in times.items()},
                        "vs cudnn": round(times["cudnn"] / times["ours"], 3),
                    }
                )
                print(rows[-1], flush=True)
    ratios = [row["vs cudnn"] for row in rows]
    print(f"vs cudnn: median x{statistics.median(ratios):.3f}, worst x{min(ratios):.3f}")
    print("written", record.write("gpu_forward", rows))
