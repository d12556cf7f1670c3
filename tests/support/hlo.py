"""What a compiled program does: our custom calls, collectives, and buffers of size S x S."""

import re

FORWARD = "jax_flashattn_forward"
BACKWARD = "jax_flashattn_backward"
TANGENT = "jax_flashattn_tangent"


def compiled_text(function, *args) -> str:
    """HLO of a jitted function for these arguments, after optimisation."""
    return function.lower(*args).compile().as_text()


def run_with_text(function, *args) -> tuple:
    """Results of a jitted function and its HLO, compiled once."""
    compiled = function.lower(*args).compile()
    return compiled(*args), compiled.as_text()


def count_calls(text: str, target: str) -> int:
    """How many custom calls of this target the program has."""
    return text.count(f'custom_call_target="{target}"')


def assert_kernels(
    text: str,
    forward: int | None = None,
    backward: int | None = None,
    tangent: int | None = None,
) -> None:
    """The program runs our kernels: this often, or at least once."""
    for target, wanted in ((FORWARD, forward), (BACKWARD, backward), (TANGENT, tangent)):
        have = count_calls(text, target)
        if wanted is None:
            continue
        assert have == wanted, f"{target} is called {have} times, expected {wanted}"


def assert_no_square(text: str, sq: int, sk: int) -> None:
    """No instruction has a [.., sq, sk, ..] or [.., sk, sq, ..] result."""
    found = re.search(rf"\w+\[(?:\d+,)*(?:{sq},{sk}|{sk},{sq})(?:,\d+)*\]", text)
    assert found is None, f"the program holds {found.group()}"


def collectives(text: str) -> list[tuple[str, str]]:
    """(element type with shape, operation) of every result of every collective."""
    names = "all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter"
    found = re.findall(rf"= (.+?) ((?:{names})(?:-start)?)\(", text)
    return [(x, kind) for types, kind in found for x in re.findall(r"\w+\[[\d,]*\]", types)]
