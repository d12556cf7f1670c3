"""pmap, explicit sharding, shard_map with shared keys, sharded vmap, the compilation cache, x64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from support import derivatives, hlo, programs
from support.compare import assert_bitwise

from jax_flashattn import (
    IntervalMask,
    attention_forward,
    blockwise_attention,
    flash_attention,
)

RNG = np.random.default_rng(0)
Q, K, V = (
    jnp.asarray(RNG.standard_normal((4, s, h, 16)), jnp.float32)
    for s, h in ((24, 8), (40, 4), (40, 4))
)
IDS = tuple(jnp.asarray(np.sort(RNG.integers(0, 4, (4, s))), jnp.int32) for s in (24, 40))
LENGTHS = tuple(jnp.asarray(x, jnp.int32) for x in ([24, 3, 17, 0], [40, 9, 16, 8]))


def make_mesh(kind: AxisType):
    devices = np.array(jax.devices("cpu")[:8]).reshape(2, 4)
    return jax.sharding.Mesh(devices, ("data", "model"), axis_types=(kind, kind))


def loss(q, k, v, **options):
    out, lse = flash_attention(q, k, v, causal=True, return_lse=True, **options)
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(np.asarray(x), np.asarray(y), rtol=2e-5, atol=1e-5)


def place(mesh, x, spec):
    return jax.device_put(x, NamedSharding(mesh, spec))


def test_pmap():
    """One batch element per device: value, gradients, and a collective next to the call."""
    run = jax.value_and_grad(loss, (0, 1, 2))
    arrays = [x[:, None] for x in (Q, K, V)]
    mapped = jax.pmap(run, axis_name="i", devices=jax.devices("cpu")[:4])
    assert_close(mapped(*arrays), jax.vmap(run)(*arrays))
    mean = jax.pmap(
        lambda *x: jax.lax.pmean(loss(*x), "i"), axis_name="i", devices=jax.devices("cpu")[:4]
    )
    np.testing.assert_allclose(mean(*arrays), loss(Q, K, V) / 4, rtol=1e-5)


# --- Explicit sharding: shardings are part of the types ---

MASKS = {
    "causal": {},
    "segments": {"segment_ids": IDS},
    "lengths": {"lengths": LENGTHS},
    "mask": {"mask": IntervalMask.sliding_window(24, 40, 9, None)},
}


@functools.cache
def whole_loss(name):
    """On one device."""
    return jax.jit(jax.value_and_grad(functools.partial(loss, **MASKS[name]), (0, 1, 2)))(Q, K, V)


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize(
    "spec", [P("data"), P(None, None, "model"), P("data", None, "model")], ids=str
)
def test_explicit_mode(name, spec):
    """Results have the types of what they belong to, and nothing is moved."""
    mesh, options = make_mesh(AxisType.Explicit), MASKS[name]
    whole = whole_loss(name)
    with jax.set_mesh(mesh):
        arrays = [place(mesh, x, spec) for x in (Q, K, V)]
        attend = jax.jit(
            functools.partial(flash_attention, causal=True, return_lse=True, **options)
        )
        out, lse = attend(*arrays)
        b, _, h = (*spec, None, None)[:3]
        assert jax.typeof(out).sharding.spec == P(b, None, h, None)
        assert jax.typeof(lse).sharding.spec == P(b, h, None)
        run = jax.jit(jax.value_and_grad(functools.partial(loss, **options), (0, 1, 2)))
        (value, gradients), text = hlo.run_with_text(run, *arrays)
        for gradient, array in zip(gradients, arrays):
            assert jax.typeof(gradient).sharding.spec == jax.typeof(array).sharding.spec
        assert_close((value, gradients), whole)
    hlo.assert_kernels(text, forward=1, backward=1)
    large = [x for x in hlo.collectives(text) if x[0] != "f32[]"]
    assert not large, f"collectives on arrays: {large}"


FEATURES = {
    "sinks": ("sinks", (8,), (2,)),
    "one bias": ("bias", (1, 1, 24, 40), (None, None)),
    "bias per head": ("bias", (1, 8, 24, 40), (None, 2)),
    "bias per pair": ("bias", (4, 8, 24, 40), (0, 2)),
}


@functools.cache
def feature_loss(name):
    """The gradients' program, its value and the feature."""
    argument, shape, _ = FEATURES[name]
    x = jnp.asarray(RNG.standard_normal(shape), jnp.float32)
    options = {"alibi_slopes": jnp.full(8, 0.1), "dropout_rate": 0.2}
    options |= {"dropout_key": jax.random.key(0)}

    def of(q, k, v, x):
        return loss(q, k, v, **{argument: x}, **options)

    run = jax.jit(jax.value_and_grad(of, (0, 1, 2, 3)))
    return run, run(Q, K, V, x), x


