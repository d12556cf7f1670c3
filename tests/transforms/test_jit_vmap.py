"""vmap over every subset of the operands, all axes, nested, around and inside grad."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hlo
from support.compare import assert_bitwise

from jax_flashattn import IntervalMask, flash_attention

SHAPES = {"query": (2, 9, 4, 8), "key": (2, 13, 2, 8), "value": (2, 13, 2, 6)}
SUBSETS = [s for n in (1, 2, 3) for s in itertools.combinations(range(3), n)]
N = 3


def arrays(batched=(), axes=(0, 0, 0)):
    """query, key, value; the batched ones with a further axis of different data."""
    rng, result = np.random.default_rng(0), []
    for n, shape in enumerate(SHAPES.values()):
        if n not in batched:
            result.append(jnp.asarray(rng.standard_normal(shape), jnp.float32))
            continue
        x = rng.standard_normal((N, *shape))
        result.append(jnp.asarray(np.moveaxis(x, 0, axes[n]), jnp.float32))
    return result


def attend(*x):
    out, lse = flash_attention(*x, causal=True, window=(7, None), return_lse=True)
    return out, lse


def loss(*x):
    out, lse = attend(*x)
    return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum()


def pick(x, n, index, batched, axes):
    return jnp.take(x, index, axis=axes[n]) if n in batched else x


def _equals_loop(function, batched, axes, out_axes=0):
    x = arrays(batched, axes)
    in_axes = tuple(axes[n] if n in batched else None for n in range(3))
    together = jax.jit(jax.vmap(function, in_axes=in_axes, out_axes=out_axes))(*x)
    for index in range(N):
        one = jax.jit(function)(*(pick(a, n, index, batched, axes) for n, a in enumerate(x)))
        for a, b in zip(jax.tree.leaves(together), jax.tree.leaves(one)):
            a = np.take(np.asarray(a), index, axis=out_axes)
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("batched", SUBSETS, ids=str)
def test_every_subset_of_operands(batched):
    _equals_loop(attend, batched, (0, 0, 0))


@pytest.mark.parametrize("batched", SUBSETS, ids=str)
def test_gradients_of_every_subset(batched):
    """vmap of grad, where unbatched operands still get batched gradients."""
    _equals_loop(jax.grad(loss, (0, 1, 2)), batched, (0, 0, 0))


@pytest.mark.parametrize("axes", [(1, 2, 3), (4, 0, 1), (-1, -2, -5), (2, -1, 0)], ids=str)
def test_axes(axes):
    _equals_loop(attend, (0, 1, 2), axes)
    _equals_loop(jax.grad(loss, (0, 1, 2)), (0, 1, 2), axes)


@pytest.mark.parametrize("out_axes", [1, -1])
def test_out_axes(out_axes):
    _equals_loop(attend, (0, 1), (0, 0, 0), out_axes)


@pytest.mark.parametrize("batched", SUBSETS, ids=str)
def test_gradient_of_a_vmapped_sum(batched):
    """grad of vmap: an unbatched operand's gradient is the sum over the mapped axis."""
    x = arrays(batched)
    in_axes = tuple(0 if n in batched else None for n in range(3))
    total = lambda *y: jax.vmap(loss, in_axes)(*y).sum()  # noqa: E731
    together = jax.jit(jax.grad(total, (0, 1, 2)))(*x)
    singles = [
        jax.grad(loss, (0, 1, 2))(*(pick(a, n, i, batched, (0, 0, 0)) for n, a in enumerate(x)))
        for i in range(N)
    ]
    for n, a in enumerate(together):
        parts = np.stack([np.asarray(one[n]) for one in singles])
        wanted = parts if n in batched else parts.sum(0)
        np.testing.assert_allclose(a, wanted, rtol=1e-5, atol=5e-6)


