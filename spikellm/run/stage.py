"""What a stage is: a name, what its result depends on, what it refuses beforehand, how it is computed and reported.

A new stage is one object in the registry of `stages.py`, and its name among the choices of `config/schema.py`.
"""

import logging
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar

from spikellm.model.passage import Found, Keep
from spikellm.run.workspace import Workspace
from spikellm.store.artifacts import Artefact, artifact_key
from spikellm.store.provenance import Code
from spikellm.store.record import Findings, Row

log = logging.getLogger(__name__)

BLOCK = "block.safetensors"


@dataclass(frozen=True, slots=True, kw_only=True)
class StageOutcome:
    """What a stage adds to results.json, and the artefacts that it is from."""

    artefacts: list[Artefact]
    findings: Findings
    tables: dict[str, list[Row]] = field(default_factory=dict)  # rows by the name of a csv file
    plots: list[Path] = field(default_factory=list)  # pictures to copy into the run's folder


class Stage(ABC):
    """Something that a job does. It holds no state: whatever it needs is in the workspace, or the result of another stage."""

    name: ClassVar[str]  # in `stages`, in results.json, of its folder in the store
    needs: ClassVar[tuple["Stage", ...]] = ()  # whose results it obtains where it has to be computed, asked for or not

    def needed(self, work: Workspace) -> tuple["Stage", ...]:
        """Those of `needs` without whose results this one cannot be had now."""
        return self.needs

    def prepare(self, work: Workspace) -> None:  # noqa: B027 (not every stage has something to refuse)
        """Refuse what cannot be read, and name options without effect, before the long work starts.

        Raises:
            InputError: with key, value and cure.
        """

    @abstractmethod
    def run(self, work: Workspace) -> StageOutcome:
        """Obtain the result, from the store or by computing it."""


class KeyedStage(Stage):
    """A stage with one artefact."""

    code: ClassVar[Code]  # that computes it

    @abstractmethod
    def inputs(self, work: Workspace) -> dict[str, object]:
        """Everything that the result depends on, in JSON types."""

    @abstractmethod
    def compute(self, work: Workspace, folder: Path) -> None:
        """Write the result into an empty folder."""

    def key(self, work: Workspace) -> str:
        """Stands for the result in the keys of what is computed from it."""
        return artifact_key(self.inputs(work))

    def is_done(self, work: Workspace) -> bool:
        """Whether the store has the result."""
        return work.store.holds(self.name, self.inputs(work))

    def needed(self, work: Workspace) -> tuple[Stage, ...]:
        """None where the store has the result, else all of `needs`."""
        return () if self.is_done(work) else self.needs

    def artefact(self, work: Workspace) -> Artefact:
        """The result, intact."""
        return work.store.load_or_compute(self.name, self.inputs(work), partial(self.compute, work))

    @contextmanager
    def kept_blocks(self, work: Workspace, save: Callable[[Path, Found], None], load: Callable[[Path], Found]) -> Iterator[Keep[Found]]:
        """Within: what is found for a block is an artefact of its own, so that whoever goes on does so behind the last finished block.

        They are taken away at the end: whatever is made of them must have been written by then.

        Args:
            save, load: a block's file, to and from.
        """
        stage, inputs = f"{self.name}_block", self.inputs(work)
        passed: list[Artefact] = []

        def keep(block: str, find: Callable[[], Found]) -> Found:
            def compute(folder: Path) -> None:
                if passed and all(each.cached for each in passed):
                    log.info("%s: goes on behind %d finished blocks", self.name, len(passed))
                save(folder / BLOCK, find())

            artefact = work.store.load_or_compute(stage, inputs | {"block": block}, compute)
            passed.append(artefact)
            return load(artefact.folder / BLOCK)

        yield keep
        for artefact in passed:
            work.store.remove(artefact)
