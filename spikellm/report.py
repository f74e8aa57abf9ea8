"""What a person reads: results.json, sites.csv and spikes.csv of a run, its table on the console, the summary of a sweep.

Imported by Hydra before every run (the sweep callback), so no torch here.
"""

import csv
import json
import logging
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from spikellm.artifacts import write_json, write_text

log = logging.getLogger(__name__)

RESULTS, SPIKES, FAILURE = "results.json", "spikes.csv", "error.json"
SUMMARY_COLUMNS = ("model", "T", "grain", "ann", "base2", "snn", "ratio", "relative_mse", "folder", "error")
NETWORK_NAMES = (("ANN", "ann"), ("base-2 SNN", "base2"), ("SNN", "snn"))


def job_place() -> tuple[Path, str | None]:
    """The folder of the running job, and the name of its sweep; None for a single run."""
    running = HydraConfig.get()
    return Path(running.runtime.output_dir), Path(running.sweep.dir).name if running.mode is RunMode.MULTIRUN else None


def write_results(folder: Path, results: dict[str, Any], tables: dict[str, list[dict[str, Any]]]) -> Path:
    """Write results.json, the tables by their file name (sites.csv, spikes.csv), and the plots of spikes; the path of results.json."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_text(folder / name, _csv_text(rows, tuple(rows[0])))
    write_json(folder / RESULTS, results)
    if SPIKES in tables:
        from spikellm.spike_plots import draw_spikes  # a second to import: not before every run

        draw_spikes(folder, tables[SPIKES])
    return folder / RESULTS


def write_failure(folder: Path, reason: str) -> None:
    """Leave the reason beside a job that failed, for the sweep's summary; nothing where the folder cannot be written."""
    with suppress(OSError):
        write_json(folder / FAILURE, {"error": reason})


def objective(results: dict[str, Any], key: str) -> float | None:
    """The number under a dotted key of results.json; None where there is none."""
    value: Any = results
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def console_table(results: dict[str, Any], path: Path) -> str:
    """The last lines of a run."""
    lines = [f"{results['model']}  T={results['T']}  grain={results['grain']}"]
    if search := results.get("search"):
        lines.append(
            f"  relative error  base 2 {search['relative_mse_base2']:.3g}   fitted {search['relative_mse']:.3g}"
            f"   worse than base 2 at {search['worse_than_base2']} of {results.get('sites', '?')} sites"
        )
    if perplexity := results.get("perplexity"):
        lines.append(f"  perplexity, {perplexity['windows']} windows of {perplexity['window']} tokens")
        lines += _perplexities(perplexity)
    for text, figures in results.get("perplexity_by_text", {}).items():
        lines.append(f"  perplexity, {text}, {figures['windows']} windows of {figures['window']} tokens")
        lines += _perplexities(figures)
    if anytime := results.get("anytime"):
        lines.append("  perplexity when the last neuron is read after 1, 2, .. T steps")
        lines.append("    " + "  ".join(f"{value:.4g}" for value in anytime["perplexity"]))
    if accuracies := results.get("zero_shot"):
        lines += _accuracies(accuracies)
    if spikes := results.get("spikes"):
        lines += _spike_lines(spikes, results["energy"])
    lines.append(f"  results  {path}")
    return "\n".join(lines)


def _spike_lines(spikes: dict[str, Any], energy: dict[str, Any]) -> list[str]:
    ann = energy["ann_pj_per_token"]
    lines = [
        f"  spikes, {spikes['windows']} windows of {spikes['window']} tokens   firing rate {spikes['firing_rate']:.3f}"
        f"   at synapses {spikes['firing_rate_at_synapses']:.3f}   SOPs per token {spikes['sops_per_token']:.4g}",
        f"  energy per token [uJ], {energy['table']}: MAC {energy['mac_pj']:g} pJ, AC {energy['ac_pj']:g} pJ ({energy['source']})",
    ]
    for name, key in (("ANN", "ann"), (f"{energy['int_bits']}-bit ANN", "int"), ("SNN", "snn")):
        value = energy[f"{key}_pj_per_token"]
        lines.append(f"    {name:<12}{value / 1e6:>12.4g}   x {value / ann:.4f}")
    meets = [
        f"{energy[key]:.3f} with the {name}"
        for key, name in (("break_even_firing_rate", "ANN"), ("break_even_firing_rate_int", f"{energy['int_bits']}-bit ANN"))
    ]
    return [*lines, f"    even at a synaptic firing rate of {', '.join(meets)}"]


