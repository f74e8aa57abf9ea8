"""The vocabulary of places: where a LLaMA-family decoder multiplies an activation, and what the place is called.

Nine sites in every decoder layer and one after the last: `layers.3.softmax`, `head_input`. The attribute names of transformers' LLaMA
implementation are written here and nowhere else; Mistral, Qwen2 and Qwen3 share them.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import nn

from spikellm.config.choices import Amplitude
from spikellm.config.labels import SiteKind

ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
# Of these, those whose layers may differ in their windows (layer_types); all of Mistral's layers have the same one.
MIXED_WINDOWS = ("qwen2", "qwen3")
# After an architecture: the model type of a saved spiking model. transformers repeats it to who opens one without this package.
SPIKING_TYPE = ", spiking: pip install spikellm, import spikellm"

LAYERS = "model.layers"
EMBEDDING = "model.embed_tokens"
FINAL_NORM = "model.norm"
ROTARY = "model.rotary_emb"
HEAD = "lm_head"
ATTENTION, MLP = "self_attn", "mlp"
ATTENTION_NORM, MLP_NORM = "input_layernorm", "post_attention_layernorm"
QUERY, KEY, VALUE, OUTPUT = "self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj"
GATE, UP, DOWN, ACTIVATION = "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj", "mlp.act_fn"
HEAD_NORMS = ("q_norm", "k_norm")  # of the attention module, between projection and RoPE; Qwen3 only
LINEARS = (QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN)
LAYER_PARTS = (ATTENTION_NORM, MLP_NORM, QUERY, KEY, VALUE, OUTPUT, GATE, UP, DOWN, ACTIVATION)

# The Linears of a layer that read a site's spikes.
READERS = {
    SiteKind.attention_input: (QUERY, KEY, VALUE),
    SiteKind.attention_output: (OUTPUT,),
    SiteKind.mlp_input: (GATE, UP),
    SiteKind.mlp_product: (DOWN,),
}

LINEAR_INPUTS = (*READERS, SiteKind.head_input)

# Where a spike reaches a single synapse: its product with one other number is taken there.
ONE_SYNAPSE = (SiteKind.value, SiteKind.activation)

# The axis that neuron groups divide: heads in [B, H, L, E] and [B, H, L, S], channels elsewhere.
GROUP_AXIS = dict.fromkeys(SiteKind, -1) | {
    SiteKind.query: 1,
    SiteKind.key: 1,
    SiteKind.value: 1,
    SiteKind.softmax: 1,
}

# Where a site's neuron sits: the module below the layer (below the model for the last kind) that holds the slot, and
# the slot's attribute. The slots are made by `modules.py` and `attention.py`. In the order in which a token meets them.
SPIKING_ATTENTION = "spiking"
SLOTS = {
    SiteKind.attention_input: (ATTENTION_NORM, "neuron"),
    SiteKind.query: (f"{ATTENTION}.{SPIKING_ATTENTION}", "query"),
    SiteKind.key: (f"{ATTENTION}.{SPIKING_ATTENTION}", "key"),
    SiteKind.value: (f"{ATTENTION}.{SPIKING_ATTENTION}", "value"),
    SiteKind.softmax: (f"{ATTENTION}.{SPIKING_ATTENTION}", "softmax"),
    SiteKind.attention_output: (OUTPUT, "neuron"),
    SiteKind.mlp_input: (MLP_NORM, "neuron"),
    SiteKind.activation: (ACTIVATION, "neuron"),
    SiteKind.mlp_product: (DOWN, "neuron"),
    SiteKind.head_input: (FINAL_NORM, "neuron"),
}


@dataclass(frozen=True, slots=True)
class Site:
    """One place of the network. `layer` is None for the site after the last layer."""

    kind: SiteKind
    layer: int | None

    @property
    def name(self) -> str:
        """`layers.{i}.{kind}`, or `head_input`."""
        return self.kind.name if self.layer is None else f"layers.{self.layer}.{self.kind.name}"

    @classmethod
    def of(cls, name: str) -> "Site | None":
        """The site with that name; None: there is none in any model."""
        *place, kind = name.split(".")
        layer = int(place[1]) if len(place) == 2 and place[1].isdecimal() else None
        site = cls(SiteKind[kind], layer) if kind in SiteKind.__members__ else None
        return site if site is not None and site.name == name and (layer is None) == (site.kind is SiteKind.head_input) else None

    @property
    def slot(self) -> tuple[str, str]:
        """(module path from the model's root, attribute) of the neuron."""
        owner, attribute = SLOTS[self.kind]
        return (owner if self.layer is None else f"{LAYERS}.{self.layer}.{owner}"), attribute


def is_per_token(kind: SiteKind, amplitude: Amplitude) -> bool:
    """Whether neurons there have their amplitude from the token: a Linear sums over one token's inputs, attention over other tokens'."""
    return amplitude is Amplitude.token and kind in LINEAR_INPUTS


def sites(layers: int) -> Iterator[Site]:
    """All 9 * layers + 1 sites of a model, in the order in which a token meets them."""
    for layer in range(layers):
        for kind in SLOTS:
            if kind is not SiteKind.head_input:
                yield Site(kind, layer)
    yield Site(SiteKind.head_input, None)


def decoder_layers(model: nn.Module) -> nn.ModuleList:
    """The decoder layers of a model.

    Raises:
        ValueError: it has none where models of the LLaMA family have theirs.
    """
    owner, _, name = LAYERS.rpartition(".")
    layers = getattr(getattr(model, owner, None), name, None)
    if not isinstance(layers, nn.ModuleList):
        raise ValueError(f"{type(model).__name__} has no layers in {LAYERS}; supported: {', '.join(ARCHITECTURES)}")
    return layers


def head_width(config: Any) -> int:
    """E, the width of an attention head; transformers' configs may leave it to be derived."""
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def check_architecture(model: nn.Module) -> None:
    """Refuse a model that this vocabulary does not fit.

    Raises:
        ValueError: unsupported model type, windows of attention that it does not have, or a module of the vocabulary is missing.
    """
    kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__).removesuffix(SPIKING_TYPE)
    if kind not in ARCHITECTURES:
        raise ValueError(f"architecture {kind!r} is not supported; supported: {', '.join(ARCHITECTURES)}")
    _check_windows(kind, getattr(model, "config", None))
    modules = dict(model.named_modules())
    wanted = [EMBEDDING, FINAL_NORM, HEAD, *(f"{LAYERS}.0.{part}" for part in LAYER_PARTS)]
    missing = [name for name in wanted if name not in modules]
    if missing:
        raise ValueError(f"architecture {kind!r} lacks the modules {', '.join(missing)}")


def _check_windows(kind: str, config: Any) -> None:
    """Refuse windows of attention of which an architecture's masks know nothing, while transformers' caches follow them."""
    window, types = getattr(config, "sliding_window", None), getattr(config, "layer_types", None)
    if kind in MIXED_WINDOWS:
        known = {"full_attention", "sliding_attention"}
    else:
        known = {"sliding_attention" if kind == "mistral" and window is not None else "full_attention"}
    if types is not None and not set(types) <= known:
        raise ValueError(f"config.json, layer_types={types}: {kind} attends by {' and '.join(sorted(known))} alone; take it out")
    if kind == "llama" and window is not None:
        raise ValueError(f"config.json, sliding_window={window}: llama has no windows; take it out, or model_type: mistral, which has")
