"""What the documentation shows runs: docstring examples, README's Python, README's commands."""

import doctest
import importlib
import pathlib
import re

import pytest

ROOT = pathlib.Path(__file__).parents[2]
NAMES = (
    "api",
    "bert_padding",
    "blockwise",
    "explanation",
    "flash_attn",
    "flash_attn_varlen",
    "flash_mha",
    "flax.attention",
    "inspection",
    "kvcache",
    "masks",
    "nn",
    "packing",
    "partials",
    "passes",
    "rotary",
    "shifted_sparse",
)
MODULES = tuple(f"jax_flashattn.{name}" for name in NAMES)


@pytest.mark.parametrize("name", MODULES)
def test_docstring_examples(name):
    result = doctest.testmod(importlib.import_module(name))
    assert result.attempted > 0
    assert result.failed == 0


def test_readme_python_runs():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    assert len(blocks) >= 2
    namespace = {}
    for block in blocks:
        exec(block, namespace)
    assert namespace["out"].shape == namespace["q"].shape


def test_diagnostics_page(capsys):
    from jax_flashattn.__main__ import main

    assert main() == 0
    text = capsys.readouterr().out
    assert "instruction set" in text
    assert "relative error" in text


def test_readme_begins_with_two_commands():
    first_screen = (ROOT / "README.md").read_text().split("## Use")[0]
    commands = re.findall(r"```bash\n(.*?)\n```", first_screen, re.DOTALL)
    assert len(commands) == 2
    assert "examples/train_lm.py" in commands[0]
    assert commands[1].endswith("-m pytest")


def test_semantics_clauses_named_in_code_exist():
    written = set(re.findall(r"\bS\d+\b", (ROOT / "docs/semantics.md").read_text()))
    for path in [*ROOT.glob("jax_flashattn/**/*.py"), *ROOT.glob("csrc/**/*.*")]:
        named = set(re.findall(r"\(S(\d+)\)|// S(\d+)", path.read_text()))
        for clause in {f"S{a or b}" for a, b in named}:
            assert clause in written, f"{path.name} names {clause}"
