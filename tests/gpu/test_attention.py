"""The CPU grids on CUDA, and what only a GPU can get wrong.

Without a GPU these are skipped; with --require-gpu that is a failure. --backend cpu runs them on
the CPU instead, to test the tests.
"""

import concurrent.futures
import contextlib
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import grids, hlo, oracle
from support.case import Case, cases
from support.check import GRADIENTS, check_case, check_results, execute, jitted
from support.compare import assert_bitwise, assert_same_numbers
from support.data import make_problem
from support.memory_load import memory_load
from support.tangent import check_tangents

from jax_flashattn import _native, flash_attention

DTYPES = ("bfloat16", "float16")
GRID = [case for case in grids.ALL if case.scale is None or abs(case.scale) < 3]


@pytest.fixture(scope="module")
def platform(request):
    """ "cuda", or what --backend says."""
    backend = request.config.getoption("backend") or "cuda"
    problem = _missing(backend)
    if problem and request.config.getoption("require_gpu"):
        pytest.fail(f"--require-gpu: {problem}")
    if problem:
        pytest.skip(problem)
    return backend


def _missing(backend: str) -> str | None:
    """Why this platform cannot run the tests, or None."""
    try:
        jax.devices(backend)
    except RuntimeError as error:
        return f"jax has no {backend} device: {error}"
    if backend == "cuda" and "CUDA" not in _native.modules:
        return f"the CUDA extension is missing: {_native.problems.get('CUDA')}"
    return None


def put(platform, *arrays):
    return [jax.device_put(x, jax.devices(platform)[0]) for x in arrays]


@cases(*(case.replace(dtype=dtype) for case in GRID for dtype in DTYPES))
def test_grid(case, platform):
    check_case(case, platform)


@cases(*(c.replace(dtype=t) for c, t in zip(GRID[::3], itertools.cycle(DTYPES))))
def test_tangents(case, platform):
    check_tangents(case, platform)


BASE = Case(b=2, sq=300, sk=260, hq=8, hk=2, d=64, dv=64, dtype="bfloat16", dlse=True)
VARIANTS = (
    BASE,
    BASE.replace(causal=True),
    BASE.replace(d=128, dv=128, causal=True, left=70),
    BASE.replace(d=256, dv=256, causal=True),
    BASE.replace(layout="lengths", lengths_q=(300, 129), lengths_k=(65, 260), causal=True),
    BASE.replace(sk=300, layout="segments", lengths_q=((100, 1, 64, 100), (300,)), causal=True),
    BASE.replace(interval="random"),
    BASE.replace(causal=True, softcap=4.0, alibi="bh", sinks=True, dropout=0.2),
    BASE.replace(sk=300, layout="segments", lengths_q=((100, 1, 64, 100), (300,)), alibi="h",
                 sinks=True, dropout=0.4),
    BASE.replace(alibi="bh", scale=-0.3),
    BASE.replace(alibi="h", scale=0.0, causal=True),
    BASE.replace(alibi="h", scale=1e-25),
    BASE.replace(softcap=4.0, scale=0.0),
    BASE.replace(d=256, dv=256, alibi="h", softcap=3.0, scale=-0.7, causal=True),
    BASE.replace(d=192, dv=128, alibi="h", dropout=0.2),
    # The other head dims of the instances with ALiBi alone, with softcap, with dropout.
    BASE.replace(d=96, dv=96, alibi="bh"),
    BASE.replace(d=128, dv=128, alibi="h", causal=True),
    BASE.replace(d=192, dv=192, alibi="h", causal=True, scale=-0.2),
    BASE.replace(d=256, dv=256, alibi="bh"),
    BASE.replace(d=128, dv=128, softcap=5.0, causal=True),
    BASE.replace(d=96, dv=96, dropout=0.1, causal=True),
    BASE.replace(d=128, dv=128, dropout=0.3, alibi="h"),
    BASE.replace(d=256, dv=256, dropout=0.3, causal=True),
    BASE.replace(dropout=0.2, causal=True, left=70),
    BASE.replace(d=192, dv=192, dropout=0.2),
    BASE.replace(d=128, dv=128, sk=300, layout="segments",
                 lengths_q=((100, 1, 64, 100), (300,)), dropout=0.3),
    # ALiBi alone walks blocks downwards: masks that begin and end anywhere.
    BASE.replace(d=128, dv=128, alibi="h", interval="random"),
    BASE.replace(sk=300, layout="segments", lengths_q=((100, 1, 64, 100), (300,)), alibi="h"),
    BASE.replace(alibi="bh", causal=True, left=70),
)  # fmt: skip


