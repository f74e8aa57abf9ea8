"""Passes of windows through the blocks that outlive their process: what is found for a block is kept, and the hidden states behind it.

Killed in block k, the next start goes on at block k: what blocks before it gave is there, and so are the states that come in.
"""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from safetensors.torch import load_file
from torch import Tensor

from spikellm.store.artifacts import Artefact, ArtifactStore, read_json, write_json, write_tensors

log = logging.getLogger(__name__)

Found = TypeVar("Found")
# What is found for a block, by the block's name: what is kept of it already, or what the function finds.
Keep = Callable[[str, Callable[[], Found]], Found]
FOUND = "found.json"


def not_kept(_block: str, find: Callable[[], Found]) -> Found:
    """Nothing is kept: every block's result is found."""
    return find()


class Passage:
    """Where the hidden states behind the last finished block are kept; here nowhere, and every pass begins at the first block."""

    def behind(self, blocks: int) -> tuple[int, Sequence[Tensor]]:
        """How many of so many blocks are finished, and the states behind them: 0 and none."""
        return 0, []

    def keep(self, finished: int, states: Sequence[Tensor]) -> None:
        """The states behind so many blocks, in the place of those before."""


class StoredPassage(Passage):
    """In the store.

    Args:
        stage: of the artefacts.
        inputs: what the states depend on beside the number of blocks behind which they are.
    """

    def __init__(self, store: ArtifactStore, stage: str, inputs: Mapping[str, object]) -> None:
        self.store, self.stage, self.inputs = store, stage, inputs
        self._last: Artefact | None = None
        self._full = False

    def behind(self, blocks: int) -> tuple[int, Sequence[Tensor]]:
        """The furthest states that are whole."""
        for finished in range(blocks, 0, -1):
            if self.store.holds(self.stage, self._of(finished)):
                folder = self.store.folder(self.stage, self._of(finished))
                self._last = Artefact(folder, True)
                log.info("%s: goes on behind %d of %d blocks", self.stage, finished, blocks)
                return finished, _Lying(sorted(folder.glob("*.safetensors")))
        return 0, []

    def keep(self, finished: int, states: Sequence[Tensor]) -> None:
        """Write them, then take those before away; on a disk that is too full for both, say so and keep none."""
        if self._full:
            return

        def write(folder: Path) -> None:
            for number in range(len(states)):  # one at a time: those that lie on disk come into memory
                write_tensors(folder / f"{number:06d}.safetensors", {"state": states[number].contiguous()})

        before = self._last
        try:
            self._last = self.store.load_or_compute(self.stage, self._of(finished), write)
        except OSError as error:
            log.warning("%s: hidden states cannot be kept (%s): killed, this pass would begin anew", self.stage, error.strerror or error)
            self._full = True
        if before is not None and before != self._last:
            self.store.remove(before)

    def forget(self) -> None:
        """Take the last states away: what they were for is done."""
        if self._last is not None:
            self.store.remove(self._last)

    def _of(self, finished: int) -> dict[str, object]:
        return {**self.inputs, "finished": finished}


class _Lying(Sequence[Tensor]):
    """States in files, read when they are asked for."""

    def __init__(self, files: Sequence[Path]) -> None:
        self.files = files

    def __len__(self) -> int:
        return len(self.files)

    def __getitem__(self, index: Any) -> Any:
        return load_file(self.files[index])["state"]


@contextmanager
def kept_passage(store: ArtifactStore, stage: str, inputs: Mapping[str, object]) -> Iterator[StoredPassage]:
    """Within: where the states of a pass are kept; they are gone when it has ended without an error."""
    passage = StoredPassage(store, stage, inputs)
    yield passage
    passage.forget()


class Passes:
    """Passes one after the other, and what each finds, in JSON types; nothing is kept."""

    def find(self, name: str, find: Callable[[Passage], Any]) -> Any:
        """What a pass has found, or finds now."""
        return find(Passage())

    def forget(self) -> None:
        """What they were for is done."""


class StoredPasses(Passes):
    """In the store: what passes have found, and the states of the one that goes on.

    Args:
        stage: of the artefacts; that of the states has `_states` behind its name.
        inputs: what all of it depends on beside the name of the pass.
    """

    def __init__(self, store: ArtifactStore, stage: str, inputs: Mapping[str, object]) -> None:
        self.store, self.stage, self.inputs = store, stage, inputs
        self._found: list[Artefact] = []

    def find(self, name: str, find: Callable[[Passage], Any]) -> Any:
        """What a pass has found, or finds now."""
        inputs = {**self.inputs, "pass": name}
        passage = StoredPassage(self.store, f"{self.stage}_states", inputs)
        artefact = self.store.load_or_compute(self.stage, inputs, lambda folder: write_json(folder / FOUND, find(passage)))
        passage.forget()
        self._found.append(artefact)
        return read_json(artefact.folder / FOUND)

    def forget(self) -> None:
        """Take all of it away."""
        for artefact in self._found:
            self.store.remove(artefact)
