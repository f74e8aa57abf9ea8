"""A model whose decoder layers lie on disk: a layer's weights are in memory while it is called, or while `present` holds them.

    offload    a model without weights gets its ends (embedding, final norm, lm_head) and a hook at every layer
    present    within, a layer's weights are there for as many calls as there are windows
    rotate     the layers' rotated weights become files of their own; the model then reads these

On a CPU a tensor of the model's dtype is its pages of the file: they come in at first use and leave with the layer, nothing is copied, and
a layer that several passes read stays in the page cache where there is room. Whatever walks over blocks (`model/blocks.py`) holds one
layer at a time; a plain forward brings every layer in once. The next one is read meanwhile (`ahead.py`).
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from accelerate.utils import send_to_device
from torch import Tensor, nn
from tqdm.auto import tqdm

from spikellm.config.choices import RotationPart
from spikellm.model.ahead import ReadAhead
from spikellm.model.intake import not_finite
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.rotation import begin, rotate_block
from spikellm.model.sites import EMBEDDING, FINAL_NORM, HEAD, LAYERS, decoder_layers, head_width
from spikellm.model.stored import Below, Stored
from spikellm.store.artifacts import write_tensors

# The folder of a part by its name, made once by the function where it is not there yet.
Keep = Callable[[str, Callable[[Path], None]], Path]

ENDS = (EMBEDDING, FINAL_NORM, HEAD)
FILE = "weights.safetensors"


class OnDisk(ModelHook):
    """accelerate's hook of a decoder layer: its weights come before a call and go after it, unless they are held.

    Args:
        weights: the layer's, by name below it.
        device: where the layer is called.
        ahead: reads weights; shared by the layers of a model.
        scratch: folder for hidden states that do not stay in memory either; None: they do.
    """

    change: Callable[[nn.Module], None] | None = None  # of the weights, whenever they have come
    following: "OnDisk | None" = None  # of the layer that is called next

    def __init__(self, weights: Below, device: torch.device, ahead: ReadAhead, scratch: Path | None = None) -> None:
        self.weights, self.device, self.ahead, self.scratch, self.holders = weights, device, ahead, scratch, 0

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[tuple, dict]:
        """The weights are there."""
        self.take(module)
        return send_to_device(args, self.device), send_to_device(kwargs, self.device)

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        """They are gone, if nobody else holds them."""
        self.leave(module)
        return output

    def take(self, module: nn.Module, *, ahead: bool = True) -> None:
        """Bring the weights in for one more holder; `ahead`: those of the layer that follows will be wanted too."""
        if not self.holders:
            found = self.ahead.get(self.weights)
            if ahead and self.following is not None:
                self.ahead.expect(self.following.weights)
            for name, parameter in list(module.named_parameters()):
                put(module, name, found[name], dtype=parameter.dtype, device=self.device)
            if self.change is not None:
                self.change(module)
        self.holders += 1

    def leave(self, module: nn.Module) -> None:
        """One holder less; after the last one the weights are dropped."""
        self.holders -= 1
        if not self.holders:
            for name, parameter in list(module.named_parameters()):
                put(module, name, torch.empty_like(parameter, device="meta"), dtype=parameter.dtype, device=torch.device("meta"))


def put(module: nn.Module, name: str, value: Tensor, *, dtype: torch.dtype, device: torch.device | str) -> None:
    """Give a module another parameter, by its path."""
    owner, _, own = name.rpartition(".")
    setattr(module.get_submodule(owner), own, nn.Parameter(value.to(device=device, dtype=dtype), requires_grad=False))


def hook_of(module: nn.Module) -> OnDisk | None:
    """What brings in a module's weights; None: they are in memory."""
    hook = getattr(module, "_hf_hook", None)
    return hook if isinstance(hook, OnDisk) else None


def is_offloaded(model: PreTrainedModel) -> bool:
    """Whether layers of a model lie on disk."""
    return any(hook_of(layer) for layer in decoder_layers(model))


