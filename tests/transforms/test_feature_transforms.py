"""Softcap, ALiBi, sinks, dropout and bias under vmap, sharding, remat and export."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo
from support.compare import assert_bitwise

from jax_flashattn import flash_attention

RNG = np.random.default_rng(0)
B, SQ, SK, HQ, HK, D = 4, 24, 40, 8, 4, 16


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


Q, K, V = normal(B, SQ, HQ, D), normal(B, SK, HK, D), normal(B, SK, HK, D)
SLOPES, SINKS, KEY = jnp.exp2(-jnp.arange(1.0, 9)), normal(HQ), jax.random.key(3)
STATIC = {"causal": True, "softcap": 3.0, "dropout_rate": 0.3}


def loss(arrays, fixed):
    """Of everything; `arrays` are differentiated."""
    out, lse = flash_attention(
        arrays["q"], arrays["k"], arrays["v"], return_lse=True, **STATIC, **fixed,
        sinks=arrays["sinks"], **({"bias": arrays["bias"]} if "bias" in arrays else {}),
    )  # fmt: skip
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


ARRAYS = {"q": Q, "k": K, "v": V, "sinks": SINKS}
FIXED = {"alibi_slopes": SLOPES, "dropout_key": KEY}
gradients = jax.jit(jax.value_and_grad(loss))


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=3e-5, atol=1e-5)


@pytest.fixture(scope="module")
def mesh():
    return jax.sharding.Mesh(np.array(jax.devices("cpu")[:8]).reshape(2, 4), ("data", "model"))


SPECS = {
    "batch": P("data"),
    "heads": P(None, None, "model"),
    "both": P("data", None, "model"),
    "batch over all": P("model"),
}
BIASES = {None: (), "full": (B, HQ, SQ, SK), "per head": (1, HQ, SQ, SK), "per key": (B, 1, 1, SK)}


@pytest.mark.parametrize("bias", BIASES)
@pytest.mark.parametrize("name", SPECS)
def test_batch_and_head_shardings_need_no_collective(mesh, name, bias):
    """Masks drop the same elements on every device; only what is shared over devices is summed."""
    spec = SPECS[name]
    batch, heads = (*spec, None, None)[0], (*spec, None, None)[2]
    arrays = ARRAYS | ({} if bias is None else {"bias": normal(*BIASES[bias])})
    specs = {"q": spec, "k": spec, "v": spec, "sinks": P(heads)}
    if bias is not None:
        axes = (batch, heads, None, None)
        specs["bias"] = P(*(a if n > 1 else None for a, n in zip(axes, BIASES[bias])))
    placed = {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}
    results, text = hlo.run_with_text(gradients, placed, FIXED)
    assert_close(results, gradients(arrays, FIXED))
    hlo.assert_kernels(text, forward=1, backward=1)
    # The loss, the sinks' gradient, and that of a bias shared over devices, one device's part.
    shared = {1, HQ // (mesh.shape[heads] if heads else 1)}
    if bias is not None:
        shared.add(placed["bias"].addressable_shards[0].data.size)
    dims = [x.partition("[")[2].rstrip("]").split(",") for x, _ in hlo.collectives(text)]
    sizes = {int(np.prod([int(n) for n in d if n])) for d in dims}
    assert sizes <= shared, hlo.collectives(text)


def test_shard_map_sums_what_is_replicated(mesh):
    """Sinks and bias replicated over a manual data axis: their gradients are summed over it."""
    arrays = ARRAYS | {"bias": normal(1, HQ, 1, SK)}
    fixed = {"alibi_slopes": SLOPES}
    static = {"causal": True, "softcap": 3.0}

    def local(arrays):
        out = flash_attention(
            arrays["q"], arrays["k"], arrays["v"], sinks=arrays["sinks"], bias=arrays["bias"],
            **fixed, **static,
        )  # fmt: skip
        return (out**2).sum()

    specs = {"q": P("data"), "k": P("data"), "v": P("data"), "sinks": P(), "bias": P()}
    sharded = jax.shard_map(
        lambda a: jax.lax.psum(local(a), "data"), mesh=mesh, in_specs=(specs,), out_specs=P()
    )
    run = jax.jit(jax.value_and_grad(sharded))
    assert_close(run(arrays), jax.value_and_grad(local)(arrays))


MAPPED = ("q", "sinks", "bias", "alibi_slopes", "dropout_key")
SUBSETS = [s for n in (1, 2, 5) for s in itertools.combinations(MAPPED, n)]


def _mapped_inputs(batched, bias_shape):
    small = {"q": normal(2, 9, 4, 8), "k": normal(2, 13, 2, 8), "v": normal(2, 13, 2, 6)}
    small |= {"sinks": normal(4), "bias": normal(*bias_shape)}
    fixed = {"alibi_slopes": SLOPES[:4], "dropout_key": KEY}
    for name in batched:
        if name == "dropout_key":
            fixed[name] = jax.random.split(KEY, 3)
        else:
            where = fixed if name in fixed else small
            where[name] = jnp.stack([where[name] * s for s in (1.0, -0.5, 2.0)])
    in_axes = tuple({n: 0 if n in batched else None for n in x} for x in (small, fixed))
    return small, fixed, in_axes


@pytest.mark.parametrize(
    ("batched", "bias_shape"),
    [
        *((s, ((1, 4, 9, 13), (2, 1, 1, 13))[n % 2]) for n, s in enumerate(SUBSETS)),
        *(((*s, "bias"), (2, 1, 1, 13)) for s in ((), ("q",))),
        (MAPPED, (1, 4, 9, 13)),
    ],
    ids=str,
)
def test_vmap_is_a_loop(batched, bias_shape):
    """Value and gradients for every slice, also of operands that are not mapped."""
    small, fixed, in_axes = _mapped_inputs(batched, bias_shape)
    run = jax.jit(jax.vmap(jax.value_and_grad(loss), in_axes))
    together = run(small, fixed)
    for n in range(3):
        slices = [
            {name: x[n] if name in batched else x for name, x in group.items()}
            for group in (small, fixed)
        ]
        assert_close(jax.tree.map(lambda x, n=n: x[n], together), gradients(*slices))


@pytest.mark.parametrize("bias_shape", [(1, 4, 9, 13), (2, 1, 1, 13)], ids=str)
def test_gradient_of_a_vmapped_sum(bias_shape):
    """Operands that are not mapped get the sum."""
    small, fixed, in_axes = _mapped_inputs(("q",), bias_shape)
    total = jax.jit(jax.grad(lambda a: jax.vmap(loss, in_axes)(a, fixed).sum()))(small)
    each = jax.vmap(jax.grad(loss), in_axes)(small, fixed)
    for name in ("k", "v", "sinks", "bias"):
        np.testing.assert_allclose(total[name], each[name].sum(0), rtol=1e-4, atol=2e-5)


def test_vmap_with_one_key_gives_every_slice_the_same_mask():
    """As jax.random.bernoulli would; with a key each, other masks."""
    q = jnp.zeros((3, 1, 20, 2, 8))
    k, v = jnp.zeros((1, 32, 1, 8)), jnp.eye(32)[None, :, None]
    attend = functools.partial(flash_attention, key=k, value=v, dropout_rate=0.5)
    same = jax.vmap(lambda q: attend(q, dropout_key=KEY))(q)
    assert_bitwise("slices", same[0], same[2])
    assert_bitwise("alone", same[1], attend(q[1], dropout_key=KEY))
    other = jax.vmap(lambda q, key: attend(q, dropout_key=key))(q, jax.random.split(KEY, 3))
    assert (other[0] != 0).tolist() != (other[1] != 0).tolist()


def test_checkpoint_drops_the_same_elements_again():
    plain = jax.grad(loss)(ARRAYS, FIXED)
    for policy in (None, jax.checkpoint_policies.save_only_these_names("attention_out")):
        again = jax.grad(jax.checkpoint(loss, policy=policy))(ARRAYS, FIXED)
        for a, b in zip(jax.tree.leaves(again), jax.tree.leaves(plain)):
            assert_bitwise("gradient", a, b)


def test_values_never_recompile_and_options_do():
    traces = []

    @functools.partial(jax.jit, static_argnums=1)
    def run(fixed, static):
        traces.append(1)
        return flash_attention(Q, K, V, **fixed, **dict(static))

    static = (("softcap", 3.0), ("dropout_rate", 0.3))
    a = run(FIXED, static)
    b = run({"alibi_slopes": 2 * SLOPES, "dropout_key": jax.random.key(9)}, static)
    assert len(traces) == 1
    assert np.abs(a - b).max() > 1e-2
    texts = {
        jax.jit(lambda f, s=s: flash_attention(Q, K, V, **f, **s)).lower(FIXED).as_text()
        for s in ({}, {"softcap": 3.0}, {"softcap": 15.0}, {"dropout_rate": 0.3},
                  {"dropout_rate": 0.31})
    }  # fmt: skip
    assert len(texts) == 5


def test_nothing_of_the_size_of_all_scores_is_held():
    """A bias of one head for all: no [b, h, sq, sk] in the program, value and gradient."""
    arrays = ARRAYS | {"q": normal(2, 131, 8, 16), "k": normal(2, 137, 4, 16)}
    arrays |= {"v": normal(2, 137, 4, 16), "bias": normal(1, 1, 131, 137)}
    text = hlo.compiled_text(gradients, arrays, FIXED)
    hlo.assert_kernels(text, forward=1, backward=1)
    assert "131,137]" in text
    for size in ("8,131,137", "2,1,131,137", "4,131,137", "2,131,137"):
        assert f"{size}]" not in text, size


def test_export_round_trip():
    checks = [export.DisabledSafetyCheck.custom_call(n) for n in (hlo.FORWARD, hlo.BACKWARD)]
    fixed = FIXED | {"dropout_key": jax.random.PRNGKey(1)}
    exported = export.export(gradients, platforms=["cpu"], disabled_checks=checks)(ARRAYS, fixed)
    assert_close(exported.call(ARRAYS, fixed), gradients(ARRAYS, fixed))


def test_debug_nans_and_strict_promotion():
    """Rows that see nothing, -inf in lse, sinks and dropout make no NaN on the way."""
    arrays = ARRAYS | {"q": normal(B, 50, HQ, D), "bias": normal(1, HQ, 1, SK)}
    with (
        jax.debug_nans(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        value = jax.value_and_grad(loss)(arrays, FIXED)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(value))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_reference_computes_the_same(dtype):
    """Every feature at once, value and every gradient."""
    arrays = {n: x.astype(dtype) for n, x in ARRAYS.items()} | {"sinks": SINKS}
    arrays["bias"] = normal(1, HQ, SQ, SK).astype(dtype)
    ids = (jnp.asarray([[1] * 9 + [0] * 3 + [2] * 12] * B), jnp.asarray([[1] * 20 + [2] * 20] * B))
    fixed = FIXED | {"segment_ids": ids}
    kernel, reference = (
        jax.jit(lambda x, f, i=i: jax.grad(loss)(x, f | {"implementation": i}))(arrays, fixed)
        for i in ("kernel", "reference")
    )
    for name, x in kernel.items():
        x, y = (np.asarray(z, float) for z in (x, reference[name]))
        tolerance = 2e-5 if dtype == "float32" else 4e-2
        np.testing.assert_allclose(x, y, atol=tolerance * np.abs(y).max(), err_msg=name)
