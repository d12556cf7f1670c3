"""GPU kernel time against every peer that can be imported: cuDNN, tokamax, torch.

JAX's peers are timed by CUPTI, as in benchmarks/gpu.py; torch by events around calls that keep the
GPU busy. A peer that refuses a shape is left out of its row.
"""

import functools
import importlib.util
import statistics
from collections.abc import Callable

import jax
import numpy as np

from benchmarks import gpu, record

LENGTHS = (1024, 4096, 16384)


def _tokamax(causal: bool) -> Callable:
    import tokamax

    return lambda q, k, v: tokamax.dot_product_attention(
        q, k, v, is_causal=causal, implementation="mosaic"
    )


def _tokamax_times(arrays, causal: bool, iterations: int) -> dict[str, float]:
    """Kernel names do not tell its passes apart: the backward is the gradient less the forward."""
    attention = _tokamax(causal)
    forward = gpu.milliseconds(jax.jit(attention), arrays[:3], iterations, False)
    both = gpu.milliseconds(jax.jit(gpu.gradient(attention)), arrays, iterations, False)
    return {"forward": forward, "backward": both - forward}


def _torch_times(arrays, causal: bool, iterations: int) -> dict[str, float]:
    """The fastest of torch's own backends: FlashAttention-2 and cuDNN."""
    import torch
    from torch.nn import attention, functional

    q, k, v, dout = (
        torch.from_numpy(np.asarray(x, np.float32)).to("cuda", torch.bfloat16).transpose(1, 2)
        for x in arrays
    )
    inputs = [x.detach().requires_grad_() for x in (q, k, v)]

    def timed(call: Callable) -> float:
        samples = []
        for _ in range(iterations + 2):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(4):
                call()
            end.record()
            torch.cuda.synchronize()
            samples.append(start.elapsed_time(end) / 4)
        return statistics.median(samples[2:])

    times: dict[str, list[float]] = {"forward": [], "backward": []}
    for backend in (
        attention.SDPBackend.FLASH_ATTENTION,
        attention.SDPBackend.CUDNN_ATTENTION,
    ):
        with attention.sdpa_kernel(backend):

            def forward():
                return functional.scaled_dot_product_attention(*inputs, is_causal=causal)

            with torch.no_grad():
                times["forward"].append(timed(forward))
            backward = functools.partial(
                torch.autograd.grad, forward(), inputs, dout, retain_graph=True
            )
            times["backward"].append(timed(backward))
    return {mode: min(x) for mode, x in times.items()}


def run(rounds: int, iterations: int) -> None:
    """Dense calls of every head dim: results/gpu_peers.json."""
    rows = []
    others = {"tokamax": _tokamax_times, "torch": _torch_times}
    others = {name: f for name, f in others.items() if importlib.util.find_spec(name)}
    print("peers: cudnn", *others, flush=True)
    for s in LENGTHS[::-1]:
        for d in gpu.HEAD_DIMS:
            b, h = gpu.TOKENS // s, gpu.WIDTH // d
            arrays = gpu.make_arrays(b, s, h, h, d)
            for causal in (False, True):
                functions = gpu.peers(causal)
                times = {
                    mode: gpu.measure(functions, arrays, mode, rounds, iterations)
                    for mode in ("forward", "backward")
                }
                for name, other in others.items():
                    try:
                        for mode, ms in other(arrays, causal, iterations).items():
                            times[mode][name] = ms
                    except Exception as error:  # theirs, of any kind
                        print(f"{name} d={d} s={s}: {repr(error)[:100]}")
                for mode, found in times.items():
                    flop = gpu.count_flop(b * h * s * s * (0.5 if causal else 1), d, mode)
                    best = min(ms for name, ms in found.items() if name != "ours")
                    rows.append(
                        {
                            "d": d,
                            "s": s,
                            "causal": causal,
                            "mode": mode,
                            "tflops": {n: round(flop / ms / 1e9, 1) for n, ms in found.items()},
                            "vs best": round(best / found["ours"], 3),
                        }
                    )
                    print(rows[-1], flush=True)
        record.write("gpu_peers", rows)
    for mode in ("forward", "backward"):
        ratios = [row["vs best"] for row in rows if row["mode"] == mode]
        print(f"{mode} vs best: median x{statistics.median(ratios):.3f}, worst x{min(ratios):.3f}")