def scratch_of(model: PreTrainedModel) -> Path | None:
    """Where hidden states may lie of a model whose layers are on disk; None: they stay in memory."""
    return next((hook.scratch for layer in decoder_layers(model) if (hook := hook_of(layer)) is not None), None)


@contextmanager
def _held(hook: OnDisk, module: nn.Module, *, ahead: bool) -> Iterator[None]:
    hook.take(module, ahead=ahead)
    try:
        yield
    finally:
        hook.leave(module)


def present(module: nn.Module, *, ahead: bool = True) -> AbstractContextManager[None]:
    """A context within which the weights of a block are in memory; of one that has them there anyway it does nothing.

    Args:
        ahead: False where weights are not computed with: on a CPU none of their pages come in then.
    """
    hook = hook_of(module)
    return nullcontext() if hook is None else _held(hook, module, ahead=ahead)


@runtime_checkable
class LayerChange(Protocol):
    """Something that gives decoder layers other weights."""

    def apply_to(self, layer: nn.Module, path: str) -> None:
        """Those of the layer at a path of the model, in place."""


def change_layers(model: PreTrainedModel, change: LayerChange) -> None:
    """Give all decoder layers other weights: now, or whenever they are brought in."""
    for index, layer in enumerate(decoder_layers(model)):
        path, hook = f"{LAYERS}.{index}", hook_of(layer)
        if hook is None:
            change.apply_to(layer, path)
        else:
            hook.change = partial(change.apply_to, path=path)


def offload(model: PreTrainedModel, stored: Stored, device: torch.device, scratch: Path | None = None) -> None:
    """Give a model on the meta device its ends, and its layers a hook each; tied weights are one tensor, as in the checkpoint.

    Args:
        stored: the tensors of the checkpoint.
        device, scratch: see `OnDisk`.

    Raises:
        KeyError: a tensor is not stored.
    """
    tied = HEAD if f"{HEAD}.weight" not in stored else None
    for end in ENDS:
        for name, parameter in list(model.get_submodule(end).named_parameters()):
            if end != tied:
                put(model, f"{end}.{name}", stored[f"{end}.{name}"].clone(), dtype=parameter.dtype, device=device)
    if tied:
        model.tie_weights()
    ahead, layers = ReadAhead(device), decoder_layers(model)
    hooks = [OnDisk(stored.below(f"{LAYERS}.{index}"), device, ahead, scratch) for index in range(len(layers))]
    for hook, following in pairwise(hooks):
        hook.following = following
    for layer, hook in zip(layers, hooks, strict=True):
        add_hook_to_module(layer, hook)


@torch.no_grad()
def rotate(model: PreTrainedModel, *, seed: int, parts: Collection[RotationPart], keep: Keep) -> None:
    """`rotation.rotate` of an offloaded model: one layer after the other into a file of its own, from which the model reads it then.

    Args:
        keep: where rotated layers are kept; of a run that was stopped those are there.

    Raises:
        FloatingPointError: a weight is NaN or infinite; names it.
    """
    signs = begin(model, seed=seed, parts=parts)
    for index, layer in enumerate(tqdm(decoder_layers(model), desc="rotate", unit="layer", disable=None)):
        path, hook = f"{LAYERS}.{index}", hook_of(layer)
        assert hook is not None

        def compute(folder: Path, layer: nn.Module = layer, path: str = path) -> None:
            with present(layer):
                for parameter in layer.parameters():
                    parameter.data = parameter.data.clone()  # what is mapped stays as it is
                if found := not_finite(layer):
                    raise FloatingPointError(f"{path}.{found}")
                rotate_block(layer, parts, signs, head_width(model.config))
                write_tensors(folder / FILE, {f"{path}.{name}": weight.cpu() for name, weight in layer.named_parameters()})

        file = keep(path, compute) / FILE
        hook.weights = Stored({f"{path}.{name}": file for name, _ in layer.named_parameters()}).below(path)
