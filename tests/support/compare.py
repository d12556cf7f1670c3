"""How close is close enough, in one place: shape, dtype, non-finite, exact zeros, then numbers."""

import numpy as np


def _ulp(dtype: str, size: float) -> float:
    """The spacing of a dtype at this magnitude."""
    bits = {"bfloat16": 7, "float16": 10, "float32": 23, "float64": 52}[dtype]
    if size == 0 or not np.isfinite(size):
        return 0.0
    return 2.0 ** (np.floor(np.log2(size)) - bits)


def _table(title: str, what: str, actual, wanted, context) -> str:
    """The failure report: what, where, how far, and how to run it again."""
    lines = [f"{title}: {what}"]
    if actual.shape == wanted.shape and actual.size:
        with np.errstate(invalid="ignore"):
            gap = np.abs(actual - wanted)
        gap = np.where(np.isnan(gap), np.where(actual == wanted, 0, np.inf), gap)
        relative = gap / np.maximum(np.abs(wanted), 1e-30)
        at = np.unravel_index(np.argmax(gap), gap.shape)
        lines += [
            f"  max abs     {gap.max():.6g}",
            f"  max rel     {np.nanmax(relative):.6g}",
            f"  worst at    {tuple(int(n) for n in at)}",
            f"  actual      {actual[at]!r}",
            f"  expected    {wanted[at]!r}",
        ]
    for name, x in (("actual", actual), ("expected", wanted)):
        counts = (np.isnan(x).sum(), np.isposinf(x).sum(), np.isneginf(x).sum())
        lines.append(f"  {name:<11} {counts[0]} NaN, {counts[1]} +inf, {counts[2]} -inf")
    lines.append(f"  rerun with  pytest --repro {str(context)!r}")
    return "\n".join(lines)


def widen(x) -> np.ndarray:
    return np.asarray(x).astype(np.float64)


def assert_structure(name, actual, wanted, dtype, context) -> None:
    """Shape, dtype, and the positions of NaN, +inf and -inf."""
    actual_wide = widen(actual)
    assert actual.shape == wanted.shape, f"{name} {actual.shape}, not {wanted.shape}: {context}"
    assert str(actual.dtype) == dtype, f"{name} is {actual.dtype}, not {dtype}: {context}"
    for kind, test in (("NaN", np.isnan), ("+inf", np.isposinf), ("-inf", np.isneginf)):
        same = np.array_equal(test(actual_wide), test(wanted))
        assert same, _table(name, f"{kind} at other positions", actual_wide, wanted, context)


def assert_zero(name, actual, where, context) -> None:
    """Exactly 0 wherever the contract says so."""
    x = widen(actual)
    wrong = where & (x != 0)
    assert not wrong.any(), _table(
        name, f"{wrong.sum()} exact zeros are not 0", x, np.where(where, 0, x), context
    )


def _row_errors(x, ref):
    """Relative error per last-axis row; rows far below the largest count relative to that."""
    norm = np.sqrt((ref**2).sum(-1))
    return np.sqrt(((x - ref) ** 2).sum(-1)) / np.maximum(norm, 1e-2 * norm.max() + 1e-300)


def assert_numbers(name, actual, exact, low, dtype, factor, floor, context) -> None:
    """The three rules: largest error, Frobenius norm, worst row."""
    if exact.size == 0:
        return
    x, size = widen(actual), np.abs(exact).max()
    ulps = 2 * _ulp(dtype, size)
    error, limit = np.abs(x - exact).max(), max(factor * np.abs(low - exact).max(), ulps, floor)
    assert error <= limit, _table(name, f"error {error:.4g} > {limit:.4g}", x, exact, context)
    if size == 0:
        return
    norm = np.linalg.norm(exact)
    error = np.linalg.norm(x - exact) / norm
    spread = np.sqrt(exact.size)
    limit = 1.5 * np.linalg.norm(low - exact) / norm + spread * max(ulps, floor) / norm
    assert error <= limit, _table(name, f"norm of error {error:.4g}", x, exact, context)
    if exact.ndim > 1:
        row, row_limit = _row_errors(x, exact).max(), _row_errors(low, exact).max()
        limit = 2 * factor * row_limit + np.sqrt(exact.shape[-1]) * 100 * max(ulps, floor) / size
        assert row <= limit, _table(name, f"worst row {row:.4g} > {limit:.4g}", x, exact, context)


def assert_lse(actual, exact, dtype, floor, context) -> None:
    """Log-sum-exp: -inf by position is checked before; here the finite ones."""
    finite = np.isfinite(exact)
    x, ref = widen(actual)[finite], exact[finite]
    absolute, relative = {
        "float64": (1e-13, 2.0**-46),
        "float32": (1e-5, 2.0**-20),
    }.get(dtype, (1e-3, 2.0**-16))
    limit = absolute + relative * np.abs(ref) + floor
    wrong = np.abs(x - ref) > limit
    assert not wrong.any(), _table("lse", f"{wrong.sum()} values off", x, ref, context)


def assert_bitwise(name, a, b, context="") -> None:
    """Equal bit for bit, NaN included."""
    a, b = np.asarray(a), np.asarray(b)
    assert a.dtype == b.dtype, f"{name}: {a.dtype} and {b.dtype} {context}"
    assert a.shape == b.shape, f"{name}: {a.shape} and {b.shape} {context}"
    same = a.tobytes() == b.tobytes()
    assert same, _table(name, "not bitwise equal", widen(a), widen(b), context)


def assert_same_numbers(name, a, b, dtype, context="") -> None:
    """NaN and inf at the same positions, numbers within a few roundings of the largest.

    For runs that may sum in another order: a kernel leaves its fast path when it meets NaN.
    """
    a, b = widen(a), widen(b)
    assert_structure(name, a, b, "float64", context)
    finite = np.isfinite(b)
    size = np.abs(b[finite]).max(initial=0)
    limit = 4 * _ulp(dtype, size)
    wrong = np.abs(np.where(finite, a, 0) - np.where(finite, b, 0)) > limit
    assert not wrong.any(), _table(name, f"{wrong.sum()} numbers differ", a, b, context)
