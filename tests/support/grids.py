"""Named lists of cases, shared by the CPU and the GPU tests."""

import itertools

from support.case import Case

# Around the kernels' tiles (64 rows by 96 keys on CPU; 64, 128, 176 on a GPU), and primes.
_SHAPES = (
    *((1, 1), (1, 300), (2, 97), (63, 95), (64, 96), (65, 97), (113, 203), (127, 129), (128, 128)),
    *((129, 1), (191, 193), (108, 256), (256, 113), (300, 64), (47, 1)),
)
_HEADS = ((1, 1), (2, 1), (3, 3), (6, 2), (7, 1), (8, 2), (12, 3))
_HEAD_DIMS = (1, 2, 3, 7, 8, 15, 16, 17, 31, 32, 40, 59, 64, 80, 96, 127, 128, 192, 255, 256)
_VALUE_DIMS = ((64, 128), (128, 64), (1, 256), (256, 1), (40, 59), (3, 17))
_WINDOWS = ((0, 0), (0, None), (None, 0), (5, 3), (63, 0), (64, 65), (95, 96))

HEADS = [Case(b=2, sq=37, sk=53, hq=q, hk=k, causal=True, dlse=True) for q, k in _HEADS]
HEAD_DIMS = [Case(sq=70, sk=99, hq=2, d=d, dv=d, causal=True, dlse=True) for d in _HEAD_DIMS]
VALUE_DIMS = [Case(b=2, sq=67, sk=101, hq=4, hk=2, d=d, dv=e, right=4) for d, e in _VALUE_DIMS]
SHAPES = [
    Case(b=2, sq=sq, sk=sk, hq=4, hk=2, d=24, dv=24, causal=causal, dlse=True)
    for (sq, sk), causal in itertools.product(_SHAPES, (False, True))
]
WINDOWS = [
    Case(sq=sq, sk=sk, hq=2, left=left, right=right, dlse=True)
    for (sq, sk), (left, right) in itertools.product(
        ((100, 100), (70, 130), (130, 70), (3, 200)), _WINDOWS
    )
]
CAUSAL_WINDOWS = [
    Case(sq=50, sk=70, hq=2, causal=True, left=left, right=right)
    for left, right in itertools.product((None, 0, 9, 69), (None, 0, 8))
]
SCALES = [
    Case(sq=67, sk=99, hq=2, scale=scale, causal=True, dlse=True)
    for scale in (1.0, 0.5, 0.0, -0.3, -2, 1e-6, 3.0)
]
STRUCTURED = [
    Case(b=2, sq=90, sk=130, hq=4, hk=2, d=32, dv=32, data=data, right=9)
    for data in ("integer", "massive", "constant_score", "onehot")
]

_PADDED = Case(b=4, sq=70, sk=130, hq=4, hk=2, layout="lengths", dlse=True)
_LENGTHS = (
    {"lengths_q": (70, 3, 0, 64), "lengths_k": (130, 5, 9, 97)},
    {"lengths_q": (70, 70, 1, 65), "lengths_k": (0, 129, 1, 40)},
    {"lengths_q": (-3, 1000, -(2**31), 2**31 - 1), "lengths_k": (5, 2**31 - 1, 9, 1000)},
)
LENGTHS = [
    _PADDED.replace(**lengths, **window)
    for lengths in _LENGTHS
    for window in ({}, {"causal": True}, {"left": 9, "right": 2}, {"left": 0, "right": 0})
] + [_PADDED.replace(sk=70, lengths_q=(70, 0, 33, 64), causal=True)]

