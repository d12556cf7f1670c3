"""Every refusal: its type, and that its text names the value and what is accepted."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashattn import (
    IntervalMask,
    _native,
    attention_backward,
    attention_forward,
    flash_attention,
)


def zeros(shape, dtype=np.float32):
    return np.zeros(shape, dtype)


def ones(shape, dtype=np.float32):
    return np.ones(shape, dtype)


Q = zeros((2, 6, 4, 8))
K = zeros((2, 5, 2, 8))
IDS = ones((2, 6), np.int32)
KEY_IDS = ones((2, 5), np.int32)


def _refuses(error, words, *args, **options):
    """The call raises exactly this type, with all words in its text."""
    with pytest.raises(error) as info:
        flash_attention(*args, **options)
    assert type(info.value) is error
    missing = [word for word in words if word not in str(info.value)]
    assert not missing, f"{missing} not in {info.value}"


SHAPES = (
    ((Q[0], K, K), ["query", "4 dimensions", "(6, 4, 8)"]),
    ((Q, K[..., 0], K), ["key", "4 dimensions", "(2, 5, 2)"]),
    ((Q, K, K[None]), ["value", "4 dimensions", "(1, 2, 5, 2, 8)"]),
    ((Q, K[:1], K), ["(2, 6, 4, 8)", "(1, 5, 2, 8)", "(2, 5, 2, 8)"]),
    ((Q, K[..., :4], K), ["(2, 5, 2, 4)", "[b, sk, hk, d]"]),
    ((Q, K, K[:, :4]), ["(2, 4, 2, 8)", "[b, sk, hk, dv]"]),
    ((Q, K, K[:, :, :1]), ["(2, 5, 1, 8)"]),
    ((Q[:, :, :3], K, K), ["divide", "3 query heads", "2 key heads"]),
    ((Q, K[:, :, :0], K[:, :, :0]), ["divide", "4 query heads", "0 key heads"]),
    ((Q[..., :0], K[..., :0], K), ["head_dim of query and key", "1 to 256", "0"]),
    ((Q, K, K[..., :0]), ["head_dim of value", "1 to 256", "0"]),
    ((zeros((1, 1, 1, 257)),) * 3, ["head_dim", "1 to 256", "257"]),
)


@pytest.mark.parametrize(("arrays", "words"), SHAPES)
def test_shapes(arrays, words):
    _refuses(ValueError, words, *arrays)


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ((Q.astype(jnp.bfloat16), K, K), ["bfloat16, float32, float32", "one dtype"]),
        ((Q, K, K.astype(jnp.float16)), ["float32, float32, float16", "one dtype"]),
        ((Q.astype(jnp.int32),) * 3, ["int32", "bfloat16, float16, float32, float64"]),
        ((Q.astype(jnp.complex64),) * 3, ["complex64", "float32"]),
        ((Q.astype(jnp.float8_e4m3fn),) * 3, ["float8_e4m3fn", "float32"]),
        (([[1.0]], K, K), ["query", "array", "list"]),
        ((Q, None, K), ["key", "array", "NoneType"]),
        ((Q, K, 3.0), ["value", "array", "float"]),
    ],
)
def test_dtypes(arrays, words):
    _refuses(TypeError, words, *arrays)


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (TypeError, {"causal": 1}, ["causal", "bool", "1"]),
        (TypeError, {"causal": None}, ["causal", "bool", "None"]),
        (TypeError, {"deterministic": "yes"}, ["deterministic", "bool", "'yes'"]),
        (ValueError, {"window": 7}, ["window", "pair", "7"]),
        (ValueError, {"window": (1, 2, 3)}, ["window", "pair", "(1, 2, 3)"]),
        (ValueError, {"window": "ab1"}, ["window", "pair", "'ab1'"]),
        (ValueError, {"window": (-1, 0)}, ["window left", "None for unbounded", "-1"]),
        (ValueError, {"window": (0, -2)}, ["window right", "None for unbounded", "-2"]),
        (ValueError, {"window": (True, 0)}, ["window left", "True"]),
        (TypeError, {"window": (1.5, 0)}, ["window left", "int", "1.5"]),
        (TypeError, {"window": (0, "x")}, ["window right", "int", "'x'"]),
        (TypeError, {"scale": "a"}, ["scale", "'a'"]),
        (ValueError, {"scale": float("nan")}, ["scale", "finite", "nan"]),
        (ValueError, {"scale": float("inf")}, ["scale", "finite", "inf"]),
        (ValueError, {"implementation": "fast"}, ["implementation", "'fast'", "reference"]),
    ],
    ids=str,
)
def test_options(error, options, words):
    _refuses(error, words, Q, K, K, **options)


MASKS = (
    (ValueError, {"lengths": ones(3, jnp.int32)}, ["lengths", "(2,)", "(3,)"]),
    (ValueError, {"lengths": (IDS[0, :2],)}, ["lengths", "pair", "1"]),
    (ValueError, {"lengths": (IDS[0, :2], IDS[0, :1])}, ["key lengths", "(2,)", "(1,)"]),
    (TypeError, {"lengths": ones(2)}, ["lengths", "int32", "float32"]),
    (TypeError, {"lengths": ones(2, jnp.int16)}, ["lengths", "int32", "int16"]),
    (TypeError, {"lengths": 5}, ["lengths", "array", "int"]),
    (ValueError, {"lengths": [2**40, 1]}, ["lengths", "int32", str(2**40)]),
    (ValueError, {"segment_ids": IDS}, ["pair", "6", "5"]),
    (ValueError, {"segment_ids": (IDS,)}, ["segment_ids", "pair", "1"]),
    (ValueError, {"segment_ids": (KEY_IDS, KEY_IDS)}, ["query segment_ids", "(2, 6)", "(2, 5)"]),
    (ValueError, {"segment_ids": (IDS, IDS)}, ["key segment_ids", "(2, 5)", "(2, 6)"]),
    (TypeError, {"segment_ids": (IDS, KEY_IDS * 1.0)}, ["key segment_ids", "int32", "float32"]),
    (TypeError, {"mask": IDS > 0}, ["mask", "IntervalMask"]),
    (ValueError, {"mask": IntervalMask(KEY_IDS, KEY_IDS)}, ["mask.lo", "6", "(2, 5)"]),
    (ValueError, {"mask": IntervalMask(IDS[0], IDS[0])}, ["mask.lo", "(6,)"]),
    (ValueError, {"mask": IntervalMask(IDS, IDS[:1])}, ["mask.hi", "(2, 6)", "(1, 6)"]),
    (TypeError, {"mask": IntervalMask(IDS * 1.0, IDS)}, ["mask.lo", "int32", "float32"]),
    (
        ValueError,
        {"mask": IntervalMask(*[ones((3, 6), jnp.int32)] * 2)},
        ["mask.lo", "2 or 1", "(3, 6)"],
    ),
)


@pytest.mark.parametrize(("error", "options", "words"), MASKS)
def test_masks(error, options, words):
    _refuses(error, words, Q, K, K, **options)


KEY = jax.random.key(0)
SLOPES = ones(4)


@pytest.mark.parametrize(
    ("error", "options", "words"),
    [
        (ValueError, {"softcap": -1.0}, ["softcap", "0 (off) or positive", "-1.0"]),
        (ValueError, {"softcap": float("inf")}, ["softcap", "finite", "inf"]),
        (TypeError, {"softcap": "30"}, ["softcap", "'30'"]),
        (TypeError, {"softcap": True}, ["softcap", "True"]),
        (TypeError, {"alibi_slopes": 0.5}, ["alibi_slopes", "array", "float"]),
        (TypeError, {"alibi_slopes": SLOPES.astype(jnp.bfloat16)}, ["alibi_slopes", "bfloat16"]),
        (ValueError, {"alibi_slopes": ones(2)}, ["alibi_slopes", "(4,) or (2, 4)", "(2,)"]),
        (ValueError, {"alibi_slopes": ones((4, 2))}, ["alibi_slopes", "(2, 4)", "(4, 2)"]),
        (TypeError, {"sinks": SLOPES.astype(jnp.int32)}, ["sinks", "float32", "int32"]),
        (ValueError, {"sinks": ones((2, 4))}, ["sinks", "(4,)", "(2, 4)"]),
        (TypeError, {"bias": zeros((1, 1, 6, 5), jnp.bfloat16)}, ["bias", "bfloat16"]),
        (ValueError, {"bias": zeros((6, 5))}, ["bias", "(2, 4, 6, 5)", "(6, 5)"]),
        (ValueError, {"bias": zeros((1, 2, 6, 5))}, ["bias", "(2, 4, 6, 5)", "(1, 2, 6, 5)"]),
        (TypeError, {"bias": [[1.0]]}, ["bias", "array", "list"]),
        (ValueError, {"differentiation": "both"}, ["differentiation", "'both'", "'reverse'"]),
        (ValueError, {"dropout_rate": 0.1}, ["dropout_rate 0.1", "dropout_key"]),
        (ValueError, {"dropout_rate": -0.1}, ["dropout_rate", "between 0 and 1", "-0.1"]),
        (ValueError, {"dropout_rate": 1.5}, ["dropout_rate", "between 0 and 1", "1.5"]),
        (TypeError, {"dropout_rate": "0.1"}, ["dropout_rate", "'0.1'"]),
        (TypeError, {"dropout_rate": 0.1, "dropout_key": 7}, ["dropout_key", "jax.random", "int"]),
        (
            TypeError,
            {"dropout_rate": 0.1, "dropout_key": ones(2)},
            ["dropout_key", "uint32", "float32"],
        ),
        (
            ValueError,
            {"dropout_rate": 0.1, "dropout_key": jax.random.split(KEY)},
            ["dropout_key", "one key", "(2,)"],
        ),
        (
            ValueError,
            {"dropout_rate": 0.1, "dropout_key": ones(3, jnp.uint32)},
            ["dropout_key", "(2,)", "(3,)"],
        ),
    ],
    ids=str,
)
def test_features(error, options, words):
    _refuses(error, words, Q, K, K, **options)


@pytest.mark.parametrize("attend", [flash_attention, attention_forward, attention_backward])
def test_bias_is_refused_by_name_when_lowered_for_cuda(attend, monkeypatch):
    """Lowering needs no GPU and not the extension itself, so the refusal is seen here too."""
    monkeypatch.setitem(_native.modules, "CUDA", _native.modules["cpu"])
    x = jax.ShapeDtypeStruct((1, 4, 1, 8), jnp.bfloat16)
    bias = jax.ShapeDtypeStruct((1, 1, 4, 4), jnp.bfloat16)
    lse = jax.ShapeDtypeStruct((1, 1, 4), jnp.float32)
    given = [x, x, x] + ([x, lse, lse] if attend is attention_backward else [])
    traced = jax.jit(attend).trace(*given, bias=bias)
    with pytest.raises(NotImplementedError, match="CUDA does not support bias"):
        traced.lower(lowering_platforms=("cuda",))


def test_a_traced_scale_is_refused():
    with pytest.raises(TypeError, match="scale must be a number known at trace time"):
        jax.jit(lambda s: flash_attention(Q, K, K, scale=s))(0.5)


def test_unknown_arguments_are_refused():
    with pytest.raises(TypeError, match="is_causal"):
        flash_attention(Q, K, K, is_causal=True)
    with pytest.raises(TypeError, match="positional"):
        flash_attention(Q, K, K, True)


def test_forward_mode_is_a_clear_error():
    with pytest.raises(TypeError, match="forward-mode"):
        jax.jvp(lambda q: flash_attention(q, K, K), (Q,), (Q,))


@pytest.mark.parametrize(
    "options",
    [
        {"window": (np.int64(3), None)},
        {"window": [3, 0]},
        {"scale": np.float32(0.5)},
        {"scale": 1},
        {"lengths": [6, 3]},
        {"lengths": (np.array([6, 3]), [5, 2])},
        {"segment_ids": (np.ones((2, 6), int), np.ones((2, 5), int))},
        {"dropout_rate": 0.0, "dropout_key": None},
        {"implementation": "kernel"},
        {"implementation": "reference"},
    ],
    ids=str,
)
def test_accepted_spellings(options):
    out = jax.jit(lambda: flash_attention(Q, K, K, **options))()
    assert out.shape == Q.shape
    assert np.isfinite(out).all()