@cases(*VARIANTS)
def test_agrees_with_the_cpu_kernel(case, platform):
    """Both kernels, same inputs: within a few roundings of each other."""
    problem = make_problem(case)
    here, there = (execute(problem, problem.given, p) for p in (platform, "cpu"))
    for name, x in here.items():
        a, b = x.astype(float), there[name].astype(float)
        assert np.array_equal(np.isneginf(a), np.isneginf(b)), name
        a, b = (np.where(np.isneginf(y), 0, y) for y in (a, b))
        scale = 1e-4 if name == "lse" else 3e-2
        np.testing.assert_allclose(a, b, atol=scale * np.abs(b).max(), err_msg=name)


MASKS = {
    "full": {},
    "causal": {"causal": True},
    "window": {"window": (150, 40)},
    "documents": {"causal": True, "segment_ids": True},
    "apart": {"segment_ids": True},
    "lengths": {"lengths": True},
    "in turn": {"causal": True, "deterministic": True},
    "dropout": {"causal": True, "dropout_rate": 0.2, "dropout_key": True},
    "ALiBi": {"window": (400, 40), "alibi_slopes": True},
    "softcap": {"causal": True, "softcap": 3.0},
}


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_many_tiles_for_every_block(d, mask, platform):
    """More tiles than the GPU has multiprocessors: persistent blocks take several each.

    A kernel with a single query buffer once waited for itself at its second tile. "apart": the two
    halves of a tile are in different documents, so that each warpgroup passes over blocks of the
    other; one that held the last of its values while it waited for the next tile's queries never
    got them. "lengths": of some key tiles no row sees anything.
    """
    b, s, hq, hk = 4, 1100, 16, 8
    rng = np.random.default_rng(d)
    shapes = [(b, s, hq, d), (b, s, hk, d), (b, s, hk, d), (b, s, hq, d)]
    arrays = [jnp.asarray(rng.standard_normal(shape), jnp.bfloat16) for shape in shapes]
    options = dict(MASKS[mask])
    if "segment_ids" in options:
        ids = np.sort(rng.integers(0, 9, (b, s)), axis=1)
        if mask == "apart":
            ids = np.tile((np.arange(s) + 64) // 384, (b, 1))
        options["segment_ids"] = jnp.asarray(ids[:, ::-1].copy(), jnp.int32)
    if "lengths" in options:
        options["lengths"] = jnp.asarray(rng.integers(0, s + 1, b), jnp.int32)
    if "dropout_key" in options:
        options["dropout_key"] = jax.random.key(d)
    if "alibi_slopes" in options:
        options["alibi_slopes"] = jnp.asarray(rng.uniform(0.001, 0.3, hq), jnp.float32)
    static = {k: v for k, v in options.items() if not isinstance(v, jax.Array)}
    traced = {k: v for k, v in options.items() if k not in static}

    def run(q, k, v, dout, traced):
        def attention(q, k, v):
            return flash_attention(q, k, v, return_lse=True, **static, **traced)

        out, vjp, lse = jax.vjp(attention, q, k, v, has_aux=True)
        return lse, out, *vjp(dout)

    results = []
    for device in (platform, "cpu"):
        moved = jax.device_put((*arrays, traced), jax.devices(device)[0])
        results.append([np.asarray(x, np.float64) for x in jax.jit(run)(*moved)])
    (lse, *outputs), (want_lse, *wanted) = results
    assert np.array_equal(np.isneginf(lse), np.isneginf(want_lse))
    seeing = np.isfinite(want_lse)
    np.testing.assert_allclose(lse[seeing], want_lse[seeing], atol=1e-3)
    for name, x, want in zip(("out", *GRADIENTS), outputs, wanted):
        np.testing.assert_allclose(x, want, atol=3e-2 * np.abs(want).max(), err_msg=name)


@cases(*(case.replace(deterministic=True) for case in VARIANTS))
def test_deterministic_reruns_are_bitwise_equal(case, platform):
    problem = make_problem(case)
    first = execute(problem, problem.given, platform)
    for _ in range(20):
        for name, x in execute(problem, problem.given, platform).items():
            assert_bitwise(name, x, first[name], case)


@cases(*VARIANTS)
def test_forward_reruns_are_bitwise_equal(case, platform):
    """S14 without asking for it; the backward then only agrees within rounding."""
    problem = make_problem(case)
    first = execute(problem, problem.given, platform)
    for _ in range(20):
        again = execute(problem, problem.given, platform)
        for name in ("out", "lse"):
            assert_bitwise(name, again[name], first[name], case)
        for name in GRADIENTS:
            a, b = again[name].astype(float), first[name].astype(float)
            np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max(), err_msg=name)


