"""A copy of the project in which facts can be wrong: builds the CPU extension there and runs tests.

The extension is compiled directly, at -O1 and for this machine's most capable instruction set
alone, which takes seconds. The other sets are stubs that are never picked. AVX512-BF16 comes with
AVX-512, to which it leaves all elements but bfloat16. AMX is left out: its sources are the same but
for amx.h.
"""

import concurrent.futures
import dataclasses
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import sysconfig

ROOT = pathlib.Path(__file__).parents[2]
ISAS = ("baseline", "avx2", "avx512", "avx512_bf16")
# What this machine has, but the set must not.
WITHOUT = {"avx512": ("-mno-avx512bf16", "-mno-amx-bf16"), "avx512_bf16": ("-mno-amx-bf16",)}


def _sources(command: str) -> tuple[str, ...]:
    """What cmake/cpu.cmake compiles by this command, below csrc."""
    text = (ROOT / "cmake/cpu.cmake").read_text()
    return tuple(re.findall(r"csrc/(\S+\.cc)", re.search(rf"{command}\([^)]*\)", text)[0]))


KERNELS, BINDINGS = _sources("add_library"), _sources("pybind11_add_module")
WITHOUT_KERNELS = (
    "tests/unit/test_semantics.py",
    "tests/unit/test_mask.py",
    "tests/unit/test_scratch.py",
)
SECONDS_PER_TEST = 60
SECONDS = 600  # of one run

# An editable install would win over the copy; its finder goes.
ON_THE_COPY = """
import sys
sys.meta_path[:] = [f for f in sys.meta_path if not type(f).__module__.startswith("_editable")]
sys.path.insert(0, {copy!r})
import jax_flashattn
assert jax_flashattn.__file__.startswith({copy!r}), jax_flashattn.__file__
"""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """`test` is the first to fail; None if all passed."""

    test: str | None
    how: str = ""


