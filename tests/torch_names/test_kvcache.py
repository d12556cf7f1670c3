"""flash_attn_with_kvcache against a plain numpy cache, in float64."""

import functools
import inspect
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hlo
from support.caches import (
    CAPACITY,
    HK,
    HQ,
    KINDS,
    LENGTHS,
    SIZE,
    B,
    Contiguous,
    D,
    Paged,
    garbage_behind,
    normal,
    oracle,
    tables,
)

from jax_flashattn import _native, flash_attn_with_kvcache

SIGNATURE = (  # reference: flash-attn 2.8.3
    "q,k_cache,v_cache,k=None,v=None,rotary_cos=None,rotary_sin=None,cache_seqlens=None,"
    "cache_batch_idx=None,cache_leftpad=None,block_table=None,softmax_scale=None,causal=False,"
    "window_size=(-1,-1),softcap=0.0,rotary_interleaved=True,alibi_slopes=None,num_splits=0,"
    "return_softmax_lse=False"
)
# Options a call may have, by flash-attn's names.
FEATURES = (
    {},
    {"causal": True},
    {"causal": True, "window_size": (9, -1), "num_splits": 4},
    {"window_size": (6, 2), "softmax_scale": 0.3},
    {"causal": True, "softcap": 2.0, "alibi_slopes": np.array([0.5, 0.25, 0.125, 0.1], np.float32)},
)


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def check(kind, sq, new_tokens, *, leftpad=None, rotary=None, lengths=LENGTHS, **features):
    layout = KINDS[kind]()
    q = normal(0, B, sq, HQ, D)
    rows = garbage_behind(normal(1, 2, B, CAPACITY, HK, D), lengths)
    new = None if new_tokens is None else normal(2, 2, B, new_tokens, HK, D)
    wanted = oracle(q, rows, new, lengths, leftpad, rotary, **features)
    cache = layout.store(rows)
    options = features | layout.arguments | {"return_softmax_lse": True}
    if leftpad is not None:
        options["cache_leftpad"] = leftpad
    if rotary:
        cos, sin = tables(rotary[0])
        options |= {"rotary_cos": cos, "rotary_sin": sin, "rotary_interleaved": rotary[1]}

    def call(q, cache, new, lengths):
        new = (None, None) if new is None else new
        return flash_attn_with_kvcache(q, *cache, *new, cache_seqlens=lengths, **options)

    for function in (call, jax.jit(call)):
        results = function(q, cache, new, lengths)
        np.testing.assert_allclose(results[0], wanted[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(results[-1], wanted[1], rtol=1e-9)
        assert len(results) == (2 if new is None else 4)
        if new is not None:
            after = np.stack(results[1:3])
            np.testing.assert_allclose(layout.load(after), wanted[2], rtol=1e-12)
            np.testing.assert_array_equal(after, layout.store(layout.load(after)))  # only there


def test_signature():
    parameters = inspect.signature(flash_attn_with_kvcache).parameters.values()
    given = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    words = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in given]
    assert ",".join(words).replace(", ", ",") == SIGNATURE


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("sq", "new"), [(1, 1), (1, None), (7, 7), (3, 20), (20, 3), (31, 31)])
def test_append_and_attend(kind, sq, new, features):
    check(kind, sq, new, **features)


