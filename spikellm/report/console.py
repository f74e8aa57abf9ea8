"""The last lines of a run."""

from pathlib import Path
from typing import Any

from spikellm.report.results import RESULTS, extent, reference_perplexity, value_at

NETWORK_NAMES = (
    ("ANN", "ann"),
    ("ANN, prefix", "ann_prefix"),
    ("base-2 SNN", "base2"),
    ("SNN", "snn"),
    ("INT, static", "int_static"),
    ("INT, token", "int_token"),
)


def console_table(results: dict[str, Any], folder: Path) -> str:
    """The last lines of a run."""
    lines = [f"{results['model']}  T={results['T']}  grain={results['grain']}"]
    if search := results.get("search"):
        lines.append(
            f"  relative error  base 2 {search['relative_mse_base2']:.3g}   fitted {search['relative_mse']:.3g}"
            f"   worse than base 2 at {search['worse_than_base2']} of {results['sites']} sites"
        )
    if perplexity := results.get("perplexity"):
        lines.append(f"  perplexity, {extent(perplexity)}")
        lines += _perplexities(perplexity)
    for text, figures in results.get("perplexity_by_text", {}).items():
        lines.append(f"  perplexity, {text}, {extent(figures)}")
        lines += _perplexities(figures)
    if anytime := results.get("anytime"):
        lines.append("  perplexity when the last neuron is read after 1, 2, .. T steps")
        lines.append("    " + "  ".join(f"{value:.4g}" for value in anytime["perplexity"]))
    if accuracies := results.get("zero_shot"):
        lines += _accuracies(accuracies)
    if spikes := results.get("spikes"):
        lines += _spike_lines(spikes, results["energy"])
    if diagnosed := results.get("diagnostics"):
        lines += _damage(diagnosed)
    if reference := results.get("reference"):
        lines.append(f"  published in {reference['source']}")
        for key, published in reference["figures"].items():
            measured = value_at(results, key)
            lines.append(f"    {key:<40}{published:>10.4g}   measured {'nothing' if measured is None else f'{measured:.4g}'}")
    if (folder / "report.html").is_file():
        lines.append(f"  report   {folder / 'report.html'}")
    lines.append(f"  results  {folder / RESULTS}")
    return "\n".join(lines)


def _spike_lines(spikes: dict[str, Any], energy: dict[str, Any]) -> list[str]:
    lines = [
        f"  spikes, {extent(spikes)}   firing rate {spikes['firing_rate']:.3f}   at synapses {spikes['firing_rate_at_synapses']:.3f}"
        f"   SOPs per token {spikes['sops_per_token']:.4g}   latency {spikes['latency_steps']} steps",
        f"  energy per token [uJ], {energy['table']}: MAC {energy['mac_pj']:g} pJ, AC {energy['ac_pj']:g} pJ ({energy['source']})",
    ]
    pairs = (("ann", "snn", "break_even_firing_rate"), ("int", "snn_int", "break_even_firing_rate_snn_int"))
    for ann, snn, rate in pairs:
        values = [energy[f"{key}_pj_per_token"] for key in (ann, snn)]
        for name, key, value in zip(("ANN", "SNN"), (ann, snn), values, strict=True):
            title = f"{name}, {energy['weights'][key]} weights"
            lines.append(f"    {title:<24}{value / 1e6:>10.4g}   x {value / values[0]:.4f}")
        lines.append(f"    even at a synaptic firing rate of {energy[rate]:.3f}")
    for name, key in NETWORK_NAMES:  # of integers: beside the integer pair
        if key.startswith("int") and (value := energy.get(f"{key}_pj_per_token")) is not None:
            title = f"{name}, {energy['weights'][key]} weights"
            lines.append(f"    {title:<24}{value / 1e6:>10.4g}   x {value / energy['int_pj_per_token']:.4f}")
    return lines


def _damage(diagnosed: dict[str, Any]) -> list[str]:
    """How far the codes are above the bound, and what spiking alone does the most damage."""
    lines = []
    if (above := diagnosed["median_above_bound"]) is not None:
        lines.append(f"  squared error over the Lloyd-Max bound of as many levels, median of the sites that have one: {above:.3g}")
    if by_kind := diagnosed.get("perplexity_by_kind"):
        lines.append(f"  perplexity / that without neurons ({by_kind['none']:.3f}), where one kind of site or one site spikes alone")
        kinds = sorted((name for name in by_kind if name != "none"), key=lambda name: -by_kind[name])
        worst = [(name, by_kind[name]) for name in kinds] + list(diagnosed["perplexity_by_site"].items())
        lines += [f"    {value / by_kind['none']:.5f}  {name}" for name, value in worst]
    return lines


def _perplexities(figures: dict[str, Any]) -> list[str]:
    """Each network's, and its ratio to the ANN with the same prefix."""
    reference = reference_perplexity(figures)
    known = [(name, figures[key]) for name, key in NETWORK_NAMES if key in figures]
    return [f"    {name:<12}{value:>12.3f}" + (f"   x {value / reference:.4f}" if reference else "") for name, value in known]


def _accuracies(accuracies: dict[str, Any]) -> list[str]:
    """A block for each of lm-eval's metrics: acc, and acc_norm of the tasks that have it."""
    lines = []
    for title, metric in (("accuracy [%]", "acc"), ("acc_norm [%]", "acc_norm")):
        tasks = [task for task, found in next(iter(accuracies.values())).items() if metric in found]
        if not tasks:
            continue
        lines.append(f"  {title}  " + "".join(f"{task:>16}" for task in tasks) + f"{'mean':>9}")
        for name, key in NETWORK_NAMES:
            if found := accuracies.get(key):
                cells = [f"{100 * found[task][metric]:.2f} +- {100 * found[task].get(f'{metric}_stderr', 0):.2f}" for task in tasks]
                mean = 100 * sum(found[task][metric] for task in tasks) / len(tasks)
                lines.append(f"    {name:<12}" + "".join(f"{cell:>16}" for cell in cells) + f"{mean:>9.2f}")
    return lines
