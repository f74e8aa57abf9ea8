"""Where the tensors of a model lie that is never in memory as a whole: a checkpoint's safetensors, or files made of other sources."""

import hashlib
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
import transformers
from accelerate import init_empty_weights
from huggingface_hub import snapshot_download
from jaxtyping import Float
from torch import Tensor
from transformers import PretrainedConfig

from spikellm.config.boundary import blamed_on
from spikellm.config.model import ModelConfig
from spikellm.model.offload import ENDS, FILE, Keep, present
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import HEAD, LAYERS, decoder_layers
from spikellm.model.stored import Stored
from spikellm.store.artifacts import write_json, write_tensors

PATTERN = "model*.safetensors"
REST = "rest"  # name of the part that is neither a decoder layer nor one of ENDS
DRAWN = 2**24  # numbers of a random tensor that are float32 at a time


def skeleton(config: PretrainedConfig, dtype: torch.dtype) -> PreTrainedModel:
    """The architecture without weights, in `dtype`; RoPE's frequencies are there, float32 as in a model that is read from a checkpoint."""
    with init_empty_weights(include_buffers=False):
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32, trust_remote_code=False
        )
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.config.dtype = dtype
    model.tie_weights()
    return model


def tensors_of(model: PreTrainedModel) -> list[str]:
    """Names of a model's parameters; tied ones have one."""
    return [name for name, _ in model.named_parameters() if not (model.config.tie_word_embeddings and name == f"{HEAD}.weight")]


def shards(folder: Path) -> Stored | None:
    """The tensors of a folder's safetensors by name; None: it has none."""
    return Stored.of(sorted(folder.glob(PATTERN))) or None


def fetched(config: ModelConfig) -> Path:
    """The local copy of a hub model's safetensors.

    Raises:
        InputError: the hub does not give it.
    """
    with blamed_on(f"model.path={config.path}", "model.path=FOLDER takes a local copy in transformers' format"):
        return Path(snapshot_download(config.path, revision=config.revision or "main", allow_patterns=[PATTERN, "*.json"]))


def written(names: Iterable[str], tensor: Callable[[str], Tensor], keep: Keep) -> Stored:
    """Tensors as files, one for each decoder layer and each end; `tensor` gives those that are not there yet."""
    parts: dict[str, list[str]] = {}
    for name in names:
        parts.setdefault(".".join(name.split(".")[:3]) if name.startswith(LAYERS) else _end(name), []).append(name)
    files: dict[str, Path] = {}
    for part, own in parts.items():

        def compute(folder: Path, own: list[str] = own) -> None:
            write_tensors(folder / FILE, {name: tensor(name).contiguous() for name in own})

        files |= dict.fromkeys(own, keep(part, compute) / FILE)
    return Stored(files)


def _end(name: str) -> str:
    """Which of ENDS a tensor is of, by its name; REST: of none."""
    return next((end for end in ENDS if name.startswith(end)), REST)


def random_weight(name: str, model: PreTrainedModel, config: ModelConfig) -> Float[Tensor, "..."]:
    """A random model's tensor, from its name and `model.seed` alone: Linears and embeddings normal, norms 1, biases 0."""
    like = model.get_parameter(name)
    if name.endswith("bias"):
        return torch.zeros(like.shape, dtype=like.dtype)
    if like.ndim == 1:
        return torch.ones(like.shape, dtype=like.dtype)
    seed = int.from_bytes(hashlib.sha256(f"{config.seed} {name}".encode()).digest()[:8]) >> 1
    deviation, generator = model.config.initializer_range, torch.Generator().manual_seed(seed)
    found = torch.empty(like.shape, dtype=like.dtype)
    for rows in found.split(max(1, DRAWN // like.shape[1])):
        rows.copy_(torch.empty(rows.shape).normal_(std=deviation, generator=generator))
    return found


def write_shards(model: PreTrainedModel, folder: Path) -> None:
    """The weights and buffers of a model as transformers reads them: a file for each decoder layer and each end, and the index."""
    layers = decoder_layers(model)
    tied = {f"{HEAD}.weight"} if model.config.tie_word_embeddings else set()
    rest = {name: tensor for name, tensor in model.state_dict().items() if not name.startswith(f"{LAYERS}.") and name not in tied}
    ends: dict[str, dict[str, Tensor]] = {}
    for name, tensor in rest.items():
        ends.setdefault(_end(name), {})[name] = tensor
    places: dict[str, str] = {}
    size = 0

    def write(number: int, tensors: dict[str, Tensor]) -> None:
        nonlocal size
        file = f"model-{number:05d}-of-{len(layers) + len(ends):05d}.safetensors"
        write_tensors(folder / file, {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}, {"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
        size += sum(tensor.nbytes for tensor in tensors.values())

    for number, tensors in enumerate(ends.values(), 1):
        write(number, tensors)
    for index, layer in enumerate(layers):
        with present(layer):
            write(len(ends) + index + 1, {f"{LAYERS}.{index}.{name}": tensor for name, tensor in layer.state_dict().items()})
    write_json(folder / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": places})
