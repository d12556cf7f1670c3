"""dot_product_attention against jax.nn's, whose signature and meaning it has."""

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import derivatives, hlo

from jax_flashattn import dot_product_attention

TOLERANCE = {"rtol": 1e-5, "atol": 3e-6}  # jax.nn has a float32 softmax for any dtype
SIZES = ((20, 20), (12, 31), (31, 12))


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def compare(sq, sk, hk=2, *, rows=None, **options):
    """Values, gradients and residual; `rows` [b, sq] names rows that see a key, others give 0."""
    q, k, v = normal(0, 2, sq, 4, 16), normal(1, 2, sk, hk, 16), normal(2, 2, sk, hk, 16)
    rows = np.ones((2, sq), bool) if rows is None else np.broadcast_to(rows, (2, sq))
    dout = np.where(rows[..., None, None], normal(3, 2, sq, 4, 16), 0)
    results = []
    for function in (dot_product_attention, jax.nn.dot_product_attention):
        call = functools.partial(function, **options, return_residual=True)
        results.append(derivatives.vjp(call, (q, k, v), (dout, np.zeros((2, sq, 4)))))
    ours, theirs = results
    assert not np.any(ours[0][~rows])
    assert np.all(np.isneginf(ours[1][~rows]))
    for x, y in zip(ours[:2], theirs[:2]):
        assert x.shape == y.shape
        np.testing.assert_allclose(x[rows], y[rows], **TOLERANCE)
    for x, y in zip(ours[2:], theirs[2:]):
        np.testing.assert_allclose(x, y, **TOLERANCE)


def test_signature():
    theirs = inspect.signature(jax.nn.dot_product_attention).parameters
    ours = inspect.signature(dot_product_attention).parameters
    assert [(p.name, p.kind, p.default) for p in ours.values()] == [
        (p.name, p.kind, p.default) for p in theirs.values()
    ]


