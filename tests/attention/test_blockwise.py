"""blockwise_attention is one flash_attention call: value and gradients, for every kind of mask."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import derivatives, grids, hlo
from support.case import Case, cases
from support.check import LEARNED, check_results, execute, x64_if
from support.compare import assert_bitwise
from support.data import make_problem

from jax_flashattn import IntervalMask, blockwise_attention, flash_attention


def results(problem, query_chunk: int, key_chunk: int) -> dict:
    """out, lse and gradients of a problem, chunk by chunk."""
    options = problem.case.options()
    arguments = problem.mask_arguments()
    if "intervals" in arguments:
        arguments["mask"] = IntervalMask(*arguments.pop("intervals"))

    @jax.jit
    def run(query, key, value, dout, dlse, arguments):
        attend = functools.partial(
            blockwise_attention, query_chunk=query_chunk, key_chunk=key_chunk, return_lse=True
        )
        learned = {n: arguments.pop(n) for n in LEARNED if n in arguments}
        (out, lse), pullback = jax.vjp(
            lambda *x: attend(*x[:3], **x[3], **arguments, **options), query, key, value, learned
        )
        dq, dk, dv, of_learned = pullback((dout, dlse))
        found = {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}
        return found | {"d" + n: x for n, x in of_learned.items()}

    with x64_if(problem.case.dtype == "float64"):
        arrays = [problem.given[n] for n in ("query", "key", "value", "dout", "dlse")]
        return jax.device_get(run(*arrays, arguments))


EVERYTHING = {"softcap": 5.0, "alibi": "h", "sinks": True, "dropout": 0.2}
BIASES = ("bhij", "hij", "bi", "hj", "")  # cut along both axes of a chunk, one, or none
SAMPLE = (
    Case(b=2, sq=64, sk=96, hq=4, hk=2, causal=True, dlse=True),
    Case(b=2, sq=90, sk=70, hq=2, d=24, dv=40, causal=True, left=30, dlse=True),
    grids.LENGTHS[1],
    grids.LENGTHS[6],
    grids.SEGMENTS[9],
    grids.SEGMENTS[17],
    grids.INTERVALS[0],
    grids.INTERVALS[6],
    grids.COMBINED[0],
    grids.SCALES[3],
    grids.STRUCTURED[1],
    grids.STRUCTURED[2],
    Case(b=2, sq=70, sk=90, hq=4, hk=2, softcap=2.0, causal=True, dlse=True),
    Case(b=2, sq=70, sk=90, hq=4, hk=2, alibi="bh", sinks=True, left=50, dlse=True),
    Case(b=2, sq=70, sk=90, hq=4, hk=2, dropout=0.3, causal=True, dlse=True),
    Case(b=2, sq=90, sk=70, hq=4, hk=2, causal=True, dlse=True, **EVERYTHING),
    grids.SEGMENTS[9].replace(**EVERYTHING),
    grids.LENGTHS[1].replace(poison="invisible", **EVERYTHING),
    grids.INTERVALS[6].replace(**EVERYTHING),
    *(Case(b=2, sq=90, sk=70, hq=4, hk=2, causal=True, dlse=True, bias=axes) for axes in BIASES),
    Case(b=2, sq=90, sk=70, hq=4, hk=2, left=30, dlse=True, bias="bij", **EVERYTHING),
    grids.LENGTHS[1].replace(poison="invisible", bias="bhij"),
    grids.SEGMENTS[9].replace(bias="hij", **EVERYTHING),
)


@cases(*SAMPLE)
def test_against_the_oracle_and_one_call(case):
    """Chunks of 32 rows and 40 keys: neither divides the lengths."""
    problem = make_problem(case)
    found = results(problem, 32, 40)
    check_results(problem, found)
    if case.data != "gaussian":
        return  # ill-conditioned on purpose: both are right, but not equal
    whole = execute(problem, problem.given)
    for name in set(found) - {"lse"}:
        size = max(np.abs(whole[name]).max(), 1e-30)
        assert np.abs(found[name] - whole[name]).max() <= 2e-6 * size, name


@pytest.mark.parametrize("chunks", [(1, 7), (7, 1), (64, 1000), (1000, 64), (80, 100)], ids=str)
def test_chunks_of_any_size(chunks):
    problem = make_problem(Case(b=1, sq=23, sk=31, hq=2, hk=1, causal=True, right=2, dlse=True))
    check_results(problem, results(problem, *chunks))


@cases(
    *(grids.LENGTHS[1].replace(poison=poison) for poison in ("tail", "invisible")),
    grids.SEGMENTS[5].replace(poison="invisible"),
)
def test_nan_in_what_nobody_sees_stays_there(case):
    problem = make_problem(case)
    check_results(problem, results(problem, 33, 41))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
@pytest.mark.parametrize("features", [{}, EVERYTHING | {"bias": "ij"}], ids=["plain", "features"])
def test_dtypes(dtype, features):
    problem = make_problem(grids.SEGMENTS[1].replace(dtype=dtype, **features))
    check_results(problem, results(problem, 48, 64))


@pytest.mark.parametrize("rows", [1, 3])
def test_a_bias_of_minus_infinity_hides_chunks(rows):
    """Of some rows one chunk, of others all they see: these are empty (S11)."""
    problem = make_problem(Case(b=2, sq=9, sk=13, hq=2, causal=True, dlse=True, bias="bij"))
    bias = problem.features.bias
    bias[:, :, 2:5, 5:10], bias[:, :, 6:] = -np.inf, -np.inf
    given = [problem.given[n] for n in ("query", "key", "value", "dout", "dlse")]
    results_of = []
    for chunks in ({"query_chunk": rows, "key_chunk": 5}, None):
        attend = flash_attention if chunks is None else blockwise_attention

        def run(q, k, v, bias, attend=attend, chunks=chunks):
            return attend(q, k, v, bias=bias, causal=True, return_lse=True, **(chunks or {}))

        results_of.append(derivatives.vjp(run, (*given[:3], bias), tuple(given[3:])))
    assert np.isneginf(results_of[0][1][:, :, 6:]).all()
    for a, b in zip(*results_of):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


@cases(
    *(Case(sq=0, sk=5), Case(sq=5, sk=0), Case(b=0), Case(hq=0, hk=0)),
    *(Case(sq=0, sk=5, bias="ij"), Case(sq=5, sk=0, bias="i"), Case(b=0, bias="bhij")),
)
def test_empty(case):
    problem = make_problem(case)
    check_results(problem, results(problem, 2, 2))


def _loss(q, k, v, chunk):
    out, lse = blockwise_attention(
        q, k, v, query_chunk=chunk, key_chunk=chunk, causal=True, return_lse=True
    )
    return (out**2).sum() + lse.sum()


def test_the_program_does_not_grow_with_the_number_of_chunks():
    x = jax.random.normal(jax.random.key(0), (1, 256, 2, 16))
    run = jax.jit(jax.value_and_grad(_loss, (0, 1, 2)), static_argnums=3)
    sizes = []
    for chunk in (64, 8):
        text = run.lower(x, x, x, chunk).compile().as_text()
        hlo.assert_kernels(text, forward=1, backward=1)
        hlo.assert_no_square(text, 256, 256)
        sizes.append(text.count("\n"))
    assert abs(sizes[0] - sizes[1]) < 0.1 * sizes[0], sizes


def test_saved_names_keep_the_loop_from_running_again():
    x = jax.random.normal(jax.random.key(0), (1, 64, 2, 16))
    names = jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse")
    for policy, calls in ((names, 1), (None, 2)):

        def body(x, _, policy=policy):
            layer = jax.checkpoint(lambda x: x + jnp.tanh(_attend(x)), policy=policy)
            return layer(x), None

        run = jax.jit(jax.grad(lambda x, f=body: jax.lax.scan(f, x, None, length=2)[0].sum()))
        hlo.assert_kernels(hlo.compiled_text(run, x), forward=calls, backward=1)


def _attend(x):
    return blockwise_attention(x, x, x, query_chunk=16, key_chunk=32, causal=True)


def test_under_vmap_and_in_shard_map():
    x = jax.random.normal(jax.random.key(0), (4, 2, 40, 2, 8))
    mapped = jax.jit(jax.vmap(jax.grad(lambda x: (_attend(x) ** 2).sum())))(x)
    one = jax.grad(lambda x: (flash_attention(x, x, x, causal=True) ** 2).sum())
    for n in range(4):
        np.testing.assert_allclose(mapped[n], one(x[n]), rtol=1e-4, atol=1e-5)
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
    batch, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()

    def local(q, k):
        out = blockwise_attention(q, k, k, query_chunk=16, key_chunk=32, causal=True)
        return jax.lax.psum((out**2).sum(), "data")

    k = x[0, :1]
    run = jax.shard_map(local, mesh=mesh, in_specs=(batch, whole), out_specs=whole)
    got = jax.jit(jax.grad(run, (0, 1)))(x[1], k)
    plain = jax.grad(
        lambda q, k: (flash_attention(q, *[jnp.repeat(k, 2, 0)] * 2, causal=True) ** 2).sum(),
        (0, 1),
    )
    for a, b in zip(got, plain(x[1], k)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_sinks_and_bias_shared_by_the_devices_of_a_shard_map():
    """Their gradients are summed over the batch, on all devices."""
    x = jax.random.normal(jax.random.key(0), (4, 40, 2, 8))
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
    batch, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    slopes = jnp.array([0.5, 0.1])
    learned = {"sinks": jnp.array([0.3, -1.0])}
    learned["bias"] = jax.random.normal(jax.random.key(1), (1, 2, 40, 40))

    def plain(x, learned, attend=flash_attention):
        return (attend(x, x, x, alibi_slopes=slopes, **learned) ** 2).sum()

    def local(x, learned):
        attend = functools.partial(blockwise_attention, query_chunk=16, key_chunk=32)
        return jax.lax.psum(plain(x, learned, attend), "data")

    run = jax.shard_map(local, mesh=mesh, in_specs=(batch, whole), out_specs=whole)
    wanted, got = (jax.jit(jax.grad(f, (0, 1)))(x, learned) for f in (plain, run))
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(wanted)):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_every_kind_of_dropout_key():
    x = jax.random.normal(jax.random.key(0), (1, 30, 2, 8))
    chunks = {"query_chunk": 16, "key_chunk": 7}
    for key in (jax.random.key(3), jax.random.PRNGKey(3), jax.random.key(3, impl="rbg")):
        options = {"dropout_rate": 0.4, "dropout_key": key}
        wanted = flash_attention(x, x, x, **options)
        got = jax.jit(lambda x, o=options: blockwise_attention(x, x, x, **chunks, **o))(x)
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-6)
    off = {"dropout_rate": 1e-6, "dropout_key": jax.random.key(0)}
    got = blockwise_attention(x, x, x, **chunks, **off)
    assert_bitwise("rate that rounds to 0", got, blockwise_attention(x, x, x, **chunks))


def test_repeatable():
    x = jax.random.normal(jax.random.key(0), (1, 100, 4, 16))
    run = jax.jit(jax.grad(_loss, (0, 1, 2)), static_argnums=3)
    for a, b in zip(run(x, x, x, 32), run(x, x, x, 32)):
        assert_bitwise("gradient", a, b)


def test_wrong_arguments():
    x = jnp.ones((1, 4, 1, 8))
    with pytest.raises(ValueError, match=r"bias must have shape .* = \(1, 1, 4, 4\) or 1 on any"):
        blockwise_attention(x, x, x, query_chunk=2, key_chunk=2, bias=jnp.zeros((1, 1, 2, 2)))
    with pytest.raises(ValueError, match="query_chunk must be 1 or more, got 0"):
        blockwise_attention(x, x, x, query_chunk=0, key_chunk=1)
    with pytest.raises(TypeError, match=r"key_chunk must be a Python int, got 2\.5"):
        blockwise_attention(x, x, x, query_chunk=1, key_chunk=2.5)
