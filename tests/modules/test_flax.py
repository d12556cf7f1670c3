"""attention_fn inside the layers of Flax nnx and linen, against Flax's own attention."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen, nnx
from support import hlo

from jax_flashattn.flax import attention_fn

BATCH, LENGTH, HEADS, WIDTH = (2, 3), 20, 4, 32


@pytest.fixture(scope="module")
def inputs():
    return jax.random.normal(jax.random.key(0), (*BATCH, LENGTH, WIDTH))


def padding_mask():
    lengths = np.arange(3, 3 + 6).reshape(*BATCH, 1)
    real = np.arange(LENGTH) < lengths
    return jnp.asarray(real[..., None, None, :], jnp.float32)  # Flax's masks are float


def documents_mask():
    ids = np.sort(np.random.default_rng(0).integers(0, 4, (*BATCH, LENGTH)), -1)
    return jnp.asarray(ids[..., None, :, None] == ids[..., None, None, :])


def scattered_mask():
    """Not an interval, and different for every head; each row sees something."""
    mask = np.random.default_rng(1).random((*BATCH, HEADS, LENGTH, LENGTH)) < 0.5
    mask[..., np.arange(LENGTH), np.arange(LENGTH)] = True
    return jnp.asarray(mask)


MASKS = {
    "none": lambda: None,
    "causal": lambda: nnx.make_causal_mask(jnp.ones((*BATCH, LENGTH))),
    "padding": padding_mask,
    "documents": documents_mask,
    "scattered": scattered_mask,
}


def nnx_layer(function, **changes):
    return nnx.MultiHeadAttention(
        num_heads=HEADS,
        in_features=WIDTH,
        decode=False,
        attention_fn=function,
        rngs=nnx.Rngs(0),
        **changes,
    )


def close(a, b, tolerance=2e-4):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(x, y, atol=tolerance, rtol=tolerance)


@pytest.mark.parametrize(
    ("name", "kv_heads", "is_causal"),
    [
        *((name, None, False) for name in MASKS),
        *((name, None, True) for name in ("none", "padding", "documents")),
        *(("documents", 2, True), ("scattered", 2, False)),
    ],
)
def test_nnx_value_and_gradients(inputs, name, kv_heads, is_causal):
    mask = MASKS[name]()

    def loss(layer, x):
        # Flax's own function wants a bool mask where it takes the fast path.
        own = layer.attention_fn is nnx.dot_product_attention
        given = mask.astype(bool) if own and mask is not None else mask
        return (layer(x, mask=given, is_causal=is_causal) ** 2).sum()

    run = nnx.jit(nnx.value_and_grad(loss))
    ours = run(nnx_layer(attention_fn, num_kv_heads=kv_heads), inputs)
    theirs = run(nnx_layer(nnx.dot_product_attention, num_kv_heads=kv_heads), inputs)
    close(ours, theirs)


@pytest.mark.parametrize("name", MASKS)
def test_linen_value(inputs, name):
    mask = MASKS[name]()
    theirs = linen.MultiHeadDotProductAttention(num_heads=HEADS)
    variables = theirs.init(jax.random.key(0), inputs)
    ours = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=attention_fn)
    results = (jax.jit(x.apply)(variables, inputs, mask=mask) for x in (ours, theirs))
    close(*results)


def test_linen_causal_by_partial(inputs):
    """linen passes only what the signature names; partial keeps the signature."""
    causal = functools.partial(attention_fn, is_causal=True)
    ours = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=causal)
    theirs = linen.MultiHeadDotProductAttention(num_heads=HEADS)
    variables = theirs.init(jax.random.key(0), inputs)
    mask = linen.make_causal_mask(jnp.ones((*BATCH, LENGTH)))
    close(ours.apply(variables, inputs), theirs.apply(variables, inputs, mask=mask))


def test_linen_dropout_is_refused_not_dropped(inputs):
    """A function with **kwargs would silently train without dropout (linen filters by name)."""
    layer = linen.MultiHeadDotProductAttention(
        num_heads=HEADS, attention_fn=attention_fn, dropout_rate=0.5, deterministic=False
    )
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(NotImplementedError, match=r"dropout_rate=0\.5"):
        layer.init(rngs, inputs)


@pytest.mark.parametrize("name", ["bias", "input_positions", "qk_attn_weights_einsum"])
def test_what_cannot_be_honoured_is_refused(inputs, name):
    q = inputs.reshape(*BATCH, LENGTH, HEADS, -1)
    with pytest.raises(NotImplementedError, match=name):
        attention_fn(q, q, q, **{name: jnp.ones(())})


def test_a_mask_that_does_not_broadcast_is_refused(inputs):
    q = inputs.reshape(*BATCH, LENGTH, HEADS, -1)
    with pytest.raises(ValueError, match=r"mask must be broadcastable"):
        attention_fn(q, q, q, mask=jnp.ones((5, 1, LENGTH, LENGTH)))


def test_sown_weights_are_flax_weights(inputs):
    sown = []
    for function in (attention_fn, linen.dot_product_attention):
        layer = linen.MultiHeadDotProductAttention(num_heads=HEADS, attention_fn=function)
        variables = layer.init(jax.random.key(0), inputs)
        mask = linen.make_causal_mask(jnp.ones((*BATCH, LENGTH)))
        _, state = layer.apply(
            variables, inputs, mask=mask, sow_weights=True, mutable=["intermediates"]
        )
        sown.append(state)
    close(*sown, tolerance=1e-5)


def test_top_left_causal_with_more_keys_than_queries():
    """Flax and jax.nn align causal top-left; flash_attention aligns bottom-right."""
    q, k, v = (jax.random.normal(jax.random.key(i), (1, n, 2, 8)) for i, n in enumerate((5, 9, 9)))
    close(
        attention_fn(q, k, v, is_causal=True), jax.nn.dot_product_attention(q, k, v, is_causal=True)
    )


def test_the_kernel_runs_without_square_buffers():
    q = jnp.ones((1, 384, 2, 16))
    text = hlo.compiled_text(jax.jit(functools.partial(attention_fn, is_causal=True)), q, q, q)
    hlo.assert_kernels(text, forward=1)
    hlo.assert_no_square(text, 384, 384)
