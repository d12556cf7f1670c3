"""The FFI decoder: wrong shapes and types are errors with both shapes in words, never an abort."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.hlo import BACKWARD, FORWARD, TANGENT

from jax_flashattn import _native

ATTRIBUTES = {
    "scale": np.float64(0.25),
    "left": np.int64(-1),
    "right": np.int64(-1),
    "deterministic": np.bool_(False),
    "softcap": np.float64(0),
    "keep_threshold": np.int64(65536),
}
B, SQ, SK, HQ, HK, D, DV = 2, 3, 5, 4, 2, 8, 16
F32, I32, U32, BF16 = jnp.float32, jnp.int32, jnp.uint32, jnp.bfloat16

# name -> (shape, dtype) of a correct call in the user's form.
INPUTS = {
    "query": ((B, SQ, HQ, D), F32),
    "key": ((B, SK, HK, D), F32),
    "value": ((B, SK, HK, DV), F32),
    "lengths": ((B, 2), I32),
    "lo": ((B, SQ), I32),
    "hi": ((B, SQ), I32),
    "position": ((B, SQ), I32),
    "key_coordinates": ((B, 2), I32),
    "alibi_slopes": ((B, HQ), F32),
    "sinks": ((B, HQ), F32),
    "dropout": ((B, HQ, 4), U32),
    "bias": ((1, HQ, 1, SK), F32),
}
FORWARD_RESULTS = {"out": ((B, SQ, HQ, DV), F32), "lse": ((B, HQ, SQ), F32)}
BACKWARD_INPUTS = INPUTS | {
    "dout": ((B, SQ, HQ, DV), F32),
    "lse": ((B, HQ, SQ), F32),
    "delta": ((B, HQ, SQ), F32),
}
BACKWARD_RESULTS = {
    "dq": ((B, SQ, HQ, D), F32),
    "dk": ((B, SK, HK, D), F32),
    "dv": ((B, SK, HK, DV), F32),
    "dbias": ((1, HQ, 1, SK), F32),
    "scratch": ((B, HK, 1, SK + 2, 48), F32),
}
TANGENT_INPUTS = INPUTS | {
    "out": ((B, SQ, HQ, DV), F32),
    "lse": ((B, HQ, SQ), F32),
    "dq": ((B, SQ, HQ, D), F32),
    "dk": ((B, SK, HK, D), F32),
    "dv": ((B, SK, HK, DV), F32),
    "dbias": ((1, HQ, 1, SK), F32),
    "dsink": ((B, HQ, SQ), F32),
}
TANGENT_RESULTS = {"dout": ((B, SQ, HQ, DV), F32), "dlse": ((B, HQ, SQ), F32)}


def _call(target, inputs, results, **attributes):
    arrays = [jnp.ones(*x) for x in inputs.values()]
    types = [jax.ShapeDtypeStruct(*x) for x in results.values()]
    run = jax.ffi.ffi_call(target, types, vmap_method="sequential")
    return jax.block_until_ready(jax.jit(lambda *x: run(*x, **(ATTRIBUTES | attributes)))(*arrays))


def _refuses(target, inputs, results, words, **attributes):
    with pytest.raises(Exception, match="jax_flashattn") as info:
        _call(target, inputs, results, **attributes)
    text = str(info.value)
    assert "INVALID_ARGUMENT" in text
    missing = [word for word in words if word not in text]
    assert not missing, f"{missing} not in {text}"


def test_a_correct_call_runs():
    out, lse = _call(FORWARD, INPUTS, FORWARD_RESULTS)
    assert np.isfinite(out).all()
    assert np.isneginf(lse).all(), "lo = hi = 1 hides everything"
    results = _call(BACKWARD, BACKWARD_INPUTS, BACKWARD_RESULTS)
    results = [*results[:4], *_call(TANGENT, TANGENT_INPUTS, TANGENT_RESULTS)]
    assert all(not np.asarray(x).any() for x in results)


FORWARD_WRONG = (
    ("query", ((B, SQ, 3, D), F32), ["[2, 3, 3, 8]", "[2, 5, 2, 8]", "hk dividing hq"]),
    ("query", ((B, SQ, HQ), F32), ["[2, 3, 4]", "[2, 5, 2, 8]"]),
    ("query", ((1, 1, 1, 1, 1, 1), F32), ["[1, 1, 1, 1, 1, 1]"]),
    ("query", ((), F32), ["[]"]),
    ("query", ((B, SQ, HQ, D), I32), ["query", "float16, bfloat16, float32 or float64"]),
    ("query", ((B, SQ, HQ, D), BF16), ["key", "[2, 5, 2, 8]"]),
    ("key", ((B, SK, HK, D + 1), F32), ["key", "[2, 5, 2, 9]", "[2, 5, 2, 8]"]),
    ("key", ((B + 1, SK, HK, D), F32), ["key", "[3, 5, 2, 8]", "[2, 5, 2, 8]"]),
    ("key", ((B, SK, 0, D), F32), ["[2, 3, 4, 8]", "[2, 5, 0, 8]"]),
    ("key", ((B, SK, HK), F32), ["[2, 5, 2]"]),
    ("value", ((B, SK + 1, HK, DV), F32), ["value", "[2, 6, 2, 16]", "[2, 5, 2, 16]"]),
    ("value", ((B, SK, HK, DV), BF16), ["value", "[2, 5, 2, 16]"]),
    ("value", ((B, SK, HK, 257), F32), ["257", "1 to 256"]),
    ("value", ((B, SK, HK, 0), F32), ["0", "1 to 256"]),
    ("lengths", ((B, 3), I32), ["lengths", "[2, 3]", "[2, 2]"]),
    ("lengths", ((B + 1, 2), I32), ["lengths", "[3, 2]", "[2, 2]"]),
    ("lengths", ((B, 2), F32), ["lengths", "[2, 2]"]),
    ("lengths", ((), I32), ["lengths", "[]", "[2, 2]"]),
    ("lo", ((B, SQ + 1), I32), ["lo", "[2, 4]", "[2, 3]"]),
    ("hi", ((1, SQ), I32), ["hi", "[1, 3]", "[2, 3]"]),
    ("hi", ((B, 0), I32), ["lo and hi must be given together"]),
    ("position", ((B, SK), I32), ["position", "[2, 5]", "[2, 3]"]),
    ("key_coordinates", ((B, 3), I32), ["key_coordinates", "[2, 3]", "[2, 2]"]),
    ("alibi_slopes", ((B, HK), F32), ["alibi_slopes", "[2, 2]", "[2, 4]"]),
    ("alibi_slopes", ((B, HQ), BF16), ["alibi_slopes", "[2, 4]"]),
    ("sinks", ((HQ,), F32), ["sinks", "[4]", "[2, 4]"]),
    ("dropout", ((B, HQ, 2), U32), ["dropout", "[2, 4, 2]", "[2, 4, 4]"]),
    ("dropout", ((B, HQ, 4), I32), ["dropout", "[2, 4, 4]"]),
    ("bias", ((B, HQ, SQ, SQ), F32), ["bias", "[2, 4, 3, 3]", "[2, 4, 3, 5]"]),
    ("bias", ((HQ, SQ, SK), F32), ["bias", "[4, 3, 5]", "[2, 4, 3, 5]"]),
    ("bias", ((1, HK, 1, SK), F32), ["bias", "[1, 2, 1, 5]"]),
    ("bias", ((1, HQ, 1, SK), BF16), ["bias", "float32"]),
)


@pytest.mark.parametrize(("name", "wrong", "words"), FORWARD_WRONG, ids=str)
def test_forward_refuses(name, wrong, words):
    _refuses(FORWARD, INPUTS | {name: wrong}, FORWARD_RESULTS, words)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("out", ((B, SQ, HQ, D), F32), ["out", "[2, 3, 4, 8]", "[2, 3, 4, 16]"]),
        ("out", ((B, SQ, HQ, DV), BF16), ["out", "[2, 3, 4, 16]"]),
        ("lse", ((B, SQ, HQ), F32), ["lse", "[2, 3, 4]", "[2, 4, 3]"]),
        ("lse", ((B, HQ, SQ), BF16), ["lse", "[2, 4, 3]"]),
    ],
    ids=str,
)
def test_forward_refuses_results(name, wrong, words):
    _refuses(FORWARD, INPUTS, FORWARD_RESULTS | {name: wrong}, words)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("key", ((B, SK, HK, D + 1), F32), ["key", "[2, 5, 2, 9]"]),
        ("dout", ((B, SQ, HQ, D), F32), ["dout", "[2, 3, 4, 8]", "[2, 3, 4, 16]"]),
        ("dout", ((B, SQ, HQ, DV), BF16), ["dout"]),
        ("lse", ((B, SQ, HQ), F32), ["lse", "[2, 3, 4]", "[2, 4, 3]"]),
        ("delta", ((B, HQ, SQ, 1), F32), ["delta", "[2, 4, 3, 1]", "[2, 4, 3]"]),
        ("delta", ((B, HQ, SQ), BF16), ["delta", "[2, 4, 3]"]),
    ],
    ids=str,
)
def test_backward_refuses(name, wrong, words):
    _refuses(BACKWARD, BACKWARD_INPUTS | {name: wrong}, BACKWARD_RESULTS, words)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("dq", ((B, SQ, HQ, DV), F32), ["dq", "[2, 3, 4, 16]", "[2, 3, 4, 8]"]),
        ("dk", ((B, SK, HQ, D), F32), ["dk", "[2, 5, 4, 8]", "[2, 5, 2, 8]"]),
        ("dv", ((B, SK, HK, DV), BF16), ["dv", "[2, 5, 2, 16]"]),
        ("dbias", ((B, HQ, 1, SK), F32), ["dbias", "[2, 4, 1, 5]", "[1, 4, 1, 5]"]),
        ("dbias", ((1, HQ, 1, SK), BF16), ["dbias"]),
        ("scratch", ((B, HK, 1, SK, 48), F32), ["scratch", "[2, 2, 1, 5, 48]", "[2, 2, 1, 7, 48]"]),
        ("scratch", ((B, HK, 1, SK + 2, 40), F32), ["scratch", "40", "48"]),
        ("scratch", ((B, HK, 0, SK + 2, 48), F32), ["scratch", "[2, 2, 0, 7, 48]"]),
        ("scratch", ((7,), F32), ["scratch", "[7]"]),
    ],
    ids=str,
)
def test_backward_refuses_results(name, wrong, words):
    _refuses(BACKWARD, BACKWARD_INPUTS, BACKWARD_RESULTS | {name: wrong}, words)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("query", ((B, SQ, HQ, D), BF16), ["key", "[2, 5, 2, 8]"]),
        ("out", ((B, SQ, HQ, D), F32), ["out", "[2, 3, 4, 8]", "[2, 3, 4, 16]"]),
        ("lse", ((B, SQ, HQ), F32), ["lse", "[2, 3, 4]", "[2, 4, 3]"]),
        ("dq", ((B, SQ, HK, D), F32), ["dq", "[2, 3, 2, 8]", "[2, 3, 4, 8]"]),
        ("dk", ((B, SK, HK, D), BF16), ["dk", "[2, 5, 2, 8]"]),
        ("dv", ((B, SK, HK, D), F32), ["dv", "[2, 5, 2, 8]", "[2, 5, 2, 16]"]),
        ("dbias", ((B, HQ, SQ, SQ), F32), ["bias", "[2, 4, 3, 3]", "[2, 4, 3, 5]"]),
        ("dbias", ((B, 0), F32), ["bias and its tangent", "together"]),
        ("dsink", ((B, HQ), F32), ["dsink", "[2, 4]", "[2, 4, 3]"]),
    ],
    ids=str,
)
def test_tangent_refuses(name, wrong, words):
    _refuses(TANGENT, TANGENT_INPUTS | {name: wrong}, TANGENT_RESULTS, words)


@pytest.mark.parametrize(
    ("name", "wrong", "words"),
    [
        ("dout", ((B, SQ, HQ, D), F32), ["dout", "[2, 3, 4, 8]", "[2, 3, 4, 16]"]),
        ("dlse", ((B, SQ, HQ), F32), ["dlse", "[2, 3, 4]", "[2, 4, 3]"]),
    ],
    ids=str,
)
def test_tangent_refuses_results(name, wrong, words):
    _refuses(TANGENT, TANGENT_INPUTS, TANGENT_RESULTS | {name: wrong}, words)


def test_a_call_of_another_version_is_refused():
    """The operand list is one: fewer, or results or attributes that are missing, name the count."""
    fewer = {n: INPUTS[n] for n in list(INPUTS)[:6]}
    _refuses(FORWARD, fewer, FORWARD_RESULTS, ["6 operands", "expected 12"])
    only_out = {"out": FORWARD_RESULTS["out"]}
    _refuses(FORWARD, INPUTS, only_out, ["1 results", "12 and 2"])
    without = {n: BACKWARD_RESULTS[n] for n in list(BACKWARD_RESULTS)[:4]}
    _refuses(BACKWARD, BACKWARD_INPUTS, without, ["result 4 is missing"])


@pytest.mark.parametrize("name", ATTRIBUTES)
def test_a_missing_attribute_is_refused(name, monkeypatch):
    monkeypatch.delitem(ATTRIBUTES, name)
    if name == "deterministic":  # the CPU is always
        _call(FORWARD, INPUTS, FORWARD_RESULTS)
    else:
        _refuses(FORWARD, INPUTS, FORWARD_RESULTS, [name])


def test_the_logical_form_gives_the_same_numbers():
    """[b, g, r, s, d] in row-major order is the b, s, h, d call on transposed data."""
    rng = np.random.default_rng(0)
    q, k, v = (rng.standard_normal(INPUTS[n][0]).astype(np.float32) for n in list(INPUTS)[:3])
    given = [
        np.array([[3, 5], [2, 4]], np.int32),  # lengths
        *[np.zeros((B, 0), np.int32)] * 2,
        rng.integers(0, 9, (B, SQ)).astype(np.int32),  # position
        np.array([[1, 2], [0, 3]], np.int32),  # key coordinates
        *(rng.uniform(size=(B, HQ)).astype(np.float32) for _ in range(2)),
        rng.integers(0, 2**32, (B, HQ, 4), np.uint32),  # dropout
        rng.standard_normal((B, HQ, SQ, SK)).astype(np.float32),
    ]
    attributes = ATTRIBUTES | {"softcap": np.float64(2), "keep_threshold": np.int64(40000)}
    types = [jax.ShapeDtypeStruct(*x) for x in FORWARD_RESULTS.values()]
    out, lse = jax.ffi.ffi_call(FORWARD, types)(q, k, v, *given, **attributes)
    q5 = q.reshape(B, SQ, HK, HQ // HK, D).transpose(0, 2, 3, 1, 4)
    r = HQ // HK
    for n, x in enumerate(given):
        if n < 5:
            given[n] = np.broadcast_to(x[:, None], (B, HK, x.shape[1]))
        else:
            given[n] = x.reshape(B, HK, r, *x.shape[2:])
    layouts = [(4, 2, 1, 3, 0), (3, 1, 2, 0), (3, 1, 2, 0)]
    layouts += [tuple(range(x.ndim))[::-1] for x in given]
    types = [
        jax.ShapeDtypeStruct((B, HK, HQ // HK, SQ, DV), F32),
        jax.ShapeDtypeStruct((B, HK, HQ // HK, SQ), F32),
    ]
    run = jax.ffi.ffi_call(
        FORWARD, types, input_layouts=[layout[::-1] for layout in layouts],
        output_layouts=[(0, 3, 1, 2, 4), (0, 1, 2, 3)],
    )  # fmt: skip
    keys = [x.transpose(0, 2, 1, 3) for x in (k, v)]
    out5, lse5 = jax.jit(lambda *x: run(*x, **attributes))(q5, *keys, *given)
    back = np.asarray(out5).transpose(0, 3, 1, 2, 4).reshape(out.shape)
    assert np.array_equal(back, out)
    assert np.array_equal(np.asarray(lse5).reshape(lse.shape), lse)


def test_a_missing_platform_says_why(monkeypatch):
    monkeypatch.setitem(_native.problems, "CUDA", "libwhatever.so not found")
    monkeypatch.delitem(_native.modules, "CUDA", raising=False)
    with pytest.raises(ImportError, match=r"CUDA.*libwhatever.so not found.*BUILD.md"):
        _native.require("CUDA")
    _native.require("cpu")


CACHED_INPUTS = INPUTS | {
    "key": ((7, SK, HK, D), F32),
    "value": ((7, SK, HK, DV), F32),
    "lo": ((B, 0), I32),
    "hi": ((B, 0), I32),
    "sinks": ((B, 0), F32),
    "dropout": ((B, 0), U32),
    "bias": ((B, 0), F32),
    "table": ((B, 3), I32),
}
CACHED_RESULTS = FORWARD_RESULTS | {"scratch": ((B, 2, HQ * SQ, 34), F32)}
CACHED_WRONG = (
    ("query", ((B, HK, 2, SQ, D), F32), ["[2, 2, 2, 3, 8]", "[7, 5, 2, 8]"]),
    ("key", ((7, SK, HK), F32), ["[7, 5, 2]"]),
    ("key", ((7, SK, HK, D + 1), F32), ["key", "[7, 5, 2, 9]", "[7, 5, 2, 8]"]),
    ("value", ((6, SK, HK, DV), F32), ["value", "[6, 5, 2, 16]", "[7, 5, 2, 16]"]),
    ("table", ((B + 1, 3), I32), ["table", "[3, 3]", "[2, 3]"]),
    ("table", ((B, 3), F32), ["table", "[2, 3]"]),
    ("table", ((B,), I32), ["[2]", "[b, columns or 0]"]),
    ("dropout", ((B, HQ, 4), U32), ["no bias and no dropout"]),
    ("bias", ((1, HQ, 1, 3 * SK), F32), ["no bias and no dropout"]),
)


def test_a_correct_cached_call_runs():
    out, lse, _ = _call(_native.CACHED, CACHED_INPUTS, CACHED_RESULTS)
    np.testing.assert_allclose(out[:, 0], 1, rtol=1e-6)  # values are ones, lengths one
    assert np.isneginf(lse[:, :, 1:]).all()


@pytest.mark.parametrize(("name", "wrong", "words"), CACHED_WRONG)
def test_cached_inputs(name, wrong, words):
    _refuses(_native.CACHED, CACHED_INPUTS | {name: wrong}, CACHED_RESULTS, words)


def test_cached_rows_scratch_and_count():
    few = CACHED_INPUTS | {"table": ((B, 0), I32), "key": ((1, SK, HK, D), F32)}
    few |= {"value": ((1, SK, HK, DV), F32)}
    _refuses(_native.CACHED, few, CACHED_RESULTS, ["query has 2 rows, the cache 1"])
    wrong = CACHED_RESULTS | {"scratch": ((B, 2, HQ * SQ, 33), F32)}
    _refuses(_native.CACHED, CACHED_INPUTS, wrong, ["scratch", "[2, 2, 12, 33]", "[2, 2, 12, 34]"])
    _refuses(_native.CACHED, INPUTS, FORWARD_RESULTS, ["12 operands, expected 13"])
