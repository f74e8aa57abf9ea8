"""A saved model in the folder of its run: `model/`, with the card that tells a stranger what it is, how it is used and what was measured.

Weights are hard links to those of the artefact where the file system has them, everything else is a copy, so that what is written here
never changes an artefact.
"""

import os
import shutil
from pathlib import Path
from typing import Any
from uuid import uuid4

from spikellm.config.checks import InputError
from spikellm.config.labels import NETWORKS
from spikellm.report.results import RESULTS, extent
from spikellm.store.artifacts import write_json, write_text
from spikellm.store.record import AccuracyRecord, EnergyRecord, PerplexityRecord, Results, RotationRecord, SpikesRecord
from spikellm.store.saved import CARD, Provenance, is_saved, provenance_of

MODEL = "model"  # of a run's folder
MARK = "library_name: transformers\ntags: [spikellm, "  # of the cards that are written here
CITATION = (
    "Zheng et al., Distribution-Aware Multi-Granularity Phase Coding: Towards Lower Conversion Error for Spike-Driven Large Language "
    "Models, ICLR 2026"
)


def check_place(folder: Path) -> None:
    """Refuse a run's folder whose `model/` is something else, before the long work.

    Raises:
        InputError: it would be replaced.
    """
    target = folder / MODEL
    if os.path.lexists(target) and not is_saved(target):
        raise InputError(f"save_model=true: {target} is there and is no saved model; hydra.run.dir=FOLDER chooses where it is written")


def publish(source: Path, folder: Path, results: Results) -> Path:
    """Put the saved model `source` into the folder of a run, as `model/`, with a card and the results of the run; whole or not at all."""
    target = folder / MODEL
    if target.exists() and source.resolve() == target.resolve():
        _describe(target, results)
        return target
    temporary, old = (folder / f".{MODEL}.{uuid4().hex[:8]}.tmp" for _ in range(2))
    temporary.mkdir(parents=True)
    try:
        for file in source.iterdir():
            _link(file, temporary / file.name) if file.suffix == ".safetensors" else shutil.copyfile(file, temporary / file.name)
        _describe(temporary, results)
        if target.exists():
            target.rename(old)
        temporary.rename(target)
    finally:
        for rest in (temporary, old):
            shutil.rmtree(rest, ignore_errors=True)
    return target


