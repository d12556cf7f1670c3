"""The mutation gate's list stays true to the sources (the gate itself takes too long for here)."""

import pathlib
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path.append(str(ROOT / "tests/mutation_gate"))

from mutations import MUTATIONS  # noqa: E402


def test_every_mutation_finds_its_text_once():
    for mutation in MUTATIONS:
        count = (ROOT / mutation.file).read_text().count(mutation.old)
        assert count == 1, f"{mutation.name}: {mutation.file} has {count} times {mutation.old!r}"
        assert mutation.old != mutation.new


def test_names_are_unique():
    names = [m.name for m in MUTATIONS]
    assert len(set(names)) == len(names)


def test_clauses_exist():
    text = (ROOT / "docs/semantics.md").read_text()
    for mutation in MUTATIONS:
        assert all(f"**{clause} " in text for clause in mutation.clause.split(", ")), mutation
