"""Inputs of a case: mask arrays from its geometry, numbers from its data seed, and poison."""

import dataclasses

import ml_dtypes
import numpy as np
from support import oracle
from support.case import Case

DTYPES = {
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float32": np.dtype(np.float32),
    "float64": np.dtype(np.float64),
}


@dataclasses.dataclass(frozen=True)
class Problem:
    """A case made concrete: clean arrays for the oracle, `given` for the library."""

    case: Case
    mask: oracle.Mask
    see: np.ndarray  # [b, sq, sk]
    clean: dict
    given: dict
    scale: float
    features: oracle.Features
    bias: np.ndarray | None  # as given: poisoned where the features' own is clean

    def mask_arguments(self) -> dict:
        """The arrays flash_attention takes by keyword, as plain tuples and arrays."""
        f = self.features
        m, pair = self.mask, self.case.lengths_k is not None
        arguments = {}
        if m.lengths_q is not None:
            arguments["lengths"] = (m.lengths_q, m.lengths_k) if pair else m.lengths_q
        if m.ids_q is not None:
            arguments["segment_ids"] = (m.ids_q, m.ids_k) if pair else m.ids_q
        if m.lo is not None:
            arguments["intervals"] = (m.lo, m.hi)
        if f.slopes is not None:
            arguments["alibi_slopes"] = f.slopes if self.case.alibi == "bh" else f.slopes[0]
        if f.sinks is not None:
            arguments["sinks"] = f.sinks
        if self.bias is not None:
            arguments["bias"] = self.bias
        if self.case.dropout:
            arguments["dropout_key"] = dropout_key(self.case)
        return arguments


def document_ids(documents: tuple, s: int, cycle: int) -> np.ndarray:
    """One row of segment ids; negative lengths are padding, the rest is padding too."""
    ids, n = np.zeros(s, np.int32), 0
    at = 0
    for length in documents:
        if length > 0:
            ids[at : at + length] = 1 + (n % cycle if cycle else n)
            n += 1
        at += abs(length)
    assert at <= s, f"documents {documents} do not fit {s} positions"
    return ids


