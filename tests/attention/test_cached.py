"""The CPU kernel that reads a cache where it lies, against the oracle, over the forward's grids."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import grids, hlo
from support.cached import as_blocks, execute, make_table
from support.case import Case, cases
from support.check import check_results
from support.compare import assert_bitwise, assert_same_numbers
from support.data import make_problem

from jax_flashattn import _cached, _native, _validate

DTYPES = ("float32", "bfloat16", "float16", "float64")


def _has_kernel(case: Case) -> bool:
    return case.dropout == 0 and case.bias is None


GRID = [
    *(grids.HEADS[::2] + grids.HEAD_DIMS[::3] + grids.VALUE_DIMS[::2] + grids.SHAPES[::4]),
    *(grids.WINDOWS[::6] + grids.SCALES[::2] + grids.STRUCTURED[::2] + grids.LENGTHS[::3]),
    *(grids.SEGMENTS[::5] + grids.INTERVALS[::2]),
    *(c for c in grids.FEATURES[::3] if _has_kernel(c)),
]
FEW_ROWS = [
    Case(b=3, sq=sq, sk=sk, hq=hq, hk=hk, d=d, dv=dv, **mask)
    for (sq, sk), (hq, hk), (d, dv), mask in zip(
        itertools.cycle(((1, 1), (1, 300), (2, 129), (3, 64), (5, 500), (16, 65))),
        itertools.cycle(((8, 2), (3, 3), (7, 1), (4, 1), (6, 2), (12, 6), (16, 16))),
        itertools.cycle(((64, 64), (128, 128), (80, 24), (33, 65), (256, 200))),
        itertools.chain(
            itertools.repeat({"causal": True}, 9),
            itertools.repeat({"left": 70, "right": 1}, 6),
            itertools.repeat({"layout": "lengths", "lengths_q": (16, 1, 0), "causal": True,
                              "lengths_k": (300, 5, 64), "alibi": "bh", "sinks": True}, 9),
            itertools.repeat({"interval": "random", "softcap": 2.0}, 6),
        ),
    )
]  # fmt: skip


@cases(*(c.replace(dtype=t) for c, t in zip(GRID, itertools.cycle(DTYPES))))
def test_grid(case):
    check_results(p := make_problem(case), execute(p, paged=case.sq % 2 == 0))


@cases(*(c.replace(dtype=t, dlse=True) for c, t in zip(FEW_ROWS, itertools.cycle(DTYPES))))
def test_few_rows(case):
    check_results(p := make_problem(case), execute(p, paged=case.sk % 2 == 0))


@cases(
    *(
        Case(b=2, sq=sq, sk=300, hq=4, hk=2, d=d, dv=d, dtype=t, poison="invisible", **mask)
        for (t, d), (sq, mask) in itertools.product(
            (("float32", 64), ("bfloat16", 48), ("float16", 33), ("float64", 16)),
            (
                (1, {"left": 37, "right": 0}),
                (6, {"layout": "lengths", "lengths_q": (6, 3), "lengths_k": (131, 7), "left": 9}),
                (7, {"interval": "random"}),
            ),
        )
    )
)
def test_nothing_hidden_is_read(case):
    """S13: NaN in keys and values that no row sees, and in blocks that no table names."""
    p = make_problem(case)
    for paged in (False, True):
        results = execute(p, paged)
        check_results(p, results)


@pytest.mark.parametrize("value", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_value_reaches_the_rows_that_see_it_and_no_other(dtype, value):
    """At the end of an odd number of keys as well: its partner in a pair is nothing."""
    case = Case(sq=5, sk=71, hq=2, d=32, dv=32, causal=True, dtype=dtype)
    p = make_problem(case)
    clean = execute(p, paged=False)["out"].astype(np.float32)
    for at in range(64, 71):
        changed = {n: x.copy() for n, x in p.given.items()}
        changed["value"][0, at] = value
        q = type(p)(**(vars(p) | {"given": changed}))
        out = execute(q, paged=False)["out"].astype(np.float32)
        sees = np.arange(5) + 71 - 5 >= at
        assert_same_numbers("unseen", out[:, ~sees], clean[:, ~sees], dtype)
        wanted = np.broadcast_to(np.float32(value), out[:, sees].shape)
        np.testing.assert_array_equal(out[:, sees], wanted)


LONG = Case(b=2, sq=2, sk=1200, hq=4, hk=2, d=64, dv=64, causal=True, sinks=True, alibi="h")


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_number_of_parts(dtype):
    """Down to less than one tile of keys for each; the last ones may be empty."""
    p = make_problem(LONG.replace(dtype=dtype))
    for parts in (1, 2, 7, 18, 19, 20, 128):
        check_results(p, execute(p, paged=True, parts=parts))


def test_ids_out_of_range_are_clamped():
    case = Case(b=2, sq=1, sk=64, hq=2, d=16, dv=16)
    p = make_problem(case)
    table, count = make_table(2, 64)
    key, value = (jnp.nan_to_num(as_blocks(p.given[n], table, count)) for n in ("key", "value"))
    query = jnp.asarray(p.given["query"])

    def run(table):
        operands, spec = _validate.prepare(
            query, key, value, causal=False, window=None, scale=None, segment_ids=None,
            lengths=None, mask=None, deterministic=False, capacity=64,
        )  # fmt: skip
        return _cached.cached_attention(operands, table, spec, 2)

    for wrong, meant in ((-1, 0), (-(2**31), 0), (count, count - 1), (2**31 - 1, count - 1)):
        results = [run(jnp.asarray(table).at[1, 2].set(n)) for n in (wrong, meant)]
        for x, y in zip(*results):
            assert_bitwise(f"id {wrong}", x, y)


def _batched_call(spec_of, parts):
    def call(query, key, value, lengths, table):
        operands, spec = spec_of(query, key, value, lengths, table)
        return _cached.cached_attention(operands, table, spec, parts)

    return call


@pytest.mark.parametrize("paged", [False, True])
def test_vmap_over_every_subset(paged):
    """One call; a cache that all slices share is not copied for each."""
    b, blocks, size, columns = 2, 5, 8, 3
    rng = np.random.default_rng(0)
    capacity = columns * size if paged else size

    def spec_of(query, key, value, lengths, table):
        return _validate.prepare(
            query, key, value, causal=True, window=None, scale=None, segment_ids=None,
            lengths=(jnp.full(b, 2, jnp.int32), lengths), mask=None, deterministic=False,
            capacity=capacity,
        )  # fmt: skip

    call = _batched_call(spec_of, 2)
    shapes = ((3, b, 2, 4, 16), (3, blocks, size, 2, 16), (3, blocks, size, 2, 16))
    many = [jnp.asarray(rng.standard_normal(s), jnp.float32) for s in shapes]
    many.append(jnp.asarray(rng.integers(0, capacity + 1, (3, b)), jnp.int32))
    many.append(jnp.asarray(rng.integers(-1, blocks + 1, (3, b, columns)), jnp.int32))
    for mapped in itertools.product((True, False), repeat=5):
        if not any(mapped[: 5 if paged else 4]):
            continue
        given = [x if m else x[0] for x, m in zip(many, mapped)]
        axes = [0 if m else None for m in mapped]
        if not paged:
            given[4], axes[4] = None, None
        run = jax.jit(jax.vmap(call, axes))
        text = run.lower(*given).compile().as_text()
        assert hlo.count_calls(text, _native.CACHED) == 1
        if not (mapped[1] or mapped[2]):
            assert "f32[15,8,2,16]" not in text
        results = run(*given)
        for n in range(3):
            one = [x[n] if a == 0 else x for x, a in zip(given, axes)]
            for x, y in zip(results, call(*one)):
                np.testing.assert_allclose(x[n], y, rtol=1e-5, atol=1e-6)