def instruction_set() -> str:
    """The most capable of ISAS that this machine has, whichever the installed package picks."""
    code = "from jax_flashattn import _native; print(_native.modules['cpu'].instruction_set())"
    for isa in reversed(ISAS):
        done = subprocess.run(
            [sys.executable, "-c", code], env=os.environ | {"JAX_FLASHATTN_CPU_ISA": isa},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        if done.stdout.strip() == isa:
            return isa
    raise SystemExit("the installed package has no kernels for this machine")


def _package(name: str) -> pathlib.Path:
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise SystemExit(f"the mutation gate needs {name}: pip install {name}")
    return pathlib.Path(spec.origin).parent


class Sandbox:
    """The copy at `folder`, which must not exist yet."""

    def __init__(self, folder: pathlib.Path):
        self.folder, self.isa = folder, instruction_set()
        self.built = {self.isa} | ({"avx512"} if self.isa == "avx512_bf16" else set())
        for name in ("csrc", "jax_flashattn", "tests"):
            ignored = shutil.ignore_patterns("*.so", "__pycache__", "mutation_gate")
            shutil.copytree(ROOT / name, folder / name, ignore=ignored)
        shutil.copy(ROOT / "pyproject.toml", folder)
        self._write_stubs()
        if errors := self._compile((*KERNELS, *BINDINGS, "stubs.cc")):
            raise SystemExit(errors)
        # Else every test would fail, and every mutation seem noticed.
        code = "from jax_flashattn import _native; _native.require('cpu')"
        if (found := self._python(code)).returncode:
            raise SystemExit(f"the extension of the copy does not load:\n{found.stderr[-2000:]}")

    def _write_stubs(self) -> None:
        names = [isa for isa in (*ISAS, "amx") if isa not in self.built]
        lines = [
            f"namespace {isa} {{ void {f}(const {f.title()}Params&, Executor&) "
            "{ __builtin_trap(); } }"
            for isa in names
            for f in ("forward", "backward", "tangent", "cached")
        ]
        body = "\n".join(["namespace jax_flashattn::cpu {", *lines, "}"])
        (self.folder / "csrc/stubs.cc").write_text(f'#include "cpu/attention.h"\n{body}\n')

    def _compile(self, sources) -> str:
        """Objects of these sources, then the extension; returns the compiler's errors."""
        flags = ["-std=c++17", "-O1", "-fPIC", "-fvisibility=hidden", "-w", "-I", "csrc"]
        # Expensive optimisations are what contracts to fused multiply-adds, as the real build does.
        flags += [
            "-fexpensive-optimizations",
            "-march=native",
            "-ffp-contract=fast",
            "-fno-math-errno",
        ]
        flags += ["-I", sysconfig.get_paths()["include"]]
        flags += ["-I", str(_package("pybind11") / "include")]
        flags += ["-I", str(_package("jaxlib") / "include")]

        def run(*command) -> str:
            done = subprocess.run(
                command, cwd=self.folder, capture_output=True, text=True, check=False
            )
            return done.stderr if done.returncode else ""

        def one(unit) -> str:
            source, isa = unit
            own = (f"-DFLASH_ISA={isa}", *WITHOUT.get(isa, ()))
            return run("c++", *flags, *own, "-c", f"csrc/{source}", "-o", self._object(*unit))

        with concurrent.futures.ThreadPoolExecutor(os.cpu_count()) as pool:
            errors = "".join(pool.map(one, self._units(sources)))
        objects = [self._object(*u) for u in self._units((*KERNELS, *BINDINGS, "stubs.cc"))]
        library = "jax_flashattn/_cpu" + sysconfig.get_config_var("EXT_SUFFIX")
        return errors or run("c++", "-shared", *objects, "-o", library)

    def _units(self, sources) -> list[tuple[str, str]]:
        """Sources with the sets they are compiled for."""
        return [(s, isa) for s in sources for isa in (self.built if s in KERNELS else {self.isa})]

    @staticmethod
    def _object(source: str, isa: str) -> str:
        return f"{source.replace('/', '_')}_{isa}.o"

    def verdict(self, file: str, old: str, new: str, stages) -> Verdict:
        """What the tests say of the project with `old` replaced by `new` in `file`.

        Later stages run if earlier ones pass; the extension is built for the first that needs it.
        """
        path = self.folder / file
        text = path.read_text()
        path.write_text(text.replace(old, new))
        built, verdict = False, Verdict(None)
        try:
            for tests in stages:
                if not built and not all(t.startswith(WITHOUT_KERNELS) for t in tests):
                    built = True  # both: what the last mutation left may be either's
                    below = (*KERNELS, *(x for x in BINDINGS if x.startswith("cpu/")))
                    if errors := self._compile(below):
                        raise SystemExit(f"{file}: {new!r} does not compile:\n{errors[:2000]}")
                verdict = self.run(tests)
                if verdict.test:
                    break
            return verdict
        finally:
            path.write_text(text)

    def _python(self, code: str, *arguments: str) -> subprocess.CompletedProcess:
        """Runs code that sees the copy."""
        flags = {"JAX_PLATFORMS": "cpu", "JAX_FLASHATTN_CPU_ISA": self.isa}
        code = ON_THE_COPY.format(copy=str(self.folder)) + code
        return subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=self.folder, env=os.environ | flags,
            capture_output=True, text=True, check=False, timeout=SECONDS,
        )  # fmt: skip

    def run(self, tests) -> Verdict:
        """The tests, in this order, until one fails."""
        # One process: the order of the tests says which noticed first.
        options = ["-x", "-vv", "-n0", "--tb=line", "-o", f"timeout={SECONDS_PER_TEST}"]
        code = "import pytest; sys.exit(pytest.main(sys.argv[1:]))"
        try:
            done = self._python(code, *options, "-p", "no:warnings", *tests)
        except subprocess.TimeoutExpired as late:
            begun = re.findall(r"^(tests/\S+?::.*?)(?: PASSED.*)?$", str(late.stdout), re.M)
            return Verdict(begun[-1] if begun else "?", "hangs")
        if done.returncode == 0:
            return Verdict(None)
        failed = re.search(r"^(tests/\S+?::.*?) (?:FAILED|ERROR)", done.stdout, re.M)
        if failed:
            return Verdict(failed[1], "fails")
        begun = re.findall(r"^(tests/\S+?::\w+.*)$", done.stdout, re.M)
        if done.returncode == 1 or not begun:
            raise SystemExit(f"pytest did not run:\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}")
        return Verdict(begun[-1], f"dies ({done.returncode})")
