"""Programs that need a process of their own: python programs.py NAME OUT [ARGUMENT].

Each writes what the test wants to know to the npz file OUT.
"""

import os
import pathlib
import subprocess
import sys

import numpy as np


def run(name: str, out: pathlib.Path, argument: str = "", **environment: str) -> dict:
    """Runs a program in a child process and reads its results; an error there is one here."""
    flags = {"JAX_PLATFORMS": "cpu", "OPENBLAS_NUM_THREADS": "1", "XLA_FLAGS": ""}
    done = subprocess.run(
        [sys.executable, __file__, name, str(out), argument],
        env=os.environ | flags | environment,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    assert done.returncode == 0, f"{name} {argument} {environment}:\n{done.stderr[-4000:]}"
    with np.load(out) as results:
        return dict(results)


def isa(out: str, argument: str) -> None:
    """The instruction set in use; checks a small grid with it, or keeps the error of a call."""
    from support import cached, grids, xla
    from support.check import check_case, check_results
    from support.data import make_problem
    from support.tangent import check_tangents

    from jax_flashattn import _native, flash_attention

    xla.compile_quickly()
    name = _native.modules["cpu"].instruction_set()
    error = ""
    if name is None:
        x = np.ones((1, 2, 1, 8), np.float32)
        try:
            flash_attention(x, x, x).block_until_ready()
        except Exception as problem:
            error = str(problem)
    else:
        sample = (
            *(grids.HEAD_DIMS[::6] + grids.VALUE_DIMS[:1] + grids.SHAPES[9::16]),
            *(grids.SCALES[4:5] + grids.SEGMENTS[1:2] + grids.INTERVALS[5:6]),
            *(grids.FEATURES[-4:-2] + grids.BIASES[:1] + grids.BIASES[11:12]),
        )
        for case in sample:
            for dtype in ("float32", "bfloat16"):
                check_case(case.replace(dtype=dtype))
        for case in sample[2::4]:
            for dtype in ("float16", "float64"):
                check_case(case.replace(dtype=dtype))
            for dtype in ("float32", "bfloat16", "float16", "float64"):
                check_tangents(case.replace(dtype=dtype))
        few = (*grids.FEATURES[5::18], *grids.LENGTHS[1::6], *grids.HEAD_DIMS[1::6])
        for n, case in enumerate(c for c in few if not c.dropout):
            for dtype in ("float32", "bfloat16", "float16", "float64"):
                problem = make_problem(case.replace(sq=1 + n % 5, dtype=dtype, layout="dense"))
                check_results(problem, cached.execute(problem, paged=n % 2 == 1))
        spoiled = grids.LENGTHS[1].replace(lengths_q=(66, 3, 0, 64), poison="invisible")
        for dtype in ("float32", "bfloat16", "float16", "float64"):
            check_case(spoiled.replace(dtype=dtype))
            check_tangents(spoiled.replace(dtype=dtype))
    np.savez(out, name=str(name), error=error)


def results(out: str, argument: str) -> None:
    """Value, gradients and tangents of a few large cases, and how many threads the pool has."""
    from support import cached, tangent
    from support.case import Case
    from support.check import execute
    from support.data import make_problem

    base = Case(b=2, sq=300, sk=290, hq=8, hk=2, d=32, dv=48, dlse=True)
    cases = (
        base.replace(causal=True),
        base.replace(dtype="bfloat16", causal=True, deterministic=True),
        base.replace(dtype="float16", layout="lengths", lengths_q=(300, 20), lengths_k=(290, 9)),
        base.replace(b=1, sq=1, sk=300, hq=6, hk=2),
        base.replace(softcap=2.0, alibi="bh", sinks=True, dropout=0.3, bias="ij"),
    )
    arrays = {}
    for n, case in enumerate(cases):
        problem = make_problem(case)
        moved = tangent.execute(problem, tangent.directions(problem)[1])
        found = execute(problem, problem.given) | {n: moved[n] for n in ("dout", "dlse")}
        for name, x in found.items():
            arrays[f"{name}{n}"] = np.ascontiguousarray(x).view(np.uint8)
    one_token = make_problem(Case(b=1, sq=1, sk=3000, hq=8, hk=2, d=64, dv=64, dtype="bfloat16"))
    for paged in (False, True):
        for name, x in cached.execute(one_token, paged, parts=12).items():
            arrays[f"cached {paged} {name}"] = np.ascontiguousarray(x).view(np.uint8)
    tasks = pathlib.Path("/proc/self/task")
    names = [(t / "comm").read_text().strip() for t in tasks.iterdir()] if tasks.exists() else []
    np.savez(out, threads=sum(n.startswith("tf_XLAEigen") for n in names), **arrays)


def memory(out: str, argument: str) -> None:
    """Temporary bytes, peak resident growth and HLO of a long causal sequence with gradients."""
    import resource

    import jax
    import jax.numpy as jnp

    from jax_flashattn import flash_attention

    s = int(argument)
    x = jax.random.normal(jax.random.key(0), (1, s, 1, 32), jnp.bfloat16)

    def loss(q, k, v):
        out, lse = flash_attention(q, k, v, causal=True, return_lse=True)
        return out.astype(jnp.float32).sum() + lse.sum()

    compiled = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).lower(x, x, x).compile()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    jax.block_until_ready(compiled(x, x, x))
    after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    temporary = compiled.memory_analysis().temp_size_in_bytes
    np.savez(out, temporary=temporary, growth=(after - before) * 1024, text=compiled.as_text())


def cache(out: str, argument: str) -> None:
    """Persistent cache hits and misses of a sharded gradient; the argument is the folder."""
    import jax
    import jax.numpy as jnp
    from jax.sharding import NamedSharding
    from jax.sharding import PartitionSpec as P

    from jax_flashattn import flash_attention

    jax.config.update("jax_num_cpu_devices", 2)
    jax.config.update("jax_compilation_cache_dir", argument)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    x = np.random.default_rng(0).standard_normal((2, 64, 2, 16)).astype(np.float32)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    x = jax.device_put(x, NamedSharding(mesh, P("data")))
    events = []
    jax.monitoring.register_event_listener(lambda name, **_: events.append(name))
    run = jax.jit(jax.grad(lambda x: (flash_attention(x, x, x, causal=True) ** 2).sum()))
    result = jax.block_until_ready(run(x))
    count = lambda word: sum(name.endswith(word) for name in events)  # noqa: E731
    np.savez(
        out, hits=count("cache_hits"), misses=count("cache_misses"), result=jnp.asarray(result)
    )


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))
    programs = {"isa": isa, "results": results, "memory": memory, "cache": cache}
    programs[sys.argv[1]](*sys.argv[2:])
