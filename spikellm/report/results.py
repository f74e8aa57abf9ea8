"""What a run and a sweep leave: results.json, tables and plots of a run, the summary of a sweep.

Imported before every run and for `--help`, so no torch here; the plots and report.html are made in files of their own.

Zero-shot columns are lm-eval's acc for WinoGrande and acc_norm (by answer length) for ARC, PIQA and HellaSwag. The published table
does not say which it reports; its full-precision neighbours in the literature are these.
"""

import csv
import json
import logging
import shlex
import shutil
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

from filelock import FileLock

from spikellm.config.extras import PICTURES, lack
from spikellm.config.labels import NETWORKS
from spikellm.store.artifacts import intact_json, write_json, write_text
from spikellm.store.record import JobRecord, PerplexityRecord, Record, Results, Row, SpikesRecord, reference_perplexity

log = logging.getLogger(__name__)

RESULTS, SITES, SPIKES, FAILURE, SWEEP = "results.json", "sites.csv", "spikes.csv", "error.json", "sweep.json"
RASTER = "raster.csv"
# column of summary.csv -> key of results.json, and the column's heading in summary.md
FIGURES = {network: (f"perplexity.{network}", f"ppl {label.short}") for network, label in NETWORKS.items()} | {
    "wino": ("zero_shot.snn.winogrande.acc", "Wino"),
    "arc_c": ("zero_shot.snn.arc_challenge.acc_norm", "ArcC"),
    "arc_e": ("zero_shot.snn.arc_easy.acc_norm", "ArcE"),
    "piqa": ("zero_shot.snn.piqa.acc_norm", "PIQA"),
    "hellaswag": ("zero_shot.snn.hellaswag.acc_norm", "HellaSwag"),
    "sops_per_token": ("spikes.sops_per_token", "SOPs / token"),
    "pj_per_token": ("energy.snn_pj_per_token", "pJ / token"),
    "snn_int_pj_per_token": ("energy.snn_int_pj_per_token", "pJ / token, integers"),
    "int_static_pj_per_token": ("energy.int_static_pj_per_token", "pJ / token, INT static"),
    "int_token_pj_per_token": ("energy.int_token_pj_per_token", "pJ / token, INT token"),
    "relative_mse": ("search.relative_mse", "relative error"),
}
RATIOS = {"snn": "ratio", "int_static": "int_static_ratio", "int_token": "int_token_ratio"}  # column of a perplexity -> of its ratio
HEADINGS = {name: heading for name, (_, heading) in FIGURES.items()} | {
    ratio: f"{NETWORKS[name].short} / ANN" for name, ratio in RATIOS.items()
}
IDENTITY = ("model", "T", "grain")
SHOWN_BY_COLUMNS = ("model", "snn.T", "timesteps", "grain")  # overrides that the column `options` need not repeat
NOT_FINISHED = "not finished: the same command goes on with it"
DAMAGED = f"{RESULTS} is damaged: the same command makes it again"


def extent(figures: PerplexityRecord | SpikesRecord) -> str:
    """On how much text figures were measured."""
    return f"{figures.windows} window{'s' * (figures.windows != 1)} of {figures.window} tokens"


def value_at(results: Record, key: str) -> Any:
    """What stands under a dotted key of results.json; None where there is nothing."""
    found: Any = results.to_json()
    for part in key.split("."):
        found = found.get(part) if isinstance(found, dict) else None
    return found


def objective(results: Results | None, key: str) -> float | None:
    """The number that main() returns to an optimising sweeper."""
    return None if results is None else value_at(results, key)


def write_results(folder: Path, results: Results, tables: dict[str, list[Row]], plots: list[Path]) -> Path:
    """Write results.json, the tables by their file name, and plots/; the path of results.json. An earlier failure is forgotten.

    Without the extra `report` the tables are not drawn.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for name, rows in tables.items():
        write_text(folder / name, _csv_text(rows, list(rows[0])))
    if SPIKES in tables and not lack(*PICTURES):
        from spikellm.report.spike_plots import draw_spikes  # a second to import: not before every run

        draw_spikes(folder, tables[SPIKES])
    if RASTER in tables and not lack(*PICTURES):
        from spikellm.report.spike_plots import draw_raster

        draw_raster(folder, tables[RASTER])
    for plot in plots:
        (folder / "plots").mkdir(exist_ok=True)
        shutil.copyfile(plot, folder / "plots" / plot.name)
    write_json(folder / RESULTS, results.to_json())
    (folder / FAILURE).unlink(missing_ok=True)
    return folder / RESULTS


def write_failure(folder: Path, reason: str, job: JobRecord) -> None:
    """Leave the reason beside a job that failed or was interrupted, for people and for the sweep's summary."""
    if folder.is_dir():
        write_json(folder / FAILURE, replace(job, error=reason).to_json())


