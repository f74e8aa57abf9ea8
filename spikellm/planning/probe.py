"""One decoder layer of a model's shape with weights made up, timed in what a run does with every layer.

Nothing of the pretrained model is read but its configuration. The layer goes through the same code as those of a run: rotated, observed,
with neurons. Times of two lengths of a window give the part that grows with the tokens and the part, attention's, that grows with their
square.
"""

import copy
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import PretrainedConfig

from spikellm.calibration.calibrate import observing
from spikellm.coding.codes import IntervalCodes, base2_codes
from spikellm.config.choices import RotationKind, SoftmaxNorm
from spikellm.config.model import HardwareConfig
from spikellm.config.snn import RotationConfig
from spikellm.model.blocks import Block, enter
from spikellm.model.conversion import install, model_sites, place, site_groups
from spikellm.model.offload import put
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.rotation import begin, rotate_block
from spikellm.model.shards import skeleton, tensors_of
from spikellm.model.sites import decoder_layers, head_width
from spikellm.planning.machine import Machine, seconds
from spikellm.search.options import Options

VOCABULARY = 64  # of the made-up model: its ends are reckoned, not timed
PATTERN = 2**16  # different numbers in a weight; drawing all of a large layer's takes seconds
LONGEST, SHORTEST = 2048, 64  # windows that are timed [tokens]
PRODUCT_SECONDS = 0.5  # that the longest timed window's products take, about


@dataclass(frozen=True, slots=True, kw_only=True)
class Cost:
    """Seconds that a layer takes for a window, by its tokens."""

    linear: float
    square: float

    def __call__(self, tokens: int) -> float:
        """Of a window of so many tokens."""
        return self.linear * tokens + self.square * tokens**2


@dataclass(frozen=True, slots=True, kw_only=True)
class LayerCosts:
    """What one decoder layer takes [s]."""

    rotate: float
    plain: Cost  # a window through it without neurons
    observed: Cost  # with observers at all sites
    spiking: Cost  # with neurons at all sites, folded


@torch.no_grad()
def probe(
    config: PretrainedConfig,
    dtype: torch.dtype,
    machine: Machine,
    hardware: HardwareConfig,
    rotation: RotationConfig,
    options: Options,
    *,
    window: int,
) -> LayerCosts:
    """Time one layer.

    Args:
        config: transformers' configuration of the model.
        dtype: of its weights.
        options: of the codes; T, digits.
        window: the longest of the run [tokens].
    """
    device = torch.device(machine.device)
    model = made_up(config, dtype, device)
    layer = decoder_layers(model)[0]
    parts = rotation.acting
    signs = begin(model, seed=rotation.seed, parts=parts) if rotation.kind is RotationKind.hadamard else None
    start = time.perf_counter()
    if rotation.kind is RotationKind.hadamard:
        rotate_block(layer, parts, signs, head_width(model.config))
    rotated = time.perf_counter() - start
    after = options.snn.softmax_norm is SoftmaxNorm.after
    install(model, rotated=parts, normalise_after=after, query_block=hardware.query_block)

    per_token = 2 * sum(weight.numel() for weight in layer.parameters()) / machine.products
    longest = min(window, LONGEST)
    while longest > SHORTEST and longest * per_token > PRODUCT_SECONDS:
        longest //= 2

    def cost(inside: Callable[[Block, Tensor], object]) -> Cost:
        taken = {}
        for tokens in (longest, max(2, longest // 2)):
            (state,), row = enter(model, [torch.arange(tokens)[None] % VOCABULARY])
            block = next(iter(row))
            taken[tokens] = seconds(partial(inside, block, state), device)
        return fitted(taken)

    def through(block: Block, state: Tensor) -> None:
        block(state)

    def observed(block: Block, state: Tensor) -> None:
        with observing(model, block):
            block(state)

    plain, watched = cost(through), cost(observed)
    for site in model_sites(model):
        codes = IntervalCodes.single(base2_codes(torch.ones(site_groups(model.config, site.kind)), options.T))
        place(model, site, codes.table(options.digits), compiled=hardware.fused)
    return LayerCosts(rotate=rotated, plain=plain, observed=watched, spiking=cost(through))


def fitted(taken: dict[int, float]) -> Cost:
    """The cost that gives the seconds of two lengths; neither part is negative, whatever else the machine was doing."""
    (longer, most), (shorter, least) = sorted(taken.items(), reverse=True)
    square = (most / longer - least / shorter) / (longer - shorter)
    square = min(max(square, 0.0), most / longer**2)
    return Cost(linear=most / longer - square * longer, square=square)


def made_up(config: PretrainedConfig, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """A model of one layer of the same shape, its numbers a short random sequence over and over."""
    small = copy.deepcopy(config)
    small.num_hidden_layers, small.vocab_size, small.tie_word_embeddings = 1, VOCABULARY, False
    small.pad_token_id = small.bos_token_id = small.eos_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    model: Any = skeleton(small, dtype)
    pattern = 0.02 * torch.randn(PATTERN, generator=torch.Generator().manual_seed(0))
    for name in tensors_of(model):
        like = model.get_parameter(name)
        numbers = torch.ones(like.shape) if like.ndim == 1 else pattern.repeat(-(-like.numel() // PATTERN))[: like.numel()].view(like.shape)
        put(model, name, numbers, dtype=dtype, device=device)
    return model.to(device).eval().requires_grad_(False)
