"""Texts and benchmarks: the nodes below `dataset`."""

import re
from dataclasses import dataclass, field

from omegaconf import MISSING

from spikellm.config.checks import check, check_names
from spikellm.config.choices import DatasetSource
from spikellm.config.labels import NETWORKS, NetworkName

ZERO_SHOT_TASKS = ("winogrande", "arc_challenge", "arc_easy", "piqa", "hellaswag")
ASKED_BY_NAME = (NetworkName.ann_prefix, NetworkName.base2)  # not by zero_shot.networks=null


@dataclass(kw_only=True, slots=True)
class TextConfig:
    """Where a stream of tokens comes from and how it is cut into windows."""

    source: DatasetSource = MISSING
    """where the text comes from"""
    path: str | None = None
    """local file (source=text) or hub id (source=hub)"""
    name: str | None = None
    """configuration of the hub data set"""
    split: str | None = None
    """split of the hub data set; part of the topics for pydocs"""
    field: str = "text"
    """column of the hub data set that holds the text"""
    skip_rows: int = 0
    """first rows of the hub data set that are left out"""
    max_rows: int | None = None
    """rows read from the hub data set after these (streamed where set)"""
    window: int = 2048
    """length of a window [tokens]"""
    max_windows: int | None = None
    """windows used; null: all"""

    def __post_init__(self) -> None:
        check(self.window >= 2, "dataset.*.window", self.window, "must be at least 2 tokens")
        check(self.max_windows is None or self.max_windows >= 1, "dataset.*.max_windows", self.max_windows, "must be at least 1 or null")
        check(self.skip_rows >= 0, "dataset.*.skip_rows", self.skip_rows, "must not be negative")


@dataclass(kw_only=True, slots=True)
class ZeroShotConfig:
    """Multiple-choice accuracy without examples, through lm-eval."""

    tasks: list[str] = field(default_factory=list)
    """of winogrande, arc_challenge, arc_easy, piqa, hellaswag; none: no zero-shot"""
    networks: list[str] | None = None
    """of evaluation.networks, those that answer; null: all of them but ann_prefix and base2"""
    path: str | None = None
    """folder with a TASK.jsonl for every task, in the fields of the hub's data sets; null: the hub"""
    limit: int | None = None
    """first rows of each task; null: all"""
    batch_size: int | None = None
    """sequences a forward; null: as many as products gain from and memory has room for; not felt in the results"""

    def __post_init__(self) -> None:
        check_names("dataset.zero_shot.tasks", self.tasks, ZERO_SHOT_TASKS)
        check_names("dataset.zero_shot.networks", self.networks or [], tuple(NETWORKS))
        check(self.limit is None or self.limit >= 1, "dataset.zero_shot.limit", self.limit, "must be at least 1 or null")
        given = self.batch_size
        check(given is None or given >= 1, "dataset.zero_shot.batch_size", given, "must be at least 1 or null")

    def scored(self, measured: list[NetworkName]) -> list[NetworkName]:
        """Those of the measured networks that answer the tasks.

        Raises:
            InputError: one is asked for that is not measured, or there is none.
        """
        named = self.networks
        chosen = [name for name in NetworkName if name in measured and (name not in ASKED_BY_NAME if named is None else name in named)]
        absent = [name for name in named or [] if name not in measured]
        given = "null" if named is None else f"[{','.join(named)}]"
        measure = f"evaluation.networks=[{','.join(measured)}]"
        check(not absent, "dataset.zero_shot.networks", given, f"{measure} has no {', '.join(absent)}; name it in both")
        check(bool(chosen), "dataset.zero_shot.networks", given, f"no network of {measure} is left for dataset.zero_shot.tasks; name one")
        return chosen


@dataclass(kw_only=True, slots=True)
class DatasetConfig:
    """The texts and benchmarks of a job."""

    name: str = MISSING
    """short name, in results"""
    calibration: TextConfig = MISSING
    evaluation: TextConfig = MISSING
    extra: dict[str, TextConfig] = field(default_factory=dict)
    """further evaluation texts by name; the group `texts` has presets"""
    zero_shot: ZeroShotConfig = field(default_factory=ZeroShotConfig)

    def __post_init__(self) -> None:
        for name in self.extra:
            check(re.fullmatch(r"[\w-]+", name) is not None, "dataset.extra", name, "names take letters, digits, _ and -")
