"""Strict dtype promotion: nothing here mixes dtypes by accident, in 16 bits and with gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from jax_flashattn import (
    IntervalMask,
    apply_rotary_emb,
    attention_probs,
    blockwise_attention,
    dot_product_attention,
    flash_attention,
    flash_attn_func,
    flash_attn_varlen_func,
    flash_attn_with_kvcache,
    shifted_sparse_attention,
)

Q = jnp.ones((2, 12, 4, 16), jnp.bfloat16)
K = jnp.ones((2, 20, 2, 16), jnp.bfloat16)
SLOPES = jnp.full(4, 0.1)
DROPOUT = {"dropout_rate": 0.2, "dropout_key": jax.random.key(0)}
CU = np.array([0, 5, 12], np.int32)
TABLES = jnp.ones((20, 8)), jnp.ones((20, 8))


@pytest.fixture(autouse=True)
def _strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


def gradients(attend, *x):
    """In bfloat16, as what they are of."""

    def loss(*x):
        return sum(jnp.sum(y.astype(jnp.float32)) for y in jax.tree.leaves(attend(*x)))

    found = jax.jit(jax.grad(loss, tuple(range(len(x)))))(*x)
    assert [g.dtype for g in found] == [y.dtype for y in x]


MASKS = {
    "window": {"causal": True, "window": (3, 2)},
    "lengths": {"lengths": (np.array([3, 12], np.int32), np.array([20, 4], np.int32))},
    "segments": {"segment_ids": (np.ones((2, 12), np.int32), np.ones((2, 20), np.int32))},
    "mask": {"mask": IntervalMask.causal(12, 20)},
}


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
@pytest.mark.parametrize("name", MASKS)
def test_every_feature(name, implementation):
    def attend(q, k, v, bias, sinks):
        return flash_attention(
            q,
            *(k, v),
            bias=bias,
            sinks=sinks,
            alibi_slopes=SLOPES,
            softcap=3.0,
            return_lse=True,
            implementation=implementation,
            **DROPOUT,
            **MASKS[name],
        )

    bias = jnp.zeros((1, 4, 12, 20), jnp.bfloat16)
    gradients(attend, Q, K, K, bias, jnp.zeros(4))


def test_a_bias_shared_by_slices_and_devices():
    bias = jnp.zeros((1, 1, 12, 20), jnp.bfloat16)
    gradients(
        lambda b: jax.vmap(lambda s: flash_attention(Q * s, K, K, bias=b))(Q[:, 0, 0, 0]), bias
    )
    mesh = jax.sharding.Mesh(np.array(jax.devices("cpu")[:2]), ("data",))
    q, k = (jax.device_put(x, NamedSharding(mesh, P("data"))) for x in (Q, K))
    gradients(lambda q, k, b: flash_attention(q, k, k, bias=b), q, k, bias)


CALLS = {
    "blockwise": lambda x: blockwise_attention(
        *(x, x, x), query_chunk=5, key_chunk=7, sinks=jnp.zeros(4), alibi_slopes=SLOPES, **DROPOUT
    ),
    "probabilities": lambda x: attention_probs(x, x, x, sinks=jnp.zeros(4), softcap=2.0),
    "jax.nn": lambda x: dot_product_attention(
        *(x, x, x), is_causal=True, mask=jnp.arange(12)[None, None, None] < 7
    ),
    "dense": lambda x: flash_attn_func(x, x, x, alibi_slopes=SLOPES, learnable_sink=jnp.zeros(4)),
    "varlen": lambda x: flash_attn_varlen_func(*[x[0]] * 3, CU, CU, 7, 7, alibi_slopes=SLOPES),
    "padded varlen": lambda x: flash_attn_varlen_func(
        *[x[0]] * 3, CU, CU, 7, 7, alibi_slopes=jnp.ones((2, 4))
    ),
    "cache": lambda x: flash_attn_with_kvcache(
        *(x, K, K), x[:, :3, :2], x[:, :3, :2],
        cache_seqlens=np.array([3, 4], np.int32), rotary_cos=TABLES[0], rotary_sin=TABLES[1],
    )[0],
    "shifted": lambda x: shifted_sparse_attention(x, x, x, 4, **DROPOUT),
    "rotary": lambda x: apply_rotary_emb(x, *TABLES, interleaved=True),
    "rotary of packed tokens": lambda x: apply_rotary_emb(
        x[0], *TABLES, cu_seqlens=CU, seqlen_offsets=np.array([1, 2], np.int32), max_seqlen=7
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CALLS)
def test_other_names(name):
    gradients(CALLS[name], Q)
