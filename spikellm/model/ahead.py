"""The next layer is read while one computes.

A thread of its own touches the pages of memory-mapped weights, so that who computes with them does not wait for the disk. For a GPU it
copies them through pinned memory on a stream of its own; whoever takes them lets its stream wait for that copy. Two layers are in memory
then.
"""

from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

PAGE = 4096  # [bytes]


@runtime_checkable
class Tensors(Protocol):
    """What `dict` makes tensors by name of."""

    def keys(self) -> Iterable[str]:
        """The names."""

    def __getitem__(self, name: str, /) -> Tensor:
        """One of them, read now."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Read:
    """Weights by name that have been read, and what has to have happened on the device before they are there."""

    weights: dict[str, Tensor]
    copied: torch.cuda.Event | None = None

    def take(self) -> dict[str, Tensor]:
        """The weights, for the current stream."""
        if self.copied is not None:
            stream = torch.cuda.current_stream(next(iter(self.weights.values())).device)
            stream.wait_event(self.copied)
            for weight in self.weights.values():
                weight.record_stream(stream)  # they are of the other stream's memory
        return self.weights


class ReadAhead:
    """Weights by name, read when they are asked for, or before.

    Args:
        device: where they are wanted.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._thread = ThreadPoolExecutor(1, "read ahead")
        self._stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        self._coming: tuple[Tensors, Future[Read]] | None = None

    def expect(self, weights: Tensors) -> None:
        """Begin to read; one layer at a time: what was expected before and not asked for is let go."""
        self._coming = (weights, self._thread.submit(self._read, weights))

    def get(self, weights: Tensors) -> dict[str, Tensor]:
        """Weights as they are stored: on a CPU pages of their file, else on the device.

        Raises:
            OSError, SafetensorError: whatever reading them came to.
        """
        coming, self._coming = self._coming, None
        if coming is not None and coming[0] is weights:
            return coming[1].result().take()
        return dict(weights) if self._stream is None else self._read(weights).take()

    def _read(self, weights: Tensors) -> Read:
        if self._stream is None:
            found = dict(weights)
            for weight in found.values():
                touch(weight)
            return Read(weights=found)
        with torch.cuda.stream(self._stream):
            copies = {name: weight.pin_memory().to(self.device, non_blocking=True) for name, weight in dict(weights).items()}
            return Read(weights=copies, copied=self._stream.record_event())


def touch(tensor: Tensor) -> None:
    """Bring the pages of a memory-mapped tensor in: one byte of each is read."""
    tensor.detach().flatten().view(torch.uint8)[::PAGE].max()
