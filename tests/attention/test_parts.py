"""merge_partials, attention_forward, attention_backward: parts of the keys add up to the whole."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import grids, hlo
from support.case import Case, cases
from support.check import call, check_results, x64_if
from support.compare import assert_bitwise
from support.data import make_problem

from jax_flashattn import (
    IntervalMask,
    _validate,
    attention_backward,
    attention_delta,
    attention_forward,
    attention_sink_gradient,
    flash_attention,
    merge_partials,
)

RNG = np.random.default_rng(0)


def normal(*shape):
    return jnp.asarray(RNG.standard_normal(shape), jnp.float32)


def softmax_parts(scores, values):
    """Normalised parts in float64: (out [b, s, h, d], lse [b, h, s]) each."""
    outs, lses = [], []
    for score, value in zip(scores, values):  # [b, h, s, t], [b, h, t, d]
        top = np.where(np.isneginf(m := score.max(-1, keepdims=True)), 0, m)
        weight = np.exp(score - top)
        total = weight.sum(-1, keepdims=True)
        out = weight @ value / np.where(total > 0, total, 1)
        with np.errstate(divide="ignore"):
            lses.append((top + np.log(total))[..., 0])
        outs.append(out.swapaxes(1, 2))
    return outs, lses


def parts_with_holes(count: int, scale: float = 1.0):
    """Random parts in which some rows, and one row of all parts, see nothing."""
    b, h, s, d = 2, 3, 7, 5
    scores = [scale * RNG.standard_normal((b, h, s, n + 1)) for n in range(count)]
    for n, score in enumerate(scores):
        score[:, :, n % s] = -np.inf
        score[0, 1, 4] = -np.inf
    values = [RNG.standard_normal((b, h, n + 1, d)) for n in range(count)]
    whole = softmax_parts([np.concatenate(scores, -1)], [np.concatenate(values, -2)])
    return softmax_parts(scores, values), (whole[0][0], whole[1][0])


@pytest.mark.parametrize(("count", "scale"), [(1, 1.0), (2, 1.0), (5, 1.0), (3, 300.0)])
def test_merge(count, scale):
    """Scores in the hundreds: the form log(1 + exp(b - a)) would overflow."""
    (outs, lses), (out, lse) = parts_with_holes(count, scale)
    given = [[jnp.asarray(x, jnp.float32) for x in side] for side in (outs, lses)]
    got, got_lse = jax.jit(merge_partials)(*given)
    assert np.isneginf(got_lse[0, 1, 4])
    assert not np.asarray(got[0, 4, 1]).any()
    np.testing.assert_allclose(got, out, rtol=1e-5, atol=2e-6 * max(scale, 1))
    np.testing.assert_allclose(got_lse, lse, rtol=1e-6, atol=1e-6)
    stacked = merge_partials(*(jnp.stack(side) for side in given))
    for a, b in zip(stacked, merge_partials(*given)):
        assert_bitwise("stacked", a, b)


def test_merge_in_any_nesting():
    (outs, lses), wanted = parts_with_holes(5)
    parts = [tuple(jnp.asarray(x, jnp.float32) for x in part) for part in zip(outs, lses)]
    for order in ([0, 1, 2, 3, 4], [3, 0, 4, 2, 1]):
        merged = parts[order[0]]
        for n in order[1:]:
            merged = merge_partials(*zip(merged, parts[n]))
        for a, b in zip(merged, wanted):
            np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_merge_has_no_nan_in_value_or_gradient():
    """Empty parts on one side, on both, and a poisoned output of an empty part."""
    outs = normal(2, 1, 4, 1, 8).at[:, :, 0].set(jnp.nan).at[0, :, 1].set(jnp.nan)
    lses = jnp.zeros((2, 1, 1, 4)).at[:, :, :, 0].set(-jnp.inf).at[0, :, :, 1].set(-jnp.inf)

    def loss(outs, lses):
        out, lse = merge_partials(outs, lses)
        return (out**2).sum() + jnp.where(jnp.isneginf(lse), 0, lse).sum()

    value, (douts, dlses) = jax.jit(jax.value_and_grad(loss, (0, 1)))(outs, lses)
    assert np.isfinite(value)
    assert np.isfinite(douts).all()
    assert np.isfinite(dlses).all()
    empty = np.isneginf(lses)
    assert not np.asarray(dlses)[empty].any()
    assert not np.asarray(douts.swapaxes(2, 3))[empty].any()
    assert np.asarray(dlses)[~empty].all()


def test_merge_keeps_a_visible_nan():
    """A part that did see a NaN poisons its row, however small its weight (S13)."""
    outs = jnp.ones((2, 1, 3, 1, 4)).at[0, :, 0].set(jnp.nan)
    lses = jnp.zeros((2, 1, 1, 3)).at[0, 0, 0, 0].set(-500.0).at[0, 0, 0, 1].set(jnp.nan)
    out, lse = merge_partials(outs, lses)
    assert np.isnan(out[0, :2]).all()
    assert np.isfinite(out[0, 2]).all()
    assert np.isnan(lse[0, 0]).tolist() == [False, True, False]


def test_gradient_of_a_merge():
    """Against the gradient of one softmax over everything: sizes a float64 difference can check."""
    scores, values = normal(2, 1, 2, 3, 4), normal(2, 1, 2, 4, 5)

    def attend(score, value):
        lse = jax.scipy.special.logsumexp(score, -1)
        return (jnp.exp(score - lse[..., None]) @ value).swapaxes(1, 2), lse

    def loss(pair):
        out, lse = pair
        return (jnp.sin(out)).sum() + (lse**2).sum()

    merged = lambda s, v: loss(merge_partials(*zip(attend(s[0], v[0]), attend(s[1], v[1]))))  # noqa: E731
    whole = lambda s, v: loss(attend(jnp.concatenate(s, -1), jnp.concatenate(v, -2)))  # noqa: E731
    gradients = [jax.jit(jax.grad(f, (0, 1)))(scores, values) for f in (merged, whole)]
    for a, b in zip(*gradients):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_merge_dtypes_and_errors():
    out, lse = jnp.ones((1, 2, 3, 4), jnp.bfloat16), jnp.zeros((1, 3, 2))
    merged = merge_partials([out, out], [lse, lse])
    assert [x.dtype for x in merged] == [jnp.float32, jnp.float32]
    with jax.numpy_dtype_promotion("strict"):
        merge_partials([out, out.astype(jnp.float32)], [lse, lse])
    for outs, lses in (
        ([], []),
        ([out], [lse, lse]),
        ([out], [lse[..., :1]]),
        ([out, out[:0]], [lse] * 2),
    ):
        with pytest.raises(ValueError, match="merge_partials needs one out"):
            merge_partials(outs, lses)
    with pytest.raises(TypeError, match="lses must be an array"):
        merge_partials([out], [0.0])


FEATURES = {"softcap": 5.0, "alibi": "bh", "sinks": True, "dropout": 0.3}


def by_parts(problem, cuts) -> dict:
    """out, lse and gradients with the keys cut into parts, as a ring would."""
    case, given = problem.case, problem.given
    q, k, v, dout, dlse = (given[n] for n in ("query", "key", "value", "dout", "dlse"))
    arguments = problem.mask_arguments()
    if "intervals" in arguments:
        arguments["mask"] = IntervalMask(*arguments.pop("intervals"))
    ends = (*cuts, case.sk)

    @jax.jit
    def run(q, k, v, dout, dlse, arguments):
        options = {"segment_ids": None, "lengths": None, "mask": None} | case.options()
        operands, spec = _validate.prepare(q, k, v, **(options | arguments))
        whole = IntervalMask(*_validate.row_limits(operands, spec))
        position = jnp.broadcast_to(_validate.row_positions(operands), q.shape[:2])
        common = {n: case.options()[n] for n in ("scale", "softcap", "dropout_rate")}
        names = ("alibi_slopes", "dropout_key")
        common |= {n: arguments[n] for n in names if n in arguments}
        bias = arguments.get("bias")
        cut = bias is not None and bias.shape[3] > 1
        parts = [
            (
                *(k[:, a:b], v[:, a:b]),
                common
                | {"mask": whole.for_keys(a, b - a), "bias": bias[..., a:b] if cut else bias}
                | {"query_positions": position, "key_coordinates": (jnp.int32(a), 1)},
            )
            for a, b in itertools.pairwise((0, *ends))
        ]
        pieces = [attention_forward(q, *kv, **options) for *kv, options in parts]
        sinks = arguments.get("sinks")
        out, lse = merge_partials(*zip(*pieces), sinks=sinks)
        delta = attention_delta(dout, out, dlse)
        gradients = [
            attention_backward(q, *kv, dout, lse, delta, **options) for *kv, options in parts
        ]
        dq, dk, dv, *dbias = zip(*gradients)
        total = lambda x, like: sum(y.astype(delta.dtype) for y in x).astype(like.dtype)  # noqa: E731
        found = {"out": out.astype(q.dtype), "lse": lse, "dq": total(dq, q)}
        found |= {"dk": jnp.concatenate(dk, 1), "dv": jnp.concatenate(dv, 1)}
        if sinks is not None:
            found["dsinks"] = attention_sink_gradient(sinks, lse, delta)
        if bias is not None:
            found["dbias"] = jnp.concatenate(*dbias, 3) if cut else total(*dbias, bias)
        return found

    with x64_if(case.dtype == "float64"):
        return jax.device_get(run(q, k, v, dout, dlse, arguments))


@cases(
    Case(b=2, sq=64, sk=96, hq=4, hk=2, causal=True, dlse=True),
    Case(b=2, sq=64, sk=96, hq=4, hk=2, d=40, dv=59, left=20, right=3, dtype="float64", dlse=True),
    grids.LENGTHS[5],
    grids.SEGMENTS[13],
    grids.INTERVALS[7],
    grids.STRUCTURED[2],
    grids.SCALES[2],
    grids.SEGMENTS[9].replace(dtype="bfloat16"),
    Case(b=2, sq=64, sk=96, hq=4, hk=2, causal=True, dlse=True, **FEATURES),
    Case(b=2, sq=64, sk=96, hq=4, hk=2, d=40, dv=59, dtype="float64", dlse=True, **FEATURES),
    grids.LENGTHS[5].replace(**FEATURES),
    grids.SEGMENTS[9].replace(**FEATURES),
    grids.INTERVALS[7].replace(sinks=True),
    *(
        Case(b=2, sq=64, sk=96, hq=4, hk=2, causal=True, dlse=True, bias=axes)
        for axes in ("bhij", "hj", "bi", "")
    ),
    Case(b=2, sq=64, sk=96, hq=4, hk=2, dtype="float64", dlse=True, bias="hij", **FEATURES),
    grids.SEGMENTS[9].replace(dtype="bfloat16", bias="ij", bias_dtype="float32"),
)
def test_parts_add_up(case):
    problem = make_problem(case)
    check_results(problem, by_parts(problem, (33, 34)))


@pytest.mark.parametrize("form", ["numbers", "traced", "array"])
def test_strided_parts_keep_coordinates(form):
    """Every third key: ALiBi and dropout are the whole's, on both passes and for a sink."""
    q, k, v, dout = (
        jnp.asarray(x) for x in (normal(2, 30, 4, 8), normal(2, 40, 2, 8), normal(2, 40, 2, 8),
                                 normal(2, 30, 4, 8))
    )  # fmt: skip
    features = {
        "alibi_slopes": jnp.array([0.5, 0.1, 0.03, 1.0]),
        "dropout_rate": 0.4,
        "dropout_key": jax.random.key(4),
    }
    whole = IntervalMask.causal(30, 40)
    position = jnp.broadcast_to(jnp.arange(10, 40, dtype=jnp.int32), (2, 30))

    def part(first):
        coordinates = {
            "numbers": (first, 3),
            "traced": (jnp.int32(first), jnp.int32(3)),
            "array": jnp.array([[first, 3]] * 2, jnp.int32),
        }[form]
        given = {"query_positions": position, "key_coordinates": coordinates}
        keys = k[:, first::3], v[:, first::3]
        return keys, features | given | {"mask": whole.for_keys(first, keys[0].shape[1], 3)}

    parts = [part(first) for first in range(3)]
    pieces = [attention_forward(q, *kv, **options) for kv, options in parts]
    out, lse = merge_partials(*zip(*pieces))
    run = lambda *x: flash_attention(*x, causal=True, return_lse=True, **features)  # noqa: E731
    wanted, pullback = jax.vjp(run, q, k, v)
    for a, b in zip((out, lse), wanted):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=3e-6)
    delta = attention_delta(dout, out)
    dq, dk, dv = pullback((dout, jnp.zeros_like(lse)))
    got = [attention_backward(q, *kv, dout, lse, delta, **options) for kv, options in parts]
    np.testing.assert_allclose(sum(g[0] for g in got), dq, rtol=1e-4, atol=1e-5)
    for first, (_, *of_keys) in enumerate(got):
        for a, b in zip(of_keys, (dk, dv)):
            np.testing.assert_allclose(a, b[:, first::3], rtol=1e-4, atol=1e-5)