@pytest.mark.parametrize(
    ("name", "split"), [(n, s) for n in FEATURES for s in (False, True) if n != "one bias" or not s]
)
@pytest.mark.parametrize("spec", [P("data"), P("data", None, "model")], ids=str)
def test_explicit_mode_of_learned_features(spec, name, split):
    """Gradients of sinks and bias have the type of what they are of, split or not."""
    mesh, axes = make_mesh(AxisType.Explicit), FEATURES[name][2]
    run, whole, x = feature_loss(name)
    full = (*spec, None, None)
    own = P(*(None if a is None or not split else full[a] for a in axes))
    with jax.set_mesh(mesh):
        arrays = [place(mesh, y, spec) for y in (Q, K, V)] + [place(mesh, x, own)]
        found = run(*arrays)
        for gradient, array in zip(found[1], arrays):
            assert jax.typeof(gradient).sharding.spec == jax.typeof(array).sharding.spec
    assert_close(found, whole)


def test_explicit_mode_with_other_shardings():
    """Sequence-sharded, mixed with replicated, and mapped: right, with whatever it takes."""
    mesh = make_mesh(AxisType.Explicit)
    run = jax.jit(jax.value_and_grad(loss, (0, 1, 2)))
    whole = run(Q, K, V)
    with jax.set_mesh(mesh):
        for specs in ((P(None, "model"),) * 3, (P("data"), P(), P()), (P(), P(), P("data"))):
            assert_close(run(*(place(mesh, x, s) for x, s in zip((Q, K, V), specs))), whole)
        q, k, v = (place(mesh, x, P("data")) for x in (Q, K, V))
        mapped = jax.jit(jax.vmap(lambda s: flash_attention(q * s, k, v)))(jnp.array([1.0, -1.0]))
        assert jax.typeof(mapped).sharding.spec == P(None, "data", None, None, None)
    assert_close(mapped[1], flash_attention(-Q, K, V))


def test_explicit_mode_through_auto_axes():
    """What has loops over chunks inside goes through auto_axes."""
    mesh, spec = make_mesh(AxisType.Explicit), P("data", None, "model")
    chunks = {"query_chunk": 16, "key_chunk": 16, "causal": True}
    attend = functools.partial(blockwise_attention, **chunks)
    with jax.set_mesh(mesh):
        arrays = [place(mesh, x, spec) for x in (Q, K, V)]
        out = jax.jit(jax.sharding.auto_axes(attend, out_sharding=spec))(*arrays)
        assert jax.typeof(out).sharding.spec == P("data", None, "model", None)
    assert_close(out, flash_attention(Q, K, V, causal=True))


# --- Automatic sharding ---


