"""S8, S9, S12, S15: softcap, ALiBi, sinks, dropout and bias, alone and in combination."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support import grids, oracle
from support.case import Case, cases
from support.check import GRADIENTS, check_case, execute
from support.compare import assert_bitwise
from support.data import dropout_key, make_problem

from jax_flashattn import IntervalMask, _dropout, flash_attention
from jax_flashattn._attention import attention
from jax_flashattn._operands import Operands
from jax_flashattn._reference import reference_attention
from jax_flashattn._spec import AttentionSpec

EVERYTHING = {"softcap": 1.5, "alibi": "bh", "sinks": True, "dropout": 0.25}
BASE = Case(b=2, sq=70, sk=130, hq=4, hk=2, d=24, dv=40, causal=True, dlse=True)


@cases(*grids.FEATURES)
def test_features(case):
    check_case(case)


@cases(*grids.BIASES)
def test_bias(case):
    check_case(case)


_SAMPLE = (*grids.FEATURES[::5], *grids.FEATURES[-3:], *grids.BIASES[::3])


_CHOICES = (("bfloat16", _SAMPLE), ("float16", _SAMPLE[::2]), ("float64", _SAMPLE[1::2]))


@cases(*(case.replace(dtype=dtype) for dtype, choice in _CHOICES for case in choice))
def test_dtypes(case):
    check_case(case)


@cases(*(grids.BIASES[0].replace(dtype=t, bias_dtype="float32") for t in ("bfloat16", "float64")))
def test_float32_bias_of_other_inputs(case):
    check_case(case)


@cases(
    BASE.replace(**EVERYTHING, bias="bhij", poison="invisible"),
    BASE.replace(bias="ij", poison="invisible", interval="random", dtype="bfloat16"),
    BASE.replace(**EVERYTHING, bias="hj", poison="invisible", causal=False, layout="lengths",
                 lengths_q=(60, 1), lengths_k=(99, 3)),
)  # fmt: skip
def test_nan_in_what_nobody_uses_has_no_effect(case):
    """S13, also for a bias of hidden pairs."""
    problem = make_problem(case)
    assert np.isnan(problem.bias.astype(float)).any(), "vacuous"
    check_case(case)


@cases(
    Case(sq=5, sk=0, hq=2, **EVERYTHING, bias="hij"),
    Case(sq=0, sk=7, hq=2, **EVERYTHING, bias="j"),
    Case(b=0, sq=4, sk=7, hq=2, **EVERYTHING, bias="ij"),
    Case(sq=90, sk=3, hq=2, causal=True, dlse=True, **EVERYTHING, bias="hij"),
    Case(b=2, sq=20, sk=20, hq=2, layout="lengths", lengths_q=(0, 3), **EVERYTHING, bias="h"),
)
def test_empty_sizes_and_rows_that_see_nothing(case):
    """S11 wins over S15: a sink does not fill a row that sees no key."""
    results = check_case(case)
    empty = np.broadcast_to(~make_problem(case).see.any(2)[:, None], results["lse"].shape)
    assert np.isneginf(results["lse"][empty]).all()


class TestSoftcap:
    def test_zero_and_none_are_off(self):
        x = make_problem(BASE).given
        args = [x[n] for n in ("query", "key", "value")]
        for softcap in (0, 0.0, None):
            assert_bitwise("out", flash_attention(*args, softcap=softcap), flash_attention(*args))

    @pytest.mark.parametrize("dtype", ["float32", "float64"])
    def test_a_huge_cap_changes_nothing(self, dtype):
        """tanh must be exact near 0, not 1 - 2 / (exp(2x) + 1)."""
        case = BASE.replace(dtype=dtype)
        problem = make_problem(case)
        capped = execute(make_problem(case.replace(softcap=1e6)), problem.given)
        for name, x in execute(problem, problem.given).items():
            tolerance = 1e-5 if dtype == "float32" else 1e-9
            np.testing.assert_allclose(capped[name], x, atol=tolerance, err_msg=name)

    @cases(*(BASE.replace(softcap=cap, data="massive") for cap in (0.01, 1.0, 30.0)))
    def test_where_the_cap_saturates(self, case):
        results = check_case(case)
        bound = case.softcap + np.log(case.sk) + 1e-5
        assert np.abs(results["lse"]).max() <= bound


class TestAlibi:
    @pytest.mark.parametrize("causal", [False, True])
    def test_equals_the_bias_it_describes(self, causal):
        """The lse too: no slope * j shortcut that is off by a constant per row."""
        case = BASE.replace(alibi="h", causal=causal)
        problem = make_problem(case)
        q, k, v = (problem.given[n] for n in ("query", "key", "value"))
        slopes = problem.features.slopes[0]
        distance = np.abs(np.arange(70)[:, None] + 60 - np.arange(130)).astype(np.float32)
        bias = -slopes[:, None, None] * distance
        options = {"causal": causal, "return_lse": True}
        by_slope = flash_attention(q, k, v, alibi_slopes=slopes, **options)
        by_bias = flash_attention(q, k, v, bias=bias[None], **options)
        for a, b in zip(by_slope, by_bias):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=2e-6)

    def test_slopes_have_no_gradient(self):
        x = make_problem(BASE).given
        args = [x[n] for n in ("query", "key", "value")]
        for implementation in ("kernel", "reference"):
            run = lambda s, i=implementation: flash_attention(  # noqa: E731
                *args, alibi_slopes=s, implementation=i
            )
            assert not jax.grad(lambda s, run=run: (run(s) ** 2).sum())(jnp.ones(4)).any()

    def test_interval_mask_positions_are_those_of_the_whole(self):
        """Position i + sk - sq, whatever the mask hides."""
        x = make_problem(BASE).given
        args = [x[n] for n in ("query", "key", "value")]
        hi = jnp.arange(61, 131, dtype=jnp.int32)[None]
        mask = IntervalMask(jnp.zeros_like(hi), hi)
        slopes = jnp.full(4, 0.1)
        assert_bitwise(
            "out",
            flash_attention(*args, mask=mask, alibi_slopes=slopes),
            flash_attention(*args, causal=True, alibi_slopes=slopes),
        )

    def test_packed_padded_and_separate_calls_agree(self):
        """S7: positions restart in each segment."""
        lengths = (40, 1, 89)
        packed = Case(sq=130, sk=130, hq=2, layout="segments", lengths_q=(lengths,), alibi="h",
                      causal=True)  # fmt: skip
        problem = make_problem(packed)
        results = execute(problem, problem.given)
        ends = np.cumsum(lengths)
        for end, n in zip(ends, lengths):
            q, k, v = (problem.given[x][:, end - n : end] for x in ("query", "key", "value"))
            out = flash_attention(q, k, v, causal=True, alibi_slopes=problem.features.slopes[0])
            np.testing.assert_allclose(out, results["out"][:, end - n : end], atol=3e-6)


class TestSinks:
    def test_a_sink_is_a_key_of_value_zero(self):
        problem = make_problem(BASE.replace(sinks=True, causal=False))
        q, k, v = (problem.given[n] for n in ("query", "key", "value"))
        sinks = problem.features.sinks
        out, lse = flash_attention(q, k, v, sinks=sinks, return_lse=True)
        plain, plain_lse = flash_attention(q, k, v, return_lse=True)
        total = np.logaddexp(np.asarray(plain_lse), sinks[:, None])
        np.testing.assert_allclose(lse, total, rtol=1e-5)
        weight = np.exp(plain_lse - total).swapaxes(1, 2)[..., None]
        np.testing.assert_allclose(out, plain * weight, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("sink", [-np.inf, -1e30, -200.0, 200.0, 1e30])
    def test_extreme_sinks(self, sink):
        """Neither side of the sum overflows; -inf is no sink."""
        x = make_problem(BASE).given
        args = [x[n] for n in ("query", "key", "value")]
        options = {"causal": True, "return_lse": True}
        out, lse = flash_attention(*args, sinks=np.full(4, sink, np.float32), **options)
        plain, plain_lse = flash_attention(*args, **options)
        if sink < 0:
            np.testing.assert_allclose(out, plain, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(lse, plain_lse, rtol=1e-6)
        else:
            assert not np.asarray(out).any()
            np.testing.assert_allclose(lse, np.full(lse.shape, sink), rtol=1e-6)


class TestBias:
    @pytest.mark.parametrize("implementation", ["kernel", "reference"])
    def test_minus_infinity_hides_like_a_mask(self, implementation):
        """Also where it hides the whole row: zeros, lse -inf, finite gradients."""
        x = make_problem(BASE).given
        args = [jnp.asarray(x[n]) for n in ("query", "key", "value")]
        bias = np.zeros((1, 1, 70, 130), np.float32)
        bias[:, :, :, 70:] = -np.inf
        bias[:, :, 5] = -np.inf
        mask = IntervalMask(
            jnp.zeros((1, 70), jnp.int32), jnp.where(jnp.arange(70) == 5, 0, 70)[None]
        )

        def loss(q, k, v, bias, **options):
            given = {} if bias is None else {"bias": bias}
            out, lse = flash_attention(q, k, v, return_lse=True, **options, **given)
            return (out**2).sum() + jnp.where(jnp.isfinite(lse), lse, 0).sum(), (out, lse)

        run = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)
        hidden = run(*args, jnp.asarray(bias), implementation=implementation)
        masked = run(*args, None, mask=mask)
        for a, b in zip(jax.tree.leaves(hidden), jax.tree.leaves(masked)):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=2e-5)

    @pytest.mark.parametrize("axes", ["bhij", "hij", "ij", "j", ""])
    def test_reruns_are_bitwise_equal(self, axes):
        """Many tasks share each element of a broadcast bias."""
        case = Case(b=3, sq=200, sk=200, hq=8, hk=2, bias=axes, dtype="bfloat16", causal=True)
        problem = make_problem(case)
        first = execute(problem, problem.given)
        for _ in range(3):
            for name, x in execute(problem, problem.given).items():
                assert_bitwise(name, x, first[name], case)

    @pytest.mark.parametrize("axes", ["bhij", "ij"])
    def test_gradients_of_hidden_pairs_are_written(self, axes):
        """Freed NaN buffers of the bias's size come back as its gradient."""
        case = BASE.replace(bias=axes, sq=200, sk=200, left=3)
        for _ in range(3):
            dirty = [jnp.full(make_problem(case).bias.shape, jnp.nan) for _ in range(4)]
            for x in jax.block_until_ready(dirty):
                x.delete()
            check_case(case)

    def test_a_bias_that_the_call_does_not_differentiate(self):
        problem = make_problem(BASE.replace(bias="hij"))
        q, k, v = (jnp.asarray(problem.given[n]) for n in ("query", "key", "value"))
        attend = lambda q: flash_attention(q, k, v, bias=problem.bias, causal=True)  # noqa: E731
        dq = jax.grad(lambda q: (attend(q) * problem.given["dout"]).sum())(q)
        results = execute(problem, problem.given | {"dlse": 0 * problem.given["dlse"]})
        np.testing.assert_allclose(dq, results["dq"], rtol=1e-5, atol=1e-6)