@pytest.mark.parametrize("loaded", [False, True])
@pytest.mark.parametrize("d", [64, 96, 128, 192, 256])
def test_a_thousand_steps_are_bitwise_equal(d, loaded, platform):
    """Registers that a product in flight still read were once overwritten, not in every run.

    With copies on another stream, what arrives from memory arrives at other times.
    """
    rng = np.random.default_rng(d)
    arrays = [jnp.asarray(rng.standard_normal((2, 2048, 8, d)), jnp.bfloat16) for _ in range(3)]
    arrays = jax.device_put(arrays, jax.devices(platform)[0])
    run = jax.jit(lambda a: flash_attention(*a, causal=True, return_lse=True))
    first = run(arrays)
    differ = jax.jit(lambda a, b: sum(jnp.sum(x != y) for x, y in zip(a, b)))
    steps = 1000 if platform != "cpu" else 2
    load = memory_load() if loaded and platform != "cpu" else contextlib.nullcontext([1])
    with load as copies:
        counts = [differ(run(arrays), first) for _ in range(steps)]
        assert sum(int(n) for n in counts) == 0
    assert copies


# Scores in natural units by key, for rows of which half see them negated.
GROWTH = {
    "rising": lambda j: 0.2 * j,
    "steps of nearly the limit": lambda j: 5.5 * (j // 128),
    "spike": lambda j: np.where(j == 700, 90.0, 0.0),
    "first keys": lambda j: np.where(j < 100, 60.0, 0.0),
    "beyond float32": lambda j: 300.0 * (j // 200),
}


SLOPES = (0.3, 0.02)
# Kernel instances, and what they do to scores [h, i, j] (S8).
INSTANCES = {
    "plain": ({}, lambda x, away: x),
    "ALiBi": (
        {"alibi_slopes": jnp.array(SLOPES)},
        lambda x, away: x - np.reshape(SLOPES, (2, 1, 1)) * away,
    ),
    "softcap": ({"softcap": 50.0}, lambda x, away: 50 * np.tanh(x / 50)),
    "dropout": ({"dropout_rate": 0.25, "dropout_key": jnp.array([3, 4], jnp.uint32)}, None),
}


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("growth", GROWTH)
@pytest.mark.parametrize(
    ("instance", "dtype", "d"),
    [
        *itertools.product(["plain"], DTYPES, [64, 96, 128, 192, 256]),
        *itertools.product(["ALiBi", "softcap", "dropout"], ["bfloat16"], [64, 128, 192, 256]),
    ],
)
def test_scores_that_outgrow_the_first_block(instance, dtype, d, growth, causal, platform):
    """The forward keeps a block's maximum as the reference while sums of exponentials stay small,
    and does not look for others: scores that outgrow it must send it back to look. So must scores
    too large for a softcap's polynomial."""
    s, h = 1100, 2
    options, shape = INSTANCES[instance]
    rng = np.random.default_rng(d)
    q, k, v = (rng.standard_normal((1, s, h, d)) for _ in range(3))
    q *= 0.5
    q[..., 0] = np.where(np.arange(s) % 2, 1, -1)[:, None] * d**0.5
    k[..., 0] = GROWTH[growth](np.arange(s))[:, None]
    q, k, v = (jnp.asarray(x, dtype) for x in (q, k, v))
    moved = jax.device_put((options, q, k, v), jax.devices(platform)[0])
    static = {n: x for n, x in options.items() if not isinstance(x, jax.Array)}
    out, lse = jax.jit(
        lambda o, *x: flash_attention(*x, causal=causal, return_lse=True, **(o | static))
    )(*moved)
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * d**-0.5
    i = np.arange(s)
    if shape:
        scores = shape(scores, np.abs(i[:, None] - i))
    if causal:
        scores[..., np.triu(np.ones((s, s), bool), 1)] = -np.inf
    largest = scores.max(-1, keepdims=True)
    p = np.exp(scores - largest)
    total = p.sum(-1, keepdims=True)
    if "dropout_key" in options:
        arrays = {"position": i[None], "threshold": 0.75 * 65536}
        p *= oracle.keep(np.asarray(options["dropout_key"]), arrays, (1, h, s)) / 0.75
    want = np.einsum("bhqk,bkhd->bqhd", p / total, v)
    want_lse = (largest + np.log(total))[..., 0]
    np.testing.assert_allclose(lse, want_lse, rtol=1e-6, atol=1e-3)
    np.testing.assert_allclose(np.asarray(out, np.float64), want, atol=2e-2 * np.abs(want).max())


POISONED = (
    VARIANTS[4].replace(poison="tail"),
    BASE.replace(layout="lengths", lengths_q=(1, 200), lengths_k=(3, 127), poison="tail"),
    BASE.replace(d=128, dv=128, layout="lengths", lengths_q=(300, 129), lengths_k=(65, 260),
                 poison="tail"),
    BASE.replace(sk=300, layout="segments", lengths_q=((200,), (64, 65)), poison="tail"),
)  # fmt: skip


@cases(*(case.replace(dtype=dtype) for case in POISONED for dtype in DTYPES))
def test_nan_in_padding_and_behind_lengths_has_no_effect(case, platform):
    """S13; between documents that share a tile a GPU kernel may leak, so those stay clean."""
    problem = make_problem(case.replace(deterministic=True))
    clean, given = (execute(problem, x, platform) for x in (problem.clean, problem.given))
    check_results(problem, given)
    for name, x in clean.items():
        assert_same_numbers(name, given[name], x, case.dtype, case)


def test_nan_in_a_query_stays_in_its_row(platform):
    problem = make_problem(BASE.replace(causal=True))
    query = problem.given["query"].copy()
    query[0, 200] = np.nan
    results = execute(problem, problem.given | {"query": query}, platform)
    for name in ("out", "dq"):
        bad = np.isnan(results[name].astype(float)).any((2, 3))
        assert np.argwhere(bad).tolist() == [[0, 200]], name


def test_dirty_memory_is_not_read(platform):
    """Freed NaN buffers of every size the call needs come back as outputs and scratch."""
    problem = make_problem(VARIANTS[1])
    first = execute(problem, problem.given, platform)
    for _ in range(10):
        dirty = put(platform, *(np.full(2**n, np.nan, np.float32) for n in range(8, 22)))
        jax.block_until_ready(dirty)
        for x in dirty:
            x.delete()
        again = execute(problem, problem.given, platform)
        for name in ("out", "lse"):
            assert_bitwise(name, again[name], first[name])
        assert all(np.isfinite(again[n].astype(float)).all() for n in GRADIENTS)


def test_offsets_past_two_gigabytes(platform):
    """19, 20, 21 of the list of known bugs: 2^31 elements, more batches than a grid's y or z."""
    small = platform == "cpu"
    b, s, h, d = (300 if small else 70_000), 16, 16, 128
    device = jax.devices(platform)[0]
    with jax.default_device(device):
        keys = jax.random.split(jax.random.key(0), 3)
        parts = [jax.random.normal(key, (4, s, h, d), jnp.bfloat16) for key in keys]
        tile = jax.jit(lambda x: jnp.tile(x, (b // 4, 1, 1, 1)))
        run = jax.jit(lambda *x: flash_attention(*x, causal=True))
        wanted = run(*parts)
        out = run(*(tile(x) for x in parts))
        for start in (0, 4, b // 2, 65_536, 2**31 // (s * h * d), b - 4):
            at = min(start, b - 4) // 4 * 4
            np.testing.assert_allclose(
                out[at : at + 4].astype(jnp.float32), wanted.astype(jnp.float32), atol=1e-2
            )
        gradient = jax.jit(jax.grad(lambda *x: run(*x).astype(jnp.float32).sum()))
        last = gradient(*(tile(x) for x in parts))[-4:]
        np.testing.assert_allclose(
            last.astype(jnp.float32), gradient(*parts).astype(jnp.float32), atol=1e-2
        )


def test_a_loop_of_calls_equals_single_calls(platform):
    """Command buffers: a jitted loop replays the same kernels on changing data."""
    problem = make_problem(VARIANTS[1].replace(sq=128, sk=128, hq=4, hk=4))
    q, k, v = put(platform, *(problem.given[n] for n in ("query", "key", "value")))

    def step(x):
        return x + 0.5 * flash_attention(x, k, v, causal=True)

    loop = jax.jit(lambda x: jax.lax.fori_loop(0, 20, lambda _, y: step(y), x))
    single, one = q, jax.jit(step)
    for _ in range(20):
        single = one(single)
    assert_bitwise("loop", loop(q), single)
    assert_bitwise("loop again", loop(q), single)
    hlo.assert_kernels(hlo.compiled_text(loop, q), forward=1)


def test_threads_may_call_at_the_same_time(platform):
    """Different shapes on different threads: per-size settings must not mix."""
    problems = [make_problem(case.replace(deterministic=True)) for case in VARIANTS]
    alone = [execute(p, p.given, platform) for p in problems]
    with concurrent.futures.ThreadPoolExecutor(len(problems)) as pool:
        for _ in range(5):
            for results, wanted in zip(
                pool.map(lambda p: execute(p, p.given, platform), problems), alone
            ):
                for name, x in results.items():
                    assert_bitwise(name, x, wanted[name])


def test_memory_and_calls_of_the_program(platform):
    """Two custom calls, nothing of S x S, and the flag for determinism reaches both."""
    problem = make_problem(BASE.replace(sq=1031, sk=1033, causal=True, deterministic=True))
    names = ("query", "key", "value", "dout", "dlse")
    args = put(platform, *(problem.given[n] for n in names))
    lowered = jitted(tuple(problem.case.options().items())).lower(*args, {})
    text = lowered.compile().as_text()
    hlo.assert_kernels(text, forward=1, backward=1)
    hlo.assert_no_square(text, 1031, 1033)
    assert lowered.as_text().count("deterministic = true") == 2


@pytest.mark.parametrize("dtype", ["float32"])
def test_what_cuda_does_not_take_is_refused(dtype, platform):
    if platform == "cpu":
        pytest.skip("the CPU takes everything")
    x = put(platform, jnp.ones((1, 4, 1, 8), dtype))[0]
    with pytest.raises(NotImplementedError, match="bfloat16 or float16, got float32"):
        flash_attention(x, x, x)
    x = x.astype(jnp.bfloat16)
    with pytest.raises(NotImplementedError, match="CUDA does not support bias"):
        flash_attention(x, x, x, bias=x[..., :1].reshape(1, 1, 4, 1))


def test_dropout_drops_the_same_elements_as_on_the_cpu(platform):
    """S12, read off the probability matrix: values are unit vectors, scores equal."""
    shapes = (1, 200, 4, 64), (1, 192, 2, 64)
    args = [jnp.zeros(s, jnp.bfloat16) for s in shapes]
    args.append(jnp.tile(jnp.eye(192, dtype=jnp.bfloat16)[None, :, None], (1, 1, 2, 1)))
    kept = []
    for device in (platform, "cpu"):
        key = jax.random.key(5)
        moved = jax.device_put((args, key), jax.devices(device)[0])
        run = jax.jit(lambda a, k: flash_attention(*a, dropout_rate=0.5, dropout_key=k))
        kept.append(np.asarray(run(*moved)) != 0)
    assert np.array_equal(*kept)
    assert 0.49 < kept[0].mean() < 0.51
