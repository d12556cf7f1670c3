"""One test per real bug of another project (numbers: the list in docs/testing.md)."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from support.case import Case, cases
from support.check import check_case, execute, jitted
from support.compare import assert_bitwise, assert_same_numbers
from support.data import make_problem

from jax_flashattn import flash_attention


def _spans(starts) -> tuple:
    """Document lengths of cumulative starts."""
    return tuple(int(b - a) for a, b in itertools.pairwise(starts))


def _packed(starts_q, starts_k, **options) -> Case:
    """A packed batch of one row, empty documents written as padded batch elements instead."""
    lengths_q, lengths_k = _spans(starts_q), _spans(starts_k)
    return Case(
        b=len(lengths_q), sq=max(lengths_q), sk=max(lengths_k), layout="lengths",
        lengths_q=lengths_q, lengths_k=lengths_k, **options,
    )  # fmt: skip


def test_columns_past_a_short_key_sequence_are_masked_in_the_backward():
    """1: Dao-AILab/flash-attention#443; far more queries than keys, inputs times 3."""
    case = _packed([0, 76, 110, 256], [0, 1, 2, 3], hq=2, d=32, dv=32, dtype="float16", causal=True)
    problem = make_problem(case)
    given = {n: x * np.array(3, x.dtype) for n, x in problem.given.items()}
    results = execute(problem, given)
    assert all(np.isfinite(x.astype(float)).all() for n, x in results.items() if n != "lse")
    check_case(case)


@pytest.mark.parametrize("d", [8, 64, 128])
def test_zero_length_queries_with_live_keys_and_the_reverse(d):
    """2: flash-attention#2562, PR#2568, scaled down by 16; orphan keys get gradient 0."""
    starts = [0, 0, 75, 128, 128], [0, 158, 267, 320, 512]
    results = check_case(_packed(*starts, hq=2, d=d, dv=d, causal=True))
    for name in ("dk", "dv"):
        assert not results[name][[0, 3]].any(), f"{name} of keys without queries"


@pytest.mark.parametrize("poison", ["none", "tail"])
def test_tokens_behind_the_last_document(poison):
    """3: pytorch#176793, flash-attention PR#2324: gradients of the tail are 0, not garbage."""
    case = Case(sq=246, sk=246, hq=2, layout="segments", lengths_q=((100, 143, 1),), poison=poison)
    for _ in range(3):
        _dirty_allocator(case)
        results = check_case(case)
        for name in ("out", "dq", "dk", "dv"):
            assert not results[name][:, 244:].any(), f"{name} of the tail"


def _dirty_allocator(case):
    """Frees buffers full of NaN of the sizes the call will ask for."""
    shapes = [(case.b, s, h, w) for s in (case.sq, case.sk) for h in (case.hq, case.hk)
              for w in (case.d, case.dv)]  # fmt: skip
    for x in [jnp.full(shape, jnp.nan) for shape in shapes]:
        x.delete()


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_padding_of_values_is_not_multiplied_by_zero(dtype):
    """4: flash-attention#1745, #2374."""
    case = Case(b=2, sq=50, sk=150, hq=2, layout="lengths", lengths_q=(50, 20),
                lengths_k=(100, 3), dtype=dtype, poison="tail")  # fmt: skip
    problem = make_problem(case)
    clean = execute(problem, problem.clean)
    for name, x in execute(problem, problem.given).items():
        assert_same_numbers(name, x, clean[name], dtype, case)


@pytest.mark.parametrize("d", [16, 15])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_stale_buffers_in_the_last_key_tile(dtype, d):
    """5: flash-attention#1395: each length follows a call that filled the buffers with NaN.

    An odd head dim leaves an element of each packed row to be cleared.
    """
    dirty = make_problem(Case(b=8, sq=200, sk=200, hq=2, dtype=dtype))
    nan = {n: np.full_like(x, np.nan) for n, x in dirty.given.items()}
    for sk in (1, 2, 15, 17, 31, 63, 65, 95, 96, 97, 98):
        execute(dirty, nan)
        check_case(Case(b=2, sq=70, sk=sk, hq=2, d=d, dv=d, dtype=dtype, causal=True))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_negative_scores_behind_a_masked_first_tile(dtype):
    """6: flash-attention#2082, PR#2174: a running maximum must not be forced to 0."""
    shape = {"sq": 88, "sk": 448, "hq": 14, "hk": 2, "dtype": dtype}
    problem = make_problem(Case(**shape, causal=True, data="constant_score"))
    given = problem.given | {
        "key": problem.given["key"] * np.array(1.625, problem.given["key"].dtype)
    }
    results = execute(problem, given)
    counts = np.arange(361, 449)
    lse = (given["query"][0, 0, 0, 0].astype(float) * given["key"][0, 0, 0, 0].astype(float)) / 4
    assert lse < -190
    wanted = np.broadcast_to(lse + np.log(counts), results["lse"].shape)
    np.testing.assert_allclose(results["lse"], wanted, rtol=1e-5)
    ends = np.cumsum(given["value"].astype(float), axis=1)[:, 360:] / counts[:, None, None]
    out = np.repeat(ends, 7, axis=2)
    np.testing.assert_allclose(results["out"].astype(float), out, atol=2e-2, rtol=2e-2)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32", "float64"])
