"""A run's spikes: heat maps of layers x sites and of sites over time steps, from spikes.csv; a raster, from raster.csv. No torch."""

from pathlib import Path

from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from spikellm.config.labels import SiteKind
from spikellm.store.record import Row

FOLDER = "plots"
SIGNS = {1: "#1f4e79", -1: "#d58a5a"}  # of a spike -> colour


def draw_spikes(folder: Path, rows: list[Row]) -> None:
    """Write plots/firing_rate_by_layer.png and plots/firing_rate_by_step.png below `folder`."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    for name, figure in (("firing_rate_by_layer", _by_layer(rows)), ("firing_rate_by_step", _by_step(rows))):
        figure.savefig(folder / FOLDER / f"{name}.png", dpi=140)


def draw_raster(folder: Path, rows: list[Row]) -> None:
    """Write plots/raster.png below `folder`: each spike at its token and time step, a row of dots a neuron, signs told apart."""
    (folder / FOLDER).mkdir(parents=True, exist_ok=True)
    steps, tokens = 1 + max(row["step"] for row in rows), 1 + max(row["token"] for row in rows)
    kinds = [kind.name for kind in SiteKind if any(row["kind"] == kind.name for row in rows)]
    figure = Figure(figsize=(min(3 + 0.12 * tokens * steps, 16), 0.9 + 1.1 * len(kinds)), layout="constrained")
    for axes, kind in zip(figure.subplots(len(kinds), 1, sharex=True, squeeze=False).flatten(), kinds, strict=True):
        own = [row for row in rows if row["kind"] == kind]
        place = {neuron: index for index, neuron in enumerate(sorted({row["neuron"] for row in own}))}
        for sign, colour in SIGNS.items():
            chosen = [row for row in own if row["spike"] == sign]
            x, y = [row["token"] + row["step"] / steps for row in chosen], [place[row["neuron"]] for row in chosen]
            axes.scatter(x, y, s=4, marker="|", linewidths=0.8, color=colour)
        for token in range(tokens + 1):
            axes.axvline(token - 0.5 / steps, color="#b8c4d0", linewidth=0.3)
        axes.set_ylabel(SiteKind[kind].value, fontsize=7, rotation=0, ha="right", va="center")
        axes.set_yticks([])
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_xlabel(f"new token, {steps} time steps each")
    layer = rows[0]["name"].rpartition(".")[0]
    figure.suptitle(f"{layer}: spikes of some neurons of each site, +1 blue, -1 orange", fontsize=9)
    figure.savefig(folder / FOLDER / "raster.png", dpi=140)


def _by_layer(rows: list[Row]) -> Figure:
    """Firing rate and SOPs, layers x sites; the one site after the last layer is in the title."""
    kinds = [kind.name for kind in SiteKind if any(row["kind"] == kind.name and row["layer"] is not None for row in rows)]
    layers = 1 + max(row["layer"] for row in rows if row["layer"] is not None)
    at = {(row["kind"], row["layer"]): row for row in rows}
    last = at.get((SiteKind.head_input.name, None))
    figure = Figure(figsize=(9.6, 1.8 + 0.16 * layers), layout="constrained")
    for axes, (column, title, colours) in zip(
        figure.subplots(1, 2, sharey=True),
        (("firing_rate", "firing rate [spikes / (neuron x T)]", "viridis"), ("sops_per_token", "SOPs per token", "magma")),
        strict=True,
    ):
        values = [[at[kind, layer][column] for kind in kinds] for layer in range(layers)]
        image = axes.imshow(values, aspect="auto", cmap=colours, vmin=0, origin="lower")
        axes.set_xticks(range(len(kinds)), [SiteKind[kind].value for kind in kinds], rotation=45, ha="right")
        axes.set_title(title + (f"; final norm {last[column]:.3g}" if last else ""), fontsize=9)
        axes.yaxis.set_major_locator(MaxNLocator(integer=True))
        figure.colorbar(image, ax=axes)
    figure.axes[0].set_ylabel("layer")
    return figure


def _by_step(rows: list[Row]) -> Figure:
    """Firing rate, kinds of site x time steps: spikes of all layers over their neurons."""
    kinds = [kind.name for kind in SiteKind if any(row["kind"] == kind.name for row in rows)]
    steps = len(rows[0]["firing_rate_by_step"])
    values = []
    for kind in kinds:
        sites = [row for row in rows if row["kind"] == kind]
        neurons = sum(row["neurons_per_token"] for row in sites)
        values.append([sum(row["firing_rate_by_step"][t] * row["neurons_per_token"] for row in sites) / neurons for t in range(steps)])
    figure = Figure(figsize=(2.6 + 0.55 * steps, 4.2), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=1)
    axes.set_yticks(range(len(kinds)), [SiteKind[kind].value for kind in kinds])
    axes.set_xticks(range(steps), [str(step) for step in range(1, steps + 1)])
    for row, line in enumerate(values):
        for step, value in enumerate(line):
            axes.text(step, row, f"{value:.2f}", ha="center", va="center", fontsize=7, color="white" if value < 0.6 else "black")
    axes.set_xlabel("time step")
    axes.set_title("firing rate [spikes / neuron]", fontsize=9)
    figure.colorbar(image, ax=axes)
    return figure
