"""Seeded random cases: --fuzz N runs N of them, --fuzz-seed moves to others.

A program is what must be compiled: sizes, options, which arrays are there. Its cases differ in
masks, data and poison; --fuzz N of a large N runs more cases of each program. The geometry seeds
fix everything but the numbers, the data seed fixes those.
"""

import numpy as np
from support import check
from support.case import Case

TILES = (64, 96)  # rows and keys of the CPU kernels' tiles
HEADS = ((1, 1), (2, 1), (2, 2), (3, 1), (3, 3), (5, 5), (7, 1), (8, 2), (8, 8), (12, 3), (12, 4))
HEAD_DIMS = (8, 16, 32, 40, 59, 64, 80, 96, 128, 192, 256)
PRIMES = (3, 5, 7, 13, 31, 61, 97, 131, 199, 251)
DTYPES = ("float32", "bfloat16", "float16", "float64")
MOST_SCORES = 2**17  # the oracle's time


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


def _lengths(rng, layout: str, b: int, sq: int, sk: int, paired: bool) -> dict:
    """Lengths or documents of both sides, or of one if they are not a pair."""

    def side(s):
        if layout == "segments":
            return tuple(_documents(rng, s) for _ in range(b))
        return tuple(int(rng.choice([0, s, rng.integers(0, s + 1)])) for _ in range(b))

    if layout == "dense":
        return {}
    fields = {"lengths_q": side(sq), "lengths_k": side(sk) if paired else None}
    return fields | {"id_cycle": int(rng.choice([0, 2]) if layout == "segments" else 0)}


def _window(rng, sk: int) -> dict:
    choices = [None, None, None, 0, 1, 31, 63, 64, max(sk - 1, 0), sk, sk + 5]
    left, right = (choices[rng.integers(len(choices))] for _ in range(2))
    return {"left": left, "right": right, "causal": bool(rng.random() < 0.5)}


def _features(rng) -> dict:
    """Each feature in about a sixth of the programs, so that pairs of them are common enough."""
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


def random_program(seed: int) -> Case:
    """Sizes and options; masks and data are those of its first case."""
    rng = np.random.default_rng(seed)
    hq, hk = HEADS[rng.integers(len(HEADS))]
    sq, sk, b = _length(rng), _length(rng), int(rng.choice([1, 2, 3], p=[0.4, 0.4, 0.2]))
    while b * hq * sq * sk > MOST_SCORES and (b, hq) != (1, 1):
        b, hq, hk = (b - 1, hq, hk) if b > 1 else (1, 2, 1) if hq > 2 else (1, 1, 1)
    window = _window(rng, sk)
    if window["causal"] and rng.random() < 1 / 3:
        sq, sk = max(sq, sk), min(sq, sk)
    d = int(rng.choice(HEAD_DIMS))
    layout = str(rng.choice(["dense", "lengths", "segments"], p=[0.3, 0.35, 0.35]))
    paired = layout != "segments" or sq != sk or rng.random() < 0.3
    fields = window | _lengths(rng, layout, b, sq, sk, paired) | _features(rng)
    if rng.random() < 0.3:
        fields["interval"] = "random"
    return Case(
        b=b, sq=sq, sk=sk, hq=hq, hk=hk, d=d, layout=layout, geometry_seed=seed,
        dv=d if rng.random() < 0.7 else int(rng.choice(HEAD_DIMS)),
        dtype=str(rng.choice(DTYPES, p=[0.35, 0.35, 0.2, 0.1])),
        scale=[None, None, None, 0.5, 1.0, 0.0, -0.3][rng.integers(7)],
        deterministic=bool(rng.random() < 0.3),
        **fields,
    )  # fmt: skip


def random_case(program: Case, number: int) -> Case:
    """A case of a program, in which what need not be compiled is drawn again."""
    seed = program.geometry_seed
    rng = np.random.default_rng([seed, 1, number])
    paired = program.lengths_k is not None
    fields = _lengths(rng, program.layout, program.b, program.sq, program.sk, paired)
    if program.interval:
        fields["interval"] = str(rng.choice(["random", "prefix", "decreasing", "wild"]))
    data = "gaussian"
    if program.scale is None and rng.random() < 0.15:
        data = str(rng.choice(["integer", "massive", "constant_score", "onehot"]))
    return program.replace(
        dlse=bool(rng.random() < 0.6), data=data,
        poison="invisible" if rng.random() < 0.2 else "none",
        geometry_seed=seed + 1000 * number, data_seed=int(rng.integers(2**24)), **fields,
    )  # fmt: skip


def pytest_generate_tests(metafunc):
    """A test for each program: 8 cases of each, or 50 of a large number."""
    count, first = (metafunc.config.getoption(n) for n in ("fuzz", "fuzz_seed"))
    if "program" in metafunc.fixturenames:
        each = min(50, max(8, count // 400))
        sizes = [min(each, count - n) for n in range(0, count, each)]
        programs = [(random_program(first + n), size) for n, size in enumerate(sizes)]
        metafunc.parametrize(("program", "cases"), programs, ids=repr)


def test_random_cases(program, cases):
    for number in range(cases):
        check.check_case(random_case(program, number))
    check.forget_programs()