def test_negative_scores_of_documents_behind_masked_tiles(dtype):
    """6 again: rows whose document begins tiles behind that of their neighbours in the row tile.

    Here a whole tile of keys is masked for some of the rows that visit it. All scores are -120.
    """
    case = Case(
        b=2, sq=64, sk=420, hq=4, hk=2, dtype=dtype, data="constant_score", layout="segments",
        lengths_q=((20, 20, 24), (1, 40)), lengths_k=((5, 290, 100), (300, 99)), dlse=True,
    )  # fmt: skip
    results = check_case(case)
    assert results["lse"][1, :, :41].max() < -100


@pytest.mark.parametrize(("sk", "left"), [(70, 20), (400, None)], ids=["window", "many tiles"])
@pytest.mark.parametrize("level", [-1e5, 1e5, -3e7])
def test_no_finite_mask_value_beats_real_scores(level, sk, left):
    """7: flashinfer#4267, #4450: scores far below -5e4, where all that matters is differences.

    Of many tiles all must be relative to the same rounding of a row's maximum.
    """
    problem = make_problem(Case(sq=40, sk=sk, hq=2, d=16, causal=True, left=left, scale=1.0))
    query, key = problem.given["query"].copy(), problem.given["key"].copy()
    query[..., 0], key[..., 0] = 0, 0
    plain = execute(problem, problem.given | {"query": query, "key": key})
    query[..., 0], key[..., 0] = 1, level
    query[..., 1:], key[..., 1:] = np.round(query[..., 1:]), np.round(key[..., 1:])
    integer = problem.given | {"query": query, "key": key}
    far = execute(problem, integer)
    near = execute(problem, integer | {"key": np.where(np.arange(16) == 0, 0, key)})
    tolerance = 1e-5 if abs(level) < 2**22 else 30
    np.testing.assert_allclose(far["out"], near["out"], atol=tolerance, rtol=1e-5)
    assert np.isfinite(far["lse"]).all()
    assert np.isfinite(plain["out"]).all()


def test_more_queries_than_keys_and_ragged_single_keys():
    """8: flashinfer#4452, #4451: empty causal rows are -inf, by position."""
    lse = check_case(Case(sq=8, sk=3, hq=2, causal=True, dlse=True))["lse"]
    assert np.array_equal(np.isneginf(lse), np.broadcast_to(np.arange(8) < 5, lse.shape))
    ragged = Case(b=3, sq=8, sk=3, layout="lengths", lengths_q=(8, 1, 2), lengths_k=(1, 3, 0))
    check_case(ragged.replace(causal=True, dlse=True))


@pytest.mark.parametrize("length", [64, 192, 96, 97, 160])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_far_negative_scores_in_a_padded_tile(length, dtype):
    """9: pytorch#196678: lse below -88.7, where exp(0 - lse) of a padded key overflows."""
    case = Case(sq=length, sk=length, hq=2, data="constant_score", dtype=dtype)
    results = check_case(case)
    assert results["lse"].max() < -88.7


@cases(
    *(
        Case(sq=sq, sk=sk, hq=2, left=left, right=right, dlse=True)
        for sq, sk, left, right in (
            *((20, 5, None, 4), (20, 5, None, 5), (20, 5, None, 18), (20, 5, None, 19)),
            *((5, 20, 18, None), (5, 20, 19, None), (5, 20, 4, 0), (20, 5, 4, 10)),
        )
    )
)
def test_a_side_is_dropped_only_if_it_hides_nothing(case):
    """10: flash-attention#895; all small worlds are in unit/test_mask.py."""
    check_case(case)


@pytest.mark.parametrize(("left", "right"), [(0, None), (None, 0), (0, 0)])
@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_zero_is_a_real_bound(left, right, implementation):
    """11: flash-attention PR#2624: `window or default` swallows 0."""
    x = jax.random.normal(jax.random.key(0), (1, 6, 1, 8))
    value = jnp.eye(6, 8)[None, :, None]
    out = flash_attention(x, x, value, window=(left, right), implementation=implementation)[0, :, 0]
    i, j = np.arange(6)[:, None], np.arange(8)
    sees = (j < 6) & ((j >= i) | (left is None)) & ((j <= i) | (right is None))
    assert np.array_equal(np.asarray(out) != 0, sees)


