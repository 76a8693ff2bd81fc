"""Draw the figures of scripts/bench_sync.py: milliseconds by shape, one panel for each format, logarithmic.

python scripts/plot_sync.py sync.json sync.png --quant fp8 fp8-channel
"""

import argparse
import json
from pathlib import Path

WAYS = {
    "ours": "SyncPlan.sync",
    "loop": "one parameter at a time",
    "torch": "the sync in plain torch",
    "vllm": "vLLM's reload",
}
COLORS = {"ours": "#1b7837", "loop": "#e08214", "torch": "#999999", "vllm": "#2166ac"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("figures", nargs="+", help="JSON of bench_sync.py, and at the end the .png to write")
    parser.add_argument("--quant", nargs="+", help="formats to draw (default: all)")
    args = parser.parse_args()
    *inputs, out = args.figures
    reports = [json.loads(Path(path).read_text()) for path in inputs]
    results = [r for report in reports for r in report["results"]]
    quants = args.quant or list(dict.fromkeys(r["quant"] for r in results))
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(quants), figsize=(4.6 * len(quants) + 1, 4), sharey=True, squeeze=False)
    for axis, quant in zip(axes[0], quants, strict=True):
        rows = [r for r in results if r["quant"] == quant]
        for i, (way, label) in enumerate(WAYS.items()):
            drawn = [(x, r[way]["median"]) for x, r in enumerate(rows) if way in r]
            axis.bar(
                [x + (i - 1.5) * 0.2 for x, _ in drawn], [y for _, y in drawn], 0.2, label=label, color=COLORS[way]
            )
        for x, r in enumerate(rows):
            axis.hlines(r["floor_ms"], x - 0.42, x + 0.42, color="black", linewidth=1.2,
                        label="the same traffic at copy speed" if x == 0 else None)  # fmt: skip
        axis.set_xticks(range(len(rows)), [r["shape"] for r in rows], rotation=20)
        axis.set_yscale("log")
        axis.set_title(quant)
        axis.grid(axis="y", alpha=0.3)
    axes[0][0].set_ylabel("milliseconds")
    figure.suptitle(f"Weight sync, bf16 policy to the engine, {reports[0]['device']}", fontsize=10)
    figure.legend(*axes[0][0].get_legend_handles_labels(), fontsize=8, ncols=5, loc="lower center")
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(out, dpi=130)
    print(out)


if __name__ == "__main__":
    main()
