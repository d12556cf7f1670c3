"""docs/porting.md: every row names tests, and they exist."""

import pathlib
import re

import pytest

import jax_flashattn

ROOT = pathlib.Path(__file__).parents[2]
ROWS = [
    [cell.strip() for cell in line.strip("|").split(" | ")]
    for line in (ROOT / "docs/porting.md").read_text().splitlines()
    if line.startswith("| ") and not line.startswith("| torch")
]


def named_tests(cell: str) -> list[tuple[str, str]]:
    """(file, test) for each in "`file: test, test` · `file: test`"."""
    groups = [part.split(": ") for part in re.findall(r"`([^`]+)`", cell)]
    return [(file, name) for file, names in groups for name in names.split(", ")]


@pytest.mark.parametrize("row", ROWS, ids=[row[0] for row in ROWS])
def test_row_is_exercised_by_tests_that_exist(row):
    assert len(row) == 4, "torch, here, difference, tests"
    named = named_tests(row[3])
    assert named
    for file, name in named:
        text = pathlib.Path(__file__).with_name(f"test_{file}.py").read_text()
        assert re.search(rf"^def {name}\(", text, re.MULTILINE), f"{file} has no {name}"


def test_every_name_of_torch_has_a_row():
    left = " ".join(row[0] for row in ROWS)
    names = {n for n in jax_flashattn.__all__ if n.startswith(("flash_attn_", "flash_mha"))}
    helpers = {n for n in vars(jax_flashattn.bert_padding) if n.endswith(("_input", "_axis"))}
    missing = [n for n in names | helpers | {"apply_rotary_emb"} if n not in left]
    assert len(names) >= 9
    assert not missing