def _perplexities(figures: dict[str, Any]) -> list[str]:
    return [f"    {name:<12}{figures[key]:>12.3f}   x {figures[key] / figures['ann']:.4f}" for name, key in NETWORK_NAMES]


def _accuracies(accuracies: dict[str, Any]) -> list[str]:
    tasks = list(next(iter(accuracies.values())))
    lines = ["  accuracy [%]  " + "".join(f"{task:>16}" for task in tasks) + f"{'mean':>9}"]
    for name, key in NETWORK_NAMES:
        if found := accuracies.get(key):
            cells = [f"{100 * found[task]['acc']:.2f} +- {100 * found[task].get('acc_stderr', 0):.2f}" for task in tasks]
            mean = 100 * sum(found[task]["acc"] for task in tasks) / len(tasks)
            lines.append(f"    {name:<12}" + "".join(f"{cell:>16}" for cell in cells) + f"{mean:>9.2f}")
    return lines


class SweepSummary(Callback):
    """Hydra callback: summary.csv and summary.md in a sweep's folder, brought up to date whenever a job ends.

    Not when the sweep ends: Hydra leaves that call out where a job has failed.
    """

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **_: Any) -> None:
        if config.hydra.mode is RunMode.MULTIRUN:
            folder = Path(config.hydra.sweep.dir)
            write_summary(folder, summary_rows(folder))


def summary_rows(folder: Path) -> list[dict[str, Any]]:
    """One row per job of a sweep, failed jobs with their error."""
    rows = []
    for job in sorted((path for path in folder.iterdir() if path.is_dir()), key=_job_order):
        if (job / RESULTS).is_file():
            results = json.loads((job / RESULTS).read_text(encoding="utf-8"))
            perplexity, search = results.get("perplexity", {}), results.get("search", {})
            row = {key: results[key] for key in ("model", "T", "grain")} | {key: perplexity.get(key) for key in ("ann", "base2", "snn")}
            row |= {"ratio": perplexity["snn"] / perplexity["ann"] if perplexity else None, "relative_mse": search.get("relative_mse")}
            rows.append(row | {"folder": job.name, "error": None})
        elif (job / FAILURE).is_file():
            error = json.loads((job / FAILURE).read_text(encoding="utf-8"))["error"]
            rows.append(dict.fromkeys(SUMMARY_COLUMNS) | {"folder": job.name, "error": error})
    return rows


def write_summary(folder: Path, rows: list[dict[str, Any]]) -> None:
    """summary.csv with full precision, summary.md to read."""
    lines = ["| " + " | ".join(SUMMARY_COLUMNS) + " |", "|" + " --- |" * len(SUMMARY_COLUMNS)]
    lines += ["| " + " | ".join(_cell(row[column]) for column in SUMMARY_COLUMNS) + " |" for row in rows]
    write_text(folder / "summary.csv", _csv_text(rows, SUMMARY_COLUMNS))
    write_text(folder / "summary.md", "\n".join(lines) + "\n")


def _csv_text(rows: list[dict[str, Any]], columns: tuple[str, ...]) -> str:
    table = StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows)
    return table.getvalue()


def _cell(value: Any) -> str:
    if value is None:
        return ""
    return f"{value:.5g}" if isinstance(value, float) else str(value).replace("|", "/")


def _job_order(path: Path) -> tuple[int, str]:
    number = path.name.split("-")[0]
    return (int(number), path.name) if number.isdigit() else (1 << 30, path.name)
