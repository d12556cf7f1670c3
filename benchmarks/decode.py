"""One decode step on CPU: against jax.nn and read bandwidth, and what appending costs."""

import concurrent.futures
import ctypes
import itertools
import os
import pathlib
import subprocess
import tempfile
import time

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import record
from jax_flashattn import flash_attn_with_kvcache

HQ, HK, D, BLOCK = 32, 8, 128, 256
CELLS = tuple(itertools.product(("bfloat16", "float32"), ((8, 8192), (1, 65536))))  # b, cache


def _read_loop():
    """read_loop.c, compiled for this machine."""
    source = pathlib.Path(__file__).with_name("read_loop.c")
    with tempfile.TemporaryDirectory() as folder:
        library = pathlib.Path(folder) / "read_loop.so"
        flags = ["-O3", "-march=native", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, str(source), "-o", str(library)], check=True)
        function = ctypes.CDLL(str(library)).read_words
    function.argtypes, function.restype = (ctypes.c_void_p, ctypes.c_int64), ctypes.c_uint64
    return function


class Reader:
    """Reads memory with one thread for each core; `best` is the shortest time it took."""

    def __init__(self, addresses: list[int], size: int):
        """Of pieces of `size` bytes each, every thread reads its part of every piece."""
        cores = len(os.sched_getaffinity(0))
        self.words = size // 8 // (64 * cores) * 64
        self.parts = [[at + 8 * self.words * n for at in addresses] for n in range(cores)]
        self.read, self.pool = _read_loop(), concurrent.futures.ThreadPoolExecutor(cores)
        self.best = float("inf")

    def __call__(self) -> None:
        """One pass."""
        begin = time.perf_counter()  # ctypes lets go of the GIL
        list(self.pool.map(lambda part: [self.read(at, self.words) for at in part], self.parts))
        self.best = min(self.best, time.perf_counter() - begin)


def _arrays(dtype: str, b: int, cache: int):
    rng = np.random.default_rng(0)
    q = jnp.asarray(rng.standard_normal((b, 1, HQ, D), np.float32), dtype)
    caches = [
        jnp.asarray(rng.standard_normal((b, cache, HK, D), np.float32), dtype) for _ in range(2)
    ]
    return q, *caches


def _reads(dtype: str, b: int, cache: int, seconds: float) -> dict:
    """One token over a full cache: contiguous, paged and by jax.nn."""
    q, k, v = _arrays(dtype, b, cache)
    table = np.random.default_rng(1).permutation(b * cache // BLOCK).reshape(b, -1)
    table = jnp.asarray(table, jnp.int32)
    blocks = [x.reshape(-1, BLOCK, HK, D) for x in (k, v)]
    lengths = jnp.full(b, cache, jnp.int32)
    ours = jax.jit(lambda q, k, v, n: flash_attn_with_kvcache(q, k, v, cache_seqlens=n))
    paged = jax.jit(
        lambda q, k, v, n, t: flash_attn_with_kvcache(q, k, v, cache_seqlens=n, block_table=t)
    )
    theirs = jax.jit(jax.nn.dot_product_attention)
    size = k.nbytes + v.nbytes
    same = Reader([k.unsafe_buffer_pointer(), v.unsafe_buffer_pointer()], k.nbytes)
    buffer = np.ones(size // 8, np.uint64)  # numpy asks the kernel for huge pages, XLA does not
    huge = Reader([buffer.ctypes.data], size)
    times = record.interleaved_medians(
        {
            "ours": lambda: jax.block_until_ready(ours(q, k, v, lengths)),
            "ours, paged": lambda: jax.block_until_ready(paged(q, *blocks, lengths, table)),
            "jax.nn": lambda: jax.block_until_ready(theirs(q, k, v)),
            "read loop": same,
            "read loop, huge pages": huge,
        },
        seconds,
    )
    speeds = {name: size / t / 1e9 for name, t in times.items() if name != "jax.nn"}
    speeds["read loop, best"] = size / same.best / 1e9
    speeds["read loop, huge pages, best"] = size / huge.best / 1e9
    return {
        "what": "attention of one token",
        "dtype": dtype,
        "b": b,
        "cache": cache,
        "milliseconds": {name: round(t * 1e3, 3) for name, t in times.items()},
        "gigabytes per second": {name: round(x, 2) for name, x in speeds.items()},
        "of the read loop": round(speeds["ours"] / speeds["read loop"], 3),
        "of the best read": round(speeds["ours"] / max(speeds.values()), 3),
        "vs jax.nn": round(times["jax.nn"] / times["ours"], 2),
    }


def _appends(dtype: str, b: int, cache: int, seconds: float) -> dict:
    """One step, append and attention over 64 keys, by how it gets its cache."""
    q, k, v = _arrays(dtype, b, cache)
    new = k[:, :1]

    def step(k, v, implementation):
        n = jnp.full(b, 64, jnp.int32)
        out, k, v = flash_attn_with_kvcache(
            q, k, v, new, new, cache_seqlens=n, window_size=(64, 0), implementation=implementation
        )
        return k, v, out

    def runner(donate: bool, implementation: str):
        run = jax.jit(
            lambda k, v: step(k, v, implementation), donate_argnums=(0, 1) if donate else ()
        )
        state = [k.copy(), v.copy()]

        def call():
            *state[:], out = run(*state)
            jax.block_until_ready((state, out))

        return call

    times = record.interleaved_medians(
        {
            "donated": runner(True, "kernel"),
            "copied": runner(False, "kernel"),
            "donated, XLA's scatter": runner(True, "xla"),
        },
        seconds,
    )
    return {
        "what": "append, then attention over 65 keys",
        "dtype": dtype,
        "b": b,
        "cache": cache,
        "milliseconds": {name: round(t * 1e3, 3) for name, t in times.items()},
    }


def run(seconds: float) -> None:
    """Prints a row for each measurement and writes results/cpu_decode.json."""
    rows = []
    for measure in (_reads, _appends):
        for dtype, (b, cache) in CELLS:
            rows.append(measure(dtype, b, cache, seconds))
            print(rows[-1], flush=True)
    # A load above the number of cores: others used the machine, and the numbers are provisional.
    load = round(os.getloadavg()[0], 2)
    shape = {"hq": HQ, "hk": HK, "d": D, "block": BLOCK, "load average": load}
    print("written", record.write("cpu_decode", [shape, *rows]))
