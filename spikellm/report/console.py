"""The last lines of a run."""

from pathlib import Path

from spikellm.config.labels import NETWORKS
from spikellm.report.plan import planned_and_measured
from spikellm.report.results import RESULTS, extent, value_at
from spikellm.store.record import AccuracyRecord, DiagnosticsRecord, EnergyRecord, GenerateRecord, PerplexityRecord, Results, SpikesRecord

WIDTH = 1 + max(len(label.short) for label in NETWORKS.values())


def console_table(results: Results, folder: Path) -> str:
    """The last lines of a run."""
    code = f"{results.model}  T={results.T}  grain={results.grain}"
    if results.coding not in (None, "phase"):
        code += f"  {results.coding}"
    if results.intervals not in (None, 1):
        code += f"  intervals={results.intervals}"
    if results.amplitude is not None:
        code += f"  amplitude={results.amplitude}"
    if results.weights is not None:
        code += f"  weights.bits={results.weights.bits}"
    lines = [code]
    if results.rotation is not None and (smaller := results.rotation.overlapping):
        matrices = ", ".join(f"{part} two overlapping of order {order}" for part, order in smaller.items())
        lines.append(f"  rotation, Hadamard matrices where none of the width is known: {matrices}")
    if search := results.search:
        lines.append(
            f"  relative error  base 2 {search.relative_mse_base2:.3g}   fitted {search.relative_mse:.3g}"
            f"   worse than base 2 at {search.worse_than_base2} of {results.sites} sites"
        )
    if tuned := results.tune:
        lines.append(
            f"  tuned, {tuned.what}, epochs={tuned.epochs}   relative error of a block {tuned.relative_error_before:.4g}"
            f" -> {tuned.relative_error:.4g}   better at {tuned.blocks_improved} of {tuned.blocks} blocks"
        )
    if refitted := results.compensate:
        lines.append(
            f"  compensated, {' '.join(refitted.linears)}   relative error of a block {refitted.relative_error_before:.4g}"
            f" -> {refitted.relative_error:.4g}   better at {refitted.blocks_improved} of {refitted.blocks} blocks"
        )
    if perplexity := results.perplexity:
        lines.append(f"  perplexity, {extent(perplexity)}")
        lines += _perplexities(perplexity)
    for text, figures in (results.perplexity_by_text or {}).items():
        lines.append(f"  perplexity, {text}, {extent(figures)}")
        lines += _perplexities(figures)
    if anytime := results.anytime:
        lines.append("  perplexity when the last neuron is read after 1, 2, .. T steps")
        lines.append("    " + "  ".join(f"{value:.4g}" for value in anytime.perplexity))
    if accuracies := results.zero_shot:
        lines += _accuracies(accuracies)
    if results.spikes:
        lines.append(_spike_line(results.spikes))
    if results.energy:
        lines += _energy_lines(results.energy)
    if diagnosed := results.diagnostics:
        lines += _damage(diagnosed)
    if written := results.generate:
        lines.append(_written(written))
    if reference := results.reference:
        lines.append(f"  published in {reference.source}")
        for key, published in reference.figures.items():
            measured = value_at(results, key)
            lines.append(f"    {key:<40}{published:>10.4g}   measured {'nothing' if measured is None else f'{measured:.4g}'}")
    lines += planned_and_measured(results)
    if (folder / "report.html").is_file():
        lines.append(f"  report   {folder / 'report.html'}")
    if results.saved_model is not None:
        lines.append(f"  model    {results.saved_model}")
    lines.append(f"  results  {folder / RESULTS}")
    return "\n".join(lines)


def _spike_line(spikes: SpikesRecord) -> str:
    return (
        f"  spikes, {extent(spikes)}   firing rate {spikes.firing_rate:.3f}   at synapses {spikes.firing_rate_at_synapses:.3f}"
        f"   SOPs per token {spikes.sops_per_token:.4g}   latency {spikes.latency_steps} steps"
    )