@pytest.mark.parametrize("features", FEATURES[:3], ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rotary", [(16, True), (32, True), (16, False), (32, False)], ids=str)
def test_rotary(kind, rotary, features):
    check(kind, 5, 5, rotary=rotary, **features)


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("new", [None, 4])
def test_leftpad(kind, new, features):
    leftpad = np.array([2, 30, 0], np.int32)
    check(kind, 4, new, leftpad=leftpad, rotary=None if new is None else (16, True), **features)


# Of flash-attn 2's and 3's suites: (sq, sk), and here also one that no tile divides.
LENGTH_PAIRS = (
    *((1, 128), (1, 339), (3, 1024), (64, 800), (64, 256), (3, 799), (64, 2048), (16, 20000)),
    *((128, 128), (1, 1), (113, 203), (128, 217), (108, 256), (256, 512), (1023, 1024), (1, 3131)),
)
HEAD_RATIOS = ((6, 6), (6, 2), (6, 1), (4, 2))
WINDOWS = ({}, {"causal": True}, {"causal": True, "window_size": (70, -1)}, {"window_size": (5, 9)})


@pytest.mark.parametrize(("sq", "sk"), LENGTH_PAIRS)
def test_lengths_of_the_original_suites(sq, sk):
    """Ragged and empty caches, every ratio of heads, windows, both ways a cache lies in turn."""
    capacity = -(-(sk + sq) // SIZE) * SIZE
    for n, window in enumerate(WINDOWS):
        hq, hk = HEAD_RATIOS[(n + sq + sk) % 4]
        lengths = np.array([max(sk - sq, 0), 0, sk // 3], np.int32)
        q, new = normal(0, B, sq, hq, D), normal(2, 2, B, sq, hk, D)
        rows = garbage_behind(normal(1, 2, B, capacity, hk, D), lengths)
        wanted = oracle(q, rows, new, lengths, **window)
        paged = (n + LENGTH_PAIRS.index((sq, sk))) % 2
        layout = Paged(capacity) if paged else Contiguous([4, 0, 2])
        results = flash_attn_with_kvcache(
            q, *layout.store(rows), *new, cache_seqlens=lengths, return_softmax_lse=True,
            **window, **layout.arguments,
        )  # fmt: skip
        np.testing.assert_allclose(results[0], wanted[0], rtol=1e-8, atol=1e-11)
        np.testing.assert_allclose(results[-1], wanted[1], rtol=1e-9)
        np.testing.assert_array_equal(layout.load(np.stack(results[1:3])), wanted[2])


@pytest.mark.parametrize("sq", [1, 8, 9, 64, 65])
@pytest.mark.parametrize("kind", KINDS)
def test_which_kernel_reads_the_cache(kind, sq):
    """Ours up to a size of q, else the general one; a paged cache is gathered only for that."""
    layout = KINDS[kind]()
    caches = layout.store(
        np.zeros((2, B, 256, HK, D)) if kind != "paged" else np.zeros((2, B, CAPACITY, HK, D))
    )
    run = jax.jit(functools.partial(flash_attn_with_kvcache, cache_seqlens=LENGTHS, causal=True))
    text = run.lower(np.zeros((B, sq, HQ, D)), *caches, **layout.arguments).compile().as_text()
    ours = sq * HQ // HK <= 16 if kind == "plain" else sq <= 64
    assert hlo.count_calls(text, _native.CACHED) == ours
    hlo.assert_kernels(text, forward=int(not ours))


@pytest.mark.parametrize("implementation", ["kernel", "xla", "reference"])
@pytest.mark.parametrize("kind", KINDS)
def test_implementations(kind, implementation):
    check(kind, 3, 5, causal=True, implementation=implementation)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("kind", KINDS)
def test_any_hint_gives_the_same(kind, dtype):
    layout = KINDS[kind]()
    q, new = (normal(n, *shape).astype(dtype) for n, shape in
              ((0, (B, 2, HQ, D)), (2, (2, B, 2, HK, D))))  # fmt: skip
    rows = garbage_behind(normal(1, 2, B, CAPACITY, HK, D), LENGTHS).astype(dtype)
    wide = (x.astype(np.float64) for x in (q, rows, new))
    wanted = oracle(*wide, LENGTHS, causal=True)[0]
    for hint in (0, 1, 2, 5, 128):
        out = flash_attn_with_kvcache(
            q, *layout.store(rows).astype(dtype), *new, cache_seqlens=LENGTHS, causal=True,
            num_splits=hint, **layout.arguments,
        )[0]  # fmt: skip
        limit = {"float32": 2e-6, "bfloat16": 2e-2, "float16": 3e-3}[dtype]
        np.testing.assert_allclose(out.astype(np.float64), wanted, atol=limit)


@pytest.mark.parametrize("kind", KINDS)
def test_gradients_are_those_of_the_general_kernel(kind):
    layout = KINDS[kind]()
    q, new = normal(0, B, 3, HQ, D), normal(2, 2, B, 3, HK, D)
    caches = np.nan_to_num(layout.store(normal(1, 2, B, CAPACITY, HK, D)))

    def loss(q, caches, new, implementation):
        out, *after, lse = flash_attn_with_kvcache(
            q, *caches, *new, cache_seqlens=LENGTHS, causal=True, return_softmax_lse=True,
            implementation=implementation, **layout.arguments,
        )  # fmt: skip
        return jnp.sum(out**2) + jnp.sum(jnp.sin(lse)) + sum(jnp.sum(x**3) for x in after)

    have, wanted = (
        jax.jit(jax.grad(functools.partial(loss, implementation=name), (0, 1, 2)))(q, caches, new)
        for name in ("kernel", "xla")
    )
    for x, y in zip(have, wanted):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)
        assert np.any(x)


@pytest.mark.parametrize("kind", KINDS)
def test_one_length_for_all(kind):
    """cache_seqlens as an int, and as a traced scalar."""
    layout = KINDS[kind]()
    q, new = normal(0, B, 2, HQ, D), normal(2, 2, B, 2, HK, D)
    rows = garbage_behind(normal(1, 2, B, CAPACITY, HK, D), [11] * B)
    wanted = oracle(q, rows, new, [11] * B, causal=True)
    call = functools.partial(flash_attn_with_kvcache, causal=True, **layout.arguments)
    cache = layout.store(rows)
    jitted = jax.jit(lambda n: call(q, *cache, *new, cache_seqlens=n))
    for out, *caches in (call(q, *cache, *new, cache_seqlens=11), jitted(np.int32(11))):
        np.testing.assert_allclose(out, wanted[0], rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(layout.load(np.stack(caches)), wanted[2], rtol=1e-12)


def test_a_full_cache_is_the_default():
    q, rows = normal(0, B, 3, HQ, D), normal(1, 2, B, CAPACITY, HK, D)
    out = flash_attn_with_kvcache(q, *rows, causal=True)
    wanted = oracle(q, rows, None, [CAPACITY] * B, causal=True)
    np.testing.assert_allclose(out, wanted[0], rtol=1e-9, atol=1e-12)


def test_a_cache_of_more_rows_than_queries():
    q, rows = normal(0, B, 1, HQ, D), normal(1, 2, 5, CAPACITY, HK, D)
    out = flash_attn_with_kvcache(q, *rows, cache_seqlens=LENGTHS)
    wanted = oracle(q, rows[:, :B], None, LENGTHS)
    np.testing.assert_allclose(out, wanted[0], rtol=1e-9, atol=1e-12)


def test_chunked_prefill_and_decode_give_the_whole_sequence():
    """Any cut of a sequence into chunks gives what one causal call gives."""
    q, k, v = normal(0, 1, 40, HQ, D), normal(1, 1, 40, HK, D), normal(2, 1, 40, HK, D)
    whole = oracle(
        *(np.repeat(q, B, 0), np.zeros((2, B, CAPACITY, HK, D))),
        *(np.repeat(np.stack([k, v]), B, 1), [0] * B),
        causal=True,
        rotary=(16, True),
    )[0][:1]
    cos, sin = tables(16)
    for cuts in ([0, 40], [0, 7, 8, 9, 30, 40], [*range(41)]):
        cache, parts = [jnp.zeros((1, CAPACITY, HK, D))] * 2, []
        for start, end in itertools.pairwise(cuts):
            chunk = [x[:, start:end] for x in (q, k, v)]
            out, *cache = flash_attn_with_kvcache(
                *(chunk[0], *cache, *chunk[1:], cos, sin, start), causal=True
            )
            parts.append(out)
        np.testing.assert_allclose(np.concatenate(parts, 1), whole, rtol=1e-9, atol=1e-12)


def _decode_loop(loop, steps, kind, q, caches, new, lengths):
    """One decode step, or `steps` in a loop of jax.lax; returns caches, lengths, out."""
    arguments = KINDS[kind]().arguments

    def step(carry):
        caches, n, q = carry
        out, *caches = flash_attn_with_kvcache(
            q, *caches, new, new, cache_seqlens=n, causal=True, **arguments
        )
        return tuple(caches), n + 1, out

    start = (tuple(caches), lengths, q)
    if loop == "scan":
        return jax.lax.scan(lambda c, _: (step(c), None), start, length=steps)[0]
    if loop == "while":
        return jax.lax.while_loop(lambda c: c[1][0] < lengths[0] + steps, step, start)
    return step(start)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("loop", ["none", "scan", "while"])
def test_a_donated_cache_stays_where_it_is(loop, dtype, kind):
    """Nothing but the two appends has a result of the cache's size, also with pages and indices."""
    cache = KINDS[kind]().store(np.zeros((2, B, CAPACITY, HK, D)))[0].astype(dtype)
    cache = jnp.asarray(np.concatenate([cache] * 4))  # larger than all that is temporary
    q, new = jnp.ones((B, 1, HQ, D), dtype), jnp.ones((B, 1, HK, D), dtype)
    lengths = jnp.asarray(LENGTHS)

    def compiled(donate):
        run = jax.jit(functools.partial(_decode_loop, loop, 8, kind), donate_argnums=donate)
        return run.lower(q, (cache, cache), new, lengths).compile()

    def cache_sized(compiled):
        shape = {"bfloat16": "bf16", "float32": "f32"}[dtype] + str([*cache.shape]).replace(" ", "")
        found = re.findall(rf"= {re.escape(shape)}\S* (\S+)\(", compiled.as_text())
        fine = ("parameter", "get-tuple-element", "custom-call")
        return [x for x in found if x not in fine]

    donated = compiled(1)
    text = donated.as_text()
    assert hlo.count_calls(text, _native.APPEND) == 2
    assert hlo.count_calls(text, _native.CACHED) == 1
    assert cache_sized(donated) == []
    memory = donated.memory_analysis()
    assert memory.temp_size_in_bytes < cache.nbytes / 2
    assert memory.alias_size_in_bytes >= 2 * cache.nbytes
    assert cache_sized(compiled(())) != [], "the check sees the copies of what is not donated"


@pytest.mark.parametrize("loop", ["scan", "while"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_gives_what_its_steps_give(kind, loop):
    layout = KINDS[kind]()
    q, new = normal(0, B, 1, HQ, D), normal(2, B, 1, HK, D)
    caches = tuple(layout.store(garbage_behind(normal(1, 2, B, CAPACITY, HK, D), LENGTHS)))
    run = jax.jit(functools.partial(_decode_loop, loop, 4, kind), donate_argnums=1)
    results = run(q, jax.tree.map(jnp.asarray, caches), new, jnp.asarray(LENGTHS))
    for n in range(4):
        caches, _, q = _decode_loop("none", 1, kind, q, caches, new, jnp.asarray(LENGTHS + n))
    for x, y in zip((*results[0], results[2]), (*caches, q)):
        np.testing.assert_allclose(x, y, rtol=1e-9, atol=1e-12)


def _bad(**change):
    x, cache = np.ones((2, 1, HQ, D)), np.ones((2, 32, HK, D))
    new = np.ones((2, 1, HK, D))
    base = {"q": x, "k_cache": cache, "v_cache": cache, "k": new, "v": new, "cache_seqlens": 5}
    return flash_attn_with_kvcache(**base | change)


TABLE = np.zeros((2, 2), np.int32)
BAD = (
    ({"cache_seqlens": 32}, "room for 32 keys per sequence; cache_seqlens 32 and 1 new ones"),
    ({"cache_seqlens": [5, 40]}, "cache_seqlens 40 and 1 new ones do not fit"),
    ({"cache_seqlens": [5, -1]}, "cache_seqlens must be 0 or more, got -1"),
    ({"cache_seqlens": None}, "cache_seqlens must be given with k and v"),
    ({"v": None}, "k and v must be given together"),
    ({"k": np.ones((2, 1, 3, D))}, r"k must have shape \(2, 1, 2, 32\)"),
    ({"cache_batch_idx": [0, 2]}, "cache_batch_idx must be 0 to 1, got 0 to 2"),
    ({"cache_leftpad": [0, 33]}, "cache_leftpad must be 0 to 32, got 0 to 33"),
    ({"block_table": TABLE + 2}, "block_table must hold ids 0 to 1, got 2"),
    ({"block_table": TABLE, "cache_batch_idx": [0, 1]}, "no meaning with block_table"),
    ({"implementation": "cudnn"}, "implementation must be one of .*'xla'.*, got 'cudnn'"),
    ({"block_table": TABLE[:, :0]}, r"with one block at least, got \(2, 0\)"),
    ({"block_table": TABLE[:1]}, r"block_table must have shape \[2, blocks per sequence\]"),
    ({"num_splits": -1}, "num_splits must be 0 to 128, got -1"),
    ({"rotary_cos": np.ones((32, 4))}, "rotary_cos and rotary_sin must be given together"),
    (dict.fromkeys(("rotary_cos", "rotary_sin"), np.ones((32, 4))), "multiple of 16, got 8"),
    (dict.fromkeys(("rotary_cos", "rotary_sin"), np.ones((32, 24))), "at most head_dim 32, got 48"),
    (dict.fromkeys(("rotary_cos", "rotary_sin"), np.ones((31, 8))), "32 positions, got 31"),
)


@pytest.mark.parametrize(("change", "message"), BAD, ids=[x[1] for x in BAD])
def test_errors(change, message):
    with pytest.raises(ValueError, match=message):
        _bad(**change)


def test_type_errors():
    with pytest.raises(TypeError, match="k must have the cache's dtype float64, got float32"):
        _bad(k=np.ones((2, 1, HK, D), np.float32))
    with pytest.raises(TypeError, match="cache_seqlens must have dtype int32"):
        _bad(cache_seqlens=np.ones(2))
    with pytest.raises(ValueError, match="rotary_cos and rotary_sin need k and v"):
        _bad(k=None, v=None, rotary_cos=np.ones((32, 8)), rotary_sin=np.ones((32, 8)))


@pytest.mark.parametrize("kind", KINDS)
def test_traced_nonsense_never_writes_elsewhere(kind):
    """Lengths and tables out of range: what fits is written to its place, the rest is dropped."""
    layout = KINDS[kind]()
    rows, new = normal(1, 2, B, CAPACITY, HK, D), normal(2, 2, B, 4, HK, D)
    lengths = np.array([CAPACITY - 2, 2**31 - 1, -7], np.int32)
    wanted = rows.copy()
    wanted[:, 0, -2:] = new[:, 0, :2]
    wanted[:, 2, :4] = new[:, 2]
    run = jax.jit(
        lambda cache, lengths, arguments: flash_attn_with_kvcache(
            normal(0, B, 4, HQ, D), *cache, *new, cache_seqlens=lengths, causal=True, **arguments
        )
    )
    out, *caches = run(layout.store(rows), lengths, layout.arguments)
    np.testing.assert_array_equal(layout.load(np.stack(caches)), wanted)
    assert np.all(np.isfinite(out))
    for name, array in layout.arguments.items():
        for wrong in (-1, 99, -(2**31), 2**31 - 1):
            after = run(layout.store(rows), lengths, {name: np.full_like(array, wrong)})[1:]
            np.testing.assert_array_equal(np.stack(after), layout.store(rows))


@pytest.mark.parametrize(
    ("kind", "change", "message"),
    [
        (
            "plain",
            {"cache_seqlens": [CAPACITY, 0, 0]},
            "cache_seqlens 64 and 1 new ones do not fit",
        ),
        ("plain", {"cache_seqlens": [-1, 0, 0]}, "cache_seqlens must be 0 or more, got -1"),
        ("indexed", {"cache_batch_idx": [5, 0, 1]}, "cache_batch_idx must be 0 to 4, got 0 to 5"),
        ("plain", {"cache_leftpad": [65, 0, 1]}, "cache_leftpad must be 0 to 64, got 0 to 65"),
        ("paged", {"block_table": [[77] * 4] * 3}, "block_table must hold ids 0 to 19, got 77"),
    ],
)
def test_traced_values_are_checked_on_request(kind, change, message, monkeypatch):
    layout = KINDS[kind]()
    q, new = normal(0, B, 1, HQ, D), normal(2, B, 1, HK, D)
    caches = layout.store(np.zeros((2, B, CAPACITY, HK, D)))
    given = {"cache_seqlens": LENGTHS} | layout.arguments
    given |= {name: np.array(x, np.int32) for name, x in change.items()}

    def call(given):
        return flash_attn_with_kvcache(q, *caches, new, new, **given)

    jax.block_until_ready(jax.jit(call)(given))  # off by default
    monkeypatch.setenv("JAX_FLASHATTN_CHECK_VALUES", "1")
    with pytest.raises(Exception, match=message):
        jax.block_until_ready(jax.jit(lambda given: call(given))(given))
    jax.effects_barrier()


@pytest.mark.parametrize("kind", KINDS)
def test_vmap(kind):
    layout = KINDS[kind]()
    q, rows = normal(0, 2, B, 1, HQ, D), normal(1, 2, 2, B, CAPACITY, HK, D)
    new = normal(2, 2, 2, B, 1, HK, D)
    cache = np.stack([layout.store(x) for x in rows])
    lengths = np.stack([LENGTHS, LENGTHS + 7])

    def call(q, cache, new, lengths):
        return flash_attn_with_kvcache(
            q, *cache, *new, cache_seqlens=lengths, causal=True, **layout.arguments
        )

    results = jax.jit(jax.vmap(call))(q, cache, new, lengths)
    for n in range(2):
        for x, y in zip(results, call(q[n], cache[n], new[n], lengths[n])):
            np.testing.assert_allclose(x[n], y, rtol=1e-9, atol=1e-12)
