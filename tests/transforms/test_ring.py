"""Ring attention from public pieces (examples/context_parallel.py) is one flash_attention call."""

import functools
import pathlib
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from support import hlo

from jax_flashattn import IntervalMask, flash_attention, merge_partials

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / "examples"))
import context_parallel

B, S, HQ, HK, D, DV = 2, 96, 4, 2, 8, 12
RNG = np.random.default_rng(0)
Q, K, V, DOUT = (
    jnp.asarray(RNG.standard_normal((B, S, h, d)), jnp.float32)
    for h, d in ((HQ, D), (HK, D), (HK, DV), (HQ, DV))
)
DLSE = jnp.asarray(RNG.standard_normal((B, HQ, S)), jnp.float32)
# Documents that cross, fill and fit into the shards of 12 tokens; padding at the end and between.
IDS = np.zeros((B, S), np.int32)
IDS[0, :90] = np.repeat([1, 2, 3, 0, 4], [30, 1, 29, 10, 20])
IDS[1] = np.repeat([1, 2], [12, 84])


@jax.jit
def make_masks():
    return {
        "full": IntervalMask.sliding_window(S, S, None, None),
        "causal": IntervalMask.causal(S),
        "window": IntervalMask.sliding_window(S, S, 17, 5),
        "documents": IntervalMask.documents(IDS),
        "causal documents in a window": IntervalMask.documents(IDS, causal=True, window=(20, None)),
        "prefix": IntervalMask.prefix(jnp.array([40, 0], jnp.int32), S),
    }


MASKS = make_masks()


def mesh_of(n: int) -> Mesh:
    return Mesh(np.array(jax.devices("cpu")[:n]), ("seq",))


SLOPES = jnp.array([0.5, 0.1, 0.03, 0.01])
FEATURES = {
    "alibi": {"alibi_slopes": SLOPES},
    "dropout": {"dropout_rate": 0.3, "dropout_key": np.array([7, 11], np.uint32)},
}
FEATURES["both"] = FEATURES["alibi"] | FEATURES["dropout"]


@functools.cache
def one_device(name: str, features: str | None = None):
    @jax.jit
    def run(q, k, v, mask):
        given = FEATURES.get(features, {})
        attend = functools.partial(flash_attention, mask=mask, return_lse=True, **given)
        results, pullback = jax.vjp(attend, q, k, v)
        return *results, *pullback((DOUT, DLSE))

    return jax.device_get(run(Q, K, V, MASKS[name]))


def in_layout(layout: str, n: int, mask: IntervalMask):
    """The arrays in the order in which the devices hold them, and that order."""
    order = context_parallel.token_order(layout, S, n)
    q, k, v, dout = (x[:, order] for x in (Q, K, V, DOUT))
    rows = IntervalMask(mask.lo[:, order], mask.hi[:, order])
    return order, (q, k, v, rows, jnp.asarray(order)), (dout, DLSE[:, :, order])


@functools.cache
def ring_program(n: int, layout: str = "contiguous", features: str | None = None):
    given = FEATURES.get(features, {})
    ring = context_parallel.sharded_attention(mesh_of(n), layout, given.get("dropout_rate", 0.0))
    extra = given.get("alibi_slopes"), given.get("dropout_key")

    @jax.jit
    def run(q, k, v, mask, positions, cotangents):
        results, pullback = jax.vjp(lambda *x: ring(*x, mask, positions, *extra), q, k, v)
        return *results, *pullback(cotangents)

    return run


def assert_same(found, wanted, order):
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, wanted, strict=True):
        b = b[:, :, order] if name == "lse" else b[:, order]
        np.testing.assert_array_equal(np.isneginf(a), np.isneginf(b), err_msg=name)
        finite = np.isfinite(b)
        size = np.abs(b[finite]).max()
        np.testing.assert_allclose(
            np.asarray(a)[finite], b[finite], rtol=0, atol=3e-6 * size, err_msg=name
        )


@pytest.mark.parametrize("layout", context_parallel.LAYOUTS)
@pytest.mark.parametrize("name", MASKS)
def test_value_and_gradients_equal_one_device(name, layout):
    order, arrays, cotangents = in_layout(layout, 8, MASKS[name])
    assert_same(ring_program(8)(*arrays, cotangents), one_device(name), order)


