"""Eight CPU devices: batch and head shardings cost no collective, everything else stays right."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from support import hlo

from jax_flashattn import flash_attention

RNG = np.random.default_rng(0)
Q, K, V = (
    jnp.asarray(RNG.standard_normal((4, s, h, 16)), jnp.float32)
    for s, h in ((24, 8), (40, 4), (40, 4))
)
LENGTHS = tuple(jnp.asarray(x, jnp.int32) for x in ([24, 3, 17, 0], [40, 9, 16, 8]))


@pytest.fixture(scope="module")
def mesh():
    devices = jax.devices("cpu")
    if len(devices) < 8:
        pytest.fail(f"{len(devices)} CPU devices; tests/conftest.py asks for 8")
    return jax.sharding.Mesh(np.array(devices[:8]).reshape(2, 4), ("data", "model"))


def loss(q, k, v, lengths, options=()):
    out, lse = flash_attention(q, k, v, lengths=lengths, return_lse=True, **dict(options))
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


def gradients(options=()):
    return jax.jit(jax.value_and_grad(functools.partial(loss, options=tuple(options)), (0, 1, 2)))


def assert_close(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, rtol=2e-5, atol=1e-5)


WHOLE = P()


def _sharded(mesh, spec, lengths_spec=WHOLE):
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
    return *(place(x, spec) for x in (Q, K, V)), tuple(place(x, lengths_spec) for x in LENGTHS)


SPECS = {
    "batch": (P("data"), P("data")),
    "heads": (P(None, None, "model"), P()),
    "both": (P("data", None, "model"), P("data")),
    "batch over all": (P("model"), P("model")),
}


@pytest.mark.parametrize("options", [(), (("causal", True), ("window", (9, None)))], ids=str)
@pytest.mark.parametrize("name", SPECS)
def test_batch_and_head_shardings_need_no_collective(mesh, name, options):
    """Under plain jit: only the scalar loss is summed over devices."""
    arrays = _sharded(mesh, *SPECS[name])
    run = gradients(options)
    (value, grads), text = hlo.run_with_text(run, *arrays)
    assert_close((value, grads), run(Q, K, V, LENGTHS))
    for gradient, array in zip(grads, arrays):
        assert gradient.sharding.is_equivalent_to(array.sharding, 4)
    hlo.assert_kernels(text, forward=1, backward=1)
    large = [x for x in hlo.collectives(text) if x[0] != "f32[]"]
    assert not large, f"collectives on arrays: {large}"


@pytest.mark.parametrize("name", SPECS)
def test_each_device_runs_only_its_share(mesh, name):
    """The compiled call's own operand shapes are the local ones, not the global."""
    arrays = _sharded(mesh, *SPECS[name])
    text = hlo.compiled_text(jax.jit(functools.partial(flash_attention, causal=True)), *arrays[:3])
    call = next(line for line in text.splitlines() if hlo.FORWARD in line and " = " in line)
    parts = int(np.prod([mesh.shape[a] for a in SPECS[name][0] if a]))
    sizes = call.split("[")[1].split("]")[0].split(",")
    assert np.prod([int(n) for n in sizes]) == Q.size // parts


@pytest.mark.parametrize(
    "spec", [P(None, "model"), P("data", "model"), P(None, None, None, "model")], ids=str
)
def test_other_shardings_stay_correct(mesh, spec):
    run = gradients((("causal", True),))
    assert_close(run(*_sharded(mesh, spec)), run(Q, K, V, LENGTHS))


def test_mixed_shardings_stay_correct(mesh):
    """Query sharded, keys replicated, and more devices than key heads."""
    run = gradients((("causal", True),))
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
    wanted = run(Q, K, V, LENGTHS)
    assert_close(run(place(Q, P("data")), place(K, P()), place(V, P()), LENGTHS), wanted)
    spread = P(None, None, ("data", "model"))
    assert_close(run(place(Q, spread), place(K, P()), place(V, P()), LENGTHS), wanted)


def test_segments_and_vmap_under_sharding(mesh):
    ids = jnp.asarray(np.sort(RNG.integers(0, 4, (4, 24))), jnp.int32)

    def run(q, k, v, ids):
        attend = jax.vmap(
            lambda scale: flash_attention(q * scale, k[:, :24], v[:, :24], segment_ids=ids)
        )
        return (attend(jnp.array([1.0, -0.5])) ** 2).sum()

    run = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
    place = lambda x, s: jax.device_put(x, NamedSharding(mesh, s))  # noqa: E731
    arrays = *(place(x, P("data")) for x in (Q, K, V)), place(ids, P("data"))
    assert_close(run(*arrays), run(Q, K, V, ids))


def _in_shard_map(mesh, specs, check_vma, axis_names=None):
    names = frozenset(axis_names or mesh.axis_names)
    used = tuple(a for a in names if any(a in str(s) for s in specs))

    def local(q, k, v):
        out = flash_attention(q, k, v, causal=True, window=(9, None))
        return jax.lax.psum((out**2).sum(), used)

    return jax.jit(
        jax.value_and_grad(
            jax.shard_map(
                local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=check_vma,
                axis_names=names,
            ),
            (0, 1, 2),
        )
    )  # fmt: skip


def _plain():
    def whole(q, k, v):
        return (flash_attention(q, k, v, causal=True, window=(9, None)) ** 2).sum()

    return jax.value_and_grad(whole, (0, 1, 2))(Q, K, V)


@pytest.mark.parametrize(
    "specs",
    [
        (P("data"),) * 3,
        (P(None, None, "model"),) * 3,
        (P("data", None, "model"),) * 3,
        (P(),) * 3,
    ],
    ids=str,
)
def test_shard_map(mesh, specs):
    assert_close(_in_shard_map(mesh, specs, check_vma=True)(Q, K, V), _plain())


def test_shard_map_with_replicated_keys(mesh):
    """Keys and values of one head group per device: their gradients are summed over devices."""
    q, k, v = Q[..., :4, :], K[..., :1, :], V[..., :1, :]
    specs = (P(None, None, "model"), P(), P())

    def local(q, k, v):
        return jax.lax.psum((flash_attention(q, k, v, causal=True) ** 2).sum(), "model")

    run = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=P(), check_vma=True)
    run = jax.jit(jax.value_and_grad(run, (0, 1, 2)))
    whole = jax.value_and_grad(lambda *x: (flash_attention(*x, causal=True) ** 2).sum(), (0, 1, 2))
    assert_close(run(q, k, v), whole(q, k, v))
    found = hlo.collectives(hlo.compiled_text(run, q, k, v))
    sums = [shape for shape, kind in found if kind.startswith("all-reduce")]
    assert f"f32[{','.join(map(str, k.shape))}]" in sums, f"no psum of dk, dv in {found}"


def test_partial_manual_shard_map(mesh):
    """One axis manual, the other left to XLA, inside a jit over the mesh."""
    run = _in_shard_map(mesh, (P("data"),) * 3, True, axis_names=("data",))
    spec = NamedSharding(mesh, P("data", None, "model"))
    assert_close(run(*(jax.device_put(x, spec) for x in (Q, K, V))), _plain())
