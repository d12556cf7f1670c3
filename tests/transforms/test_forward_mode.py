"""differentiation="forward" under jax's transformations, and what it may be combined with."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo
from support.compare import assert_bitwise

from jax_flashattn import attention_forward, flash_attention

RNG = np.random.default_rng(0)
B, SQ, SK, HQ, HK, D, DV = 4, 24, 40, 8, 4, 16, 12
STATIC = {"causal": True, "softcap": 3.0, "dropout_rate": 0.3, "dropout_key": jax.random.key(3)}
FORWARD = {"differentiation": "forward"}


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


SHAPES = {
    "q": (B, SQ, HQ, D),
    "k": (B, SK, HK, D),
    "v": (B, SK, HK, DV),
    "sinks": (HQ,),
    "bias": (1, HQ, 1, SK),
}
ARRAYS = {n: normal(*shape) for n, shape in SHAPES.items()}
MOVED = {n: normal(*shape) for n, shape in SHAPES.items()}


def attend(arrays, **options):
    features = {n: x for n, x in arrays.items() if n in ("sinks", "bias")}
    return flash_attention(
        arrays["q"], arrays["k"], arrays["v"], return_lse=True, **features,
        **(STATIC | FORWARD | options),
    )  # fmt: skip


def loss(arrays, **options):
    out, lse = attend(arrays, **options)
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


def tangents(arrays, moved, **options):
    return jax.jvp(functools.partial(attend, **options), (arrays,), (moved,))[1]


jitted_tangents, jitted_gradients = jax.jit(tangents), jax.jit(jax.grad(loss))


def assert_close(a, b, rtol=3e-5, atol=1e-5):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=rtol, atol=atol)


def test_linearize_is_jvp_and_runs_the_forward_once():
    (out, lse), push = jax.linearize(attend, ARRAYS)
    assert_bitwise("out", out, attend(ARRAYS)[0])
    assert_bitwise("lse", lse, attend(ARRAYS)[1])
    for moved in (MOVED, jax.tree.map(lambda x: -3 * x, MOVED)):
        for a, b in zip(push(moved), tangents(ARRAYS, moved)):
            assert_bitwise("tangent", a, b)
    hlo.assert_kernels(hlo.compiled_text(jax.jit(push), MOVED), forward=0, tangent=1)


def test_jacfwd_is_jacrev():
    """Also where only some arguments move."""
    small = {"q": normal(1, 3, 2, 2), "k": normal(1, 4, 1, 2), "v": normal(1, 4, 1, 3)}
    small |= {"sinks": normal(2), "bias": normal(1, 1, 3, 4)}
    reverse = functools.partial(attend, differentiation="reverse")
    wanted = jax.jit(jax.jacrev(reverse))(small)
    assert_close(jax.jit(jax.jacfwd(attend))(small), wanted)
    assert_close(jax.jit(jax.jacrev(attend))(small), wanted)
    for name in small:
        one = jax.jacfwd(lambda x, name=name: attend(small | {name: x}))(small[name])
        assert_close(one, [x[name] for x in wanted])


SUBSETS = [
    s for n in (1, 2, 5) for s in itertools.combinations(("q", "v", "sinks", "bias", "moved"), n)
]


@pytest.mark.parametrize(
    ("batched", "bias_shape"),
    [
        *((s, ((1, 4, 9, 13), (2, 1, 1, 13))[n % 2]) for n, s in enumerate(SUBSETS)),
        *((s, (2, 1, 1, 13)) for s in (("moved",), ("bias", "moved"))),
        *((s, (1, 4, 9, 13)) for s in (("bias",), ("q", "v", "sinks", "bias", "moved"))),
    ],
    ids=str,
)
def test_vmap_is_a_loop(batched, bias_shape):
    """vmap of jvp, over the arrays, their tangents, or both; one kernel call of each kind."""
    shapes = {"q": (2, 9, 4, 8), "k": (2, 13, 2, 8), "v": (2, 13, 2, 6), "sinks": (4,)}
    arrays, moved = (
        {n: normal(*s) for n, s in (shapes | {"bias": bias_shape}).items()} for _ in range(2)
    )
    stack = lambda x: jnp.stack([x, -0.5 * x, 2 * x])  # noqa: E731
    arrays |= {n: stack(arrays[n]) for n in batched if n != "moved"}
    if "moved" in batched:
        moved = jax.tree.map(stack, moved)
    axes = ({n: 0 if n in batched else None for n in arrays}, 0 if "moved" in batched else None)
    run = jax.jit(jax.vmap(tangents, axes))
    together, text = hlo.run_with_text(run, arrays, moved)
    for n in range(3):
        one = {name: x[n] if name in batched else x for name, x in arrays.items()}
        direction = jax.tree.map(lambda x, n=n: x[n], moved) if "moved" in batched else moved
        assert_close([x[n] for x in together], jitted_tangents(one, direction))
    hlo.assert_kernels(text, tangent=1)


def test_jvp_of_vmap():
    mapped = jax.vmap(attend, ({"q": 0, "k": None, "v": None, "sinks": None, "bias": None},))
    arrays = ARRAYS | {"q": jnp.stack([ARRAYS["q"], 2 * ARRAYS["q"]])}
    moved = MOVED | {"q": jnp.stack([MOVED["q"], -MOVED["q"]])}
    together = jax.jvp(mapped, (arrays,), (moved,))[1]
    for n in range(2):
        one = tangents(arrays | {"q": arrays["q"][n]}, moved | {"q": moved["q"][n]})
        assert_close([x[n] for x in together], one)


# --- Reverse mode through the tangent's transposition ---


def test_gradients_are_those_of_reverse_mode():
    """Bitwise: it is the same kernel call. Only the sinks' sum over rows is XLA's to order."""
    ours = jax.jit(jax.value_and_grad(loss))
    wanted = jax.jit(jax.value_and_grad(functools.partial(loss, differentiation="reverse")))
    gradients, expected = ours(ARRAYS)[1], wanted(ARRAYS)[1]
    for name in ("q", "k", "v", "bias"):
        assert_bitwise(name, gradients[name], expected[name])
    assert_close(gradients["sinks"], expected["sinks"])
    hlo.assert_kernels(hlo.compiled_text(ours, ARRAYS), forward=1, backward=1, tangent=0)


@pytest.mark.parametrize("rows", [30, 50], ids="sq={}".format)
def test_gradients_of_one_argument_and_of_lse_alone(rows):
    """Symbolic zeros on either side; with 50 rows for 40 keys some see nothing."""
    arrays = ARRAYS | {"q": normal(B, rows, HQ, D)}

    def lse_sum(x, name, **options):
        lse = attend(arrays | {name: x}, **options)[1]
        return jnp.where(jnp.isfinite(lse), lse, 0).sum()

    for name in ("k", "sinks", "bias"):
        ours, wanted = (
            jax.grad(lse_sum)(arrays[name], name, differentiation=mode)
            for mode in ("forward", "reverse")
        )
        assert_close(ours, wanted)


@pytest.mark.parametrize("bias_shape", [(1, 4, 9, 13), (2, 1, 1, 13)], ids=str)
def test_gradient_of_a_vmapped_sum(bias_shape):
    """A bias that is not mapped gets one gradient, a mapped one a gradient per slice."""
    arrays = {"q": normal(3, 2, 9, 4, 8), "k": normal(2, 13, 2, 8), "v": normal(2, 13, 2, 6)}
    arrays |= {"sinks": normal(4), "bias": normal(*bias_shape)}
    for mapped in (("q",), ("q", "bias")):
        given = arrays | ({"bias": normal(3, *bias_shape)} if "bias" in mapped else {})
        axes = ({n: 0 if n in mapped else None for n in given},)
        ours, wanted = (
            jax.grad(
                lambda x, mode=mode, axes=axes: jax.vmap(
                    functools.partial(loss, differentiation=mode), axes
                )(x).sum()
            )(given)
            for mode in ("forward", "reverse")
        )
        assert_close(ours, wanted)


POLICIES = (  # policy, how many of the two loops, forward and backward, run the forward kernel
    (jax.checkpoint_policies.nothing_saveable, 2),
    (jax.checkpoint_policies.save_only_these_names("attention_out", "attention_lse"), 1),
)


@pytest.mark.parametrize(("policy", "calls"), POLICIES)
def test_checkpoint_policies(policy, calls):
    """Saving both named residuals keeps the forward kernel from running again."""

    def layer(x, scale):
        out = flash_attention(x * scale, ARRAYS["k"], ARRAYS["k"], causal=True, **FORWARD)
        return x + jnp.sin(out), None

    def scanned(x, body):
        return (jax.lax.scan(body, x, jnp.array([1.0, -0.5, 2.0]))[0] ** 2).sum()

    run = jax.jit(jax.value_and_grad(lambda x: scanned(x, jax.checkpoint(layer, policy=policy))))
    assert_close(run(ARRAYS["q"]), jax.value_and_grad(lambda x: scanned(x, layer))(ARRAYS["q"]))
    hlo.assert_kernels(hlo.compiled_text(run, ARRAYS["q"]), forward=calls, backward=1, tangent=0)


def mean_flow(weight, implementation):
    """A loss with a tangent under stop_gradient; the network is attention of scaled arrays."""

    def network(q, t):
        k, v = ARRAYS["k"] * t, ARRAYS["v"] + weight * t
        options = FORWARD | {"implementation": implementation}
        return flash_attention(q * weight, k, v, causal=True, **options)

    u, du = jax.jvp(network, (ARRAYS["q"], 0.7), (MOVED["q"], 1.0))
    return ((u - jax.lax.stop_gradient(1.1 * u - 0.3 * du)) ** 2).mean()


def test_gradient_of_a_loss_with_a_jvp_inside():
    """Mean flow and consistency training: kernels alone, eager, jitted, mapped, rematerialised."""
    run = functools.partial(mean_flow, implementation="kernel")
    wanted = jax.value_and_grad(functools.partial(mean_flow, implementation="reference"))(1.3)
    assert abs(wanted[1]) > 1e-3, "vacuous"
    for grad in (
        jax.value_and_grad(run),
        jax.jit(jax.value_and_grad(run)),
        jax.value_and_grad(jax.checkpoint(run)),
        lambda w: jax.tree.map(lambda x: x[1], jax.vmap(jax.value_and_grad(run))(jnp.ones(2) * w)),
    ):
        np.testing.assert_allclose(grad(1.3), wanted, rtol=1e-4)
    text = hlo.compiled_text(jax.jit(jax.value_and_grad(run)), 1.3)
    hlo.assert_kernels(text, forward=1, backward=1, tangent=1)


def test_the_tangent_of_a_tangent_in_its_direction():
    """The tangent is linear in its direction: that much of a second derivative there is."""
    along = lambda moved: tangents(ARRAYS, moved)  # noqa: E731
    other = jax.tree.map(lambda x: x[::-1], MOVED)
    assert_close(jax.jvp(along, (MOVED,), (other,))[1], along(other))
    ours = jax.grad(lambda moved: along(moved)[0].sum())(MOVED)
    wanted = jax.grad(lambda x: attend(x, differentiation="reverse")[0].sum())(ARRAYS)
    assert_close(ours, wanted)


# --- What there is no kernel for ---

SECOND = {
    "Hessian-vector product": lambda f: jax.jvp(jax.grad(f), (ARRAYS,), (MOVED,)),
    "gradient of a tangent": lambda f: jax.grad(lambda x: jax.jvp(f, (x,), (MOVED,))[1])(ARRAYS),
    "tangent of a tangent": lambda f: jax.jvp(
        lambda x: jax.jvp(f, (x,), (MOVED,))[1], (ARRAYS,), (MOVED,)
    ),
    "under jit": lambda f: jax.jit(jax.grad(lambda x: jax.jvp(f, (x,), (MOVED,))[1]))(ARRAYS),
    "under vmap": lambda f: jax.vmap(
        lambda s: jax.grad(lambda x: jax.jvp(f, (x,), (MOVED,))[1])(ARRAYS | {"q": ARRAYS["q"] * s})
    )(jnp.ones(2)),
}


@pytest.mark.parametrize("name", SECOND)
def test_second_derivatives_name_the_reference(name):
    with pytest.raises(NotImplementedError, match="implementation='reference'") as info:
        SECOND[name](loss)
    assert "differentiation='reverse'" in str(info.value)


def test_a_hessian_vector_product_of_reverse_mode_names_the_reference():
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
        SECOND["Hessian-vector product"](functools.partial(loss, differentiation="reverse"))
    bare = lambda q: attention_forward(q, ARRAYS["k"], ARRAYS["v"])[0].sum()  # noqa: E731
    with pytest.raises(NotImplementedError, match="implementation='reference'"):
        jax.grad(bare)(ARRAYS["q"])


@pytest.mark.parametrize("mode", ["forward", "reverse"])
def test_the_reference_has_every_derivative(mode):
    f = functools.partial(loss, implementation="reference", differentiation=mode)
    product = SECOND["Hessian-vector product"](f)[1]
    step = 1e-2
    ahead, behind = (
        jax.grad(f)(jax.tree.map(lambda x, m, s=s: x + s * step * m, ARRAYS, MOVED))
        for s in (1, -1)
    )
    differences = jax.tree.map(lambda a, b: (a - b) / (2 * step), ahead, behind)
    assert_close(product, differences, rtol=2e-2, atol=2e-1)


# --- Sharding ---


def make_mesh(kind=AxisType.Auto):
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 4)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind, kind))


SPECS = {"batch": P("data"), "heads": P(None, None, "model"), "both": P("data", None, "model")}


def placed(mesh, arrays, spec):
    heads = (*spec, None, None)[2]
    specs = {"q": spec, "k": spec, "v": spec, "sinks": P(heads), "bias": P(None, heads)}
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}


@pytest.mark.parametrize("name", SPECS)
def test_batch_and_head_shardings_need_no_collective(name):
    mesh = make_mesh()
    arguments = [placed(mesh, x, SPECS[name]) for x in (ARRAYS, MOVED)]
    results, text = hlo.run_with_text(jitted_tangents, *arguments)
    assert_close(results, jitted_tangents(ARRAYS, MOVED))
    hlo.assert_kernels(text, forward=1, tangent=1)
    assert not hlo.collectives(text)


@pytest.mark.parametrize("name", SPECS)
def test_explicit_mode(name):
    mesh, spec = make_mesh(AxisType.Explicit), SPECS[name]
    b, _, h = (*spec, None, None)[:3]
    with jax.set_mesh(mesh):
        arguments = [placed(mesh, x, spec) for x in (ARRAYS, MOVED)]
        (dout, dlse), text = hlo.run_with_text(jax.jit(tangents), *arguments)
        assert jax.typeof(dout).sharding.spec == P(b, None, h, None)
        assert jax.typeof(dlse).sharding.spec == P(b, h, None)
        assert not hlo.collectives(text)
        gradients = jax.jit(jax.grad(loss))(arguments[0])
    assert_close((dout, dlse), jitted_tangents(ARRAYS, MOVED))
    assert_close(gradients, jitted_gradients(ARRAYS))


def test_shard_map_with_shared_arrays():
    """check_vma on: tangents of replicated arrays, and gradients summed over the shards."""
    mesh, options = make_mesh(), {"dropout_rate": 0.0}
    specs = {"q": P("data"), "k": P("data"), "v": P("data"), "sinks": P(), "bias": P()}
    local = functools.partial(tangents, **options)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(specs, specs), out_specs=P("data"))
    assert_close(jax.jit(mapped)(ARRAYS, MOVED), local(ARRAYS, MOVED))
    summed = jax.shard_map(
        lambda x: jax.lax.psum(loss(x, **options), "data"), mesh=mesh, in_specs=(specs,),
        out_specs=P(),
    )  # fmt: skip
    assert_close(jax.jit(jax.grad(summed))(ARRAYS), jax.grad(loss)(ARRAYS, **options))


def test_debug_nans_and_strict_promotion():
    """Rows that see nothing make no NaN on the way, forward or transposed."""
    arrays = ARRAYS | {"q": normal(B, 50, HQ, D)}
    moved = MOVED | {"q": normal(B, 50, HQ, D)}
    with (
        jax.debug_nans(True),
        jax.numpy_dtype_promotion("strict"),
        jax.numpy_rank_promotion("raise"),
    ):
        results = tangents(arrays, moved), jax.grad(loss)(arrays)
    assert all(np.isfinite(x).all() for x in jax.tree.leaves(results))