@pytest.mark.parametrize("left", [4, 5, 6, 100, 2**31, 2**40])
def test_a_window_wider_than_the_context_stays_causal(left):
    """12: tlc-pack/libflash_attn#11."""
    problem = make_problem(Case(sq=5, sk=5, hq=2, causal=True))
    args = [problem.given[n] for n in ("query", "key", "value")]
    wide = flash_attention(*args, causal=True, window=(left, None))
    assert_bitwise("out", wide, flash_attention(*args, causal=True))


@pytest.mark.parametrize(("left", "right", "seen"), [(3, 3, 7), (4, 0, 5), (0, 2, 3)])
def test_a_window_counts_keys_on_each_side(left, right, seen):
    """13: huggingface/transformers#39408: a window of w is not 2w + 1 keys."""
    q, v = jnp.zeros((1, 30, 1, 4)), jnp.eye(30)[None, :, None]
    out = flash_attention(q, q, v, window=(left, right))[0, 15, 0]
    assert np.count_nonzero(out) == seen
    np.testing.assert_allclose(out[15 - left : 16 + right], 1 / seen, rtol=1e-6)


def test_causal_is_aligned_with_the_last_key():
    """14: flash-attention#1778, often reported: bottom-right, and rows before it are empty."""
    q, v = jnp.zeros((1, 5, 1, 4)), jnp.eye(2, 2)[None, :, None]
    out = flash_attention(q, jnp.zeros((1, 2, 1, 4)), v, causal=True)[0, :, 0]
    assert np.array_equal(out, [[0, 0], [0, 0], [0, 0], [1, 0], [0.5, 0.5]])


@pytest.mark.parametrize(
    "options",
    [{}, {"left": 40}, {"layout": "lengths", "lengths_q": (260, 100)}, {"d": 256, "dv": 256}],
    ids=str,
)
def test_deterministic_reaches_the_kernel_and_holds(options):
    """17: flash-attention#2244, #1596, PR#1766."""
    case = Case(b=2, sq=260, sk=260, hq=6, hk=2, dtype="bfloat16", causal=True).replace(**options)
    problem = make_problem(case.replace(deterministic=True))
    first = execute(problem, problem.given)
    for _ in range(10):
        for name, x in execute(problem, problem.given).items():
            assert_bitwise(name, x, first[name], case)
    keywords = tuple(problem.case.options().items())
    args = [problem.given[n] for n in ("query", "key", "value", "dout", "dlse")]
    text = jitted(keywords).lower(*args, problem.mask_arguments()).as_text()
    assert text.count("deterministic = true") == 2
    assert "deterministic = false" not in text


@cases(
    Case(b=4, sq=1, sk=40, hq=4, hk=4, layout="lengths", lengths_q=(0, 1, 0, 1),
         lengths_k=(9, 40, 0, 1)),
    Case(b=4, sq=1, sk=33, hq=21, hk=7, layout="lengths", lengths_q=(0, 0, 0, 1),
         lengths_k=(33, 0, 1, 30)),
    Case(b=4, sq=1, sk=33, hq=21, hk=7, layout="lengths", lengths_q=(1, 1, 1, 1),
         lengths_k=(0, 0, 0, 33), causal=True),
)  # fmt: skip
def test_decode_with_empty_sequences(case):
    """23: flash-attention#1537, #1619."""
    check_case(case.replace(dlse=True))


@pytest.mark.parametrize("d", [64, 256])
def test_views_of_one_fused_projection(d):
    """25: flash-attention#2541: query, key and value sliced from one array, which is donated."""
    rng = np.random.default_rng(0)
    fused = rng.standard_normal((2, 33, 3, 2, d)).astype(np.float32)

    def loss(x):
        out = flash_attention(x[:, :, 0], x[:, :, 1], x[:, :, 2], causal=True)
        return (out**2).sum()

    parts = [jnp.asarray(np.ascontiguousarray(fused[:, :, n])) for n in range(3)]
    separate = jax.grad(lambda *x: (flash_attention(*x, causal=True) ** 2).sum(), (0, 1, 2))(*parts)
    together = jax.jit(jax.grad(loss), donate_argnums=0)(jnp.asarray(fused))
    for n in range(3):
        np.testing.assert_allclose(together[:, :, n], separate[n], rtol=1e-5, atol=1e-5)


