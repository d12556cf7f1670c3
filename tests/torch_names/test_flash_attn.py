"""flash-attn's dense functions: names, order and defaults; values, gradients; packed gradients."""

import inspect
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import hlo, oracle
from support.torch_names import oracle_features, see

import jax_flashattn
from jax_flashattn import (
    _torch_names,
    flash_attention,
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
)

# Options a call may have, by flash-attn's names.
SLOPES = np.array([0.5, 0.25, 0.125, 0.0625], np.float32)
SINKS = np.array([0.3, -1.0, 2.0, -np.inf])
FEATURES = (
    {},
    {"causal": True},
    {"causal": True, "window_size": (5, -1)},
    {"window_size": (3, 0), "softmax_scale": 0.3},
    {"window_size": (None, 4), "deterministic": True},
    {"softcap": 2.0, "causal": True},
    {"alibi_slopes": SLOPES},
    {"alibi_slopes": np.stack([SLOPES, SLOPES[::-1]]), "window_size": (9, 3)},
    {"learnable_sink": SINKS, "causal": True},
    {"dropout_p": 0.3, "dropout_key": np.array([3, 4], np.uint32), "softcap": 5.0},
)

_TAIL = (
    "dropout_p=0.0,softmax_scale=None,causal=False,window_size=(-1,-1),softcap=0.0,"
    "alibi_slopes=None,deterministic=False,return_attn_probs=False"
)
_CU = "cu_seqlens_q,cu_seqlens_k,max_seqlen_q,max_seqlen_k"
SIGNATURES = {  # reference: flash-attn 2.8.3
    "flash_attn_func": f"q,k,v,{_TAIL}",
    "flash_attn_kvpacked_func": f"q,kv,{_TAIL}",
    "flash_attn_qkvpacked_func": f"qkv,{_TAIL}",
    "flash_attn_varlen_func": f"q,k,v,{_CU},{_TAIL},block_table=None",
    "flash_attn_varlen_kvpacked_func": f"q,kv,{_CU},{_TAIL}",
    "flash_attn_varlen_qkvpacked_func": f"qkv,cu_seqlens,max_seqlen,{_TAIL}",
}


@pytest.fixture(autouse=True)
def _x64():
    with jax.enable_x64(True):
        yield


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


@pytest.mark.parametrize("name", SIGNATURES)
def test_signature(name):
    parameters = inspect.signature(getattr(jax_flashattn, name)).parameters.values()
    given = [p for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]
    words = [p.name if p.default is p.empty else f"{p.name}={p.default!r}" for p in given]
    assert ",".join(words).replace(", ", ",") == SIGNATURES[name]
    assert all(
        p.kind is p.KEYWORD_ONLY and p.default is None for p in list(parameters)[len(given) :]
    )


def _with_aux(results):
    """out and lse, and S_dmask, which has no gradient."""
    return results[:2], results[2]


@pytest.mark.parametrize("features", FEATURES, ids=str)
@pytest.mark.parametrize(("sq", "sk", "hk"), [(17, 17, 4), (9, 40, 2), (33, 12, 1), (1, 30, 4)])
def test_dense(sq, sk, hk, features):
    q, k, v = normal(0, 2, sq, 4, 16), normal(1, 2, sk, hk, 16), normal(2, 2, sk, hk, 16)
    dout = normal(3, 2, sq, 4, 16)
    sink = features.get("learnable_sink")
    rest = {n: x for n, x in features.items() if n != "learnable_sink"}

    def call(q, k, v, sink):
        return flash_attn_func(q, k, v, **rest, learnable_sink=sink, return_attn_probs=True)

    @jax.jit
    def run(q, k, v, sink):
        (out, lse), pull, dmask = jax.vjp(
            lambda *x: _with_aux(call(*x)), q, k, v, sink, has_aux=True
        )
        return out, lse, pull((dout, jnp.zeros_like(lse))), dmask

    out, lse, gradients, dmask = run(q, k, v, sink)
    arrays = dict(query=q, key=k, value=v, dout=dout, dlse=np.zeros(lse.shape))
    visible = np.broadcast_to(see(sq, sk, **features), (2, sq, sk))
    given = oracle_features((2, 4, sq, sk), **features)
    wanted = oracle.attention(arrays, visible, features.get("softmax_scale", 0.25), given)
    if given.keep is None:
        assert dmask is None
    else:
        hidden = np.asarray(dmask) == 0
        assert np.array_equal((dmask > 0) | hidden, given.keep | hidden)
        np.testing.assert_allclose(np.abs(dmask).sum(-1), 1, rtol=1e-9)
    for name, x in zip(("out", "lse", "dq", "dk", "dv", "dsinks"), (out, lse, *gradients)):
        if x is None:
            continue
        np.testing.assert_allclose(x, wanted[name], rtol=1e-9, atol=1e-12, err_msg=name)