def _intervals(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Public IntervalMask arrays of the case's kind."""
    rng = np.random.default_rng(case.geometry_seed)
    shape, sk = (case.b, case.sq), case.sk
    if case.interval == "prefix":  # a prefix everyone sees, then causal
        prefix = rng.integers(0, sk + 1, (case.b, 1))
        hi = np.maximum(prefix, np.arange(case.sq)[None] + 1 + sk - case.sq)
        lo = np.zeros(shape, int)
    elif case.interval == "decreasing":
        lo = np.broadcast_to(np.arange(case.sq)[::-1] * sk // max(2 * case.sq, 1), shape)
        hi = np.broadcast_to(sk - np.arange(case.sq) * sk // max(case.sq, 1), shape)
    elif case.interval == "wild":  # beyond every bound
        values = np.array([-(2**31), -5, -1, 0, 1, sk // 2, sk, sk + 9, 2**31 - 1])
        lo, hi = rng.choice(values, shape), rng.choice(values, shape)
    else:
        lo, hi = rng.integers(-2, sk + 1, shape), rng.integers(-1, sk + 3, shape)
    return lo.astype(np.int32), hi.astype(np.int32)


def make_mask(case: Case) -> oracle.Mask:
    arrays = {}
    if case.layout == "lengths":
        arrays["lengths_q"] = np.array(case.lengths_q, np.int32)
        arrays["lengths_k"] = np.array(case.lengths_k or case.lengths_q, np.int32)
    elif case.layout == "segments":
        sides = (case.lengths_q, case.sq), (case.lengths_k or case.lengths_q, case.sk)
        arrays["ids_q"], arrays["ids_k"] = (
            np.stack([document_ids(row, s, case.id_cycle) for row in rows]) for rows, s in sides
        )
    if case.interval:
        arrays["lo"], arrays["hi"] = _intervals(case)
    return oracle.Mask(**arrays)


def _massive(rng, shapes, case):
    """A few activation columns far above the rest, as trained models have."""
    x = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x["query"][..., 0] *= 20
    x["key"][..., 0] += 20
    x["value"][..., -1] *= 50
    return x


def _integer(rng, shapes, case):
    """Small integers: sums are exact in any order."""
    return {name: rng.integers(-2, 3, shape).astype(float) for name, shape in shapes.items()}


def _constant_score(rng, shapes, case, score=-120.0):
    """Every score is the same far negative number."""
    x = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x["query"][:], x["key"][:] = 0, 0
    x["query"][..., 0], x["key"][..., 0] = -8.0, -score / 8 / _scale(case)
    return x


def _onehot(rng, shapes, case):
    """One key takes nearly all the weight."""
    x = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    if case.sk:
        x["query"][..., 0] = 8
        x["key"][:, case.sk // 2, :, 0] += 8
    return x


def _identity_v(rng, shapes, case):
    """Value j is the j-th unit vector, so the output is the probability matrix."""
    assert case.dv >= case.sk, "identity_v needs dv >= sk"
    x = {name: rng.standard_normal(shape) for name, shape in shapes.items()}
    x["value"][:] = np.eye(case.sk, case.dv)[None, :, None]
    return x


def _gaussian(rng, shapes, case):
    return {name: rng.standard_normal(shape) for name, shape in shapes.items()}


_KINDS = {
    "gaussian": _gaussian,
    "integer": _integer,
    "identity_v": _identity_v,
    "massive": _massive,
    "constant_score": _constant_score,
    "onehot": _onehot,
}


def _scale(case: Case) -> float:
    return case.d**-0.5 if case.scale is None else case.scale


def _clean_arrays(case: Case) -> dict:
    rng = np.random.default_rng(case.data_seed)
    shapes = {
        "query": (case.b, case.sq, case.hq, case.d),
        "key": (case.b, case.sk, case.hk, case.d),
        "value": (case.b, case.sk, case.hk, case.dv),
        "dout": (case.b, case.sq, case.hq, case.dv),
        "dlse": (case.b, case.hq, case.sq),
    }
    dtype = DTYPES[case.dtype]
    arrays = _KINDS[case.data](rng, shapes, case)
    if not case.dlse:
        arrays["dlse"] = np.zeros(shapes["dlse"])
    statistics = np.float64 if case.dtype == "float64" else np.float32
    return {n: x.astype(statistics if n == "dlse" else dtype) for n, x in arrays.items()}


def _poisoned(case: Case, mask: oracle.Mask, see: np.ndarray, clean: dict) -> dict:
    """NaN where nothing may read, or where what is read may not matter."""
    if case.poison == "none":
        return clean
    hidden_q, hidden_k = ~see.any(2), ~see.any(1)
    if case.poison == "tail":
        if mask.ids_q is not None:
            hidden_q, hidden_k = mask.ids_q == 0, mask.ids_k == 0
        else:
            hidden_q = np.arange(case.sq) >= np.clip(mask.lengths_q, 0, case.sq)[:, None]
            hidden_k = np.arange(case.sk) >= np.clip(mask.lengths_k, 0, case.sk)[:, None]
    given = {name: x.copy() for name, x in clean.items()}
    for name in ("query", "dout"):
        given[name][hidden_q] = np.nan
    for name in ("key", "value"):
        given[name][hidden_k] = np.nan
    if case.dlse:
        given["dlse"][np.broadcast_to(hidden_q[:, None], given["dlse"].shape)] = np.nan
    return given


def dropout_key(case: Case) -> np.ndarray:
    """A raw key, as jax.random.PRNGKey makes them, with both words in use."""
    return np.array([0xDEAD0000 + case.data_seed, 17 * case.data_seed + 3], np.uint32)


def _features(case: Case, mask: oracle.Mask) -> oracle.Features:
    rng = np.random.default_rng(case.data_seed + 1)
    statistics = np.float64 if case.dtype == "float64" else np.float32
    arrays = {"position": oracle.positions(case, mask)}
    if case.alibi is not None:
        slopes = np.exp2(-rng.uniform(1, 8, (case.b if case.alibi == "bh" else 1, case.hq)))
        arrays["slopes"] = np.broadcast_to(slopes.astype(np.float32), (case.b, case.hq))
    if case.sinks:
        arrays["sinks"] = rng.normal(1, 2, case.hq).astype(statistics)
    if case.bias is not None:
        sizes = {"b": case.b, "h": case.hq, "i": case.sq, "j": case.sk}
        shape = tuple(n if axis in case.bias else 1 for axis, n in sizes.items())
        dtype = DTYPES[case.bias_dtype or case.dtype]
        arrays["bias"] = rng.standard_normal(shape).astype(dtype)
    if case.dropout:
        arrays["threshold"] = round((1 - case.dropout) * 65536)
        sizes = (case.b, case.hq, case.sk)
        arrays["keep"] = oracle.keep(dropout_key(case), arrays, sizes)
    return oracle.Features(softcap=case.softcap, **arrays)


def _poisoned_bias(case: Case, see: np.ndarray, bias: np.ndarray | None) -> np.ndarray | None:
    """NaN in a bias that no visible pair reads."""
    if bias is None or case.poison == "none":
        return bias
    return np.where(oracle.reduced_to(see[:, None], bias.shape, np.any), bias, np.nan).astype(
        bias.dtype
    )


def make_problem(case: Case) -> Problem:
    mask = make_mask(case)
    see = oracle.visible(case, mask)
    clean = _clean_arrays(case)
    given = _poisoned(case, mask, see, clean)
    features = _features(case, mask)
    bias = _poisoned_bias(case, see, features.bias)
    return Problem(case, mask, see, clean, given, _scale(case), features, bias)
