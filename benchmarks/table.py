"""README's CPU table, made from results/cpu.json between two markers."""

import json
import statistics

from benchmarks import record

BEGIN, END = "<!-- benchmarks: cpu -->", "<!-- end -->"


def _row(name: str, rows: list[dict]) -> str:
    cells = [name]
    for mode in ("forward", "forward+backward"):
        for causal in (False, True):
            chosen = [r for r in rows if r["mode"] == mode and r["causal"] == causal]
            ratio = statistics.median(r["vs torch"] for r in chosen)
            speed = statistics.median(r["gflops"]["ours"] for r in chosen)
            cells.append(f"{speed:.0f} ({ratio:.2f}x)")
    return "| " + " | ".join(cells) + " |"


def cpu_table() -> str:
    """Markdown: medians over sequence lengths, GFLOP/s and the ratio to torch."""
    data = json.loads((record.RESULTS / "cpu.json").read_text())
    rows, where = data["rows"], data["environment"]
    lines = [
        "| | forward, full | forward, causal | forward+backward, full | forward+backward, causal |",
        "|---|---|---|---|---|",
    ]
    for dtype in ("float32", "bfloat16"):
        for d in (64, 128):
            chosen = [r for r in rows if r["dtype"] == dtype and r["d"] == d]
            lines.append(_row(f"{dtype}, d = {d}", chosen))
    summary = []
    for dtype in ("float32", "bfloat16"):
        torch = [r["vs torch"] for r in rows if r["dtype"] == dtype]
        nn = [r["vs jax.nn"] for r in rows if r["dtype"] == dtype and r["vs jax.nn"]]
        summary.append(
            f"{dtype}: {statistics.median(torch):.2f}x torch in the median cell "
            f"({min(torch):.2f} to {max(torch):.2f}), {statistics.median(nn):.1f}x jax.nn"
        )
    lines += [
        "",
        f"GFLOP/s and, in brackets, the ratio to torch {where['versions']['torch']} "
        "`scaled_dot_product_attention`; medians over S = 512 to 8192, 4 heads, "
        f"{where['cores']} cores of an {where['cpu']}, one process. " + "; ".join(summary) + ". "
        "From `python -m benchmarks cpu`.",
    ]
    return "\n".join(lines)


def write() -> None:
    """Replaces what stands between the markers in README.md."""
    readme = record.ROOT / "README.md"
    head, rest = readme.read_text().split(BEGIN)
    tail = rest.split(END)[1]
    readme.write_text(f"{head}{BEGIN}\n{cpu_table()}\n{END}{tail}")
    print("written", readme)
