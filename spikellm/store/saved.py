"""The folder of a saved spiking model from outside: whether a folder is one, that its files are those that were saved, how it was made.

`spikellm.json` is written last and names every file that decides which network this is, with size and sha256: config.json, weights,
tokenizer. Texts about the model and options of sampling (README.md, results.json, generation_config.json) are free to be edited. Sums are
those of `sha256sum`, and shards are hashed side by side; `verify=False` compares sizes alone, where 16 GB are not to be read twice.

How it was made stands in config.json, under quantization_config: `Provenance`. No torch here: the command asks before it composes.
"""

import json
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from spikellm.config.boundary import blamed_on
from spikellm.config.checks import InputError
from spikellm.config.snn import RotationConfig
from spikellm.store.artifacts import artifact_key, file_digest, intact_json, write_json
from spikellm.store.record import CompensateRecord, Record, RotationRecord, SearchRecord, TuneRecord, WeightsRecord

METHOD = "spikellm"  # quant_method in config.json
SCHEMA = 5  # of spikellm.json and of the description in config.json; raised when what is written no longer means the same
MANIFEST, CONFIG, TOKENIZER, CARD = "spikellm.json", "config.json", "tokenizer_config.json", "README.md"
CURE = "copy or convert it again"
WEIGHTS = ("*.safetensors", "*.safetensors.index.json")
# What transformers would read in the place of weights that were saved.
READ_AS_WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin")
# Nodes of the configuration that decide which network a conversion gives; beside them the seed.
CONVERTING = ("snn", "rotation", "weights", "prefix", "search", "tune", "compensate")
# How it is run: decided anew wherever it is measured.
RUNNING = ("snn.execution", "snn.step_chunk", "snn.max_memory_gib")


@dataclass(frozen=True, kw_only=True)
class Provenance(Record):
    """How a spiking model was made; what a run on the saved model reports of it."""

    model: str  # short name of the pretrained one
    path: str  # of it: hub id, package:file, name of a folder
    revision: str | None = None  # commit, of a hub id
    source: str | None = None  # fingerprint of its weights and tokenizer, as in `inputs` of results.json
    calibration: str | None = None  # fingerprint of the calibration text
    prefix_tokens: list[int]
    options: dict[str, Any]  # by dotted key of the configuration: T, grain, coding and all others that decide the network
    rotation: RotationRecord | None = None
    search: SearchRecord | None = None
    relative_error: dict[str, float]  # by site, on text that decided nothing
    tune: TuneRecord | None = None
    compensate: CompensateRecord | None = None
    weights: WeightsRecord | None = None
    versions: dict[str, str | None]  # that made it

    @property
    def keeps_weights(self) -> bool:
        """Whether the weights are the pretrained model's, rotated: without its neurons the network then is the pretrained one."""
        tuned = self.options.get("tune.epochs") and self.options.get("tune.what") == "all"
        return self.options.get("weights.bits") is None and not (tuned or self.options.get("compensate.enabled"))


def conversion_options(nodes: Mapping[str, Any], seed: int) -> dict[str, object]:
    """`Provenance.options` of the nodes of `CONVERTING`."""
    found = {f"{name}.{key}": _plain(value) for name in CONVERTING for key, value in asdict(nodes[name]).items()}
    return {key: value for key, value in found.items() if key not in RUNNING} | {"seed": seed}


def rotation_record(rotation: RotationConfig, orders: Mapping[str, list[int]], model: Mapping[str, object]) -> RotationRecord:
    """Which rotation, for results.json and `Provenance`; the hash is of it and of what `model` says of the pretrained model.

    Args:
        orders: of each acting part's Hadamard matrices (`model.rotation.orders`).
    """
    known: dict[str, Any] = {"kind": rotation.kind.value, "seed": rotation.seed, "parts": [str(part) for part in rotation.acting]}
    smaller = {part: found for part, found in orders.items() if len(found) > 1}  # what a plain Hadamard matrix is, the width says
    found = artifact_key(known | dict(model) | ({"orders": smaller} if smaller else {}))
    return RotationRecord(**known, orders=dict(orders), hash=found)


def _plain(value: Any) -> Any:
    """In JSON types."""
    return [_plain(each) for each in value] if isinstance(value, list) else getattr(value, "value", value)


def is_saved(folder: Path) -> bool:
    """Whether a spiking model was saved here, intact or not."""
    return (folder / MANIFEST).is_file() or described_in(intact_json(folder / CONFIG) or {}) is not None


