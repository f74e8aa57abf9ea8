"""What block-wise tuning gains: perplexity, the error at the blocks' outputs, seconds.

    python experiments/tuning/study.py [OVERRIDE ..]

Overrides are those of main.py. All rows share one calibration, the rows of one T one search; what is in output_root already is not
computed again, and a tuning that was stopped goes on behind its last finished block. Prints the table of README.md.
"""

import logging
import sys

from spikellm.run.command import compose_config
from spikellm.run.stages import run_stages

STEPS = (4, 3, 8)
TUNINGS: tuple[tuple[str, list[str]], ...] = (("none", []), ("neurons", ["tune.epochs=1"]), ("all", ["tune.epochs=1", "tune.what=all"]))
HEADINGS = ("T", "tuned", "perplexity / ANN", "excess falls by", "error at blocks' outputs", "blocks improved", "tuning and conversion [s]")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    print("\n| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
    for T in STEPS:
        untuned = None
        for name, options in TUNINGS:
            overrides = [f"snn.T={T}", *options, "evaluation.networks=[ann_prefix,snn]"]
            results = run_stages(compose_config([*sys.argv[1:], *overrides])).results
            assert results.perplexity is not None
            found = results.perplexity.networks
            ratio = found["snn"] / found["ann_prefix"]
            untuned = ratio if untuned is None else untuned
            cells = [str(T), name, f"{ratio:.4f}", f"{1 - (ratio - 1) / (untuned - 1):.0%}"]
            if (tuned := results.tune) is not None:
                cells += [f"x {tuned.relative_error / tuned.relative_error_before:.3f}", f"{tuned.blocks_improved} of {tuned.blocks}"]
                cells.append(f"{results.stages['convert'].seconds:.0f}")
            else:
                cells += [""] * 3
            print("| " + " | ".join(cells) + " |", flush=True)


if __name__ == "__main__":
    main()
