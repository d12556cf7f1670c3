"""Plots of results/gpu_dense.json, one per head dim: docs/images/h200_d<head dim>.png."""

import json

import matplotlib
from matplotlib import pyplot

from benchmarks import record

COLORS = {"ours": "tab:blue", "cudnn": "tab:gray"}


def gpu() -> None:
    """TFLOP/s over lengths, both passes, ours and cuDNN's."""
    matplotlib.use("Agg")
    data = json.loads((record.RESULTS / "gpu_dense.json").read_text())
    rows = [row for row in data["rows"] if "tflops" in row and "s" in row]
    matmul = next(r["tflops"] for r in data["rows"] if r.get("case") == "matmul 8192^3")
    for d in sorted({row["d"] for row in rows}):
        lengths = sorted({row["s"] for row in rows if row["d"] == d})
        figure, panels = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True)
        for panel, mode in zip(panels, ("forward", "backward")):
            for name, color in COLORS.items():
                for causal, style in ((False, "-o"), (True, "--s")):
                    found = [
                        (row["s"], row["tflops"][name])
                        for row in rows
                        if (row["d"], row["mode"], row["causal"]) == (d, mode, causal)
                    ]
                    label = f"{name}, {'causal' if causal else 'full'}"
                    panel.plot(*zip(*sorted(found)), style, color=color, label=label)
            panel.axhline(matmul, color="tab:red", linewidth=0.8, label="8192³ matrix product")
            panel.set_xscale("log", base=2)
            panel.set_xticks(lengths, [str(s) for s in lengths])
            panel.set_title(f"{mode}, head dim {d}")
            panel.set_xlabel("sequence length")
            panel.grid(alpha=0.3)
        panels[0].set_ylabel("TFLOP/s, bfloat16")
        panels[0].set_ylim(0)
        panels[1].legend(fontsize=8, loc="lower right")
        figure.tight_layout()
        path = record.ROOT / "docs" / "images" / f"h200_d{d}.png"
        figure.savefig(path, dpi=80)
        pyplot.close(figure)
        print("written", path)
