"""What was learnt of a block, as a value and on disk."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors.torch import load_file
from torch import Tensor

from spikellm.calibration.statistics import SiteStatistics
from spikellm.coding.neuron import PhaseTable
from spikellm.model.sites import LAYERS
from spikellm.search.fit import CodeFit, stored_digits
from spikellm.store.artifacts import write_tensors

Tables = dict[str, PhaseTable]  # by name of the site
Weights = dict[str, Float[Tensor, "O I"]]  # by name of the Linear below its layer


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class TunedBlock:
    """What was learnt of one block, and its loss on the choosing part before and after."""

    tables: Tables  # empty where weights are re-fitted alone
    weights: Weights  # those that have changed
    before: float
    after: float


def by_path(found: Mapping[int, TunedBlock]) -> Weights:
    """The weights of a network's blocks, given by layer, by path of the Linear."""
    return {f"{LAYERS}.{layer}.{name}": weight for layer, block in found.items() for name, weight in block.weights.items()}


def save_block(path: Path, block: TunedBlock) -> None:
    """Write a block to a safetensors file."""
    tensors = {"before": torch.tensor(block.before, dtype=torch.float64), "after": torch.tensor(block.after, dtype=torch.float64)}
    for site, table in block.tables.items():
        values = table.rows._asdict() | {"cuts": table.cuts} | asdict(table.digits)
        tensors |= {f"table:{site}:{name}": torch.as_tensor(value) for name, value in values.items() if value is not None}
    tensors |= {f"weight:{name}": weight for name, weight in block.weights.items()}
    write_tensors(path, {key: value.cpu().clone(memory_format=torch.contiguous_format) for key, value in tensors.items()})


def load_block(path: Path) -> TunedBlock:
    """What `save_block` wrote."""
    tensors = load_file(path)
    tables: dict[str, dict[str, Tensor]] = {}
    weights = {}
    for key, value in tensors.items():
        match key.split(":"):
            case ["table", site, name]:
                tables.setdefault(site, {})[name] = value
            case ["weight", name]:
                weights[name] = value
    return TunedBlock(
        tables={site: _table(values) for site, values in tables.items()},
        weights=weights,
        before=tensors["before"].item(),
        after=tensors["after"].item(),
    )


def _table(values: dict[str, Tensor]) -> PhaseTable:
    digits = stored_digits(values)
    return PhaseTable(values["theta"], values["h"], values["d"], values["v0"], digits=digits, cuts=values.get("cuts"))


def retabled(fit: CodeFit, table: PhaseTable | None, statistics: SiteStatistics) -> CodeFit:
    """A site's code with another table, its errors and firing rates those of the table on the reporting part; None: as it is.

    Amplitude, bases and rho stay those that the search found: no bases spell a tuned table. v0 is the table's.
    """
    if table is None:
        return fit
    return fit.with_table(table.to(fit.theta), statistics.to(fit.theta.device))
