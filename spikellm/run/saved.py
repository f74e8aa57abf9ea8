"""A saved spiking model on the command line: what its folder says need not be said again, and cannot be contradicted.

`python main.py model.path=FOLDER` with such a folder is completed by overrides, before Hydra composes: T, grain, coding and all else that
decided the network, its name and dtype, and where nothing else is asked for the stage and the networks that it can be measured by. The
name of the run's folder, the results and the keys of figures then speak of the network that is measured.
"""

import json
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override

from spikellm.config.checks import InputError
from spikellm.store.artifacts import intact_json
from spikellm.store.saved import CONFIG, Provenance, is_saved, provenance_of

FIELD_OF_GROUP = {"grain": "snn.grain", "timesteps": "snn.T"}  # groups that set one field of a conversion


def completed(arguments: list[str]) -> list[str]:
    """Arguments that Hydra can read, with those that a saved model's folder gives.

    Raises:
        InputError: an option contradicts the folder; several models where one of them is a saved one.
    """
    given = _overrides(arguments)
    folder = _saved(given)
    if folder is None or _value(given.get("model.source")) not in (None, "spiking"):
        return arguments
    made = provenance_of(folder)
    if _value(given.get("experiment")) is not None:
        raise InputError(f"{given['experiment'].input_line}: says how a model is converted, and {folder} is one already; leave it out")
    for key, override in given.items():
        field = FIELD_OF_GROUP.get(key, key)
        if field in made.options and (override.is_sweep_override() or not _equal(override.value(), made.options[field])):
            raise InputError(
                f"{override.input_line}: {folder} is a spiking model of {field}={_text(made.options[field])}; leave the option out, "
                f"or convert {made.path} again"
            )
    return [*arguments, *(f"{key}={text}" for key, text in _told(folder, made).items() if key not in given)]


def as_given(arguments: list[str]) -> list[str]:
    """The arguments without those that a saved model's folder gives anyway."""
    folder = _saved(_overrides(arguments))
    told = {} if folder is None else _told(folder, provenance_of(folder))
    return [argument for argument in arguments if argument not in {f"{key}={text}" for key, text in told.items()}]


def _overrides(arguments: list[str]) -> dict[str, Override]:
    """By key or group; none where no path of a model is given, so that Hydra itself reads what people type."""
    if not any(argument.lstrip("+").startswith("model.path=") for argument in arguments):
        return {}
    parser = OverridesParser.create()
    found = [parser.parse_override(each) for each in arguments if "=" in each and not each.startswith("-")]
    return {override.key_or_group: override for override in found}


def _saved(given: dict[str, Override]) -> Path | None:
    """The folder of the saved model that is named; None: it is another model."""
    override = given.get("model.path")
    if override is None:
        return None
    if override.is_sweep_override():
        for path in map(str, override.sweep_iterator()):
            if is_saved(Path(path.strip("'\""))):
                raise InputError(f"{override.input_line}: {path} is a saved spiking model, which has its own T and grain; give it alone")
        return None
    folder = Path(str(override.value()))
    return folder if is_saved(folder) else None


def _told(folder: Path, made: Provenance) -> dict[str, str]:
    """What the folder says, as values of the command line."""
    networks = ["ann_prefix", "snn"] if made.keeps_weights else ["snn"]
    dtype = (intact_json(folder / CONFIG) or {}).get("dtype", "float32")
    told: dict[str, object] = {"model.source": "spiking", "model.name": made.model, "model.dtype": dtype}
    told |= made.options | {"evaluation.networks": networks, "stages": ["evaluate"]}
    return {key: _quoted(value) for key, value in told.items()}


def _text(value: object) -> str:
    """As a person writes it."""
    if isinstance(value, list):
        return f"[{','.join(map(_text, value))}]"
    return value if isinstance(value, str) else json.dumps(value)


def _quoted(value: object) -> str:
    """As Hydra reads it: a text that may be taken for something else, as the 2 of two grains, stands in quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) and not value.isidentifier() else _text(value)


def _value(override: Override | None) -> Any:
    return None if override is None or override.is_sweep_override() else override.value()


def _equal(given: object, made: object) -> bool:
    """Whether a value of the command line is the one that was saved; grain=2 is grain='2'."""
    return given == made or str(given) == str(made)