def test_nested_vmap_is_one_call():
    """Inner batch 2, two mapped axes of different size, no loop: one kernel call."""
    rng = np.random.default_rng(1)
    q = jnp.asarray(rng.standard_normal((4, *SHAPES["query"], 3)), jnp.float32)
    k, v = arrays()[1:]
    k = jnp.stack([k, 2 * k, 3 * k, -k])
    run = jax.jit(jax.vmap(jax.vmap(attend, (-1, None, None)), (0, 0, None)))
    out, lse = run(q, k, v)
    assert out.shape == (4, 3, *SHAPES["query"][:3], 6)
    for i, j in itertools.product(range(4), range(3)):
        one, one_lse = attend(q[i, ..., j], k[i], v)
        np.testing.assert_allclose(out[i, j], one, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(lse[i, j], one_lse, rtol=1e-5, atol=1e-6)
    hlo.assert_kernels(hlo.compiled_text(run, q, k, v), forward=1)


def test_vmap_three_deep_around_and_inside_grad():
    """Sizes 2, 3 and 5 on different axes of different operands; still one call of each kernel."""
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.standard_normal((2, *SHAPES["query"], 5)), jnp.float32)
    k = jnp.asarray(rng.standard_normal((3, *SHAPES["key"])), jnp.float32)
    v = jnp.asarray(
        rng.standard_normal((*SHAPES["value"][:2], 2, *SHAPES["value"][2:])), jnp.float32
    )
    axes = ((0, None, 2), (None, 0, None), (-1, None, None))

    def mapped(function):
        for in_axes in axes[::-1]:
            function = jax.vmap(function, in_axes)
        return jax.jit(function)

    each = mapped(jax.value_and_grad(loss, (0, 1, 2)))
    values, gradients = each(q, k, v)
    assert values.shape == (2, 3, 5)
    for n, m, p in itertools.product(range(2), range(3), range(5)):
        one, wanted = jax.value_and_grad(loss, (0, 1, 2))(q[n, ..., p], k[m], v[:, :, n])
        np.testing.assert_allclose(values[n, m, p], one, rtol=1e-5)
        for a, b in zip(gradients, wanted):
            np.testing.assert_allclose(a[n, m, p], b, rtol=1e-5, atol=5e-6)
    hlo.assert_kernels(hlo.compiled_text(each, q, k, v), forward=1, backward=1)
    total = jax.jit(jax.grad(lambda *x: mapped(loss)(*x).sum(), (0, 1, 2)))(q, k, v)
    sums = gradients[0].sum(1), gradients[1].sum((0, 2)), gradients[2].sum((1, 2))
    homes = (0, -1), (0,), (2,)  # where the operands have their mapped axes
    for a, b, home in zip(total, sums, homes):
        b = np.moveaxis(np.asarray(b), range(len(home)), home)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("kind", ["lengths", "segment_ids", "mask"])
@pytest.mark.parametrize("batch_arrays", [False, True])
def test_mask_arrays_are_mapped_too(kind, batch_arrays):
    rng = np.random.default_rng(2)
    q = jnp.asarray(rng.standard_normal((N, 2, 9, 4, 8)), jnp.float32)
    k, v = arrays()[1:]
    if kind == "lengths":
        values = (rng.integers(0, 10, (N, 2)), rng.integers(0, 14, (N, 2)))
    elif kind == "segment_ids":
        values = (rng.integers(0, 3, (N, 2, 9)), rng.integers(0, 3, (N, 2, 13)))
    else:
        values = (rng.integers(0, 9, (N, 2, 9)), rng.integers(4, 14, (N, 2, 9)))
    values = tuple(jnp.asarray(np.sort(x) if x.ndim == 3 else x, jnp.int32) for x in values)

    def run(q, values):
        given = IntervalMask(*values) if kind == "mask" else values
        return flash_attention(q, k, v, causal=True, return_lse=True, **{kind: given})

    q_in = q[0] if batch_arrays else q
    together = jax.jit(jax.vmap(run, (None if batch_arrays else 0, 0)))(q_in, values)
    run = jax.jit(run)
    for n in range(N):
        q_one = q[0] if batch_arrays else q[n]
        one = run(q_one, jax.tree.map(lambda x, n=n: x[n], values))
        for a, b in zip(together, one):
            np.testing.assert_allclose(a[n], b, rtol=1e-5, atol=1e-6)


def test_vmap_of_size_one_and_zero():
    q, k, v = arrays()
    out, _ = jax.vmap(attend, (0, None, None))(q[None], k, v)
    assert_bitwise("size 1", out[0], attend(q, k, v)[0])
    out, lse = jax.vmap(attend, (0, None, None))(q[None][:0], k, v)
    assert out.shape == (0, 2, 9, 4, 6)
    assert lse.shape == (0, 2, 4, 9)


def test_values_never_recompile_and_options_do():
    q, k, v = arrays()
    traces = []

    @jax.jit
    def run(q, k, v, lengths):
        traces.append(1)
        return flash_attention(q, k, v, lengths=(lengths, lengths), causal=True)

    a = run(q, k, v, jnp.array([9, 3], jnp.int32))
    b = run(2 * q, k, v, jnp.array([1, 0], jnp.int32))
    assert len(traces) == 1
    assert np.abs(a - b).max() > 0.1
    texts = {
        jax.jit(lambda *x, o=o: flash_attention(*x, **o)).lower(q, k, v).as_text()
        for o in (
            *({}, {"causal": True}, {"scale": 2.0}, {"window": (1, None)}, {"window": (None, 1)}),
            {"deterministic": True},
        )
    }
    assert len(texts) == 6


def test_eval_shape_matches_the_reference():
    for dtype in (jnp.bfloat16, jnp.float16, jnp.float32):
        x = [a.astype(dtype) for a in arrays()]
        shapes = [
            jax.eval_shape(
                lambda *y, i=i: flash_attention(*y, return_lse=True, implementation=i), *x
            )
            for i in ("kernel", "reference")
        ]
        assert shapes[0] == shapes[1]


def test_jit_equals_eager_bitwise():
    x = arrays()
    for name, a, b in zip(("out", "lse"), attend(*x), jax.jit(attend)(*x)):
        assert_bitwise(name, a, b)