def _link(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:  # on another file system, or one without links
        shutil.copyfile(source, target)


def _describe(folder: Path, results: Results) -> None:
    write_json(folder / RESULTS, results.to_json())
    write_card(folder, model_card(provenance_of(folder), results))


def write_card(folder: Path, card: str) -> None:
    """Write README.md, unless one is there that somebody else has written."""
    place = folder / CARD
    if not place.is_file() or MARK in place.read_text(encoding="utf-8", errors="replace"):
        write_text(place, card)


def model_card(made: Provenance, results: Results | None = None) -> str:
    """The card in Markdown, with the front matter that the hub reads.

    Args:
        made: how the model was made.
        results: of a run that measured it.
    """
    options = made.options
    code = f"T={options['snn.T']}, grain={options['snn.grain']}, {options['snn.coding']}"
    base = f"\nbase_model: {made.path}" if made.path.count("/") == 1 else ""
    return f"""---
{MARK}spiking-neural-network, phase-coding]
pipeline_tag: text-generation{base}
---

# {made.model}, spiking: {code}

A spiking neural network made from the pretrained model `{made.path}` without training: wherever the network multiplies an activation, a
few-spike neuron sends at most {options["snn.T"]} spikes instead of the number (distribution-aware multi-granularity phase coding).

## Use

```python
import spikellm  # pip install spikellm; it teaches transformers the format

model, tokenizer = spikellm.load("FOLDER")  # or AutoModelForCausalLM.from_pretrained("FOLDER"), pipeline("text-generation", "FOLDER")
prompt = tokenizer("Spikes are", return_tensors="pt")
print(tokenizer.decode(model.generate(**prompt, max_new_tokens=20)[0]))
```

`python main.py model.path=FOLDER` measures it again. {_prefix(made)}

## Measured

{_measured(results)}

## Made of

{_table(("what", "value"), _facts(made, results))}

Method: {CITATION}.
"""


def _prefix(made: Provenance) -> str:
    if not made.prefix_tokens:
        return "Nothing stands before a text by itself."
    return (
        f"Keys and values of the tokens {made.prefix_tokens} stand before every sequence by themselves: the tokenizer here adds none "
        "of them to a text."
    )


def _measured(results: Results | None) -> str:
    parts = [] if results is None else _figures(results)
    return "\n\n".join(parts) if parts else "Nothing so far."


def _figures(results: Results) -> list[str]:
    parts = []
    texts: dict[str, PerplexityRecord] = ({"evaluation text": results.perplexity} if results.perplexity else {}) | (
        results.perplexity_by_text or {}
    )
    for name, found in texts.items():
        rows = [
            (label.long, f"{value:.4f}", f"{value / found.reference:.4f}" if found.reference else "")
            for network, label in NETWORKS.items()
            if (value := found.networks.get(network)) is not None
        ]
        parts.append(f"Perplexity, {name}, {extent(found)}:\n\n" + _table(("network", "perplexity", "over the ANN's, same prefix"), rows))
    if results.zero_shot:
        accuracies = [
            (NETWORKS[network].long, task, _accuracy(found))
            for network, tasks in results.zero_shot.items()
            for task, found in tasks.items()
        ]
        parts.append("Zero-shot (lm-eval):\n\n" + _table(("network", "task", "accuracy"), accuracies))
    costs = [*_spikes(results.spikes), *_energy(results.energy)]
    return [*parts, "Cost:\n\n" + _table(("what", "value"), costs)] if costs else parts


def _accuracy(found: AccuracyRecord) -> str:
    norm = "" if found.acc_norm is None else f", acc_norm {found.acc_norm:.4f}"
    return f"acc {found.acc:.4f}{norm}" + (f", {found.rows} rows" if found.rows else "")


def _spikes(found: SpikesRecord | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    return [
        ("firing rate, spikes / (neurons x T)", f"{found.firing_rate:.4f}"),
        ("synaptic operations a token", f"{found.sops_per_token:.4g}"),
        ("latency [time steps]", str(found.latency_steps)),
    ]


def _energy(found: EnergyRecord | None) -> list[tuple[str, str]]:
    if found is None:
        return []
    networks = {"ANN": found.ann_pj_per_token, "SNN": found.snn_pj_per_token}
    return [(f"energy a token, {name}, table {found.table} [uJ]", f"{value / 1e6:.4g}") for name, value in networks.items()]


def _rotation(made: RotationRecord) -> str:
    matrices = "; ".join(f"{part}: {' + '.join(map(str, orders))}" for part, orders in (made.orders or {}).items())
    return f"{made.kind}, seed {made.seed}, hash {made.hash}{f', orders {matrices}' if matrices else ''}"


def _facts(made: Provenance, results: Results | None) -> list[tuple[str, str]]:
    search, versions = made.search, ", ".join(f"{name} {version}" for name, version in made.versions.items())
    facts: dict[str, Any] = {
        "pretrained model": f"{made.path}{f', commit {made.revision}' if made.revision else ''}",
        "fingerprint of its files": made.source,
        "fingerprint of the calibration text": made.calibration,
        "rotation": made.rotation and _rotation(made.rotation),
        "relative error of the codes": search and f"{search.relative_mse:.3g} (base 2: {search.relative_mse_base2:.3g})",
        "weights": made.weights and f"{made.weights.bits} bits ({made.weights.rounding})",
        "tuned": made.tune and f"{made.tune.what}, {made.tune.epochs} passes",
        "re-fitted": made.compensate and f"{made.compensate.weights_refitted} weights of {', '.join(made.compensate.linears)}",
        "versions": versions,
        "command": results and results.command and f"`{results.command}`",
    }
    return [(name, str(value)) for name, value in facts.items() if value]


def _table(heads: tuple[str, ...], rows: list[Any]) -> str:
    lines = [heads, ("---",) * len(heads), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)
