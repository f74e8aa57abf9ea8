"""What a folder of weights must be to become a model here: looked at before it is loaded, cheaply, and after.

transformers fills what a checkpoint lacks with random numbers, leaves out what it does not expect, and says either in a report that
nobody reads. Here such a checkpoint is refused, with the first name, before the long work starts.
"""

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.config.boundary import blamed_on
from spikellm.config.checks import InputError
from spikellm.config.model import ModelConfig
from spikellm.model.sites import ARCHITECTURES, EMBEDDING, FINAL_NORM, HEAD, SPIKING_TYPE
from spikellm.model.stored import forms_of

DESCRIPTIONS = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "vocab.json", "*.index.json")
LFS_POINTER = b"version https://git-lfs"
OF_A_DECODER = re.compile(rf"(^|\.)layers\.\d+\.|^({re.escape(EMBEDDING)}|{re.escape(FINAL_NORM)}|{HEAD})\.")
DERIVED = re.compile(r"\.(rotary_emb\.inv_freq|attn\.(masked_)?bias)$")  # of older transformers: buffers that the config determines
FLOATING = ("F64", "F32", "F16", "BF16")  # as safetensors names them
CURE = "give a folder in transformers' format, fetched whole"


def check_folder(config: ModelConfig) -> None:
    """Refuse a local folder by what its files look like from outside.

    Raises:
        InputError: an adapter, or a file that is empty, a git-lfs pointer, damaged, or a pickle of anything but weights.
    """
    folder, place = Path(config.path), f"model.path={config.path}"
    if (folder / "adapter_config.json").exists():
        raise InputError(f"{place}: holds an adapter (adapter_config.json); merge it into its model (merge_and_unload) and save that")
    files = [
        file for pattern in (*DESCRIPTIONS, "tokenizer.model", "model*.safetensors", "pytorch_model*.bin") for file in folder.glob(pattern)
    ]
    for file in sorted(files):
        if not file.is_file():  # a pipe would be waited for
            raise InputError(f"{place}, {file.name}: is no file; {CURE}")
        with blamed_on(f"{place}, {file.name}", CURE), file.open("rb") as stream:
            head = stream.read(len(LFS_POINTER))
        if not head:
            raise InputError(f"{place}, {file.name}: is empty; {CURE}")
        if head == LFS_POINTER:
            raise InputError(f"{place}, {file.name}: is a git-lfs pointer, not the file; fetch it with: git lfs pull")
        if file.suffix == ".json":
            with blamed_on(f"{place}, {file.name}", CURE):
                content = json.loads(file.read_bytes())
            if not isinstance(content, dict):
                raise InputError(f"{place}, {file.name}: holds no JSON object; {CURE}")
        if file.suffix == ".safetensors":
            for name, (dtype, _) in forms_of(file, f"{place}, {file.name}", CURE).items():
                if dtype not in FLOATING and OF_A_DECODER.search(name) and not DERIVED.search(name):
                    raise InputError(f"{place}, {file.name}: {name} is {dtype}; give the model in 16 or 32 bits")
        if file.suffix == ".bin" and not _holds_weights(file):
            raise InputError(f"{place}, {file.name}: is no pickle of weights alone; give the model as safetensors")


def _holds_weights(pickle: Path) -> bool:
    """Whether a file is read, without running code of it, as tensors by name; what an archive holds is not read into memory."""
    try:
        found = torch.load(pickle, map_location="cpu", weights_only=True, mmap=is_zipfile(pickle))
    except Exception:  # bytes that are no pickle can raise nearly anything; torch's own message advises to let the code run
        return False
    return isinstance(found, Mapping) and all(isinstance(key, str) and isinstance(value, Tensor) for key, value in found.items())


def check_config(config: ModelConfig, content: Mapping[str, object]) -> None:
    """Refuse a model by its config.json, before any of its code could be asked for and before its weights are fetched.

    Raises:
        InputError: a spiking or quantised model, or an unsupported architecture.
    """
    kind, quantised = str(content.get("model_type")), content.get("quantization_config") or content.get("compression_config")
    method = quantised.get("quant_method", "unknown method") if isinstance(quantised, Mapping) else quantised
    if kind.endswith(SPIKING_TYPE) or method == "spikellm":
        raise InputError(
            f"model.path={config.path}: holds a spiking model already; leave model.source out to measure it, or give the pretrained model "
            "that it was made of"
        )
    if quantised:
        raise InputError(
            f"model.path={config.path}: holds quantised weights ({method}); give the model in 16 or 32 bits that it was made of"
        )
    check_type(config, kind)


def check_type(config: ModelConfig, model_type: str) -> None:
    """Refuse an architecture by name.

    Raises:
        InputError: it is not supported.
    """
    if model_type not in ARCHITECTURES:
        raise InputError(
            f"model={config.name}, model.path={config.path}: architecture {model_type!r} is not supported; "
            f"supported: {', '.join(ARCHITECTURES)}"
        )


def check_vocabulary(config: ModelConfig, content: Mapping[str, object], tokens: int) -> None:
    """Refuse a tokenizer whose own vocabulary (without tokens added to it) goes beyond the embedding.

    Raises:
        InputError: it does.
    """
    rows = content.get("vocab_size")
    if isinstance(rows, int) and tokens > rows:
        raise InputError(
            f"model.path={config.path}: the tokenizer has {tokens} tokens, the embedding {rows} rows (vocab_size in config.json): "
            f"they are not of one model; {CURE}"
        )


def unfilled(info: Mapping[str, Any]) -> str | None:
    """What is wrong between a checkpoint and its model, by what `output_loading_info` of `from_pretrained` gives; None: nothing."""
    lost = sorted(key for key in info["unexpected_keys"] if OF_A_DECODER.search(key) and not DERIVED.search(key))
    if missing := sorted(info["missing_keys"]):
        besides = f", and {len(lost)} in it are not the model's, {lost[0]} first" if lost else ""
        return f"{len(missing)} tensors of the model are not in the checkpoint, {missing[0]} first{besides}"
    if mismatched := sorted(info["mismatched_keys"]):
        name, found, wanted = mismatched[0]
        return f"{len(mismatched)} tensors have other shapes than config.json says, {name} first: {tuple(found)}, not {tuple(wanted)}"
    if lost:
        return f"{len(lost)} weights of the checkpoint have no place in the model that config.json describes, {lost[0]} first"
    return str(info["error_msgs"][0]) if info["error_msgs"] else None


def not_finite(model: nn.Module) -> str | None:
    """The first weight that holds NaN or infinite values, and how many; None: no weight does."""
    for name, weight in tqdm(model.named_parameters(), desc="weights", unit="tensor", leave=False, disable=None):
        if not (weight.is_meta or weight.isfinite().all()):
            return f"{name} has {(~weight.isfinite()).sum()} values of {weight.numel()} that are NaN or infinite"
    return None


def check_finite(config: ModelConfig, model: nn.Module) -> None:
    """Refuse weights that are no numbers.

    Raises:
        InputError: NaN or infinite values; names the first tensor.
    """
    if found := not_finite(model):
        cure = "model.dtype=bfloat16 has a wider range" if config.dtype.value == "float16" else CURE
        raise InputError(f"model.path={config.path}: {found} in model.dtype={config.dtype.value}; {cure}")
