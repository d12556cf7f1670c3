"""explain: the table of kernels is csrc's, counts are those of the mask, and it needs no data."""

import itertools
import pathlib
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jax_flashattn import IntervalMask, _dispatch, _native, explain, flash_attention

CSRC = pathlib.Path(__file__).parents[2] / "csrc"


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def source(path: str) -> str:
    """A file without comments and line breaks."""
    return " ".join(re.sub(r"//[^\n]*", "", (CSRC / path).read_text()).split())


# --- In step with csrc: if one of these fails, change _dispatch.py too ---


def test_tiles_are_those_of_the_kernels():
    text = source("cuda/sm90/forward.cu")

    def tiles(extent):
        tuned = re.findall(rf"Tuned<T, (\d+), {extent}> : ForwardShape<T, \1, (\d+), (\d+),", text)
        return {int(d): (64 * int(groups), int(keys)) for d, groups, keys in tuned}

    assert tiles("kExtent") | tiles("Extent::kPlain") == _dispatch.SM90_FORWARD_TILES
    for name, extent in (
        ("alibi_slopes", "kDistances"), ("softcap", "kScores"), ("dropout", "kDropout")
    ):  # fmt: skip
        own = _dispatch.SM90_EXTENT_FORWARD_TILES[name]
        wanted = tiles("kExtent") | tiles(f"Extent::{extent}")
        assert _dispatch.SM90_FORWARD_TILES | own == wanted
    assert (
        "using TunedBackward = BackwardShape<T, kD, kD == 64 ? 128 : 64, kD <= 128 ? 128 : 64, "
        "kInTurn, kExtent>;"
    ) in source("cuda/sm90/backward.cu")
    tiles = _dispatch.SM90_FORWARD_TILES
    backward = {d: (128 if d == 64 else 64, 128 if d <= 128 else 64) for d in tiles}
    assert backward == _dispatch.SM90_BACKWARD_TILES
    tile = source("cpu/tile.h")
    rows, keys = (int(re.search(rf"{n} = (\d+);", tile)[1]) for n in ("kRows", "kTileKeys"))
    assert (rows, keys) == _dispatch.CPU_TILE


def test_rules_are_those_of_the_dispatch():
    text = source("cuda/dispatch.cc")
    constant = r"return launch\(std::integral_constant<int, (\d+)>\(\)\);"
    steps = re.findall(rf"if \(d <= (\d+)\) {constant}", text)
    assert all(limit == instance for limit, instance in steps)
    instances = [int(n) for n in re.findall(constant, text)]
    assert instances == list(_dispatch.SM90_FORWARD_TILES) == list(_dispatch.SM90_BACKWARD_TILES)
    for rule in (
        "return n.d % 8 == 0 && n.dv % 8 == 0 && n.sk > 0 && "
        "n.b * n.g * n.r * ((n.sq + 63) / 64) < INT32_MAX && "
        "n.b * n.g * ((n.sk + 63) / 64) < INT32_MAX;",
        "if (facts.major == 9 && facts.minor == 0 && fits_sm90(p.n) && knows_features(p)) "
        "return sm90_instance(",
        "if (facts.major == 9 && facts.minor == 0 && fits_sm90(p.n) && p.n.r * p.n.sq > 0 && "
        "sm90::worth_tiles(p.n) && knows_features(p)) "
        "return sm90_instance(",
        "return !p.features.bias.data && !(p.features.dropout && p.features.keys);",
    ):
        assert rule in text, f"csrc/cuda/dispatch.cc no longer says: {rule}"
    few = "bool worth_tiles(const Sizes& n) { return n.sq > 32 || n.sk > 1024; }"
    assert few in source("cuda/sm90/backward_workspace.h")


# --- What it says ---


def explained(d=128, dv=None, dtype=jnp.bfloat16, platform="cuda", **options):
    q, v = shape(2, 256, 4, d, dtype=dtype), shape(2, 256, 2, dv or d, dtype=dtype)
    k = shape(2, 256, 2, d, dtype=dtype)
    return explain(q, k, v, platform=platform, **options)


@pytest.mark.parametrize(
    ("d", "instance"), [(8, 64), (64, 64), (72, 96), (128, 128), (136, 192), (200, 256)]
)
def test_hopper_instances(d, instance):
    page = explained(d, 8)
    for which, one, tiles in (
        ("forward", page.forward, _dispatch.SM90_FORWARD_TILES),
        ("backward", page.backward, _dispatch.SM90_BACKWARD_TILES),
    ):
        assert one.kernel == f"cuda sm90 {which}, head dim {instance}, bfloat16"
        assert one.tile == tiles[instance]
        assert one.tiles is not None
        assert not one.notes


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"d": 60}, "multiples of 8, d is 60: pad to 64"),
        ({"dv": 33}, "multiples of 8, dv is 33: pad to 40"),
        ({"compute_capability": "8.0"}, "compute capability 9.0 .* this is 8.0"),
    ],
)
def test_why_not_the_tensor_cores(arguments, words):
    page = explained(**arguments)
    for which, one in (("forward", page.forward), ("backward", page.backward)):
        assert one.kernel == f"cuda plain {which}, bfloat16"
        assert one.tiles is None
        assert re.search(words, " ".join(one.notes)), one.notes


