"""Load a causal language model and its tokenizer onto the hardware.

Three sources: a GGUF file inside an installed package (the embedded default: no hub needed), a hub id or local folder in
transformers' format, and random weights for tests. All give a plain transformers model with sdpa attention: the ANN.
"""

import logging
import re
from copy import deepcopy
from dataclasses import replace
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import torch
import transformers
from transformers import AutoConfig, PretrainedConfig, PreTrainedTokenizerBase

from spikellm.config.boundary import blamed_on
from spikellm.config.checks import InputError
from spikellm.config.choices import Device, ModelSource
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.config.schema import Config
from spikellm.model.intake import CURE, check_config, check_finite, check_folder, check_type, check_vocabulary, unfilled
from spikellm.model.offload import Keep, offload, put
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.shards import fetched, random_weight, shards, skeleton, tensors_of, written
from spikellm.model.sites import check_architecture
from spikellm.model.stored import Stored
from spikellm.store.saved import TOKENIZER
from spikellm.store.sources import cached_commit, packaged_file

log = logging.getLogger(__name__)

GIB = 2**30
WORKING_SHARE, WORKING_BYTES = 1.1, GIB  # what a network needs beside its weights: a part of them widened, activations of a window
HUB_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")
LEAST_POSITIONS = 2048  # of any supported pretrained model
# Options of an architecture of which torch takes 0, and makes a network of nothing.
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim")


def load_model(config: ModelConfig, hardware: HardwareConfig) -> PreTrainedModel:
    """The pretrained model in evaluation mode, weights in `load.dtype`, on `hardware.device`.

    Raises:
        InputError: unknown, gated or unreachable model, unsupported architecture, absent device.
    """
    dtype = getattr(torch, config.dtype.value)
    device_map = _device_map(hardware)
    model: PreTrainedModel
    if config.source is ModelSource.random:
        model = _random_model(config, dtype).to("cpu" if device_map is None else "cuda")  # small: never spread
    else:
        _looked_at(config)  # refuse before gigabytes are fetched
        arguments = {"dtype": dtype, "device_map": device_map, "attn_implementation": "sdpa", **_location(config)}
        if config.source is ModelSource.gguf and hasattr(transformers, "GgufConfig"):
            # since transformers 5.24 weights may stay in GGUF's blocks, which cannot be rotated
            arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
        if config.source is ModelSource.gguf:
            arguments["config"] = model_config(config)
        model = _from_hub(config, transformers.AutoModelForCausalLM, **arguments)
        if config.source is ModelSource.gguf:
            _forget_gguf(model)
        _check_in_memory(config, hardware, model)
        check_finite(config, model)
    check_type(config, model.config.model_type)
    check_architecture(model)
    model.eval().requires_grad_(False)
    return model


def load_offloaded(config: ModelConfig, hardware: HardwareConfig, keep: Keep, scratch: Path | None = None) -> PreTrainedModel:
    """The same model with its decoder layers on disk (`offload.py`): one of them is in memory at a time.

    Safetensors are read where they lie. What comes in another form is written as such once, layer by layer.

    Args:
        keep: where that is kept.
        scratch: folder for hidden states beyond `blocks.STATES_BYTES`; None: they stay in memory.

    Raises:
        InputError: as in `load_model`, but for weights of decoder layers that are NaN or infinite: nobody has read them.
    """
    dtype, device = getattr(torch, config.dtype.value), torch.device(_device_map(hardware) or "cpu")
    _looked_at(config)
    model = skeleton(model_config(config), dtype)
    check_type(config, model.config.model_type)
    check_architecture(model)
    stored = _stored(config, model, keep)
    if lost := unfilled(_loading_info(model, stored)):
        raise InputError(f"model.path={config.path}: {lost}; {CURE}")
    offload(model, stored, device, scratch)
    check_finite(config, model)  # its ends
    return model.eval().requires_grad_(False)


