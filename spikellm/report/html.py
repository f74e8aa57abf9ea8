"""report.html of a run or a sweep: one file, readable without network and JavaScript, on paper, phone and desktop.

Made from what lies in the folder (results.json, sites.csv, error.json, sweep.json, .hydra/, plots/*.png) and nothing else, so it can be
made again at any time: `python main.py stages=[report] report.folder=FOLDER`.
"""

import base64
import csv
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from spikellm.config.checks import InputError
from spikellm.config.labels import NETWORKS
from spikellm.config.schema import Config
from spikellm.report import plots
from spikellm.report.results import (
    FIGURES,
    RESULTS,
    SITES,
    SPIKES,
    SWEEP,
    extent,
    heading,
    readable,
    recorded_results,
    summary_rows,
    value_at,
    write_summary,
)
from spikellm.store.artifacts import intact_json, write_text
from spikellm.store.record import Results, reference_perplexity

REPORT, PICTURE = "report.html", "summary.png"
SHOWN_MAPS = {"relative_error": "relative squared error", "firing_rate": "firing rate [spikes / (neuron x T)]"}


def rebuild(config: Config) -> Path:
    """Write the report of `results.folder`, or of the newest run or sweep; its path.

    Raises:
        InputError: there is nothing to report on.
    """
    root = Path(config.output_root)
    if config.report.folder is not None:
        folder = Path(config.report.folder).expanduser()
        if not _reportable(folder):
            raise InputError(f"report.folder={folder}: neither a run's folder ({RESULTS}) nor a sweep's ({SWEEP} and folders of jobs)")
    else:
        folders = [path.parent for kind, file in (("runs", RESULTS), ("sweeps", SWEEP)) for path in root.glob(f"{kind}/*/*/{file}")]
        if not folders:
            raise InputError(f"report.folder=null: no run or sweep below output_root={root}; report.folder=FOLDER names one")
        folder = max(folders, key=lambda path: path.parts[-2:])  # DATE/TIME
    return write_report(folder)


