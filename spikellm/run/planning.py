"""The plan of a job: what it would read, hold and take on this machine (`plan=true`); of large models what it will, before it starts."""

import logging
from collections.abc import Iterable
from pathlib import Path

import torch

from spikellm.config.checks import InputError
from spikellm.config.choices import ModelSource
from spikellm.config.dataset import TextConfig
from spikellm.evaluation.figures import named_texts
from spikellm.evaluation.texts import token_windows
from spikellm.model.load import model_config
from spikellm.model.shards import PATTERN
from spikellm.planning.machine import measure
from spikellm.planning.plan import Job, plan
from spikellm.planning.probe import probe
from spikellm.planning.shape import Shape
from spikellm.planning.watch import resident
from spikellm.report.plan import plan_table
from spikellm.run.stage import KeyedStage, Stage
from spikellm.run.workspace import Workspace
from spikellm.store.record import PlanRecord

# What large models leave in the store: layers on disk, and saved models.
LARGE_ARTEFACTS = ("weights_on_disk", "convert")
PLANNED = ("calibrate", "search", "convert")  # stages whose work is planned, but for figures
GIB = 2**30

log = logging.getLogger(__name__)

LARGE = 5 * 10**8  # weights of a model that is planned for unasked: a minute of planning beside hours of work


def planned(work: Workspace) -> PlanRecord:
    """What the job takes where the store has nothing of it.

    Raises:
        InputError: no plan can be made of a saved model; an unreadable text.
    """
    config = work.config
    if config.model.source is ModelSource.spiking:
        raise InputError(f"plan=true with model.path={config.model.path}: it is converted already; plans are of conversions")
    known = model_config(work.model)
    dtype = getattr(torch, config.model.dtype.value)
    shape = Shape.of(known, dtype)
    texts = [_extent(work, key, text) for key, text in named_texts(config.dataset).items()]
    calibration = _extent(work, "dataset.calibration", config.dataset.calibration)
    before = resident()  # a layer that was timed leaves pages behind, which the run fills again
    machine = measure(torch.device("cpu" if work.device == "cpu" else "cuda"), Path(config.output_root))
    longest = max(tokens for _, tokens in [calibration, *texts])
    costs = probe(known, dtype, machine, config.hardware, config.rotation, work.options, window=longest)
    random, folder = config.model.source is ModelSource.random, Path(config.model.path)
    job = Job(
        stages=config.stages,
        calibration=calibration,
        texts=texts,
        networks=list(config.evaluation.networks),
        T=work.options.T,
        grains=work.options.most_grains,
        spike_windows=config.spikes.windows if config.spikes.enabled else 0,
        save=config.save_model,
        offload=work.models.offloaded,
        made=random or (folder.is_dir() and not any(folder.glob(PATTERN))),
        random=random,
        compiled=config.hardware.fused,
        query_block=config.hardware.query_block,
        resident=before,
    )
    return plan(shape, costs, machine, job)


def planned_if_large(work: Workspace, stages: Iterable[Stage]) -> PlanRecord | None:
    """`planned`, of a large model; None: not worth it, as the model is small, or saved, or all that the stages keep is there.

    Raises:
        InputError: as `planned`; the disk has no room for what the job leaves there.
    """
    source = work.config.model.source
    if source in (ModelSource.spiking, ModelSource.gguf):
        return None
    if all(stage.is_done(work) for stage in stages if isinstance(stage, KeyedStage) and stage.name in PLANNED):
        return None
    known = model_config(work.model)
    shape = Shape.of(known, getattr(torch, work.config.model.dtype.value))
    if shape.layers * shape.layer + shape.embedding < LARGE:
        return None
    found = planned(work)
    log.info("%s", plan_table(found))
    there = sum(path.stat().st_size for stage in LARGE_ARTEFACTS for path in work.store.root.glob(f"{stage}/*/**/*") if path.is_file())
    lacking = found.disk_gib - there / GIB - found.disk_free_gib
    if lacking > 0:
        raise InputError(
            f"output_root={work.config.output_root}: the run leaves {found.disk_gib:.1f} GiB there, {found.disk_free_gib:.1f} GiB are "
            f"free; free {lacking:.1f} GiB or take another output_root"
        )
    return found


def _extent(work: Workspace, key: str, text: TextConfig) -> tuple[int, int]:
    """Windows of a text, and their tokens; one that names its windows is not read."""
    if text.max_windows is not None:
        return text.max_windows, text.window
    return len(token_windows(text, key, work.tokenizer, work.vocabulary)), text.window