def stays_on_disk(config: ModelConfig, hardware: HardwareConfig) -> bool:
    """Whether a model's layers stay on disk: as `hardware.offload` says, or where its weights do not fit into the memory that is free."""
    if hardware.offload is not None or config.source is ModelSource.gguf or hardware.device is Device.auto:
        return bool(hardware.offload)
    weights = sum(parameter.nbytes for parameter in skeleton(model_config(config), getattr(torch, config.dtype.value)).parameters())
    free = psutil.virtual_memory().available if _device_map(hardware) is None else torch.cuda.mem_get_info()[0]
    room = free if hardware.max_memory_gib is None else hardware.max_memory_gib * GIB
    if weights * WORKING_SHARE + WORKING_BYTES <= room:
        return False
    log.info("%s: weights of %.1f GiB, memory of %.1f GiB: one decoder layer at a time", config.name, weights / GIB, room / GIB)
    return True


def _loading_info(model: PreTrainedModel, stored: Stored) -> dict[str, list]:
    """What transformers would say of a model that is filled with these tensors, for `intake.unfilled`."""
    wanted, found = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}, stored.shapes()
    return {
        "missing_keys": [name for name in tensors_of(model) if name not in found],
        "unexpected_keys": [name for name in found if name not in wanted],
        "mismatched_keys": [(name, found[name], shape) for name, shape in wanted.items() if found.get(name, shape) != shape],
        "error_msgs": [],
    }


def _stored(config: ModelConfig, model: PreTrainedModel, keep: Keep) -> Stored:
    if config.source is ModelSource.hub:
        folder = Path(config.path) if Path(config.path).is_dir() else fetched(config)
        if (found := shards(folder)) is not None:
            return found
    if config.source is ModelSource.random:
        return written(tensors_of(model), lambda name: random_weight(name, model, config), keep)
    whole: dict[str, torch.Tensor] = {}

    def tensor(name: str) -> torch.Tensor:
        if not whole:  # at the first one that is not written yet
            whole.update(load_model(config, HardwareConfig(device=Device.cpu)).state_dict())
        return whole[name]

    return written(tensors_of(model), tensor, keep)


def load_spiking(config: ModelConfig, hardware: HardwareConfig) -> PreTrainedModel:
    """A saved spiking model, whose files were looked at before.

    Raises:
        InputError: it does not fit together; absent device.
    """
    from spikellm.model import checkpoint  # subclasses of transformers' model, see `pretrained.py`

    arguments = {"dtype": getattr(torch, config.dtype.value), "compiled": hardware.fused, "query_block": hardware.query_block}
    model, _ = checkpoint.load(config.path, verify=False, device_map=_device_map(hardware), **arguments)
    _check_in_memory(config, hardware, model)
    return model


def load_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase | None:
    """The model's tokenizer; None for random models, whose tokens are the bytes of the text, and spiking ones made of them."""
    if config.source is ModelSource.random:
        return None
    if config.source is ModelSource.spiking and not (Path(config.path) / TOKENIZER).is_file():
        return None
    content = _looked_at(config)
    tokenizer = _from_hub(config, transformers.AutoTokenizer, **_location(config))
    check_vocabulary(config, content, tokenizer.vocab_size)
    return tokenizer


def model_config(config: ModelConfig) -> PretrainedConfig:
    """transformers' configuration of the model, without its weights."""
    if config.source is ModelSource.gguf:
        return deepcopy(_packed_config(config.path))
    return _random_config(config) if config.source is ModelSource.random else _from_hub(config, AutoConfig, **_location(config))


@cache
def _packed_config(path: str) -> PretrainedConfig:
    """That of a GGUF file, once in a process: it takes seconds, for the vocabulary is read with it."""
    config = ModelConfig(name="packed", source=ModelSource.gguf, path=path)
    found: PretrainedConfig = _from_hub(config, AutoConfig, **_location(config))
    return found


def vocabulary(config: ModelConfig) -> int | None:
    """Tokens that the model has embeddings for; None for GGUF, whose tokenizer is in the same file."""
    return None if config.source is ModelSource.gguf else model_config(config).vocab_size


def context_warning(config: Config) -> str | None:
    """What to say where windows are longer than the model's positions; None where they are not."""
    named = {"dataset.evaluation": config.dataset.evaluation}
    if config.model.source is not ModelSource.spiking:
        named = {"dataset.calibration": config.dataset.calibration} | named
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
        return transformers.AutoModelForCausalLM.from_config(model_config(config), trust_remote_code=False)


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


def _location(config: ModelConfig) -> dict[str, object]:
    if config.source is ModelSource.gguf:
        folder, name = packaged_file(config)
        return {"pretrained_model_name_or_path": str(folder), "gguf_file": name}
    return {"pretrained_model_name_or_path": config.path, "revision": config.revision or "main"}


