"""Tangents of a case: directions, the oracle's answer and the library's."""

import functools

import jax
import numpy as np
from support import compare, hlo, oracle
from support.case import Case
from support.check import LEARNED, call, x64_if
from support.data import Problem, make_problem

ARRAYS = ("query", "key", "value")


def directions(problem: Problem) -> tuple[dict, dict]:
    """Random tangents of all that has one, clean and poisoned where the arrays are."""
    rng = np.random.default_rng(problem.case.data_seed + 2)
    primals = {n: problem.given[n] for n in ARRAYS}
    primals |= {"bias": problem.bias, "sinks": problem.features.sinks}
    clean, given = {}, {}
    for name, x in primals.items():
        if x is None:
            continue
        clean[name] = rng.standard_normal(x.shape).astype(x.dtype)
        given[name] = np.where(np.isnan(x.astype(float)), np.nan, clean[name]).astype(x.dtype)
    return clean, given


def oracle_tangents(problem: Problem, moved: dict, *, low: bool = False) -> tuple[dict, dict]:
    """dout [b, sq, hq, dv] and dlse [b, hq, sq], and how far a correct kernel may be off.

    With dS = scale (dq k + q dk) softcap' + dbias and the dropout factor F,
      dlse = sum_j P dS + P_sink dsink,   dout = sum_j F P (dS v + dv) - dlse out.
    """
    see, scale, features = problem.see[:, None], problem.scale, problem.features
    dtype = problem.clean["query"].dtype
    wide = np.float32 if low and dtype != np.float64 else np.float64
    round_ = oracle.rounder(dtype) if low else lambda x: x
    rows = lambda x: np.swapaxes(x.astype(wide), 1, 2)  # noqa: E731
    q, k, v = (rows(problem.clean[n]) for n in ARRAYS)
    dq, dk, dv = (rows(moved[n]) for n in ARRAYS)
    repeat = q.shape[1] // max(k.shape[1], 1)
    k, v, dk, dv = (np.repeat(x, repeat, axis=1) for x in (k, v, dk, dv))
    product = lambda a, b: a @ np.swapaxes(b, -1, -2)  # noqa: E731

    score, steepness = round_(wide(scale) * product(q, k)), 1.0
    if features.softcap:
        tanh = np.tanh(score / wide(features.softcap))
        score, steepness = wide(features.softcap) * tanh, 1 - tanh**2
    added = features.added(k.shape[2], wide)
    p, lse = oracle._softmax(score + added, see, features.sinks)
    shown = see & (lse > -np.inf)[..., None]
    ds = wide(scale) * (product(dq, k) + product(q, dk)) * steepness
    if "bias" in moved:
        ds = ds + moved["bias"].astype(wide)
    ds = np.where(shown, ds, 0)
    kept = round_(p) * features.factor(wide)
    dlse = (p * ds).sum(-1)
    if "sinks" in moved:
        share = np.exp(features.sinks[:, None] - np.where(lse > -np.inf, lse, np.inf))
        dlse = dlse + share * moved["sinks"][:, None]
    out = round_(kept @ v)
    dout = round_(round_(p * ds) * features.factor(wide) @ v + kept @ dv - dlse[..., None] * out)

    step = 16 * 2.0**-52 if dtype == np.float64 else 2.0**-23
    eps = 2.0 ** -(7 if dtype.name == "bfloat16" else np.finfo(dtype).nmant)
    size = np.abs(scale) * product(np.abs(q), np.abs(k)) + np.abs(added)
    noise = step * p * np.where(shown & np.isfinite(size), 2 + size, 0)  # of P
    terms = np.abs(scale) * (product(np.abs(dq), np.abs(k)) + product(np.abs(q), np.abs(dk)))
    dnoise = 4 * (noise * np.abs(ds) + step * p * np.where(shown, terms, 0))  # of P dS
    factor = features.factor(wide)
    spread = dnoise.sum(-1)[..., None] + eps * np.abs(dlse)[..., None]
    floors = {
        "dout": (dnoise * factor) @ np.abs(v) + 4 * (noise * factor) @ np.abs(dv)
        + spread * np.abs(out),
        "dlse": dnoise.sum(-1) + 4 * step * np.abs(dlse),
    }  # fmt: skip
    results = {"dout": np.swapaxes(dout, 1, 2), "dlse": dlse}
    return (
        {n: x.astype(np.float64) for n, x in results.items()},
        {n: float(x.max(initial=0)) for n, x in floors.items()},
    )


@functools.cache
def jitted(options: tuple):
    """(out, lse) and their tangents as one program; shared by cases with the same options."""

    def run(primals, moved, fixed):
        def forward(primals):
            arrays = dict(primals)
            args = [arrays.pop(n) for n in ARRAYS]
            return call(*args, fixed | arrays, return_lse=True, **dict(options))

        return jax.jvp(forward, (primals,), (moved,))

    return jax.jit(run)


def execute(problem: Problem, moved: dict, platform: str = "cpu") -> dict:
    """out, lse, dout and dlse of the library; asserts that our kernels ran."""
    with (
        x64_if(problem.case.dtype == "float64"),
        jax.default_device(jax.devices(platform)[0]),
    ):
        arguments = problem.mask_arguments()
        primals = {n: problem.given[n] for n in ARRAYS}
        primals |= {n: arguments.pop(n) for n in LEARNED if n in arguments}
        options = (*problem.case.options().items(), ("differentiation", "forward"))
        compiled = jitted(options).lower(primals, moved, arguments).compile()
        if all(primals["query"].shape):
            hlo.assert_kernels(compiled.as_text(), forward=1, backward=0, tangent=1)
        values, tangents = jax.device_get(compiled(primals, moved, arguments))
    return dict(zip(("out", "lse", "dout", "dlse"), (*values, *tangents), strict=True))


def check_tangents(case: Case, platform: str = "cpu") -> dict:
    """One case against the oracle; returns the results."""
    problem = make_problem(case)
    clean, given = directions(problem)
    results = execute(problem, given, platform)
    with np.errstate(all="ignore"):
        exact, floors = oracle_tangents(problem, clean)
        low, _ = oracle_tangents(problem, clean, low=True)
    dtypes = {"dout": case.dtype, "dlse": "float64" if case.dtype == "float64" else "float32"}
    for name, wanted in exact.items():
        compare.assert_structure(name, results[name], wanted, dtypes[name], case)
    nothing = ~problem.see.any(2)
    compare.assert_zero("dout", results["dout"], nothing[:, :, None, None], case)
    compare.assert_zero("dlse", results["dlse"], nothing[:, None], case)
    for name, wanted in exact.items():
        args = (wanted, low[name], dtypes[name], 2, floors[name])
        compare.assert_numbers(name, results[name], *args, case)
    return results
