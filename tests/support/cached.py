"""Runs a case through the kernel that reads a cache, whatever the dispatch would say."""

import functools
from unittest import mock

import jax
import numpy as np
from support import hlo
from support.check import GRADIENTS, LEARNED, x64_if

from jax_flashattn import IntervalMask, _cached, _native, _validate


def as_blocks(x: np.ndarray, table: np.ndarray, count: int) -> np.ndarray:
    """Rows [b, sk, h, d] in blocks [count, size, h, d] that the table names; NaN in all others."""
    size = x.shape[1] // table.shape[1] if table.shape[1] else 1
    blocks = np.full((count, size, *x.shape[2:]), np.nan, x.dtype)
    blocks[table] = x.reshape(*table.shape, size, *x.shape[2:])
    return blocks


def make_table(b: int, sk: int, seed: int = 3) -> tuple[np.ndarray, int]:
    """Blocks of the largest size up to 16 that divides sk, in any order, and how many there are."""
    size = max(n for n in range(1, 17) if sk % n == 0) if sk else 1
    columns = sk // size
    count = b * columns + 3
    table = np.random.default_rng(seed).permutation(count)[: b * columns]
    return table.reshape(b, columns).astype(np.int32), count


@functools.cache
def _program(options: tuple, capacity: int, parts: int):
    def run(query, key, value, dout, dlse, table, arguments):
        arguments = dict(arguments)
        if "intervals" in arguments:
            arguments["mask"] = IntervalMask(*arguments.pop("intervals"))
        masks = dict.fromkeys(("lengths", "segment_ids", "mask")) | arguments

        def forward(query, key, value, learned):
            operands, spec = _validate.prepare(
                query, key, value, **(masks | learned), **dict(options), capacity=capacity
            )
            return _cached.cached_attention(operands, table, spec, parts)

        learned = {n: arguments[n] for n in LEARNED if n in arguments}
        (out, lse), pullback = jax.vjp(forward, query, key, value, learned)
        *gradients, of_learned = pullback((dout, dlse))
        return out, lse, *gradients, *of_learned.values()

    return jax.jit(run)


def execute(problem, paged: bool, parts: int = 3) -> dict:
    """As support.check.execute, with keys and values in a cache."""
    case, given = problem.case, problem.given
    table, key, value = None, given["key"], given["value"]
    if paged:
        table, count = make_table(case.b, case.sk)
        key, value = (as_blocks(x, table, count) for x in (key, value))
    with x64_if(case.dtype == "float64"):
        arrays = (given["query"], key, value, given["dout"], given["dlse"])
        arguments = problem.mask_arguments()
        run = _program(tuple(case.options().items()), case.sk, parts)
        with mock.patch.object(_cached, "_reads_in_place", return_value=True):
            compiled = run.lower(*arrays, table, arguments).compile()
        if case.b * case.sq * case.hq:
            assert hlo.count_calls(compiled.as_text(), _native.CACHED) == 1
        results = jax.device_get(compiled(*arrays, table, arguments))
    learned = ["d" + n for n in LEARNED if n in arguments]
    results = dict(zip(("out", "lse", *GRADIENTS, *learned), results, strict=True))
    for name in ("dk", "dv") if paged else ():
        x = results[name][table]
        results[name] = x.reshape(case.b, case.sk, *x.shape[3:])
    return results