@cases(
    *(
        Case(b=3, sq=66, sk=98, hq=4, hk=2, d=256, dv=256, dtype=t, data="massive", causal=True)
        for t in ("bfloat16", "float16", "float32")
    )
)
def test_structured_activations_with_large_heads_and_batches(case):
    """26: NVIDIA/TransformerEngine#3216: wrong for b >= 2, head dim 256, on real activations."""
    check_case(case)


@cases(
    *(
        Case(b=2, sq=40, sk=50, hq=ratio * hk, hk=hk, d=d, dv=dv, causal=True)
        for ratio in (1, 2, 3, 7, 8)
        for hk, d, dv in ((1, 16, 32), (2, 32, 16), (3, 64, 128))
    )
)
def test_every_group_ratio_with_other_value_dims(case):
    """29: native-sparse-attention-triton#27: heads map to key heads by division, not modulo."""
    check_case(case)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_segment_ids_are_not_ignored(implementation):
    """37: AI-Hypercomputer/maxtext#4476: another segment's numbers must not matter."""
    rng = np.random.default_rng(0)
    x = jnp.asarray(rng.standard_normal((1, 20, 2, 8)), jnp.float32)
    ids = jnp.asarray([[1] * 8 + [2] * 12], jnp.int32)

    def first(x):
        return flash_attention(x, x, x, segment_ids=ids, implementation=implementation)[:, :8]

    changed = x.at[:, 8:].multiply(100.0)
    assert_bitwise("out", first(changed), first(x))
    plain = flash_attention(x, x, x, implementation=implementation)[:, :8]
    assert np.abs(plain - first(x)).max() > 1e-2


def test_positions_restart_in_each_segment():
    """38: TransformerEngine PR#2523: padding between segments must not shift their windows."""
    case = Case(
        sq=120, sk=120, hq=2, layout="segments", lengths_q=((-3, 40, -6, 7, -1, 50),),
        left=6, right=1, dlse=True,
    )  # fmt: skip
    check_case(case)
    check_case(case.replace(causal=True, right=None))


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_two_caps_in_one_process(dtype):
    """28: flash-attention PR#2402: the cap is part of what is compiled; its formula, its slope."""
    case = Case(b=2, sq=40, sk=50, hq=2, dtype=dtype, data="massive", causal=True)
    results = [check_case(case.replace(softcap=cap)) for cap in (15.0, 30.0, 15.0)]
    for name, x in results[0].items():
        assert_bitwise(name, x, results[2][name])
    assert np.abs(results[0]["lse"] - results[1]["lse"]).max() > 1


@cases(
    *(
        Case(b=2, sq=sq, sk=60, hq=2, alibi="bh", causal=causal, dlse=True)
        for sq in (1, 40, 60, 90)
        for causal in (False, True)
    )
)
def test_lse_with_alibi_has_no_row_constant(case):
    """30: flash-attention's alibi.h adds slope * j under a causal mask, and its lse shows it."""
    check_case(case)


@pytest.mark.parametrize("implementation", ["kernel", "reference"])
def test_float32_bias_of_half_inputs_makes_no_nan(implementation):
    """39: jax#28974, #32242, #37422: broadcasts, mixed dtypes and lengths under debug_nans."""
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 9, 2, 8)), jnp.bfloat16)
    bias = jnp.where(jnp.arange(9) < 5, 0.0, -jnp.inf)[None, None, None]
    lengths = jnp.array([9, 3], jnp.int32)

    def loss(x, bias):
        out = flash_attention(x, x, x, bias=bias, lengths=lengths, implementation=implementation)
        return out.astype(jnp.float32).sum()

    with jax.debug_nans(True):
        gradients = jax.jit(jax.grad(loss, (0, 1)))(x, bias)
    assert gradients[1].shape == (1, 1, 1, 9)
    assert all(np.isfinite(g.astype(jnp.float32)).all() for g in gradients)


@pytest.mark.parametrize("sk", [64, 192, 704, 832])
def test_far_negative_scores_with_features(sk):
    """9 again (pytorch#196678), where a half tile of features could be scored 0."""
    check_case(Case(sq=40, sk=sk, data="constant_score", alibi="h", sinks=True, dropout=0.2))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32", "float64"])
def test_heads_do_not_write_into_each_other(dtype):
    """Ours: a last key tile that starts at an odd key wrote a row behind its accumulators.

    An even number of keys, a window whose first key is odd, and many heads on several threads.
    """
    case = Case(b=8, sq=24, sk=40, hq=16, hk=8, causal=True, left=9, dtype=dtype)
    problem = make_problem(case)
    first = check_case(case)
    for _ in range(150):
        for name, x in execute(problem, problem.given).items():
            assert_bitwise(name, x, first[name], case)