def test_both_examples_of_the_documentation():
    """causal with (2, 5) and (5, 2), and window (1, 2) with (3, 5): the matrices as printed."""
    eye = jnp.eye(5, 16)[None, :, None]
    for sq, sk, options, rows in (
        (2, 5, {"causal": True}, ["11110", "11111"]),
        (5, 2, {"causal": True}, ["00", "00", "00", "10", "11"]),
        (3, 5, {"window_size": (1, 2)}, ["01111", "00111", "00011"]),
    ):
        q, k = jnp.zeros((1, sq, 1, 16)), jnp.zeros((1, sk, 1, 16))
        out = flash_attn_func(q, k, eye[:, :sk], **options)[0, :, 0, :sk]
        assert ["".join(str(int(x > 0)) for x in row) for row in out] == rows


@pytest.mark.parametrize("features", FEATURES, ids=str)
def test_packed_forms(features):
    qkv, dout = normal(0, 2, 21, 3, 4, 16), normal(1, 2, 21, 4, 16)
    q, k, v = (qkv[:, :, n] for n in range(3))
    wanted, pull = jax.vjp(lambda *x: flash_attn_func(*x, **features), q, k, v)
    dq, dk, dv = pull(dout)

    out, pull = jax.vjp(lambda x: flash_attn_qkvpacked_func(x, **features), qkv)
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(pull(dout)[0], np.stack([dq, dk, dv], 2))

    out, pull = jax.vjp(lambda *x: flash_attn_kvpacked_func(*x, **features), q, qkv[:, :, 1:])
    np.testing.assert_array_equal(out, wanted)
    np.testing.assert_array_equal(pull(dout)[1], np.stack([dk, dv], 2))


def test_packed_gradient_is_written_once():
    """One fused pass makes the packed gradient from the kernel's three; no concatenation exists."""
    qkv = jnp.ones((2, 64, 3, 4, 16), jnp.float32)
    gradient = jax.jit(jax.grad(lambda x: flash_attn_qkvpacked_func(x, causal=True).sum()))
    text = hlo.compiled_text(gradient, qkv)
    hlo.assert_kernels(text, forward=1, backward=1)
    assert "concatenate" not in text
    entry = text[text.index("ENTRY") :]
    makers = [x for x in re.findall(r"= f32\[2,64,3,4,16\]\S* (\w+)", entry) if x != "parameter"]
    assert makers == ["fusion"]


def test_probabilities_encode_dropout(monkeypatch):
    """Signs of S_dmask, with a flash_attention whose dropout is known."""
    kept = np.random.default_rng(5).random((2, 4, 9, 300)) > 0.4

    def probabilities(query, key):
        score = jnp.einsum("bihd,bjhd->bhij", query, jnp.repeat(key, 2, axis=2)) / 4
        return jax.nn.softmax(score)

    def dropping(query, key, value, *, dropout_rate, dropout_key):
        p = probabilities(query, key)
        p = p * kept / 0.6 if dropout_rate else p
        return jnp.einsum("bhij,bjhd->bihd", p, jnp.repeat(value, 2, axis=2))

    monkeypatch.setattr(_torch_names, "flash_attention", dropping)
    q, k = normal(0, 2, 9, 4, 16), normal(1, 2, 300, 2, 16)
    options = {"dropout_rate": 0.4, "dropout_key": jax.random.key(0)}
    result = _torch_names.signed_probabilities(q, k, options)
    wanted = np.where(kept, 1, -1) * np.asarray(probabilities(q, k))
    np.testing.assert_allclose(result, wanted, rtol=1e-12)


def test_errors():
    x = jnp.ones((1, 8, 2, 16))
    with pytest.raises(ValueError, match=r"qkv must have shape \[batch, seqlen, 3"):
        flash_attn_qkvpacked_func(jnp.ones((1, 8, 2, 2, 16)))
    with pytest.raises(ValueError, match=r"kv must have shape \[batch, seqlen, 2"):
        flash_attn_kvpacked_func(x, jnp.ones((1, 8, 3, 2, 16)))
    with pytest.raises(ValueError, match="window_size must be a pair"):
        flash_attn_func(x, x, x, window_size=3)
    with pytest.raises(ValueError, match="-1 or None for unbounded"):
        flash_attn_func(x, x, x, window_size=(-2, 0))
    with pytest.raises(ValueError, match=r"softcap must be .* got -1"):
        flash_attn_func(x, x, x, softcap=-1.0)
    with pytest.raises(ValueError, match="needs a dropout_key"):
        flash_attn_func(x, x, x, 0.1)
    big = jax.ShapeDtypeStruct((1, 32768, 16, 64), jnp.bfloat16)
    key = jax.random.key(0)
    with pytest.raises(ValueError, match=r"would allocate 32.0 GB for S_dmask of shape"):
        jax.eval_shape(
            lambda x: flash_attn_func(x, x, x, 0.1, return_attn_probs=True, dropout_key=key), big
        )


def test_same_as_the_native_call_in_bfloat16():
    q, k = (jnp.asarray(normal(n, 2, 40, h, 32), jnp.bfloat16) for n, h in ((0, 4), (1, 2)))
    out = flash_attn_func(q, k, k, 0.0, None, True, (7, 3))
    wanted = flash_attention(q, k, k, causal=True, window=(7, 3))
    np.testing.assert_array_equal(out, wanted)