def test_sinks_join_a_merge_once():
    """Value and derivative as in one call; rows that see nothing stay empty."""
    q, k, v = normal(2, 30, 4, 8), normal(2, 20, 2, 8), normal(2, 20, 2, 8)
    sinks, cuts = jnp.array([0.5, -1.0, -jnp.inf, 40.0]), (slice(0, 7), slice(7, 20))
    masks = [IntervalMask.causal(30, 20).for_keys(s.start, s.stop - s.start) for s in cuts]

    def merged(q, k, v, sinks):
        parts = [
            flash_attention(q, k[:, s], v[:, s], mask=m, return_lse=True)
            for s, m in zip(cuts, masks)
        ]
        return merge_partials(*zip(*parts), sinks=sinks)

    def whole(q, k, v, sinks):
        return flash_attention(q, k, v, sinks=sinks, causal=True, return_lse=True)

    def loss(attend):
        def of(*x):
            out, lse = attend(*x)
            return (out**2).sum() + jnp.where(jnp.isfinite(lse), jnp.sin(lse), 0).sum()

        return jax.grad(of, (0, 1, 2, 3))

    got, wanted = merged(q, k, v, sinks), whole(q, k, v, sinks)
    assert np.isneginf(got[1][:, :, :10]).all()
    assert not np.asarray(got[0][:, :10]).any()
    for a, b in zip((*got, *loss(merged)(q, k, v, sinks)), (*wanted, *loss(whole)(q, k, v, sinks))):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match=r"sinks must have shape \(4,\), got \(3,\)"):
        merged(q, k, v, sinks[:3])


