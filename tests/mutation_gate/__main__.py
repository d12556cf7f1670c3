"""Flips facts of the code one at a time, shows which test notices, and keeps docs/mutations.md.

python tests/mutation_gate                # every mutation
python tests/mutation_gate --only lse     # those with "lse" in their names
python tests/mutation_gate --missing      # those that the table has no test for
python tests/mutation_gate --untried      # those that the table does not have
python tests/mutation_gate --quick        # only the tests that a mutation names itself
"""

import argparse
import pathlib
import re
import sys
import tempfile
import time

from mutations import MUTATIONS, Mutation
from sandbox import ROOT, WITHOUT_KERNELS, Sandbox, Verdict

TABLE = ROOT / "docs/mutations.md"
# Run in this order, if the tests that a mutation names pass.
TESTS = (
    "tests/attention/test_backward.py",
    "tests/attention/test_forward.py",
    "tests/attention/test_lse.py",
    "tests/attention/test_mask_forms.py",
    "tests/attention/test_parts.py",
    "tests/attention/test_edges.py",
    "tests/attention/test_features.py",
    "tests/adversarial",
)
NOBODY = "**nobody**"
HEAD = """# Mutation gate

Kept by `python tests/mutation_gate`. Each row is one fact of the code made wrong, and the first
test that noticed, of a quick subset that starts with the tests closest to the fact: others may
notice too. A row without a test is a missing test, or a program that computes the same, and says
why.

| mutation | file | clause | killed by |
|---|---|---|---|
"""


def _stages(mutation: Mutation, quick: bool) -> list:
    first = mutation.tests or WITHOUT_KERNELS[:2]
    return [first] if quick else [first, [t for t in TESTS if t not in first]]


def _killer(mutation: Mutation, verdict: Verdict) -> str:
    if verdict.test is None:
        return f"equivalent: {mutation.equivalent}" if mutation.equivalent else NOBODY
    name = verdict.test.removeprefix("tests/").split("[")[0]
    return f"`{name}`" + ("" if verdict.how == "fails" else f" ({verdict.how})")


def _read_table() -> dict[str, str]:
    """The killers known so far, by name of the mutation."""
    text = TABLE.read_text() if TABLE.exists() else ""
    return dict(re.findall(r"^\| (.+?) \| \S+ \| .+? \| (.+) \|$", text, re.M))


def _write_table(killers: dict[str, str]) -> None:
    known = [m for m in MUTATIONS if m.name in killers]
    rows = [f"| {m.name} | {m.file} | {m.clause} | {killers[m.name]} |" for m in known]
    missed = sum(killers[m.name] == NOBODY for m in known)
    counts = f"{len(MUTATIONS)} mutations, {len(known)} tried, {missed} noticed by nobody."
    TABLE.write_text(HEAD + "\n".join(rows) + f"\n\n{counts}\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", default="", help="part of the names of the mutations to run")
    parser.add_argument("--missing", action="store_true", help="those the table has no test for")
    parser.add_argument("--untried", action="store_true", help="those the table does not have")
    parser.add_argument("--quick", action="store_true", help="only tests a mutation names itself")
    chosen = parser.parse_args()
    killers = _read_table()
    mutations = [m for m in MUTATIONS if chosen.only in m.name]
    if chosen.missing:
        mutations = [m for m in mutations if killers.get(m.name, NOBODY) == NOBODY]
    if chosen.untried:
        mutations = [m for m in mutations if m.name not in killers]
    with tempfile.TemporaryDirectory() as folder:
        sandbox = Sandbox(pathlib.Path(folder) / "project")
        stages = [tests for m in mutations for tests in _stages(m, chosen.quick)]
        if broken := sandbox.run(list(dict.fromkeys(t for tests in stages for t in tests))).test:
            raise SystemExit(f"the unmutated project fails {broken}")
        for m in mutations:
            begin = time.monotonic()
            verdict = sandbox.verdict(m.file, m.old, m.new, _stages(m, chosen.quick))
            killers[m.name] = _killer(m, verdict)
            print(f"{time.monotonic() - begin:4.0f} s  {m.name}: {killers[m.name]}", flush=True)
            _write_table(killers)
    return any(killers[m.name] == NOBODY for m in mutations)


if __name__ == "__main__":
    sys.exit(main())
