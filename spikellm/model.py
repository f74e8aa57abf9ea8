"""Load a causal language model and its tokenizer onto the hardware.

Three sources: a GGUF file inside an installed package (the embedded default: no hub needed), a hub id or local folder in
transformers' format, and random weights for tests. All give a plain transformers model with sdpa attention: the ANN.
"""

import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from spikellm.config import Device, HardwareConfig, InputError, ModelConfig, ModelSource
from spikellm.data import settle_for_cache_if_unreachable
from spikellm.sites import ARCHITECTURES, check_architecture
from spikellm.sources import cached_commit, packaged_file

log = logging.getLogger(__name__)


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
    _check_type(config, model.config.model_type)
    check_architecture(model)
    model.eval().requires_grad_(False)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for random models, whose tokens are the bytes of the text."""
    if config.source is ModelSource.random:
        return None
    return _from_hub(config, AutoTokenizer, **_location(config))


def empty_model(config: ModelConfig) -> PreTrainedModel:
    """The architecture on the meta device, without weights (random sources and local or hub configs)."""
    architecture = _random_config(config) if config.source is ModelSource.random else _from_hub(config, AutoConfig, **_location(config))
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(architecture)


def pinned(config: ModelConfig) -> ModelConfig:
    """The same model with the revision of a hub id resolved to the commit that it stands for now.

    What a job loads from then on, weights, configurations and tokenizer, is of this commit, whatever happens to the branch.

    Raises:
        InputError: the model is unknown, or the hub does not answer and the local cache does not have it.
    """
    if config.source is not ModelSource.hub or Path(config.path).is_dir():
        return config
    _from_hub(config, AutoConfig, **_location(config))  # brings the local cache up to date with the hub
    return replace(config, revision=cached_commit(config.path, config.revision or "main") or config.revision)


def _location(config: ModelConfig) -> dict[str, Any]:
    if config.source is ModelSource.gguf:
        folder, name = packaged_file(config)
        return {"pretrained_model_name_or_path": str(folder), "gguf_file": name}
    return {"pretrained_model_name_or_path": config.path, "revision": config.revision or "main"}


def _from_hub(config: ModelConfig, loader: Any, **arguments: Any) -> Any:
    if config.source is ModelSource.hub and not Path(config.path).is_dir():
        settle_for_cache_if_unreachable()
    try:
        return loader.from_pretrained(**arguments)
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


def _check_type(config: ModelConfig, model_type: str) -> None:
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"model={config.name}, model.path={config.path}: architecture {model_type!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )


def _random_config(config: ModelConfig) -> Any:
    _check_type(config, config.path)
    return AutoConfig.for_model(config.path, **config.options)


def _random_model(config: ModelConfig) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        return AutoModelForCausalLM.from_config(_random_config(config), attn_implementation="sdpa")


def _forget_gguf(model: PreTrainedModel) -> None:
    """A model read from GGUF is an ordinary dense model from here on; its GGUF quantizer would refuse to be saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("is_quantized", None)
