"""Tensors in safetensors files by name, each memory-mapped when it is asked for: on a CPU its pages come in as they are read."""

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from safetensors import safe_open
from torch import Tensor

from spikellm.config.boundary import blamed_on

CURE = "fetch it, or make it, again"


class Stored(Mapping[str, Tensor]):
    """Which file each tensor is in."""

    def __init__(self, files: Mapping[str, Path]) -> None:
        self.files = dict(files)

    @classmethod
    def of(cls, files: Iterable[Path]) -> "Stored":
        """All tensors of some files; of one in several the last counts.

        Raises:
            InputError: a file is damaged.
        """
        found: dict[str, Path] = {}
        for file in files:
            with blamed_on(f"{file}", CURE), safe_open(file, "pt") as tensors:
                found |= dict.fromkeys(tensors.keys(), file)
        return cls(found)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.files[name], "pt") as tensors:
            return tensors.get_tensor(name)

    def __contains__(self, name: object) -> bool:
        return name in self.files  # a mapping's own would map the tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Those of all tensors, of which none is read."""
        found = {file: forms_of(file, f"{file}", CURE) for file in set(self.files.values())}
        return {name: found[file][name][1] for name, file in self.files.items()}

    def below(self, path: str) -> "Below":
        """The tensors of the module at a path, by their names below it."""
        return Below(self, f"{path}.")


def forms_of(file: Path, what: str, cure: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a safetensors file says of its tensors: dtype, by safetensors' name of it, and shape.

    Args:
        file: looked at.
        what, cure: as in `blamed_on`.

    Raises:
        InputError: the file is damaged.
    """
    with blamed_on(what, cure), safe_open(file, "pt") as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
        return {name: (str(each.get_dtype()), tuple(each.get_shape())) for name, each in slices.items()}


class Below(Mapping[str, Tensor]):
    """Those of a mapping whose names begin with a prefix, without it."""

    def __init__(self, every: Mapping[str, Tensor], prefix: str) -> None:
        self.every, self.prefix = every, prefix

    def __getitem__(self, name: str) -> Tensor:
        return self.every[self.prefix + name]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix(self.prefix) for name in self.every if name.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)