KEY = jax.eval_shape(lambda: jax.random.key(0))


@pytest.mark.parametrize(
    ("arguments", "rows"),
    [
        ({"softcap": 3.0}, 128),
        ({"alibi_slopes": shape(4, dtype=jnp.float32)}, 128),
        ({"dropout_rate": 0.1, "dropout_key": KEY}, 128),
        ({"dropout_rate": 0.1, "dropout_key": np.zeros(2, np.uint32)}, 128),
        ({"sinks": shape(4, dtype=jnp.float32)}, 192),
        ({"softcap": 0.0, "dropout_rate": 1e-6, "dropout_key": KEY}, 192),
    ],
    ids=str,
)
def test_features(arguments, rows):
    """The tensor-core kernels know them; what changes the scores has an instance of its own."""
    page = explained(64, **arguments)
    assert page.forward.kernel.startswith("cuda sm90 forward")
    assert page.backward.kernel.startswith("cuda sm90 backward")
    assert page.forward.tile == (rows, 128)
    assert page.visible_pairs == 2 * 4 * 256 * 256


def test_few_rows_take_the_plain_backward():
    q, k = shape(2, 32, 4, 64), shape(2, 1024, 2, 64)
    page = explain(q, k, k, platform="cuda")
    assert page.forward.kernel.startswith("cuda sm90 forward")
    assert page.backward.kernel.startswith("cuda plain backward")
    assert "a few rows" in " ".join(page.backward.notes)


def test_features_are_checked_as_in_the_call():
    with pytest.raises(ValueError, match="needs a dropout_key"):
        explained(dropout_rate=0.1)
    with pytest.raises(ValueError, match="sinks must have shape"):
        explained(sinks=shape(3, dtype=jnp.float32))
    with pytest.raises(TypeError, match="alibi_slopes must have dtype float32"):
        explained(alibi_slopes=shape(4))


def test_bias():
    """Not on CUDA; on CPU its bytes are read by both passes and written by one."""
    bias = shape(1, 4, 256, 256, dtype=jnp.float32)
    page = explained(bias=bias)
    assert page.forward.kernel is None
    assert page.backward.kernel is None
    assert page.tangent.kernel is None
    assert "no bias" in str(page)
    with_bias, without = (explained(platform="cpu", bias=x) for x in (bias, None))
    assert with_bias.forward.bytes - without.forward.bytes == 4 * 4 * 256 * 256
    assert with_bias.backward.bytes - without.backward.bytes == 2 * 4 * 4 * 256 * 256


def test_a_refusal_is_said_and_is_one(monkeypatch):
    """What explain says CUDA refuses is refused when lowering for CUDA."""
    page = explained(dtype=jnp.float32)
    assert page.forward.kernel is None
    assert "REFUSED" in str(page)
    assert "bfloat16 or float16, not float32" in str(page)
    monkeypatch.setitem(_native.modules, "CUDA", None)
    x = shape(1, 8, 1, 8, dtype=jnp.float32)
    with pytest.raises(NotImplementedError, match="bfloat16 or float16"):
        jax.jit(lambda x: flash_attention(x, x, x)).trace(x).lower(lowering_platforms=("cuda",))


def test_a_missing_extension_is_said(monkeypatch):
    monkeypatch.setitem(_native.problems, "CUDA", "libwhatever.so not found")
    assert "not installed here: libwhatever.so not found" in str(explained())
    assert "not installed" not in str(explained(platform="cpu"))
    assert "not installed" not in str(explained(implementation="reference"))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("kind", [None, "lengths", "segment_ids", "mask"])
def test_pairs_and_tiles_are_counted(kind, causal):
    """Against the matrix, with shapes only for query, key and value."""
    b, sq, sk, hq = 2, 200, 300, 4
    q, kv = shape(b, sq, hq, 64), shape(b, sk, 2, 64)
    ids = np.repeat([[1, 2, 3], [1, 1, 0]], 100, axis=1).astype(np.int32)
    values = {
        "lengths": (np.array([200, 50], np.int32), np.array([10, 300], np.int32)),
        "segment_ids": (ids[:, :sq], ids),
        "mask": IntervalMask.sliding_window(sq, sk, 20, 30),
    }
    given = {kind: values[kind]} if kind else {}
    page = explain(q, kv, kv, causal=causal, platform="cpu", **given)
    see = _visible(b, sq, sk, causal, given)
    assert page.visible_pairs == see.sum() * hq
    assert page.forward.flops == page.visible_pairs * 4 * 64
    assert page.backward.flops == page.visible_pairs * 10 * 64
    counts = {"full": 0, "partial": 0, "skipped": 0}
    for n, i, j in itertools.product(range(b), range(0, sq, 64), range(0, sk, 96)):
        tile = see[n, i : i + 64, j : j + 96]
        counts["full" if tile.all() else "partial" if tile.any() else "skipped"] += hq
    tiles = page.forward.tiles
    assert {n: getattr(tiles, n) for n in counts} == counts
    assert f"{tiles.full:,} full" in str(page)


