"""What config.json says of a saved spiking model: its sites, its flags, how it was made, with checksums over all of it.

A file that was changed since must not pass for what was converted: beside the sums of whole files (`store/saved.py`) config.json has
checksums over flags, every site's table and the prefix, which are compared when the tables stand in the model.
"""

import hashlib
import json
from collections.abc import Iterable
from dataclasses import asdict, dataclass, fields
from typing import Any, Self

import torch
from torch import Tensor
from transformers.quantizers import register_quantization_config
from transformers.utils.quantization_config import QuantizationConfigMixin

from spikellm.coding.neuron import PhaseTable
from spikellm.config.boundary import reason
from spikellm.config.checks import InputError
from spikellm.kernels.encode import Digits
from spikellm.store.saved import CONFIG, CURE, METHOD, SCHEMA, check_schema

EXECUTION = ("query_block", "compiled")  # how the network is computed, not which one it is


@dataclass(frozen=True, slots=True, kw_only=True)
class SiteRecord:
    """One site's neurons: the digits of a `PhaseTable`, its shape, and the sha256 of its rows and cuts."""

    T: int
    groups: int
    digits: Digits
    sha256: str

    @classmethod
    def of(cls, name: str, table: PhaseTable) -> Self:
        """What is recorded of `table`.

        Raises:
            ValueError: the neuron can send nothing or is never reset, or the table was rounded.
        """
        if table.theta.dtype not in (torch.float32, torch.float64):
            raise ValueError(f"{name}: the table was rounded to {table.theta.dtype}; convert after model.to(..), not before it")
        for row in ("h", "d"):
            if not getattr(table, row).any():
                raise ValueError(f"{name}: {row} is 0 everywhere, which no code is")
        values = [*table.rows, *([] if table.cuts is None else [table.cuts])]
        return cls(T=table.T, groups=table.groups, digits=table.digits, sha256=digest(values))

    @classmethod
    def read(cls, place: str, found: Any) -> Self:
        """What `asdict` gave.

        Raises:
            InputError: it was changed since; the message names `place`.
        """
        _check_keys(place, cls, found)
        _check_keys(f"{place}.digits", Digits, found["digits"])
        try:
            digits = Digits(**found["digits"])
        except (ValueError, TypeError) as error:
            raise InputError(f"{place}.digits: {reason(error)}; {CURE}") from error
        return cls(**found | {"digits": digits})

    def empty(self) -> PhaseTable:
        """A table of this shape, to be filled; float64, which changes no value that a file can hold."""
        rows = torch.zeros(self.groups * self.digits.populations, self.T, dtype=torch.float64)
        ends = self.digits.intervals - 1
        cuts = rows.new_zeros(ends, self.groups * self.digits.sides) if ends else None
        return PhaseTable(rows, rows, rows, rows[:, 0], digits=self.digits, cuts=cuts)


@register_quantization_config(METHOD)
@dataclass(kw_only=True, repr=False)
class SpikingModelConfig(QuantizationConfigMixin):
    """What the modules of a saved spiking model look like: `quantization_config` of its config.json."""

    quant_method: Any = METHOD
    schema: int = SCHEMA
    rotated: list[str]  # which of R3 and R4 act online
    normalise_after: bool  # where the softmax is normalised
    amplitude: str  # of the neurons that Linears read
    prefix_length: int  # P
    prefix_sha256: str | None  # of the prefix's keys and values, layer by layer
    rotary_dtype: str  # of RoPE's frequencies, which no checkpoint holds: model.to(bfloat16) rounds them, from_pretrained does not
    provenance: dict[str, object] | None = None  # `Provenance` in JSON types, where the caller of `save` knows it
    sites: dict[str, SiteRecord]  # by name
    query_block: int  # queries per block of attention [tokens]
    compiled: bool  # neurons run fused
    sha256: str = ""  # of everything here, but for EXECUTION

    def __post_init__(self) -> None:
        self.sha256 = self.sha256 or self.checksum()

    def checksum(self) -> str:
        """sha256 of all fields that decide which network this is."""
        content = {key: value for key, value in self.to_dict().items() if key not in (*EXECUTION, "sha256")}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def to_dict(self) -> dict[str, object]:
        """In JSON types, as transformers asks for it."""
        return asdict(self)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], *_: object, **__: object) -> Self:
        """What `to_dict` gave.

        Raises:
            InputError: written by another version, or changed since.
        """
        place = f"{CONFIG}, quantization_config"
        check_schema(place, config_dict.get("schema"))
        _check_keys(place, cls, config_dict)
        sites = {}
        for name, record in config_dict["sites"].items():
            sites[name] = SiteRecord.read(f"{place}.sites.{name}", record)
        config = cls(**config_dict | {"sites": sites})
        if config.sha256 != config.checksum():
            raise InputError(f"{place}: does not match its checksum, the file was changed; {CURE}")
        return config


def _check_keys(place: str, kind: type, found: object) -> None:
    wanted = {field.name for field in fields(kind)}
    if not isinstance(found, dict):
        raise InputError(f"{place}: is no table of {', '.join(sorted(wanted))}; {CURE}")
    if unknown := sorted(set(found) - wanted):
        raise InputError(f"{place}: unknown key {unknown[0]!r}; {CURE}")
    if missing := sorted(wanted - set(found)):
        raise InputError(f"{place}: {missing[0]!r} is missing; {CURE}")


def digest(tensors: Iterable[Tensor]) -> str:
    """sha256 of shapes and values, in whatever floating dtype they are held."""
    found = hashlib.sha256()
    for tensor in tensors:
        found.update(str(tuple(tensor.shape)).encode())
        found.update(tensor.detach().cpu().double().contiguous().numpy().astype("<f8").tobytes())
    return found.hexdigest()
