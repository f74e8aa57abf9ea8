"""Perplexity at few time steps: intervals of the activation range beside the integer networks of as many bits.

    python experiments/few_steps/study.py [OVERRIDE ..]

Overrides are those of main.py. All rows share one calibration; what is in output_root already is not computed again, so a study that
was stopped goes on. Prints the table of README.md.
"""

import logging
import math
import sys
from typing import NamedTuple

from spikellm.run.command import compose_config
from spikellm.run.stages import run_stages

NETWORKS = "evaluation.networks=[ann_prefix,snn,int_static,int_token]"
HEADINGS = ("T", "code", "intervals", "grain", "spike weight", "integer equal [bits]", "SNN", "int_static", "int_token", "SOPs / token [M]")


class Row(NamedTuple):
    """A job: what is told to main.py."""

    T: int
    coding: str
    intervals: str
    grain: str
    least: int  # snn.min_grain_length
    weight: float | None  # search.spike_weight; None: the default

    @property
    def overrides(self) -> list[str]:
        code = [f"snn.T={self.T}", f"snn.coding={self.coding}", f"snn.intervals={self.intervals}", f"grain={self.grain}"]
        weight = [] if self.weight is None else [f"search.spike_weight={self.weight}"]
        return [*code, f"snn.min_grain_length={self.least}", *weight, NETWORKS]

    @property
    def bits(self) -> str:
        """Of the integer code with as many levels as K intervals of T binary digits and a sign."""
        return "" if self.intervals == "auto" else f"{self.T + 1 + math.log2(int(self.intervals)):.1f}"


ROWS = [
    *(Row(T, "phase_signed", "3", "2", 1, 0.0) for T in (6, 5, 4)),
    Row(3, "phase_signed", "3", "3", 1, 0.0),
    Row(2, "phase_signed", "3", "2", 1, 0.0),
    Row(4, "phase_signed", "2", "2", 2, 0.0),
    Row(4, "phase", "3", "2", 1, 0.0),
    *(Row(T, "phase_signed", "auto", "2", 2, None) for T in (8, 6, 5, 4)),
]


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    lines = []
    for number, row in enumerate(ROWS, 1):
        logging.info("%d of %d: %s", number, len(ROWS), " ".join(row.overrides))
        results = run_stages(compose_config([*sys.argv[1:], *row.overrides])).results
        assert results.perplexity is not None
        assert results.spikes is not None
        found = results.perplexity.networks
        ratios = [f"{found[name] / found['ann_prefix']:.4f}" for name in ("snn", "int_static", "int_token")]
        weight = "default" if row.weight is None else f"{row.weight:g}"
        cells = [row.T, row.coding, row.intervals, row.grain, weight, row.bits, *ratios, f"{results.spikes.sops_per_token / 1e6:.1f}"]
        lines.append("| " + " | ".join(map(str, cells)) + " |")
    print("\n| " + " | ".join(HEADINGS) + " |\n|" + " --- |" * len(HEADINGS))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
