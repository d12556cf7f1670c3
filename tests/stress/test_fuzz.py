"""Seeded random cases; --fuzz N runs N of them, --fuzz-seed moves to others."""

import numpy as np
from support.case import Case
from support.check import check_case

TILES = (64, 96)  # rows and keys of the CPU kernels' tiles
HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (5, 5), (7, 1), (8, 2), (8, 8), (12, 3), (12, 4))
HEAD_DIMS = (8, 16, 32, 40, 59, 64, 80, 96, 128, 192, 256)
PRIMES = (3, 5, 7, 13, 31, 61, 97, 131, 199, 251)
DTYPES = ("float32", "bfloat16", "float16", "float64")


def _length(rng) -> int:
    """40% on tile edges, some 0, 1, 2 and primes, the rest uniform."""
    kind, tile = rng.random(), int(rng.choice(TILES))
    if kind < 0.4:
        return int(rng.choice([tile - 1, tile, tile + 1, 2 * tile - 1, 2 * tile + 1]))
    if kind < 0.55:
        return int(rng.choice([0, 1, 2], p=[0.2, 0.5, 0.3]))
    return int(rng.choice(PRIMES)) if kind < 0.75 else int(rng.integers(1, 220))


def _documents(rng, s: int) -> tuple:
    """Document lengths that fit s positions, 15% of them padding, in front or between."""
    lengths, left = [], s
    while left > 0 and len(lengths) < 6 and rng.random() < 0.9:
        n = min(left, max(1, _length(rng)))
        lengths.append(-n if rng.random() < 0.15 else n)
        left -= n
    return tuple(lengths)


def _mask(rng, b: int, sq: int, sk: int) -> dict:
    """Lengths, documents or nothing, alike or different on both sides."""
    layout = rng.choice(["dense", "lengths", "segments"], p=[0.4, 0.3, 0.3])
    fields = {"layout": str(layout)}
    if layout == "lengths":

        def side(s):
            return tuple(int(rng.choice([0, s, rng.integers(0, s + 1)])) for _ in range(b))

        fields |= {"lengths_q": side(sq), "lengths_k": side(sk)}
    elif layout == "segments":
        fields |= {
            "lengths_q": tuple(_documents(rng, sq) for _ in range(b)),
            "lengths_k": tuple(_documents(rng, sk) for _ in range(b)),
            "id_cycle": int(rng.choice([0, 2])),
        }
        if sq == sk and rng.random() < 0.7:
            fields["lengths_k"] = None
    if rng.random() < 0.15:
        fields["interval"] = str(rng.choice(["random", "prefix", "decreasing", "wild"]))
    return fields


def _window(rng, sk: int) -> dict:
    choices = [None, None, None, 0, 1, 31, 63, 64, max(sk - 1, 0), sk, sk + 5]
    left, right = (choices[rng.integers(len(choices))] for _ in range(2))
    return {"left": left, "right": right, "causal": bool(rng.random() < 0.5)}


def _features(rng) -> dict:
    """Each feature in about a sixth of the cases, so that pairs of them are common enough."""
    choices = {
        "softcap": (0.5, 4.0, 30.0),
        "alibi": ("h", "bh"),
        "sinks": (True,),
        "dropout": (0.01, 0.3, 0.9),
        "bias": ("bhij", "hij", "ij", "bhj", "bi", "j", "h", ""),
    }
    return {
        name: values[rng.integers(len(values))]
        for name, values in choices.items()
        if rng.random() < 0.16
    }


def random_case(geometry_seed: int, data_seed: int) -> Case:
    """One case; the geometry seed alone fixes everything but the numbers."""
    rng = np.random.default_rng(geometry_seed)
    hq, hk = HEADS[rng.integers(len(HEADS))]
    sq, sk, b = _length(rng), _length(rng), int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    window = _window(rng, sk)
    if window["causal"] and rng.random() < 1 / 3:
        sq, sk = max(sq, sk), min(sq, sk)
    d = int(rng.choice(HEAD_DIMS))
    dtype = str(rng.choice(DTYPES, p=[0.35, 0.35, 0.2, 0.1]))
    fields = _mask(rng, b, sq, sk) | window
    scale = [None, None, None, 0.5, 1.0, 0.0, -0.3][rng.integers(7)]
    data = "gaussian"
    fields |= _features(np.random.default_rng([geometry_seed, 1]))
    if rng.random() < 0.1:
        data = str(rng.choice(["integer", "massive", "constant_score", "onehot"]))
        scale = None
    return Case(
        b=b, sq=sq, sk=sk, hq=hq, hk=hk, d=d, dtype=dtype, scale=scale, data=data,
        dv=d if rng.random() < 0.7 else int(rng.choice(HEAD_DIMS)),
        deterministic=bool(rng.random() < 0.3),
        dlse=bool(rng.random() < 0.6),
        poison="invisible" if rng.random() < 0.2 else "none",
        geometry_seed=geometry_seed, data_seed=data_seed, **fields,
    )  # fmt: skip


def pytest_generate_tests(metafunc):
    """Cases from the command line's count and seed."""
    count, seed = (metafunc.config.getoption(n) for n in ("fuzz", "fuzz_seed"))
    if "case" in metafunc.fixturenames:
        seeds = range(seed, seed + count)
        metafunc.parametrize("case", [random_case(s, s + 1000) for s in seeds], ids=repr)


def test_random_case(case):
    check_case(case)