class TestDropout:
    """S12: which elements, how many, and the same ones everywhere."""

    def matrix(self, key, sq=64, sk=96, hq=2, rate=0.4, **options):
        """The probability matrix with its holes: values are unit vectors, scores equal."""
        q = jnp.zeros((1, sq, hq, 8))
        k, v = jnp.zeros((1, sk, 1, 8)), jnp.eye(sk)[None, :, None]
        out = flash_attention(q, k, v, dropout_rate=rate, dropout_key=key, **options)
        return np.asarray(out)[0].swapaxes(0, 1)

    @pytest.mark.parametrize("implementation", ["kernel", "reference"])
    def test_the_mask_is_the_one_of_the_clause(self, implementation):
        for key in (jax.random.PRNGKey(5), jax.random.key(5, impl="threefry2x32")):
            kept = self.matrix(key, implementation=implementation) != 0
            arrays = {"position": np.arange(32, 96)[None], "threshold": round(0.6 * 65536)}
            assert np.array_equal(kept, oracle.keep(np.array([0, 5]), arrays, (1, 2, 96))[0])

    @pytest.mark.parametrize("first", [64, 960])
    def test_the_mask_where_calls_change(self, first):
        """128 keys share a call, 1,024 two others."""
        sk, key, see = 1100, jax.random.PRNGKey(5), slice(first, first + 128)
        q, k = jnp.zeros((1, 32, 2, 8)), jnp.zeros((1, sk, 1, 8))
        v = jnp.eye(sk)[None, :, None, see]
        out = flash_attention(q, k, v, dropout_rate=0.4, dropout_key=key)
        kept = np.asarray(out)[0].swapaxes(0, 1) != 0
        arrays = {"position": np.arange(sk - 32, sk)[None], "threshold": round(0.6 * 65536)}
        assert np.array_equal(kept, oracle.keep(np.array([0, 5]), arrays, (1, 2, sk))[0, ..., see])

    def test_kept_values_are_rescaled_by_the_rate_applied(self):
        matrix = self.matrix(jax.random.key(1), rate=0.3)
        kept = round(0.7 * 65536) / 65536
        np.testing.assert_allclose(matrix[matrix != 0], 1 / 96 / kept, rtol=1e-6)

    @pytest.mark.parametrize("rate", [0.02, 0.5, 0.9])
    def test_the_rate_per_head_and_per_square(self, rate):
        """Binomial bounds of six standard deviations, for heads and 16 x 16 squares."""
        kept = self.matrix(jax.random.key(2), 512, 256, hq=4, rate=rate) != 0
        for n, rates in (
            (512 * 256, kept.mean((1, 2))),
            (256, kept.reshape(4, 32, 16, 16, 16).mean((2, 4)).ravel()),
        ):
            deviation = np.sqrt(rate * (1 - rate) / n)
            assert np.abs(rates - (1 - rate)).max() < 6 * deviation + 1 / n

    def test_neighbours_heads_and_keys_are_uncorrelated(self):
        a, b = (self.matrix(jax.random.key(n), 512, 256, rate=0.5) != 0 for n in (3, 4))
        x = a[0] - 0.5
        shifts = [(0, 1), (1, 0), (8, 0), (0, 8), (0, 2), (16, 0), (0, 16), (8, 8)]
        others = [np.roll(x, shift, (0, 1)) for shift in shifts] + [a[1] - 0.5, b[0] - 0.5]
        for other in others:
            assert abs((x * other).mean() / 0.25) < 5 / np.sqrt(x.size)

    def test_rate_zero_is_bitwise_off_and_one_drops_everything(self):
        x = make_problem(BASE).given
        args = [jnp.asarray(x[n]) for n in ("query", "key", "value")]
        key = jax.random.key(0)
        for rate in (0.0, 0, 1e-6):  # below half of 2^-16
            out = flash_attention(*args, dropout_rate=rate, dropout_key=key)
            assert_bitwise("out", out, flash_attention(*args))
        for rate in (1.0, 1 - 1e-6):

            def loss(q, k, v, rate=rate):
                out = flash_attention(q, k, v, dropout_rate=rate, dropout_key=key, causal=True)
                return out.sum(), out

            gradients, out = jax.grad(loss, (0, 1, 2), has_aux=True)(*args)
            assert not out.any()
            assert not any(g.any() for g in gradients)

    def test_lse_does_not_see_it(self):
        x = make_problem(BASE).given
        args = [x[n] for n in ("query", "key", "value")]
        options = {"causal": True, "return_lse": True, "alibi_slopes": np.ones(4, np.float32)}
        dropped = flash_attention(*args, **options, dropout_rate=0.5, dropout_key=dropout_key(BASE))
        assert_bitwise("lse", dropped[1], flash_attention(*args, **options)[1])

    def test_the_mask_does_not_depend_on_what_is_visible_or_on_the_tiles(self):
        """The last rows alone, fewer keys by a window, padding: the same holes."""
        key = jax.random.key(6)
        whole = self.matrix(key, 96, 96)
        assert np.array_equal(self.matrix(key, 17, 96) != 0, whole[:, 79:] != 0)
        window = self.matrix(key, 96, 96, window=(20, 3)) != 0
        i, j = np.arange(96)[:, None], np.arange(96)
        see = (j >= i - 20) & (j <= i + 3)
        assert np.array_equal(window, (whole != 0) & see)
        lengths = (jnp.array([50], jnp.int32), jnp.array([50], jnp.int32))
        padded = self.matrix(key, 96, 96, lengths=lengths) != 0
        assert np.array_equal(padded[:, :50, :50], whole[:, :50, :50] != 0)
        ids = jnp.asarray([[1] * 40 + [2] * 56], jnp.int32)
        packed = self.matrix(key, 96, 96, segment_ids=ids) != 0
        assert np.array_equal(packed[:, 40:, 40:], whole[:, 40:, 40:] != 0)

    def test_heads_of_short_sequences_share_tiles(self):
        assert np.array_equal(
            self.matrix(jax.random.key(7), 3, 96, hq=24)[:2],
            self.matrix(jax.random.key(7), 3, 96, hq=2),
        )

    def test_every_kind_of_key_gives_another_mask(self):
        keys = [jax.random.key(s, impl=i) for s in (0, 1) for i in ("threefry2x32", "rbg")]
        keys += [jax.random.split(jax.random.key(0), 2)[1], np.array([1, 2, 3, 4], np.uint32)]
        masks = [self.matrix(key, rate=0.5) != 0 for key in keys]
        for n, a in enumerate(masks):
            for b in masks[:n]:
                assert 0.4 < (a == b).mean() < 0.6

    def test_a_traced_key_under_jit_and_scan(self):
        keys = jax.random.split(jax.random.key(8), 3)
        run = jax.jit(lambda key: jax.lax.scan(lambda _, k: (0, self._one(k)), 0, key)[1])
        for a, b in zip(run(keys), keys):
            assert_bitwise("out", a, self._one(b))

    @staticmethod
    def _one(key):
        x = jnp.ones((1, 20, 2, 8))
        return flash_attention(x, x, x, dropout_rate=0.3, dropout_key=key)

    def test_the_gradient_of_value_is_the_transposed_holed_matrix(self):
        """Forward and backward use one mask: dV = P_dropped^T dO exactly."""
        case = BASE.replace(dropout=0.5, dlse=False)
        problem = make_problem(case)
        x, results = problem.given, execute(problem, problem.given)
        unit = np.tile(np.eye(130, dtype=np.float32)[None, :, None], (2, 1, 2, 1))
        p = flash_attention(
            x["query"], x["key"], unit, causal=True, dropout_rate=0.5,
            dropout_key=dropout_key(case),
        )  # fmt: skip
        dv = np.einsum("bihj,bihe->bjhe", p, x["dout"]).reshape(2, 130, 2, 2, 40).sum(3)
        np.testing.assert_allclose(results["dv"], dv, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_shards_of_keys_keep_their_coordinates(implementation):
    """Keys 0, 2, 4, ... and 1, 3, 5, ... in a ring: ALiBi and dropout are the whole's."""
    run = {"kernel": attention, "reference": reference_attention}[implementation]
    run = jax.jit(run, static_argnums=1)
    problem = make_problem(BASE.replace(alibi="bh", dropout=0.4, hk=4))
    q, k, v = (jnp.asarray(problem.given[n]) for n in ("query", "key", "value"))
    out, lse = flash_attention(q, k, v, **problem.mask_arguments(), **problem.case.options(),
                               return_lse=True)  # fmt: skip
    spec = AttentionSpec(24**-0.5, keep_threshold=round(0.6 * 65536))
    streams = _dropout.streams(tuple(jnp.asarray(dropout_key(BASE))), 2, 4)
    position = jnp.broadcast_to(jnp.arange(70, dtype=jnp.int32) + 60, (2, 70))
    parts = []
    for start in (0, 1):
        hi = (position + 1 - start + 1) // 2
        operands = Operands(
            q, k[:, start::2], v[:, start::2], lo=jnp.zeros_like(hi), hi=hi, position=position,
            key_coordinates=jnp.array([[start, 2]] * 2, jnp.int32),
            slopes=jnp.asarray(problem.features.slopes), dropout=streams,
        )  # fmt: skip
        parts.append(run(operands, spec))
    merged = np.logaddexp(*(np.asarray(x[1]) for x in parts))
    np.testing.assert_allclose(lse, merged, rtol=1e-5)
    weights = [np.exp(np.asarray(x[1]) - merged).swapaxes(1, 2)[..., None] for x in parts]
    total = sum(w * np.asarray(x[0]) for w, x in zip(weights, parts))
    np.testing.assert_allclose(out, total, rtol=1e-4, atol=3e-6)


@cases(BASE.replace(**EVERYTHING, bias="hij", dtype="float64"))
def test_finite_differences(case):
    """All five gradients against the kernel's own forward, in float64."""
    problem = make_problem(case)
    results, rng, step = execute(problem, problem.given), np.random.default_rng(1), 1e-5
    learned = {"bias": problem.bias, "sinks": problem.features.sinks}
    with jax.enable_x64(True):

        def objective(arrays):
            args = problem.mask_arguments() | {n: arrays[n] for n in learned}
            out, lse = flash_attention(
                *(arrays[n] for n in ("query", "key", "value")), **args, **case.options(),
                return_lse=True,
            )  # fmt: skip
            return float((out * problem.given["dout"]).sum() + (lse * problem.given["dlse"]).sum())

        arrays = problem.given | learned
        for name, gradient in zip(
            ("query", "key", "value", *learned), (*GRADIENTS, "dbias", "dsinks")
        ):
            direction = rng.standard_normal(arrays[name].shape)
            ahead, behind = (
                objective(arrays | {name: arrays[name] + sign * step * direction})
                for sign in (1, -1)
            )
            wanted = (results[gradient] * direction).sum()
            assert (ahead - behind) / (2 * step) == pytest.approx(wanted, rel=1e-6, abs=1e-6), name
