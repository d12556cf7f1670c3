"""Imports and includes go one way (the layers of the library)."""

import ast
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
PACKAGE = ROOT / "jax_flashattn"

# A module imports only from lower layers. What is not named here sits on top of all of them.
LAYERS = (
    {
        "_spec",
        "_mask",
        "_compat",
        "_native",
        "_dropout",
        "_operands",
        "_checks",
        "_dispatch",
        "_values",
    },
    {"_partition", "_features", "_mask_plot", "partials"},
    {"masks"},
    {"_validate"},
    {"_primitives", "_reference", "packing", "_pages"},
    {"passes"},
    {"bert_padding", "rotary"},
    {"_derivatives"},
    {"_lowering", "_batching", "_attention", "_append"},
    {"_cached"},
    {"api"},
    {"_torch_names", "_jax_masks"},
    {"flash_attn", "flash_attn_varlen", "shifted_sparse", "nn", "kvcache"},
    {"flash_mha", "blockwise", "inspection", "explanation"},
)
RANKS = {name: rank for rank, names in enumerate(LAYERS) for name in names}
TOP = len(LAYERS)
MODULES = sorted(PACKAGE.rglob("*.py"))


def _name(path: pathlib.Path) -> str:
    return ".".join(path.relative_to(PACKAGE).with_suffix("").parts)


def _imports(path: pathlib.Path) -> set[str]:
    """Full names of everything a module imports, also inside functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name}: relative import"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def _own(path: pathlib.Path) -> set[str]:
    """Names of the library's own modules among the imports."""
    names = set()
    for full in _imports(path):
        parts = full.split(".")
        if parts[0] == "jax_flashattn" and len(parts) > 1:
            is_module = (PACKAGE / f"{parts[1]}.py").exists() or (PACKAGE / parts[1]).is_dir()
            names.add(parts[1] if is_module else "__init__")
    return names


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_python_imports_go_down(path):
    rank = RANKS.get(_name(path), TOP)
    for other in _own(path):
        down = RANKS.get(other, TOP) < rank or rank == TOP
        assert down, f"{_name(path)} imports {other}, which is not below it"


@pytest.mark.parametrize("path", MODULES, ids=_name)
def test_private_jax_only_in_compat(path):
    private = [x for x in _imports(path) if x.startswith(("jax._src", "jaxlib"))]
    assert _name(path) == "_compat" or not private, f"{_name(path)} imports {private}"


def test_init_only_reexports():
    body = ast.parse((PACKAGE / "__init__.py").read_text()).body[1:]
    assert all(isinstance(node, ast.Import | ast.ImportFrom | ast.Assign) for node in body)


def test_layers_name_existing_modules():
    """A renamed module must not silently leave its layer."""
    missing = [n for n in RANKS if not (PACKAGE / f"{n}.py").exists()]
    assert not missing, f"{missing} are in LAYERS but not in the package"


# Folder of csrc -> folders it may include from; and words no include of it may have.
FOREIGN = ("xla/", "pybind11", "cuda", "cutlass", "Python.h")
INCLUDES = {
    "semantics": ({"semantics"}, FOREIGN),
    "cpu": ({"semantics", "cpu"}, FOREIGN),
    "cuda": ({"semantics", "cuda"}, ("xla/", "pybind11", "Python.h")),
    "ffi": ({"semantics", "cpu", "cuda", "ffi"}, ()),
}
SOURCES = sorted(p for p in (ROOT / "csrc").rglob("*") if p.suffix in (".h", ".cc", ".cu", ".cuh"))


@pytest.mark.parametrize("path", SOURCES, ids=lambda p: str(p.relative_to(ROOT / "csrc")))
def test_cpp_includes_go_down(path):
    folder = path.relative_to(ROOT / "csrc").parts[0]
    assert folder in INCLUDES, f"csrc/{folder} has no place in the layers"
    allowed, foreign = INCLUDES[folder]
    text = path.read_text()
    own = re.findall(r'^\s*#\s*include\s+"([^"]+)"', text, re.MULTILINE)
    system = re.findall(r"^\s*#\s*include\s+<([^>]+)>", text, re.MULTILINE)
    for name in own:
        if not name.startswith("xla/"):
            first = name.split("/")[0]
            layer = first if first in INCLUDES else folder  # else relative to the folder itself
            assert layer in allowed, f"{path.name} includes {name}"
    for name in own + system:
        words = [w for w in foreign if w in name and name.split("/")[0] not in allowed]
        assert not words, f"{path.name} includes {name}"


def test_sources_were_found():
    assert len(MODULES) > 10
    assert len(SOURCES) > 8
