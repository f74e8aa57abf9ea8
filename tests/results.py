"""Folders of results with known content."""

import json
from pathlib import Path

from spikellm.report.results import write_failure, write_results
from spikellm.store.record import JobRecord, Results

SITE = "layers.{}.{}"
OPTIONS = f"seed=0 dataset.evaluation.path=/a/{'long/' * 20}name.txt"
KINDS = ("attention_input", "query", "softmax", "mlp_product")


def results(T: int, grain: int | str, snn: float, **more) -> dict:
    """results.json of a job, as the contract has it."""
    return {
        "schema": 1, "model": "tiny", "T": T, "grain": grain, "sites": 10, "prefix_tokens": [1], "config": "0123",
        "perplexity": {"ann": 10.0, "snn": snn, "base2": 2 * snn, "windows": 2, "window": 64, "tokens": 126},
        "search": {"relative_mse": 0.25, "relative_mse_base2": 0.5, "worse_than_base2": 0},
        "stages": {"calibrate": {"seconds": 1.5, "cached": True}}, "versions": {"spikellm": "0.1.0", "torch": "2"},
        "command": f"python main.py model=tiny snn.T={T} grain={grain} {OPTIONS}",
    } | more  # fmt: skip


def leave(folder: Path, found: dict, tables: dict, plots: list) -> None:
    """A finished job's files."""
    write_results(folder, Results.from_json(found), tables, plots)


def sites(layers: int = 3) -> list[dict]:
    return [
        {"name": SITE.format(layer, kind), "tau": [1.0], "relative_error": 10.0**-layer, "firing_rate": 0.1 * (layer + 1)}
        for layer in range(layers)
        for kind in KINDS
    ] + [{"name": "head_input", "tau": [1.0], "relative_error": 0.5, "firing_rate": 0.5}]


ZERO_SHOT = {
    "zero_shot": {
        network: {
            "winogrande": {"acc": 0.5 + shift}, "arc_challenge": {"acc": 0.1, "acc_norm": 0.25 + shift},
            "arc_easy": {"acc": 0.1, "acc_norm": 0.625 + shift}, "piqa": {"acc": 0.1, "acc_norm": 0.75 + shift},
        }
        for network, shift in (("ann", 0.0), ("snn", 0.015625))
    },
    "spikes": {
        "sops_per_token": 1234567.0, "firing_rate": 0.25, "firing_rate_at_synapses": 0.5, "windows": 1, "window": 64, "latency_steps": 60,
        "spikes_per_token": 4096.0,
    },
    "energy": {
        "ann_pj_per_token": 4e6, "snn_pj_per_token": 1.11e6, "int_pj_per_token": 5e5, "int_bits": 5, "table": "fp32", "mac_pj": 4.6,
        "ac_pj": 0.9, "source": "a paper", "break_even_firing_rate": 0.6, "break_even_firing_rate_int": 0.1,
        "snn_int_pj_per_token": 2.5e5, "break_even_firing_rate_snn_int": 0.8,
        "weights": {"ann": "fp32", "snn": "fp32", "int": "int5", "snn_int": "int5"},
    },
    "reference": {"source": "a table", "figures": {"perplexity.snn": 11.5, "zero_shot.snn.piqa.acc_norm": 0.7}},
}  # fmt: skip


def sweep(folder: Path) -> Path:
    """A sweep with two finished jobs, a failed and an unfinished one."""
    leave(make(folder / "0-T4-G1"), results(4, 1, 12.0, **ZERO_SHOT), {"sites.csv": sites()}, [])
    leave(make(folder / "1-T4-Gauto"), results(4, "auto", 11.0, **ZERO_SHOT), {"sites.csv": sites()}, [])
    reason = "snn.T=4 with grain=3: <b>too | few</b> steps"
    write_failure(
        make(folder / "2-T4-G3"), reason, JobRecord(model="tiny", T=4, grain=3, command=f"python main.py model=tiny snn.T=4 {OPTIONS}")
    )
    make(folder / "10-T6-G1" / ".hydra")
    (folder / "sweep.json").write_text(json.dumps({"command": "python main.py -m snn.T=4,6", "overrides": [], "jobs": 4}))
    return folder


def make(folder: Path) -> Path:
    folder.mkdir(parents=True)
    return folder