@pytest.mark.parametrize(("sq", "sk"), SIZES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("window", [None, 3, (4, 2), (0, 5)])
def test_masks_by_arguments(sq, sk, is_causal, window):
    i, j = np.arange(sq)[:, None], np.arange(sk)
    left, right = (None, None) if window is None else np.broadcast_to(window, 2)
    see = np.ones((sq, sk), bool) if window is None else (j >= i - left) & (j <= i + right)
    see &= (j <= i) | (not is_causal)
    compare(sq, sk, rows=see.any(1), is_causal=is_causal, local_window_size=window, scale=0.3)


@pytest.mark.parametrize(("sq", "sk"), SIZES)
@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("which", ["query", "key", "both"])
def test_lengths(sq, sk, is_causal, which):
    query, key = np.array([sq, 7], np.int32), np.array([5, sk], np.int32)
    options = {}
    if which != "key":
        options["query_seq_lengths"] = query
    if which != "query":
        options["key_value_seq_lengths"] = key
    rows = np.arange(sq) < (query if which != "key" else np.array([sq, sq]))[:, None]
    compare(sq, sk, rows=rows, is_causal=is_causal, **options)


MASKS = {
    "padding": lambda sq, sk: np.arange(sk) < np.array([sk, 9])[:, None, None, None],
    "causal": lambda sq, sk: np.arange(sk) <= np.arange(sq)[:, None],
    "per head": lambda sq, sk: np.arange(sk) <= 3 + np.arange(4)[None, :, None, None],
    "not an interval": lambda sq, sk: np.arange(sk) % 3 != 1,
    "random": lambda sq, sk: (normal(7, 2, 4, sq, sk) > 0) | (np.arange(sk) == 0),
}


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize(("is_causal", "sq", "sk"), [(False, *SIZES[0]), (True, *SIZES[1])])
def test_boolean_masks(kind, is_causal, sq, sk):
    mask = MASKS[kind](sq, sk)
    compare(sq, sk, mask=mask.reshape(*(1,) * (4 - mask.ndim), *mask.shape), is_causal=is_causal)


@pytest.mark.parametrize("shape", ["bhij", "hij", "ij", "j", "bj", ""])
@pytest.mark.parametrize("is_causal", [False, True])
def test_bias(shape, is_causal):
    """Values and all gradients, of every shape that broadcasts; as 4, and for "ij" as 2 axes."""
    b, sq, sk = 2, 12, 12
    sizes = {"b": b, "h": 4, "i": sq, "j": sk}
    bias = normal(4, *(n if axis in shape else 1 for axis, n in sizes.items()))
    bias = bias[0, 0] if shape == "ij" else bias
    arrays = normal(0, b, sq, 4, 16), normal(1, b, sk, 2, 16), normal(2, b, sk, 2, 16), bias
    dout = normal(3, b, sq, 4, 16)
    results = []
    for function in (dot_product_attention, jax.nn.dot_product_attention):
        call = functools.partial(function, is_causal=is_causal, scale=0.3)
        results.append(derivatives.vjp(call, arrays, dout))
    for ours, theirs in zip(*results):
        assert ours.shape == theirs.shape
        np.testing.assert_allclose(ours, theirs, **TOLERANCE)


def test_without_a_batch():
    q, k = normal(0, 9, 4, 16), normal(1, 12, 2, 16)
    for options in ({}, {"is_causal": True}, {"mask": np.arange(12)[None, None] < 5}):
        out, lse = dot_product_attention(q, k, k, **options, return_residual=True)
        theirs = functools.partial(jax.nn.dot_product_attention, **options, return_residual=True)
        wanted = jax.jit(theirs)(q, k, k)
        np.testing.assert_allclose(out, wanted[0], **TOLERANCE)
        np.testing.assert_allclose(lse, wanted[1], **TOLERANCE)


@pytest.mark.parametrize("implementation", ["xla", "reference", "kernel"])
def test_implementations(implementation):
    q, k = normal(0, 2, 9, 4, 16), normal(1, 2, 12, 2, 16)
    out = dot_product_attention(q, k, k, is_causal=True, implementation=implementation)
    wanted = jax.nn.dot_product_attention(q, k, k, is_causal=True)
    np.testing.assert_allclose(out, wanted, **TOLERANCE)


def test_the_residual_is_float32_for_bfloat16():
    x = jnp.ones((1, 8, 1, 16), jnp.bfloat16)
    assert dot_product_attention(x, x, x, return_residual=True)[1].dtype == jnp.float32


@pytest.mark.parametrize("key_padding", [False, True])
def test_kernels_without_square_buffers(key_padding):
    x = jnp.ones((2, 192, 2, 16), jnp.float32)
    mask = jnp.arange(192)[None, None, None] < jnp.array([192, 50])[:, None, None, None]
    options = {"is_causal": True, "local_window_size": (20, 0)}
    options |= {"mask": mask} if key_padding else {}
    text = hlo.compiled_text(jax.jit(lambda x: dot_product_attention(x, x, x, **options)), x)
    hlo.assert_kernels(text, forward=1)
    if not key_padding:  # a boolean mask brings the plain branch into the program
        hlo.assert_no_square(text, 192, 192)


def test_errors():
    x = jnp.ones((1, 8, 2, 16))
    with pytest.raises(ValueError, match="mask must be bool, got float32"):
        dot_product_attention(x, x, x, mask=jnp.ones((1, 1, 8, 8), jnp.float32))
    with pytest.raises(ValueError, match=r"mask must be broadcastable to \(1, 2, 8, 8\)"):
        dot_product_attention(x, x, x, mask=jnp.ones((1, 1, 4, 8), bool))
    with pytest.raises(NotImplementedError, match="mask together with bias"):
        dot_product_attention(x, x, x, jnp.ones((1, 1, 8, 8)), jnp.ones((1, 1, 8, 8), bool))
    with pytest.raises(ValueError, match="local_window_size must be 0 or more"):
        dot_product_attention(x, x, x, local_window_size=(-1, 0))
    with pytest.raises(TypeError, match="key_value_seq_lengths must have dtype int32"):
        dot_product_attention(x, x, x, key_value_seq_lengths=jnp.ones(1))
    with pytest.raises(ValueError, match="implementation must be one of"):
        dot_product_attention(x, x, x, implementation="triton")
