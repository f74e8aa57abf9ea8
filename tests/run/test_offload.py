"""A job whose decoder layers stay on disk finds what one in memory finds, under the same keys."""

from pathlib import Path

import pytest
import torch

import spikellm
from tests.jobs import artefacts, cached, run

CASES = {
    "signed": [
        "search.method=evolution",
        "snn.T=3",
        "grain=1",
        "snn.intervals=2",
        "evaluation.networks=[ann,ann_prefix,base2,snn,int_token]",
    ],
    "weights": ["tune.epochs=1", "tune.what=all", "compensate.enabled=true", "snn.T=4", "weights.bits=4", "weights.group_size=16"],
    "stepped": ["snn.execution=stepped", "snn.T=4", "weights.bits=8", "weights.rounding=nearest", "model.dtype=bfloat16"],
}


def figures(results: dict) -> dict:
    """What does not depend on where or when."""
    found = {key: value for key, value in results.items() if key not in ("stages", "codes", "inputs", "versions")}
    return found | {"search": {key: value for key, value in results["search"].items() if key != "seconds"}}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_results_are_those_of_the_model_in_memory(options, tmp_path):
    here = run(tmp_path / "here", *options)
    there = run(tmp_path / "there", *options, "hardware.offload=true")
    assert figures(there) == figures(here)
    codes = [Path(results["codes"]).read_bytes() for results in (here, there)]
    assert codes[0] == codes[1]
    assert len(artefacts(tmp_path / "there", "weights_on_disk")) == 5, "the ends, two layers, two rotated layers"
    assert all(cached(run(tmp_path / "here", *options, "hardware.offload=true")).values()), "one store serves both"


def test_what_is_saved_loads_as_the_same_model(tmp_path):
    logits = []
    for offload in ("false", "true"):
        found = run(tmp_path / offload, "save_model=true", "stages=[convert]", f"hardware.offload={offload}")
        model, _ = spikellm.load(found["saved_model"])
        logits.append(model(torch.arange(2, 40)[None]).logits)
        assert not list(Path(found["saved_model"]).glob("model.safetensors")) or offload == "false"
    assert torch.equal(*logits)
