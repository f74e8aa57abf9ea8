"""Every T by every grain on SmolLM2-135M: runs the sweep, then draws the figures and prints the tables of README.md.

A sweep that was stopped goes on; with `--sweep FOLDER` the figures of one that was run already are drawn and nothing is run.
"""

import argparse
import subprocess
import sys
from pathlib import Path

from spikellm.report import plots
from spikellm.report.results import write_summary
from spikellm.store.record import reference_perplexity

ROOT = Path(__file__).resolve().parents[2]
OUTPUT = ROOT / "outputs" / "studies" / "t_by_grain"
FIGURES = {"perplexity": plots.perplexity_curves, "ratio": plots.ratio_map, "operations": plots.operation_curves}
NEEDED = {"perplexity": ("snn", "ann"), "ratio": ("ratio",), "operations": ("snn", "ann", "sops_per_token")}


def run(options: list[str]) -> Path:
    """The sweep's folder. Two of its jobs are infeasible (T=4 and 5 in three grains), so its exit code does not tell success."""
    command = [sys.executable, str(ROOT / "main.py"), "-m", "experiment=t_by_grain", f"hydra.sweep.dir={OUTPUT}", *options]
    code = subprocess.run(command, check=False).returncode
    if code not in (0, 2):
        sys.exit(code)
    return OUTPUT


def table(rows: plots.Rows, column: str, digits: int) -> str:
    """A column of the summary as a table T x grain."""
    grains = plots.by_grain(rows)
    lines = ["| T | " + " | ".join(f"grain {grain}" for grain in grains) + " |", "|" + " --- |" * (1 + len(grains))]
    for T in sorted({row["T"] for row in rows}):
        values = {row["grain"]: row[column] for row in rows if row["T"] == T}
        lines.append(f"| {T} | " + " | ".join(f"{values[grain]:.{digits}f}" if values.get(grain) else "" for grain in grains) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sweep", type=Path, help="folder of a sweep that was run already")
    parser.add_argument("options", nargs="*", help="options of main.py, as dataset=wikitext2")
    arguments = parser.parse_args()
    if arguments.sweep is not None and not arguments.sweep.is_dir():
        parser.error(f"--sweep {arguments.sweep}: no such folder")
    folder = arguments.sweep or run(arguments.options)
    rows = plots.measured(write_summary(folder), "snn", "ann")
    if not rows:
        sys.exit(f"{folder}: no job has measured a perplexity")
    base2 = {row["T"]: row["base2"] for row in rows}
    print(
        f"ANN {rows[0]['ann']:.3f}, with the same prefix {reference_perplexity(rows[0]):.3f}; base 2 "
        + ", ".join(f"{base2[T]:.3f} (T={T})" for T in sorted(base2))
    )
    print("\nperplexity\n\n" + table(rows, "snn", 3) + "\n\nperplexity, SNN / ANN\n\n" + table(rows, "ratio", 4))
    for name, draw in FIGURES.items():
        if plots.measured(rows, *NEEDED[name]):
            plots.png(draw(rows), folder / f"{name}.png")
            print(f"\nfigure  {folder / f'{name}.png'}", end="")
    print()


if __name__ == "__main__":
    main()
