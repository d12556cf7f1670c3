"""`python -m jax_flashattn`: what is installed, what loaded, and whether it computes correctly."""

import importlib.metadata
import platform
import sys
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jax_flashattn import _native, flash_attention


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _extension(name: str) -> str:
    if name not in _native.modules:
        return f"not loaded: {_native.problems.get(name, 'not built')}"
    if name == "cpu":
        return f"loaded, instruction set {_native.modules[name].instruction_set()}"
    return "loaded"


def _gpus() -> str:
    try:
        devices = jax.devices("gpu")
    except RuntimeError as error:
        return f"none ({str(error).splitlines()[0]})"
    return ", ".join(f"{d.device_kind} (sm_{d.compute_capability})" for d in devices)


def _self_test(device: Any, dtype: str) -> tuple[float, float]:
    """Largest relative error of output and gradients against the float32 reference; seconds."""
    rng = np.random.default_rng(0)
    begin = time.perf_counter()
    b, s, hq, hk, d = 1, 160, 4, 2, 64
    shapes = [(b, s, hq, d), (b, s, hk, d), (b, s, hk, d), (b, s, hq, d)]
    q, k, v, w = (
        jax.device_put(jnp.asarray(rng.normal(size=shape), dtype), device) for shape in shapes
    )

    def run(q, k, v, implementation):
        out, vjp = jax.vjp(
            lambda *x: flash_attention(
                *x, causal=True, window=(100, 0), implementation=implementation
            ),
            q,
            k,
            v,
        )
        return out, *vjp(w.astype(out.dtype))

    got = jax.jit(run, static_argnums=3)(q, k, v, "kernel")
    want = jax.jit(run, static_argnums=3)(*(x.astype(jnp.float32) for x in (q, k, v)), "reference")
    errors = []
    for x, y in zip(got, want):
        x, y = np.asarray(x, np.float64), np.asarray(y, np.float64)
        errors.append(np.linalg.norm(x - y) / np.linalg.norm(y))
    return max(errors), time.perf_counter() - begin


def main() -> int:
    """Prints the report; returns 1 if a self-test failed."""
    rows = {
        "jax_flashattn": _version("jax_flashattn"),
        "python": platform.python_version(),
        "jax": f"{jax.__version__} (jaxlib {_version('jaxlib')}, flax {_version('flax')})",
        "machine": f"{platform.machine()}, {jax.local_device_count()} jax device(s)",
        "GPUs": _gpus(),
        "CPU kernels": _extension("cpu"),
        "CUDA kernels": _extension("CUDA"),
    }
    for name, text in rows.items():
        print(f"{name:>14}  {text}")

    failed = False
    tests = [(jax.devices("cpu")[0], "float32", 1e-5)]
    if "CUDA" in _native.modules and not _gpus().startswith("none"):
        tests.append((jax.devices("gpu")[0], "bfloat16", 1e-2))
    for device, dtype, bound in tests:
        error, seconds = _self_test(device, dtype)
        good = error < bound
        failed |= not good
        print(
            f"{'self-test':>14}  {device.platform} {dtype}: relative error {error:.1e} "
            f"({'ok' if good else f'FAILED, expected below {bound:.0e}'}), {seconds:.1f} s"
        )
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
