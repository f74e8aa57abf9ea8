"""How much there is of a model: bytes of a layer and of the ends, widths, groups of neurons; from its configuration alone."""

from dataclasses import dataclass
from typing import Any, Self

import torch
from transformers import PretrainedConfig

from spikellm.model.conversion import site_groups
from spikellm.model.modules import wide
from spikellm.model.shards import skeleton
from spikellm.model.sites import EMBEDDING, HEAD, SLOTS, decoder_layers, head_width


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """Numbers, not bytes, where nothing else is said."""

    layers: int
    layer: int  # weights of one
    largest: int  # of a layer's matrices
    embedding: int  # weights
    head: int  # weights of lm_head, which a rotated model has for itself
    tied: bool  # in the checkpoint
    hidden: int
    width: int  # of the MLP
    heads: int
    head_width: int
    vocabulary: int
    groups: int  # of neurons, in a layer
    most_groups: int  # at one site
    weight_bytes: int  # of a weight
    state_bytes: int  # of an activation

    @classmethod
    def of(cls, config: PretrainedConfig, dtype: torch.dtype) -> Self:
        """The shape of the model of a configuration, with weights of `dtype`."""
        model = skeleton(config, dtype)
        layer = decoder_layers(model)[0]
        embedding, head = (model.get_submodule(end).get_parameter("weight") for end in (EMBEDDING, HEAD))
        groups = [site_groups(config, kind) for kind in SLOTS]
        known: Any = config
        return cls(
            layers=len(decoder_layers(model)),
            layer=sum(weight.numel() for weight in layer.parameters()),
            largest=max(weight.numel() for weight in layer.parameters()),
            embedding=embedding.numel(),
            head=head.numel(),
            tied=head is embedding,
            hidden=known.hidden_size,
            width=known.intermediate_size,
            heads=known.num_attention_heads,
            head_width=head_width(config),
            vocabulary=known.vocab_size,
            groups=sum(groups) - 1,  # the last is the final norm's
            most_groups=max(groups),
            weight_bytes=dtype.itemsize,
            state_bytes=wide(dtype).itemsize,
        )

    @property
    def layers_bytes(self) -> int:
        """Of the weights of all layers."""
        return self.weight_bytes * self.layers * self.layer

    @property
    def checkpoint_bytes(self) -> int:
        """Of the pretrained weights."""
        return self.layers_bytes + self.weight_bytes * (self.embedding + (0 if self.tied else self.head))

    @property
    def converted_bytes(self) -> int:
        """Of the rotated ones."""
        return self.layers_bytes + self.ends_bytes

    @property
    def ends_bytes(self) -> int:
        """Of the rotated embedding and lm_head."""
        return self.weight_bytes * (self.embedding + self.head)