@pytest.mark.parametrize("mistake", ["lse", "out"])
def test_local_statistics_are_wrong(mistake):
    """The classic mistakes: with a part's own lse, or a delta of its own out, nothing adds up."""
    q, k, v, dout = (
        normal(1, 32, 2, 8),
        normal(1, 40, 2, 8),
        normal(1, 40, 2, 8),
        normal(1, 32, 2, 8),
    )
    wanted = jax.vjp(flash_attention, q, k, v)[1](dout)
    halves = [(k[:, s], v[:, s]) for s in (slice(0, 20), slice(20, 40))]
    pieces = [attention_forward(q, *kv) for kv in halves]
    out, lse = merge_partials(*zip(*pieces))
    wrong_by = []
    for own in (False, True):
        total = 0
        for kv, (own_out, own_lse) in zip(halves, pieces):
            stats = (
                own_lse if own and mistake == "lse" else lse,
                attention_delta(dout, own_out if own and mistake == "out" else out),
            )
            total += attention_backward(q, *kv, dout, *stats)[0]
        wrong_by.append(np.linalg.norm(total - wanted[0]) / np.linalg.norm(wanted[0]))
    assert wrong_by[0] < 1e-6
    assert wrong_by[1] > 0.05


def test_a_row_with_lse_of_minus_infinity_adds_nothing():
    """Even where the mask of this very call lets it see keys."""
    q, k, v, dout = normal(1, 9, 4, 8), normal(1, 12, 2, 8), normal(1, 12, 2, 8), normal(1, 9, 4, 8)
    lse = flash_attention(q, k, v, return_lse=True)[1]
    rows = np.array([0, 4, 8])
    lse, delta = lse.at[:, :, rows].set(-jnp.inf), normal(1, 4, 9).at[:, :, rows].set(jnp.nan)
    got = attention_backward(q, k, v, dout, lse, delta)
    assert all(np.isfinite(x).all() for x in got)
    assert not np.asarray(got[0])[:, rows].any()
    kept = np.setdiff1d(np.arange(9), rows)
    alone = attention_backward(q[:, kept], k, v, dout[:, kept], lse[:, :, kept], delta[:, :, kept])
    for a, b in zip((got[0][:, kept], *got[1:]), alone):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)


