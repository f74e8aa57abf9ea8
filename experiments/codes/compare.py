"""Our phase code against the codes of traditional conversion: perplexity, spikes, synaptic operations and energy in one table.

    python experiments/codes/compare.py [OVERRIDE ..]

Overrides are those of main.py (snn.T=6, dataset=text dataset.calibration.path=.. , output_root=..). All codes share one calibration, and
what has been computed before is taken from output_root. Prints the table of README.md.
"""

import logging
import sys

from spikellm.run.command import compose_config
from spikellm.run.stages import run_stages
from spikellm.store.record import Results

CODES = {
    "phase, grain=2": ["snn.coding=phase", "grain=2"],
    "phase, signed digits": ["snn.coding=phase_signed", "grain=2"],
    "rate": ["snn.coding=rate", "grain=1"],
    "TTFS": ["snn.coding=ttfs", "grain=1"],
    "few spikes, k=2": ["snn.coding=few_spike", "snn.max_spikes=2", "grain=1"],
}
HEADINGS = (
    "code", "perplexity", "x ANN", "relative squared error", "firing rate", "at synapses", "spikes / token", "SOPs / token",
    "energy [uJ / token]", "x ANN's energy",
)  # fmt: skip


def row(name: str, results: Results) -> str:
    """One line of the table."""
    perplexity, spikes, energy, search = results.perplexity, results.spikes, results.energy, results.search
    assert perplexity is not None
    assert spikes is not None
    assert energy is not None
    assert search is not None
    cells = [
        name,
        f"{perplexity.networks['snn']:.4g}",
        f"{perplexity.networks['snn'] / perplexity.networks['ann_prefix']:.4g}",
        f"{search.relative_mse:.2g}",
        f"{spikes.firing_rate:.3f}",
        f"{spikes.firing_rate_at_synapses:.3f}",
        f"{spikes.spikes_per_token:.3g}",
        f"{spikes.sops_per_token:.3g}",
        f"{energy.snn_pj_per_token / 1e6:.4g}",
        f"{energy.snn_pj_per_token / energy.ann_pj_per_token:.3f}",
    ]
    return "| " + " | ".join(cells) + " |"


def main() -> None:
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    found = {name: run_stages(compose_config(["snn.intervals=1", *sys.argv[1:], *code])).results for name, code in CODES.items()}
    some = next(iter(found.values()))
    perplexity, spikes, energy = some.perplexity, some.spikes, some.energy
    assert perplexity is not None
    assert spikes is not None
    assert energy is not None
    print(
        f"\n{some.model}, T = {some.T}, perplexity on {perplexity.windows} windows of {perplexity.window} tokens, spikes on "
        f"{spikes.windows}; ANN perplexity {perplexity.networks['ann']:.4g}, "
        f"with the same prefix {perplexity.networks['ann_prefix']:.4g}, energy {energy.ann_pj_per_token / 1e6:.4g} uJ a token "
        f"({energy.table}: {energy.mac_pj:g} / {energy.ac_pj:g} pJ, {energy.source}), {energy.int_bits}-bit ANN "
        f"{energy.int_pj_per_token / 1e6:.4g} uJ\n"
    )
    print("| " + " | ".join(HEADINGS) + " |\n|" + "---|" * len(HEADINGS))
    print("\n".join(row(name, results) for name, results in found.items()))


if __name__ == "__main__":
    main()