def _energy_lines(energy: EnergyRecord) -> list[str]:
    """ANN and SNN in pairs of one weight precision; the integer rivals over the integer ANN."""
    lines = [f"  energy per token [uJ], {energy.table}: MAC {energy.mac_pj:g} pJ, AC {energy.ac_pj:g} pJ ({energy.source})"]
    pairs = (
        ({"ann": energy.ann_pj_per_token, "snn": energy.snn_pj_per_token}, energy.break_even_firing_rate),
        ({"int": energy.int_pj_per_token, "snn_int": energy.snn_int_pj_per_token}, energy.break_even_firing_rate_snn_int),
    )
    for pair, rate in pairs:
        (ann, rival), (snn, value) = pair.items()
        if energy.weights is None or rival is None or value is None or rate is None:
            continue  # older versions knew no integer SNN
        lines += [_energy_line(f"ANN, {energy.weights[ann]} weights", rival, rival)]
        lines += [_energy_line(f"SNN, {energy.weights[snn]} weights", value, rival)]
        lines.append(f"    even at a synaptic firing rate of {rate:.3f}")
    for network, measured in (("int_static", energy.int_static_pj_per_token), ("int_token", energy.int_token_pj_per_token)):
        if energy.weights is not None and measured is not None:
            lines.append(_energy_line(f"{NETWORKS[network].short}, {energy.weights[network]} weights", measured, energy.int_pj_per_token))
    return lines


def _energy_line(title: str, pj: float, reference: float) -> str:
    return f"    {title}{pj / 1e6:>{34 - len(title)}.4g}   x {pj / reference:.4f}"


def _written(written: GenerateRecord) -> str:
    number, tokens = len(written.texts), sum(text.tokens for text in written.texts)
    line = f"  generated, {number} text{'s' * (number != 1)}, {tokens} tokens   first {written.seconds_prompt:.3g} s"
    if written.seconds_per_token is not None:
        line += f", then {written.seconds_per_token:.3g} s a token"
    if written.sops_per_token is not None and written.firing_rate is not None:
        line += f"   firing rate {written.firing_rate:.3f}   SOPs per token {written.sops_per_token:.4g}"
    return line


def _damage(diagnosed: DiagnosticsRecord) -> list[str]:
    """How far the codes are above the bound, and what spiking alone does the most damage."""
    lines = []
    if (above := diagnosed.median_above_bound) is not None:
        lines.append(f"  squared error over the Lloyd-Max bound of as many levels, median of the sites that have one: {above:.3g}")
    if by_kind := diagnosed.perplexity_by_kind:
        lines.append(f"  perplexity / that without neurons ({by_kind['none']:.3f}), where one kind of site or one site spikes alone")
        kinds = sorted((name for name in by_kind if name != "none"), key=lambda name: -by_kind[name])
        worst = [(name, by_kind[name]) for name in kinds] + list((diagnosed.perplexity_by_site or {}).items())
        lines += [f"    {value / by_kind['none']:.5f}  {name}" for name, value in worst]
    return lines


def _perplexities(figures: PerplexityRecord) -> list[str]:
    """Each network's, and its ratio to the ANN with the same prefix."""
    known = [(label.short, figures.networks[network]) for network, label in NETWORKS.items() if network in figures.networks]
    reference = figures.reference
    return [f"    {name:<{WIDTH}}{value:>12.3f}" + (f"   x {value / reference:.4f}" if reference else "") for name, value in known]


def _accuracies(accuracies: dict[str, dict[str, AccuracyRecord]]) -> list[str]:
    """A block for each of lm-eval's metrics: acc, and acc_norm of the tasks that have it."""
    lines = []
    for title, metric in (("accuracy [%]", "acc"), ("acc_norm [%]", "acc_norm")):
        tasks = [task for task, found in next(iter(accuracies.values())).items() if getattr(found, metric) is not None]
        if not tasks:
            continue
        lines.append(f"  {title}  " + "".join(f"{task:>16}" for task in tasks) + f"{'mean':>9}")
        for network, label in NETWORKS.items():
            if found := accuracies.get(network):
                scores = [getattr(found[task], metric) for task in tasks]
                errors = [getattr(found[task], f"{metric}_stderr") or 0 for task in tasks]
                cells = [f"{100 * score:.2f} +- {100 * error:.2f}" for score, error in zip(scores, errors, strict=True)]
                mean = 100 * sum(scores) / len(tasks)
                lines.append(f"    {label.short:<{WIDTH}}" + "".join(f"{cell:>16}" for cell in cells) + f"{mean:>9.2f}")
    return lines