@pytest.mark.parametrize("layout", context_parallel.LAYOUTS)
@pytest.mark.parametrize("features", FEATURES)
def test_alibi_and_dropout_are_those_of_the_whole(features, layout):
    name = "causal documents in a window" if features == "both" else "window"
    order, arrays, cotangents = in_layout(layout, 8, MASKS[name])
    found = ring_program(8, layout, features)(*arrays, cotangents)
    assert_same(found, one_device(name, features), order)


@pytest.mark.parametrize("n", [1, 2, 3])
def test_rings_of_other_sizes(n):
    name = "causal documents in a window"
    order, arrays, cotangents = in_layout("zigzag", n, MASKS[name])
    assert_same(ring_program(n)(*arrays, cotangents), one_device(name), order)


@pytest.mark.parametrize("n", [2, 4, 8])
@pytest.mark.parametrize("layout", context_parallel.LAYOUTS)
def test_every_device_holds_its_tokens_in_order(layout, n):
    order = context_parallel.token_order(layout, 48, n)
    assert sorted(order) == list(range(48))
    shards = order.reshape(n, -1)
    assert (np.diff(shards) > 0).all()
    work = (shards + 1).sum(1)  # visible pairs under a causal mask
    if layout != "contiguous":
        assert np.ptp(work) <= 48
    else:
        assert np.ptp(work) > 48


def test_no_branch_on_the_rank_and_no_gather():
    """One program for all devices: keys, values and positions permuted, nothing else moved."""
    _, arrays, cotangents = in_layout("zigzag", 8, MASKS["causal"])
    text = hlo.compiled_text(ring_program(8), *arrays, cotangents)
    assert " conditional(" not in text
    assert "partition-id" not in text
    kinds = {kind.removesuffix("-start") for _, kind in hlo.collectives(text)}
    assert kinds == {"collective-permute"}
    hlo.assert_kernels(text, forward=2, backward=2)  # the own keys, and the loop over the others
    hlo.assert_no_square(text, S, S)


def test_differentiating_through_the_parts_gives_the_same():
    """jax's own derivative of flash_attention, merge and ppermute against the written backward."""
    mesh = mesh_of(8)

    def ring(q, k, v, mask, positions):
        held, parts = (k, v, positions), []
        for hop in range(8):
            held = context_parallel._next_device(held, "seq") if hop else held
            see = mask.for_positions(held[2])
            parts.append(flash_attention(q, *held[:2], mask=see, return_lse=True))
        return merge_partials(*zip(*parts))

    tokens, lse = P(None, "seq"), P(None, None, "seq")
    specs = (tokens, tokens, tokens, tokens, P("seq"))
    sharded = jax.shard_map(ring, mesh=mesh, in_specs=specs, out_specs=(tokens, lse))
    order, arrays, cotangents = in_layout("striped", 8, MASKS["window"])

    @jax.jit
    def run(q, k, v, mask, positions):
        results, pullback = jax.vjp(lambda *x: sharded(*x, mask, positions), q, k, v)
        return *results, *pullback(cotangents)

    assert_same(run(*arrays), one_device("window"), order)


def test_16_bit_inputs():
    """Merged in float32: as good as one call, whose own rounding is the limit."""
    order, arrays, cotangents = in_layout("zigzag", 8, MASKS["causal"])
    half = [x.astype(jnp.bfloat16) for x in arrays[:3]]
    dout = cotangents[0].astype(jnp.bfloat16)
    found = ring_program(8)(*half, *arrays[3:], (dout, cotangents[1]))
    for name, a, b in zip(("out", "lse", "dq", "dk", "dv"), found, one_device("causal")):
        b = b[:, :, order] if name == "lse" else b[:, order]
        error = np.linalg.norm(np.asarray(a, np.float32) - b) / np.linalg.norm(b)
        assert error < 8e-3, (name, error)


def test_the_example_trains():
    result = context_parallel.compare("zigzag", 4, 256, 40, 4, 2, 4, alibi=True, dropout_rate=0.1)
    assert result["losses"][-1] < 0.95 * result["losses"][0]
    assert result["loss_error"] < 1e-6
    assert result["gradient_error"] < 5e-6