def test_they_are_the_two_kernels():
    q, k = normal(1, 16, 2, 8), normal(1, 16, 1, 8)
    options = {"causal": True, "window": (5, None), "scale": 0.3}
    out, lse = attention_forward(q, k, k, **options)
    whole, pullback = jax.vjp(lambda *x: call(*x, {}, return_lse=True, **options), q, k, k)
    for a, b in zip((out, lse), whole):
        assert_bitwise("forward", a, b)
    dout, dlse = normal(*out.shape), normal(*lse.shape)
    got = attention_backward(q, k, k, dout, lse, attention_delta(dout, out, dlse), **options)
    for a, b in zip(got, pullback((dout, dlse))):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)  # delta is summed in another program
    run = jax.jit(lambda *x: attention_backward(*x, **options))
    hlo.assert_kernels(hlo.compiled_text(run, q, k, k, dout, lse, lse), forward=0, backward=1)


def test_wrong_arguments():
    q, dout, lse = jnp.ones((1, 3, 2, 8)), jnp.ones((1, 3, 2, 8)), jnp.ones((1, 2, 3))
    run = functools.partial(attention_backward, q, q, q)
    with pytest.raises(
        ValueError, match=r"dout must have shape \(1, 3, 2, 8\), got \(1, 2, 2, 8\)"
    ):
        run(dout[:, :2], lse, lse)
    with pytest.raises(ValueError, match=r"delta must have shape \(1, 2, 3\), got \(1, 3, 2\)"):
        run(dout, lse, lse.swapaxes(1, 2))
    with pytest.raises(TypeError, match="lse must have dtype float32, got bfloat16"):
        run(dout, lse.astype(jnp.bfloat16), lse)
    with pytest.raises(TypeError, match="dout must have dtype float32, got bfloat16"):
        run(dout.astype(jnp.bfloat16), lse, lse)
    with pytest.raises(ValueError, match=r"one shape, got \(1, 3, 2, 8\) and \(1, 2, 2, 8\)"):
        attention_delta(dout, dout[:, :2])
    with pytest.raises(ValueError, match=r"dlse must have shape \(1, 2, 3\)"):
        attention_delta(dout, dout, lse[..., :1])
    forward = functools.partial(attention_forward, q, q, q)
    for attend in (forward, functools.partial(run, dout, lse, lse)):
        with pytest.raises(ValueError, match=r"\(1, 2, 3, 3\) or 1 on any axis, got .*3, 2\)"):
            attend(bias=jnp.zeros((1, 2, 3, 2)))
        with pytest.raises(TypeError, match="bias must have dtype float32, got bfloat16"):
            attend(bias=jnp.zeros((1, 2, 3, 3), jnp.bfloat16))
    with pytest.raises(ValueError, match=r"query_positions must have shape \(1, 3\)"):
        attention_forward(q, q, q, query_positions=jnp.arange(3))
    for wrong in ((1,), (0, 1, 2)):
        with pytest.raises(ValueError, match=r"a pair \(start, stride\)"):
            attention_forward(q, q, q, key_coordinates=wrong)
    with pytest.raises(TypeError, match="key_coordinates stride must have dtype int32"):
        attention_forward(q, q, q, key_coordinates=(0, jnp.float32(1)))
    with pytest.raises(NotImplementedError, match="have no such derivative"):
        jax.grad(lambda q: attention_forward(q, q, q)[0].sum())(q)
