"""README's tables, each made from files of results and put between two markers."""

import json
import statistics

from benchmarks import record

END = "<!-- end -->"


def _row(name: str, rows: list[dict]) -> str:
    cells = [name]
    for mode in ("forward", "forward+backward"):
        for causal in (False, True):
            chosen = [r for r in rows if r["mode"] == mode and r["causal"] == causal]
            ratio = statistics.median(r["vs torch"] for r in chosen)
            speed = statistics.median(r["gflops"]["ours"] for r in chosen)
            cells.append(f"{speed:.0f} ({ratio:.2f}x)")
    return "| " + " | ".join(cells) + " |"


def cpu_tables() -> str:
    """Markdown: a table for a machine without and for one with AMX."""
    return "\n\n".join(_cpu_table(name) for name in ("cpu", "cpu_amx"))


def _cpu_table(name: str) -> str:
    """Medians over sequence lengths, GFLOP/s and the ratio to torch."""
    data = json.loads((record.RESULTS / f"{name}.json").read_text())
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
        f"{where['cores']} cores of an {where['cpu']}"
        f"{' with AMX' if name == 'cpu_amx' else ''}, one process. " + "; ".join(summary) + ". "
        "From `python -m benchmarks cpu`.",
    ]
    return "\n".join(lines)


def gpu_table() -> str:
    """Markdown: TFLOP/s and the ratio to cuDNN by length."""
    data = json.loads((record.RESULTS / "gpu_dense.json").read_text())
    rows, where = data["rows"], data["environment"]
    lengths = (1024, 4096, 16384)
    lines = [
        "| bfloat16 | " + " | ".join(f"S = {s}, full | causal" for s in lengths) + " |",
        "|---" * (2 * len(lengths) + 1) + "|",
    ]
    for mode in ("forward", "backward"):
        for d in (64, 128, 256):
            found = {
                (r["s"], r["causal"]): f"{r['tflops']['ours']:.0f} ({r['vs cudnn']:.2f}x)"
                for r in rows
                if r.get("mode") == mode and r["d"] == d
            }
            cells = [found[s, causal] for s in lengths for causal in (False, True)]
            lines.append(f"| {mode}, d = {d} | " + " | ".join(cells) + " |")
    ratios = {
        mode: [r["vs cudnn"] for r in rows if r.get("mode") == mode]
        for mode in ("forward", "backward")
    }
    summary = "; ".join(
        f"{mode} {statistics.median(x):.2f}x in the median cell ({min(x):.2f} to {max(x):.2f})"
        for mode, x in ratios.items()
    )
    lines += [
        "",
        "TFLOP/s of kernel time (CUPTI; a gradient without its forward) and, in brackets, the "
        f"ratio to cuDNN through jax.nn in the same process; {where['devices'][0]}, 16,384 tokens, "
        f"heads times head dim 2,048. Over S = 512 to 16,384: {summary}. From `python -m "
        "benchmarks gpu`; against tokamax and torch as well: `gpu-peers`; what options cost: "
        "`gpu-features`, [docs/kernels.md](docs/kernels.md), with a plot per head dim.",
    ]
    return "\n".join(lines)


def write() -> None:
    """Replaces what stands between the markers in README.md."""
    readme = record.ROOT / "README.md"
    text = readme.read_text()
    for name, table in (("gpu", gpu_table()), ("cpu", cpu_tables())):
        begin = f"<!-- benchmarks: {name} -->"
        head, rest = text.split(begin)
        tail = rest.split(END, 1)[1]
        text = f"{head}{begin}\n{table}\n{END}{tail}"
    readme.write_text(text)
    print("written", readme)
