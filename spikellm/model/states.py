"""Hidden states of batches between two blocks: in memory, and beyond a bound in files without a name.

64 windows of 2048 tokens are 2 GiB at D = 4096, as much as five decoder layers of LLaMA-2-7B in bfloat16; two streams of them hold three
such lists. A state that lies on disk is memory-mapped when it is asked for. Its file has no name once it is open: the system frees it with
the state, also after kill -9. It is written, not mapped and filled: a full disk is an error then, no signal.
"""

from collections.abc import Iterable, MutableSequence, Sequence
from mmap import mmap
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Lying(NamedTuple):
    """A state on disk."""

    mapped: Tensor  # its file's pages
    device: torch.device  # where it is wanted

    def get(self) -> Tensor:
        """The state."""
        return self.mapped.to(self.device)


class States(MutableSequence[Tensor]):
    """A list of hidden states, each of which is exchanged as a whole and never written into.

    Args:
        states: the first ones.
        room: of those that stay in memory [bytes].
        scratch: folder of the files, made when it is needed; None: all stay in memory.
    """

    def __init__(self, states: Iterable[Tensor] = (), *, room: int = 0, scratch: Path | None = None) -> None:
        self.room, self.scratch = room, scratch
        self._held: list[Tensor | Lying] = []
        self.extend(states)

    def copy(self) -> "States":
        """The same states in a list that goes its own way; nothing is copied."""
        found = States(room=self.room, scratch=self.scratch)
        found._held = list(self._held)
        return found

    @property
    def resident(self) -> int:
        """Of those that are in memory [bytes]."""
        return sum(state.nbytes for state in self._held if isinstance(state, Tensor))

    def __len__(self) -> int:
        return len(self._held)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[each] for each in range(*index.indices(len(self)))]
        state = self._held[index]
        return state if isinstance(state, Tensor) else state.get()

    def __setitem__(self, index: Any, state: Any) -> None:
        self._held[index] = torch.empty(0)  # whose place it takes leaves first
        self._held[index] = self._kept(state)

    def __delitem__(self, index: Any) -> None:
        del self._held[index]

    def insert(self, index: int, value: Tensor) -> None:
        """Put one before another."""
        self._held.insert(index, self._kept(value))

    def _kept(self, state: Tensor) -> Tensor | Lying:
        if self.scratch is None or self.resident + state.nbytes <= self.room:
            return state
        return Lying(on_disk(state, self.scratch), state.device)


class Chain(Sequence[Tensor]):
    """Several lists of states behind one another, each state got when it is asked for."""

    def __init__(self, lists: Sequence[Sequence[Tensor]]) -> None:
        self.places = [(states, index) for states in lists for index in range(len(states))]

    def __len__(self) -> int:
        return len(self.places)

    def __getitem__(self, number: Any) -> Any:
        states, index = self.places[number]
        return states[index]


def on_disk(tensor: Tensor, folder: Path) -> Tensor:
    """The same numbers as pages of a file in a folder, which goes with them.

    Raises:
        OSError: the folder cannot be written, the disk is full.
    """
    folder.mkdir(parents=True, exist_ok=True)
    numbers = tensor.detach().cpu().contiguous()
    with TemporaryFile(dir=folder) as file:
        file.write(numbers.flatten().view(torch.uint8).numpy().data)
        file.flush()
        pages = mmap(file.fileno(), numbers.nbytes)
    return torch.frombuffer(pages, dtype=numbers.dtype).view(numbers.shape)