def _from_hub(config: ModelConfig, loader: Any, /, **arguments: Any) -> Any:
    remote = config.source is ModelSource.hub and not Path(config.path).exists()
    weights = {"output_loading_info": True, "ignore_mismatched_sizes": True} if loader is transformers.AutoModelForCausalLM else {}
    place = f"model.path={config.path}"
    try:
        with blamed_on(place, "model.path=FOLDER takes a local copy in transformers' format" if remote else CURE):
            found = loader.from_pretrained(trust_remote_code=False, **weights, **arguments)
    except InputError as error:
        if not remote:
            raise
        text = " ".join(str(error.__cause__).split())
        if "gated" in text.lower() or "401" in text or "403" in text:
            raise InputError(f"{place}: the model is gated: accept its licence on the hub and log in (hf auth login)") from error
        hub = f", and the hub does not answer for it ({text.split('. ')[0][:300]})" if HUB_ID.fullmatch(config.path) else ""
        raise InputError(f"{place}: no such local folder{hub}; model.path=FOLDER takes a local copy in transformers' format") from error
    if weights:
        found, info = found
        if lost := unfilled(info):
            raise InputError(f"{place}: {lost}; {CURE}")
    return found


def _looked_at(config: ModelConfig) -> dict[str, object]:
    """The content of config.json, of a model that may be loaded; nothing for a packed file, which has none."""
    if config.source is not ModelSource.hub:
        return {}
    if Path(config.path).is_dir():
        check_folder(config)
    content, _ = _from_hub(config, SimpleNamespace(from_pretrained=PretrainedConfig.get_config_dict), **_location(config))
    check_config(config, content)
    return content


def _device_map(hardware: HardwareConfig) -> str | None:
    if hardware.device is Device.cpu:
        return None
    if not torch.cuda.is_available():
        raise InputError(f"hardware.device={hardware.device.value}: no CUDA device found; take hardware=cpu")
    return hardware.device.value


def _check_in_memory(config: ModelConfig, hardware: HardwareConfig, model: PreTrainedModel) -> None:
    """accelerate's device map offloads what does not fit and leaves meta tensors in its place: they cannot be rotated."""
    offloaded = sorted(name for name, parameter in model.named_parameters() if parameter.is_meta)
    if offloaded:
        raise InputError(
            f"hardware.device={hardware.device.value} with model={config.name}: {len(offloaded)} weights do not fit into the memory "
            f"of the GPUs ({offloaded[0]} ..); take more GPUs, model.dtype=bfloat16, or hardware=cpu"
        )


def _random_config(config: ModelConfig) -> PretrainedConfig:
    given = dict(config.options)
    architecture = str(given.pop("model_type", config.path))
    check_type(config, architecture)
    for key in SIZES:
        if isinstance(size := config.options.get(key, 1), int) and size < 1:
            raise InputError(f"model.options.{key}={size}: must be at least 1")
    spelled = ", ".join(f"{key}: {value}" for key, value in given.items())
    what = f"model.options={{{spelled}}} with model.path={architecture}"
    cure = "these do not fit each other; conf/model/tiny.yaml has some that do"
    with blamed_on(what, cure), torch.device("meta"):  # without weights: what is wrong is told in milliseconds
        options = AutoConfig.for_model(architecture, **given)
        model = transformers.AutoModelForCausalLM.from_config(options, attn_implementation="sdpa", trust_remote_code=False)
        model(torch.zeros(1, 2, dtype=torch.long))
    return options


def _random_model(config: ModelConfig, dtype: torch.dtype) -> Any:
    """The same weights in every dtype, rounded, each from its own name and the seed: no matter which of them are made, or when."""
    model = skeleton(_random_config(config), dtype)
    for name in tensors_of(model):
        put(model, name, random_weight(name, model, config), dtype=dtype, device="cpu")
    model.tie_weights()
    return model


def _forget_gguf(model: PreTrainedModel) -> None:
    """A model read from GGUF is an ordinary dense model from here on; its GGUF quantizer would refuse to be saved."""
    model.config.__dict__.pop("quantization_config", None)
    model.__dict__.pop("hf_quantizer", None)
    model.__dict__.pop("is_quantized", None)