def _visible(b, sq, sk, causal, given) -> np.ndarray:
    """Who sees whom, from attention over unit vectors."""
    q, k = jnp.zeros((b, sq, 1, 1)), jnp.zeros((b, sk, 1, 1))
    eye = jnp.broadcast_to(jnp.eye(sk)[None, :, None], (b, sk, 1, sk))
    attend = jax.jit(
        lambda v: flash_attention(q, k, v, causal=causal, implementation="reference", **given)
    )
    columns = [attend(eye[..., n : n + 150]) for n in range(0, sk, 150)]
    return np.concatenate(columns, -1)[:, :, 0] > 0


def test_tangents():
    """differentiation="forward" has a plain kernel on every GPU, and the CPU's own."""
    page = explained()
    assert page.tangent.kernel == "cuda plain tangent, bfloat16"
    assert "no tensor-core kernel" in str(page).rpartition(" tangent ")[2]
    assert page.tangent.flops == page.visible_pairs * 2 * (3 * 128 + 2 * 128)
    text = source("cuda/dispatch.cc")
    assert re.search(r"std::string tangent\([^)]*\) { return plain::tangent\(", text)
    page = explained(platform="cpu")
    assert page.tangent.kernel == page.forward.kernel


def test_limits_that_are_not_known():
    page = explained(segment_ids=shape(2, 256, dtype=jnp.int32))
    assert page.visible_pairs is None
    assert page.forward.tiles is None
    assert page.forward.flops == 2 * 4 * 256 * 256 * 4 * 128, "all pairs, if nothing is known"
    assert "visible pairs: unknown" in str(page)
    assert "limits are not known" in str(page)
    mask = jax.eval_shape(lambda: IntervalMask.causal(256))
    assert explained(mask=mask).visible_pairs is None


def test_bytes():
    """q 2, k and v 1, out 2 of 2 * 256 * 2 heads * 128 * 2 bytes; lse; two limits per row."""
    unit, lse = 2 * 256 * 2 * 128 * 2, 2 * 256 * 4 * 4
    page = explained()
    assert page.forward.bytes == 6 * unit + lse
    assert page.backward.bytes == 2 * 4 * unit + 2 * unit + 2 * lse
    assert page.tangent.bytes == 2 * 4 * unit + 2 * 2 * unit + 3 * lse
    limits = 2 * 256 * 8
    page = explained(mask=IntervalMask.causal(256))
    assert page.forward.bytes == 6 * unit + lse + limits


def test_arrays_tracers_and_huge_shapes():
    x = jnp.ones((1, 64, 2, 8))
    pages = [explain(x, x, x, causal=True, platform="cpu")]
    jax.jit(lambda x: pages.append(explain(x, x, x, causal=True, platform="cpu")))(x)
    assert pages[0] == pages[1]
    assert pages[0].forward.kernel.startswith(f"cpu {_native.modules['cpu'].instruction_set()}")
    huge = shape(1, 200_000, 64, 128)
    page = explain(huge, huge, huge, causal=True, platform="cuda")
    assert page.visible_pairs == 64 * 200_000 * 200_001 // 2
    double = shape(1, 4, 1, 8, dtype=np.dtype("float64"))
    assert "float64" in explain(double, double, double, platform="cpu").forward.kernel


def test_empty_calls_and_the_reference():
    page = explain(*[shape(2, 0, 4, 8)] * 3, platform="cpu")
    assert (page.visible_pairs, page.forward.flops) == (0, 0)
    page = explained(implementation="reference")
    assert page.forward.kernel == "reference (jax.numpy)"
    assert f"{2 * 4 * 256 * 256 * 4:,} bytes" in str(page)


def test_wrong_arguments_raise_what_the_call_raises():
    x = shape(1, 8, 3, 16)
    with pytest.raises(ValueError, match="must divide"):
        explain(x, shape(1, 8, 2, 16), shape(1, 8, 2, 16))
    with pytest.raises(ValueError, match="window must be None or a pair"):
        explain(x, x, x, window=3)
    with pytest.raises(ValueError, match="platform must be one of"):
        explain(x, x, x, platform="tpu")
    with pytest.raises(TypeError, match="ShapeDtypeStruct, got list"):
        explain([1], x, x)
    with pytest.raises(TypeError, match="dtype"):
        explain(*[shape(1, 8, 3, 16, dtype=jnp.int32)] * 3)