_PACKED = Case(b=2, sq=150, sk=150, hq=4, hk=2, layout="segments", dlse=True)
_DOCUMENTS = (
    {"lengths_q": ((50, 1, 64, 35), (150,))},
    {"lengths_q": ((-5, 20, -1, 40, 60), (-150,))},
    {"lengths_q": ((20, 30, 7, 80), (3, -4, 70, 70)), "id_cycle": 2},
    {"lengths_q": ((15, 17, 16, 31, 33, 38), (1, 16, 47, 32, 2, 52))},  # around strips of 16 rows
)
_DOCUMENT_PAIRS = (  # orphans on either side, queries without keys, keys without queries
    {"lengths_q": ((50, 20, 80), (97,)), "lengths_k": ((10, 90, 96), (1, 96, 30))},
    {"lengths_q": ((64, 1, 63, 9), (-20, 130)), "lengths_k": ((5, -7, 64), (130,))},
    {"lengths_q": ((9, 8, 7, 70), (40, 40)), "lengths_k": ((1, 99, 3, 9), (100, 1)), "id_cycle": 2},
)
SEGMENTS = [
    base.replace(**documents, **window)
    for base, choices in ((_PACKED, _DOCUMENTS), (_PACKED.replace(sk=200), _DOCUMENT_PAIRS))
    for documents in choices
    for window in ({}, {"causal": True}, {"left": 12, "right": 0}, {"left": 0, "right": 5})
]
INTERVALS = [
    Case(b=2, sq=80, sk=130, hq=4, hk=2, interval=kind, causal=causal, dlse=True)
    for kind in ("random", "prefix", "decreasing", "wild")
    for causal in (False, True)
]
COMBINED = [
    INTERVALS[0].replace(layout="lengths", lengths_q=(80, 41), lengths_k=(99, 130), right=20),
    INTERVALS[4].replace(layout="lengths", lengths_q=(7, 80), lengths_k=(8, 70), left=30),
    *(
        case.replace(interval=interval, left=left)
        for case in (SEGMENTS[1], SEGMENTS[12])
        for interval in ("random", "prefix")
        for left in (None, 10)
    ),
]
# Softcap, ALiBi, sinks and dropout, alone and together, over the ways to hide keys.
_FEATURED = Case(b=2, sq=70, sk=130, hq=4, hk=2, d=24, dv=40, dlse=True)
_PAIRED_LENGTHS = {"layout": "lengths", "lengths_q": (70, 33), "lengths_k": (97, 130)}
_PAIRED_DOCUMENTS = {
    "layout": "segments",
    "lengths_q": ((30, -2, 38), (1, 64)),
    "lengths_k": ((64, 60), (-5, 9, 97)),
}
_MASKS = (
    {"causal": True},
    {"left": 9, "right": 70},
    {"causal": True, **_PAIRED_LENGTHS},
    {"causal": True, **_PAIRED_DOCUMENTS},
    {"interval": "random"},
    {"sq": 5, "hq": 12, "interval": "prefix", **_PAIRED_LENGTHS, "lengths_q": (5, 3)},
)
_SINGLE = (
    {"softcap": 2.0},
    {"softcap": 0.4, "scale": -0.7},
    {"alibi": "h"},
    {"alibi": "bh", "scale": 0.0},
    {"sinks": True},
    {"dropout": 0.4},
    {"softcap": 1.5, "alibi": "bh", "sinks": True, "dropout": 0.25},
)
FEATURES = [
    _FEATURED.replace(**feature, **mask) for feature, mask in itertools.product(_SINGLE, _MASKS)
]
BIASES = [
    *(_FEATURED.replace(bias=axes, causal=True) for axes in ("bhij", "hij", "bij", "ij", "bhj")),
    *(_FEATURED.replace(bias=axes, left=9) for axes in ("", "i", "bi", "hi", "j", "h")),
    *(_FEATURED.replace(bias="hij", **_SINGLE[-1], **mask) for mask in _MASKS),
    _FEATURED.replace(bias="bhij", sq=5, hq=12, sinks=True, scale=-0.3),
    # Rows enough for the CPU backward to sum a shared bias as it goes.
    _FEATURED.replace(bias="hij", sq=270, sk=201, hq=8, hk=4, causal=True, **_SINGLE[-1]),
    _FEATURED.replace(
        b=4, bias="bij", sq=300, d=8, dv=8, left=150, right=9, layout="lengths",
        lengths_q=(300, 170, 0, 64), lengths_k=(130, 9, 70, 97),
    ),
    _FEATURED.replace(bias="ij", sq=1030, sk=99, d=8, dv=8, interval="random"),
]  # fmt: skip
ALL = [
    *(HEADS + HEAD_DIMS + VALUE_DIMS + SHAPES + WINDOWS + CAUSAL_WINDOWS + SCALES + STRUCTURED),
    *(LENGTHS + SEGMENTS + INTERVALS + COMBINED + FEATURES),
]