def test_partial_manual_shard_map_with_shared_keys():
    """data manual, model left to XLA; keys are the same on all data shards: dk, dv are summed."""
    mesh = make_mesh(AxisType.Auto)
    k, v = K[:2], V[:2]

    def local(q, k, v):
        return jax.lax.psum((flash_attention(q, k, v, causal=True) ** 2).sum(), "data")

    run = jax.shard_map(
        local,
        mesh=mesh,
        in_specs=(P("data"), P(), P()),
        out_specs=P(),
        axis_names={"data"},
        check_vma=True,
    )
    run = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
    specs = P("data", None, "model"), P(None, None, "model"), P(None, None, "model")
    arrays = [place(mesh, x, spec) for x, spec in zip((Q, k, v), specs)]

    def whole(q, k, v):
        k, v = (jnp.concatenate([x, x]) for x in (k, v))
        return (flash_attention(q, k, v, causal=True) ** 2).sum()

    assert_close(run(*arrays), jax.value_and_grad(whole, (0, 1, 2))(Q, k, v))
    found = hlo.collectives(hlo.compiled_text(run, *arrays))
    assert ("f32[2,40,1,16]", "all-reduce") in found, (
        f"no psum of the local heads of dk, dv: {found}"
    )
    assert {kind for _, kind in found} == {"all-reduce"}, found


def test_vmap_keeps_a_batch_sharding():
    """The mapped axis goes behind the batch, so a batch-sharded operand stays where it is."""
    mesh = make_mesh(AxisType.Auto)
    scales = jnp.array([1.0, -0.5, 2.0])

    def mapped(q, k, v):
        return (jax.vmap(lambda s: flash_attention(q * s, k, v, causal=True))(scales) ** 2).sum()

    run = jax.jit(jax.value_and_grad(mapped, (0, 1, 2)))
    arrays = [place(mesh, x, P("data", None, "model")) for x in (Q, K, V)]
    value, gradients = run(*arrays)
    assert_close((value, gradients), run(Q, K, V))
    for gradient, array in zip(gradients, arrays):
        assert gradient.sharding.is_equivalent_to(array.sharding, 4)
    text = hlo.compiled_text(run, *arrays)
    hlo.assert_kernels(text, forward=1, backward=1)
    large = [x for x in hlo.collectives(text) if x[0] != "f32[]"]
    assert not large, f"collectives on arrays: {large}"


def test_eager_calls_keep_a_sharding():
    """Each is one compiled program, not operation after operation on gathered arrays."""
    mesh, spec = make_mesh(AxisType.Auto), P("data", None, "model")
    q, k, v = (place(mesh, x, spec) for x in (Q, K, V))
    whole = NamedSharding(mesh, spec)
    chunked = functools.partial(blockwise_attention, query_chunk=16, key_chunk=16)
    forward = lambda *x: attention_forward(*x)[0]  # noqa: E731
    for attend in (flash_attention, chunked, forward, jax.grad(lambda *x: loss(*x))):
        assert attend(q, k, v).sharding.is_equivalent_to(whole, 4), attend


# --- Modes of the process ---


def test_the_compilation_cache_hits_in_a_second_process(tmp_path):
    runs = [programs.run("cache", tmp_path / f"{n}.npz", str(tmp_path / "cache")) for n in range(2)]
    assert runs[0]["misses"] > 0, "the first process finds an empty cache"
    assert runs[1]["hits"] > 0
    assert runs[1]["misses"] == 0, "the program has something of its process in it"
    assert_bitwise("result", runs[0]["result"], runs[1]["result"])


@pytest.mark.parametrize("options", [{}, *MASKS.values()], ids=["full", *MASKS])
def test_x64_changes_nothing_for_32_bit_inputs(options):
    """The same bits and dtypes with 64-bit mode on, under strict promotion."""
    arrays = [np.asarray(x) for x in (Q, K, V)]
    given = jax.tree.map(np.asarray, options)

    def run():
        attend = functools.partial(flash_attention, return_lse=True, **given)
        ones = functools.partial(jax.tree.map, jnp.ones_like)
        return derivatives.vjp(attend, tuple(arrays), ones)

    wanted = run()
    with jax.enable_x64(True), jax.numpy_dtype_promotion("strict"):
        found = run()
    for n, (a, b) in enumerate(zip(found, wanted)):
        assert_bitwise(f"result {n}", a, b)
