"""Codes fitted on the spiking stream beside codes fitted on the ANN's: perplexity, operations, seconds of the search.

    python experiments/sequential/study.py [OVERRIDE ..]

Overrides are those of main.py. All rows share one calibration; what is in output_root already is not computed again, so a study that
was stopped goes on. Prints the table of README.md.
"""

import logging
import sys

from spikellm.run.command import compose_config
from spikellm.run.stages import run_stages

ONE_INTERVAL = "snn.intervals=1"
CODES = (  # of the plain network between 1.0 and 1.4 of its ANN
    ("T=8 signed", ["snn.T=8", "snn.coding=phase_signed", "grain=2"]),
    ("T=5 binary", ["snn.T=5", "snn.coding=phase", "grain=1"]),
    ("T=4 signed", ["snn.T=4", "snn.coding=phase_signed", "grain=1"]),
    ("T=3 signed", ["snn.T=3", "snn.coding=phase_signed", "grain=1"]),
    ("T=3 signed, 3 intervals", ["snn.T=3", "snn.coding=phase_signed", "grain=1", "snn.intervals=3"]),
)
HEADINGS = ("code", "search.sequential", "perplexity / ANN", "SOPs / token [M]", "search [s]")


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    lines = []
    for name, code in CODES:
        for sequential in ("false", "true"):
            logging.info("%s, search.sequential=%s", name, sequential)
            overrides = [
                ONE_INTERVAL,
                *code,
                "search.spike_weight=0",
                f"search.sequential={sequential}",
                "evaluation.networks=[ann_prefix,snn]",
            ]
            results = run_stages(compose_config([*sys.argv[1:], *overrides])).results
            assert results.perplexity is not None
            assert results.spikes is not None
            assert results.search is not None
            found = results.perplexity.networks
            ratio = f"{found['snn'] / found['ann_prefix']:.4f}"
            cells = [name, sequential, ratio, f"{results.spikes.sops_per_token / 1e6:.1f}", f"{results.search.seconds or 0:.0f}"]
            lines.append("| " + " | ".join(cells) + " |")
    print("\n| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
