"""Appending to a cache: what is written where, in whose memory, and under every transformation."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo

from jax_flashattn import _native
from jax_flashattn._append import append, append_by_scatter

B, N, BLOCKS, SIZE = 3, 5, 7, 16
BIG = 2**31 - 1
STARTS = ((0, 3, 11), (11, 12, 16), (-1, -5, -(2**31)), (BIG, BIG - 2, 40), (14, 20, 27))
TABLES = {
    "own": None,
    "indexed": ((4,), (0,), (6,)),
    "paged": ((4, 1), (0, 2), (6, 5)),
    "wrong": ((-1, 3), (BIG, 0), (7, -(2**31))),
}
DTYPES = ("bfloat16", "float16", "float32", "int8", "float8_e4m3fn")


def arrays(dtype, tail=(2, 3), seed=0):
    rng = np.random.default_rng(seed)
    cache, new = (
        rng.integers(0, 100, shape).astype(np.float32)
        for shape in ((BLOCKS, SIZE, *tail), (B, N, *tail))
    )
    if not dtype.startswith(("int", "float8")):
        cache[:, ::2] = np.nan
    return jnp.asarray(cache, dtype), jnp.asarray(new, dtype)


def as_table(name):
    return None if TABLES[name] is None else jnp.array(TABLES[name], jnp.int32)


def written(cache, new, start, table):
    """One position at a time."""
    cache = np.array(cache)
    table = np.arange(B)[:, None] if table is None else np.asarray(table)
    for b, t in itertools.product(range(B), range(N)):
        j = int(start[b]) + t
        if 0 <= j < table.shape[1] * SIZE:
            block = table[b, j // SIZE]
            if 0 <= block < BLOCKS:
                cache[block, j % SIZE] = new[b, t]
    return cache


def same_bits(x, y):
    np.testing.assert_array_equal(np.asarray(x).view(np.uint8), np.asarray(y).view(np.uint8))


@pytest.mark.parametrize("table", TABLES)
@pytest.mark.parametrize("start", STARTS, ids=str)
def test_what_fits_is_written_and_the_rest_dropped(table, start):
    ids = as_table(table)
    for dtype in DTYPES:
        cache, new = arrays(dtype)
        wanted = written(cache, new, start, ids)
        given = (cache, new, jnp.array(start, jnp.int32), ids)
        for function in (append, jax.jit(append), append_by_scatter):
            if function is append_by_scatter and min(start) < 0:
                continue  # positions of kvcache are clamped before
            same_bits(function(*given), wanted)
        same_bits(cache, arrays(dtype)[0])  # not donated: as it was


@pytest.mark.parametrize("tail", [(), (1,), (4, 0)])
def test_any_shape_behind_the_positions(tail):
    for rows in (B, 0):
        cache, new = (x[..., :0] if 0 in tail else x for x in arrays("float32", tail or ()))
        given = cache, new[:rows], jnp.array(STARTS[0][:rows], jnp.int32), None
        same_bits(append(*given), append_by_scatter(*given))


def test_the_last_of_equal_places_wins():
    cache, new = arrays("float32")
    table = jnp.full((B, 1), 2, jnp.int32)
    out = append(cache, new, jnp.zeros(B, jnp.int32), table)
    same_bits(out[2, :N], new[-1])


def _loop(kind, body, carry):
    if kind == "none":
        return body(carry)
    if kind == "scan":
        return jax.lax.scan(lambda c, _: (body(c), None), carry, length=6)[0]
    return jax.lax.while_loop(lambda c: c[1][0] < 6, body, carry)


@pytest.mark.parametrize("table", ["own", "indexed", "paged"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("loop", ["none", "scan", "while"])
def test_a_donated_cache_is_not_copied(loop, dtype, table):
    new, ids = arrays(dtype)[1], as_table(table)

    def run(cache, start):
        return _loop(loop, lambda c: (append(c[0], new, c[1], ids), c[1] + 1), (cache, start))

    def compiled(donate):
        args = jnp.zeros((BLOCKS, SIZE, 2, 3), dtype), jnp.zeros(B, jnp.int32)
        return jax.jit(run, donate_argnums=donate).lower(*args).compile()

    def copies(donate):
        shape = re.escape(f"{ {'bfloat16': 'bf16', 'float32': 'f32'}[dtype] }[7,16,2,3]")
        return re.findall(
            rf"= {shape}\S* (copy\S*|convert|scatter|fusion)\(", compiled(donate).as_text()
        )

    assert hlo.count_calls(compiled(0).as_text(), _native.APPEND) == 1
    assert copies(0) == []
    assert copies(()) != [], "without donation there is one copy, and the check sees it"
    cache, start = jnp.full((BLOCKS, SIZE, 2, 3), 7, dtype), jnp.zeros(B, jnp.int32)
    wanted = np.array(cache)
    for step in range(1 if loop == "none" else 6):
        wanted = written(wanted, new, [step] * B, ids)
    same_bits(jax.jit(run, donate_argnums=0)(cache, start)[0], wanted)


@pytest.mark.parametrize("table", TABLES)
def test_vmap_over_every_subset(table):
    ids = as_table(table)
    caches, news = zip(*(arrays("float32", seed=seed) for seed in range(2)))
    starts = jnp.array(STARTS[:2], jnp.int32)
    tables = None if ids is None else jnp.stack([ids, ids[::-1]])
    stacked = (jnp.stack(caches, 1), jnp.stack(news), starts, tables)
    single = (caches[0], news[0], starts[0], ids)
    for axes in itertools.product((1, None), (0, None), (0, None), (0, None)):
        if axes == (None,) * 4 or (ids is None and axes[3] == 0):
            continue
        given = [one if a is None else many for a, one, many in zip(axes, single, stacked)]
        out = jax.jit(jax.vmap(append, axes))(*given)
        same_bits(out, jax.vmap(append_by_scatter, axes)(*given))
    nested = jax.vmap(jax.vmap(append, (None, 0, None, None)), (1, None, 0, None))
    same = jax.vmap(jax.vmap(append_by_scatter, (None, 0, None, None)), (1, None, 0, None))
    given = (stacked[0], stacked[1], starts, ids)
    same_bits(nested(*given), same(*given))


def test_derivatives_are_those_of_the_scatter():
    cache, new = (jnp.nan_to_num(x) for x in arrays("float32"))
    ids, start = as_table("paged"), jnp.array([14, 30, 2], jnp.int32)
    weight = jnp.asarray(np.random.default_rng(5).standard_normal(cache.shape), jnp.float32)

    def loss(function, cache, new):
        return jnp.sum(weight * function(cache**2, new**2, start, ids))

    have, wanted = (
        jax.jit(jax.grad(functools.partial(loss, f), (0, 1)))(cache, new)
        for f in (append, append_by_scatter)
    )
    for x, y in zip(have, wanted):
        same_bits(x, y)
    assert np.any(have[1])
    tangents = [
        jax.jvp(functools.partial(loss, f), (cache, new), (cache + 1, new + 1))
        for f in (append, append_by_scatter)
    ]
    np.testing.assert_array_equal(*tangents)


def test_sharded_caches():
    """Partitioned by XLA: the scatter. Inside shard_map, where each device has its part: ours."""
    mesh = Mesh(np.array(jax.devices("cpu")[:2]), ("heads",))
    cache, new = arrays("float32")
    ids, start = as_table("paged"), jnp.array([14, 30, 2], jnp.int32)
    wanted = written(cache, new, start, ids)
    spec = P(None, None, "heads")
    sharding = NamedSharding(mesh, spec)
    given = jax.device_put((cache, new), sharding)
    jitted = jax.jit(append, out_shardings=sharding)
    same_bits(jitted(*given, start, ids), wanted)
    text = jitted.lower(*given, start, ids).compile().as_text()
    assert hlo.count_calls(text, _native.APPEND) == 0
    assert not hlo.collectives(text)
    mapped = jax.jit(
        jax.shard_map(append, mesh=mesh, in_specs=(spec, spec, P(), P()), out_specs=spec)
    )
    same_bits(mapped(*given, start, ids), wanted)
    text = mapped.lower(*given, start, ids).compile().as_text()
    assert hlo.count_calls(text, _native.APPEND) == 1


CALL = {
    "cache": ((BLOCKS, SIZE, 2), "float32"),
    "new": ((B, N, 2), "float32"),
    "start": ((B,), "int32"),
    "table": ((B, 2), "int32"),
}
WRONG = (
    ({"new": ((B, N, 3), "float32")}, r"new has shape \[3, 5, 3\].* expected \[3, 5, 2\]"),
    ({"new": ((B, N, 2), "float16")}, r"new has shape"),
    ({"start": ((2,), "int32")}, r"start has shape \[2\].* expected \[3\]"),
    ({"start": ((B,), "uint32")}, r"start has shape"),
    ({"table": ((2, 2), "int32")}, r"table has shape \[2, 2\].* expected \[3, 2\]"),
    ({"table": ((B,), "int32")}, "have 3, 3 and 1 dimensions"),
    ({"cache": ((4,), "float32")}, "have 1, 3 and 2 dimensions"),
)


@pytest.mark.parametrize(("change", "message"), WRONG, ids=[x[1] for x in WRONG])
def test_the_handler_checks_shapes_again(change, message):
    given = [jnp.zeros(*x) for x in (CALL | change).values()]
    call = jax.ffi.ffi_call(
        _native.APPEND, jax.typeof(given[0]), input_output_aliases={0: 0}, vmap_method="sequential"
    )
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.jit(call)(*given))


def test_the_handler_wants_the_cache_itself():
    given = [jnp.zeros(*x) for x in CALL.values()]
    call = jax.ffi.ffi_call(_native.APPEND, jax.typeof(given[0]), vmap_method="sequential")
    with pytest.raises(Exception, match="must be the cache's own memory"):
        jax.block_until_ready(jax.jit(call)(*given))