def write_report(folder: Path) -> Path:
    """Write report.html into the folder of a run or of a sweep, for a sweep also its summary and summary.png; the path of report.html."""
    context = _run(folder) if (folder / RESULTS).is_file() else _sweep(folder)
    environment = Environment(
        loader=PackageLoader("spikellm.report"), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    write_text(folder / REPORT, environment.get_template("report.html.j2").render(context))
    return folder / REPORT


def _reportable(folder: Path) -> bool:
    return (folder / RESULTS).is_file() or (folder.is_dir() and bool(summary_rows(folder)))


def _run(folder: Path) -> dict[str, Any]:
    results = recorded_results(folder)
    if results is None:
        raise InputError(f"report.folder={folder}: {RESULTS} there is damaged; run the job again")
    name = f"{results.model}, T = {results.T}, grain {results.grain}"
    if results.coding not in (None, "phase"):
        name += f", {results.coding}"
    if results.intervals not in (None, 1):
        name += f", intervals {results.intervals}"
    if results.amplitude is not None:
        name += f", amplitude {results.amplitude}"
    return {
        "title": name,
        "folder": folder.name,
        "command": results.command,
        "table_lines": None,
        "figures": [],
        "jobs": [_job(folder, results, name)],
        "failures": [],
        "versions": results.versions or {},
    }


def _sweep(folder: Path) -> dict[str, Any]:
    rows = write_summary(folder)
    if not rows:
        raise InputError(f"report.folder={folder}: no job has left anything there yet")
    if picture := plots.summary_figure(rows):
        plots.png(picture, folder / PICTURE)
    finished = [row for row in rows if row["error"] is None]
    best = min(plots.measured(finished, "snn"), key=lambda row: row["snn"], default=None)
    jobs, versions = [], []
    for row in finished:
        if (results := recorded_results(folder / row["folder"])) is None:
            continue  # damaged since the summary was made
        options = f", {row['options']}" if row["options"] else ""
        name = f"{row['model']}, T = {row['T']}, grain {row['grain']}{options}"
        jobs.append(_job(folder / row["folder"], results, name, open=row is best))
        versions.append(results.versions or {})
    asked = intact_json(folder / SWEEP) or {}
    models = ", ".join(sorted({row["model"] for row in finished})) or "none finished"
    return {
        "title": f"Sweep of {asked.get('jobs') or len(rows)} jobs: {models}",
        "folder": folder.name,
        "command": asked.get("command"),
        "table_lines": readable([row | {"error": None} for row in rows], rule=False),
        "figures": _sweep_figures(finished),
        "jobs": jobs,
        "failures": [(row["folder"], row["error"]) for row in rows if row["error"]],
        "versions": versions[0] if versions else {},
    }


def _sweep_figures(rows: plots.Rows) -> list[tuple[str, str]]:
    """(caption, SVG) of the figures of each model and set of other options."""
    figures = []
    for index, (model, options) in enumerate(sorted({(row["model"], row["options"] or "") for row in rows})):
        chosen = [row for row in rows if (row["model"], row["options"] or "") == (model, options)]
        caption = f"{model} {options}".strip()
        if plots.measured(chosen, "snn", "ann"):
            figures.append((caption, plots.svg(plots.perplexity_curves(chosen), f"curves{index}")))
            figures.append((caption, plots.svg(plots.ratio_map(chosen), f"ratios{index}")))
        if plots.measured(chosen, "snn", "ann", "sops_per_token"):
            figures.append((caption, plots.svg(plots.operation_curves(chosen), f"operations{index}")))
    return figures


def _job(folder: Path, results: Results, name: str, *, open: bool = True) -> dict[str, Any]:
    """What the page shows of one finished job."""
    sites = _sites(folder)
    maps = [(column, plots.site_map(sites, column, title)) for column, title in SHOWN_MAPS.items()]
    settings = folder / ".hydra" / "config.yaml"
    return {
        "name": name,
        "open": open,
        "command": results.command,
        "networks": _networks(results),
        "measured_on": _measured_on(results),
        "published": _published(results),
        "facts": _facts(results),
        "stages": [(name, f"{done.seconds:.1f}", "(was there)" if done.cached else "") for name, done in results.stages.items()],
        "maps": [(column, plots.svg(figure, f"{folder.name}-{column}")) for column, figure in maps if figure],
        "pictures": [
            (path.stem.replace("_", " "), base64.b64encode(path.read_bytes()).decode()) for path in sorted((folder / "plots").glob("*.png"))
        ],
        "settings": settings.read_text(encoding="utf-8") if settings.is_file() else None,
    }


def _sites(folder: Path) -> list[dict[str, str]]:
    """The rows of sites.csv; where an older version named the sites otherwise, spikes.csv tells which they are."""
    sites, spikes = (
        list(csv.DictReader(path.open(encoding="utf-8"))) if path.is_file() else [] for path in (folder / SITES, folder / SPIKES)
    )
    places = {row["name"]: f"layers.{row['layer']}.{row['kind']}" for row in spikes if row["layer"]}
    return [row | {"name": places.get(row["name"], row["name"])} for row in sites]


def _networks(results: Results) -> list[list[str]]:
    """The table of the networks, heading first; empty where nothing was measured."""
    perplexities = {} if results.perplexity is None else results.perplexity.networks
    scored = {name: key.split(".")[2:] for name, (key, _) in FIGURES.items() if key.startswith("zero_shot")}
    shot = {
        network: {name: getattr(found[task], metric) for name, (task, metric) in scored.items() if task in found}
        for network, found in (results.zero_shot or {}).items()
    }
    tasks = [name for name in scored if any(found.get(name) for found in shot.values())]
    lines = []
    reference = reference_perplexity(perplexities)
    for network, label in NETWORKS.items():
        scores = [shot.get(network, {}).get(name) for name in tasks]
        if network in perplexities or any(score is not None for score in scores):
            value = perplexities.get(network)
            numbers = [f"{value:.3f}" if value else "", f"{value / reference:.4f}" if value and reference else ""]
            lines.append([label.long, *numbers, *("" if score is None else f"{100 * score:.2f}" for score in scores)])
    return [["network", "perplexity", "x ANN", *map(heading, tasks)], *lines] if lines else []


def _measured_on(results: Results) -> str | None:
    said = []
    if perplexity := results.perplexity:
        said.append(f"{extent(perplexity)}, {perplexity.tokens} predicted")
        if "ann_prefix" in perplexity.networks:
            said.append("x ANN: over the perplexity of the pretrained network with the same prefix")
    if results.zero_shot:
        said.append("accuracies in %: acc for WinoGrande, acc_norm for the others")
    return "; ".join(said) or None


def _published(results: Results) -> dict[str, Any] | None:
    if (reference := results.reference) is None:
        return None
    lines = [
        (key, f"{figure:.4g}", "" if (found := value_at(results, key)) is None else f"{found:.4g}")
        for key, figure in reference.figures.items()
    ]
    return {"source": reference.source, "lines": lines}


def _facts(results: Results) -> list[tuple[str, str]]:
    """Short facts of a job, as far as they are known."""
    search, energy = results.search, results.energy
    known = {
        "sites": results.sites,
        "prefix tokens": results.prefix_tokens,
        "rotation": results.rotation and results.rotation.kind,
        "weights": results.weights and f"int{results.weights.bits}, {results.weights.rounding}",
        "relative error of base 2": search and search.relative_mse_base2,
        "relative error of the fitted code": search and search.relative_mse,
        "synaptic operations per token": results.spikes and results.spikes.sops_per_token,
        "energy per token, SNN [pJ]": energy and energy.snn_pj_per_token,
        "energy per token, ANN [pJ]": energy and energy.ann_pj_per_token,
        "energy per token, SNN on integers [pJ]": energy and energy.snn_int_pj_per_token,
        "energy per token, integers with fixed steps [pJ]": energy and energy.int_static_pj_per_token,
        "energy per token, integers with a step a token [pJ]": energy and energy.int_token_pj_per_token,
    }
    return [(name, f"{value:.4g}" if isinstance(value, float) else str(value)) for name, value in known.items() if value is not None]