def recorded_results(folder: Path) -> Results | None:
    """The content of a folder's results.json; None where it is missing or damaged."""
    try:
        return Results.from_json(intact_json(folder / RESULTS))
    except ValueError:
        return None


def finished_results(folder: Path, config: str | None) -> Results | None:
    """The results of a job that was finished in `folder` before with the same resolved configuration (its hash)."""
    results = None if (folder / FAILURE).exists() else recorded_results(folder)
    return results if results is not None and results.config == config else None


def summary_rows(folder: Path) -> list[Row]:
    """One row per job of a sweep, failed and unfinished jobs with their error.

    Columns: model, T, grain, those of FIGURES, their published values where there are any (NAME_published), RATIOS, options
    (overrides in which the jobs differ beside these), folder, error.
    """
    rows, options = [], []
    for job in sorted((path for path in folder.iterdir() if path.is_dir() and not path.name.startswith(".")), key=_job_order):
        if (job / FAILURE).exists():
            found: JobRecord | Results = JobRecord.from_json({"error": NOT_FINISHED} | (intact_json(job / FAILURE) or {}))
        elif (job / RESULTS).exists():
            found = recorded_results(job) or JobRecord(error=DAMAGED)
        elif (job / ".hydra").is_dir():
            found = JobRecord(error=NOT_FINISHED)
        else:
            continue  # not a job's folder
        rows.append(_row(found) | {"folder": job.name, "error": found.error if isinstance(found, JobRecord) else None})
        options.append(_options(found))
    known = [set(own) for own in options if own]  # a job that left no word has none
    common = set.intersection(*known) if known else set()
    published = [f"{name}_published" for name in FIGURES if any(f"{name}_published" in row for row in rows)]
    for row, own in zip(rows, options, strict=True):
        row["options"] = " ".join(option for option in own if option not in common) or None
    return [{name: row.get(name) for name in summary_columns(published)} for row in rows]


def summary_columns(published: list[str]) -> list[str]:
    """Columns of a summary in their order; a published figure stands behind the measured one."""
    columns = list(IDENTITY)
    for name in FIGURES:
        columns += [name, RATIOS[name]] if name in RATIOS else [name]
        columns += [f"{name}_published"] if f"{name}_published" in published else []
    return [*columns, "options", "folder", "error"]


def _row(found: JobRecord | Results) -> Row:
    row: Row = {key: getattr(found, key) for key in IDENTITY}
    row |= {name: value_at(found, key) for name, (key, _) in FIGURES.items()}
    reference = reference_perplexity(row)
    row |= {ratio: row[name] / reference if row[name] and reference else None for name, ratio in RATIOS.items()}
    figures = found.reference.figures if isinstance(found, Results) and found.reference is not None else {}
    return row | {f"{name}_published": figures[key] for name, (key, _) in FIGURES.items() if key in figures}


def _options(found: JobRecord | Results) -> list[str]:
    overrides = [part for part in shlex.split(found.command or "") if "=" in part]
    return [part for part in overrides if part.partition("=")[0] not in SHOWN_BY_COLUMNS]


def write_summary(folder: Path) -> list[Row]:
    """Bring summary.csv (full precision) and summary.md (to read; accuracies in percent) up to date; the rows.

    Jobs that end at the same time on several machines take turns, so that the last one sees all.
    """
    with FileLock(folder / ".summary.lock"):
        rows = summary_rows(folder)
        if rows:
            write_text(folder / "summary.csv", _csv_text(rows, list(rows[0])))
            write_text(folder / "summary.md", "\n".join("| " + " | ".join(line) + " |" for line in readable(rows)) + "\n")
    return rows


def readable(rows: list[Row], *, rule: bool = True) -> list[list[str]]:
    """The cells of a summary for people: heading, Markdown's rule, a line per job; columns without any value are left out."""
    columns = [name for name in rows[0] if name in (*IDENTITY, "folder") or any(row[name] is not None for row in rows)]
    table = [[heading(name) for name in columns]] + ([["---"] * len(columns)] if rule else [])
    return table + [[_cell(name, row[name]) for name in columns] for row in rows]


def heading(column: str) -> str:
    """A column's heading."""
    name = column.removesuffix("_published")
    return HEADINGS.get(name, name) + (", published" if name != column else "")


def _csv_text(rows: list[Row], columns: list[str]) -> str:
    table = StringIO(newline="")
    writer = csv.DictWriter(table, fieldnames=columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: json.dumps(value) if isinstance(value, list) else value for key, value in row.items()} for row in rows)
    return table.getvalue()


def _cell(column: str, value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        accuracy = FIGURES.get(column.removesuffix("_published"), ("",))[0].startswith("zero_shot")
        return f"{100 * value:.2f}" if accuracy else f"{value:.5g}"
    return str(value).replace("|", "/").replace("\n", " ")


def _job_order(path: Path) -> tuple[int, str]:
    number = path.name.split("-")[0]
    return (int(number), path.name) if number.isdigit() else (1 << 30, path.name)