def described_in(config: Mapping[str, Any]) -> dict[str, Any] | None:
    """The description in the content of a config.json; None: of no spiking model."""
    found = config.get("quantization_config")
    return found if isinstance(found, dict) and found.get("quant_method") == METHOD else None


def provenance_of(folder: Path) -> Provenance:
    """How the model in a folder was made.

    Raises:
        InputError: its config.json cannot be read, is of another version, or does not say.
    """
    with blamed_on(f"{folder}, {CONFIG}", CURE):
        content = json.loads((folder / CONFIG).read_bytes())
    description = described_in(content if isinstance(content, dict) else {})
    if description is None:
        raise InputError(f"{folder}, {CONFIG}: describes no spiking model; {CURE}")
    check_schema(f"{folder}, {CONFIG}", description.get("schema"))
    if description.get("provenance") is None:
        raise InputError(f"{folder}, {CONFIG}: does not say how the model was made; save it by save_model=true or Conversion.save")
    try:
        return Provenance.from_json(description["provenance"])
    except (ValueError, TypeError, AttributeError) as error:
        raise InputError(f"{folder}, {CONFIG}: says in part how the model was made ({error}); {CURE}") from error


def check_schema(place: str, schema: object) -> None:
    """Refuse what another version has written.

    Raises:
        InputError: with the cure.
    """
    if schema != SCHEMA:
        cure = "update spikellm" if isinstance(schema, int) and schema > SCHEMA else "convert again"
        raise InputError(f"{place}: schema={schema}, this version reads {SCHEMA}; {cure}")


def seal(folder: Path, names: Iterable[str] = ()) -> None:
    """Write `spikellm.json` over config.json, the weights and the files that are named beside them, as they are now."""
    files = {CONFIG, *names, *(file.name for pattern in WEIGHTS for file in folder.glob(pattern))}
    content = {name: {"bytes": (folder / name).stat().st_size, "sha256": file_digest(folder / name)} for name in sorted(files)}
    write_json(folder / MANIFEST, {"schema": SCHEMA, "files": content})


def check(folder: Path, *, verify: bool = True, whole: bool = True, digest: Callable[[Path], str] = file_digest) -> None:
    """Refuse a folder whose files are not those that were saved.

    Args:
        verify: compare contents; else sizes alone.
        digest: sha256 of a file; one that remembers it, where the same folder is looked at often.
        whole: every file must be there; else those that are there are looked at: a local cache of the hub holds what was asked for.

    Raises:
        InputError: names the file and the cure.
    """
    files = sealed(folder)
    found = [name for name in files if (folder / name).is_file()]
    if whole and (lost := sorted(set(files) - set(found))):
        raise InputError(f"{folder}, {lost[0]}: {'is no file' if (folder / lost[0]).exists() else 'is missing'}; {CURE}")
    for file in sorted(file for pattern in READ_AS_WEIGHTS for file in folder.glob(pattern)):
        if file.name not in files:
            raise InputError(f"{folder}, {file.name}: was not saved with the model and would be read in its place; take it away")
    for name in found:
        with blamed_on(f"{folder}, {name}", CURE):
            size = (folder / name).stat().st_size
        if size != files[name]["bytes"]:
            raise InputError(f"{folder}, {name}: has {size} bytes, {files[name]['bytes']} were saved; {CURE}")
    if verify:
        with ThreadPoolExecutor() as pool:
            digests = {name: pool.submit(digest, folder / name) for name in found}
        for name, future in digests.items():
            with blamed_on(f"{folder}, {name}", CURE):
                value = future.result()
            if value != files[name]["sha256"]:
                raise InputError(f"{folder}, {name}: does not match its checksum, the file was changed; {CURE}")


def sealed(folder: Path) -> dict[str, dict[str, Any]]:
    """Size and sha256 of every file that was saved, by name.

    Raises:
        InputError: there is no intact list of them.
    """
    place = f"{folder}, {MANIFEST}"
    if not (folder / MANIFEST).is_file():
        if (description := described_in(intact_json(folder / CONFIG) or {})) is not None:  # one of an older version has no such file
            check_schema(f"{folder}, {CONFIG}", description.get("schema"))
        raise InputError(f"{place}: is missing; {CURE}")
    content = intact_json(folder / MANIFEST) or {}
    check_schema(place, content.get("schema"))
    files = content.get("files")
    entries = files.values() if isinstance(files, dict) else [None]
    if not all(isinstance(each, dict) and {"bytes", "sha256"} <= set(each) for each in entries):
        raise InputError(f"{place}: is damaged; {CURE}")
    return content["files"]
