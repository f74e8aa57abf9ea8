"""The smallest job: what asks for it, and what it leaves."""

from pathlib import Path
from typing import Any

import pytest

from spikellm.run.stages import run_stages
from tests.configure import configure

WITH_REPORT = [
    "model=tiny", "dataset.calibration.window=64", "dataset.calibration.max_windows=2",
    "dataset.evaluation.window=64", "dataset.evaluation.max_windows=2", "search.method=base2",
]  # fmt: skip
SMALL = [*WITH_REPORT, "report.html=false"]


def run(root: Path, *arguments: str) -> dict:
    """One job in this process: the content of results.json."""
    return run_stages(configure(*SMALL, f"output_root={root}", *arguments)).results.to_json()


def cached(results: dict) -> dict[str, bool]:
    return {stage: record["cached"] for stage, record in results["stages"].items()}


def artefacts(root: Path, stage: str) -> list[Path]:
    """Finished artefacts of a stage."""
    folder = root / "artifacts" / stage
    return [path for path in folder.glob("*") if path.is_dir() and ".tmp-" not in path.name] if folder.is_dir() else []


def stopped_behind_the_first_block(module: Any, name: str, root: Path, *arguments: str) -> None:
    """A job of which Ctrl-C is all that comes of the second call of `module.name`, which finds a block."""
    whole, called = getattr(module, name), []

    def find(*given, **options):
        called.append(given)
        if len(called) > 1:
            raise KeyboardInterrupt
        return whole(*given, **options)

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(module, name, find)
        with pytest.raises(KeyboardInterrupt):
            run(root, *arguments)
