"""Turn a pretrained model into a spiking one: a slot at every site, then a neuron in every slot.

install    norms, activation, o_proj and down_proj become modules with a neuron slot; attention gets its submodule and
           the model the attention implementation "spiking". Slots are transparent: the model still is the ANN, computed with
           float32 activations (`modules.py`).
prepare    rotates, then installs
set_neuron puts an observer or a neuron into one site's slot
fill       puts `PhaseNeuron`s at all sites, or fails
occupy     puts anything else there; `occupy_sites` at some of them
"""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

import torch
from accelerate.hooks import add_hook_to_module
from torch import nn

from spikellm.coding.neuron import PhaseNeuron, PhaseTable, Slot, apply_wide
from spikellm.config.choices import Amplitude, RotationPart
from spikellm.config.labels import SiteKind
from spikellm.model.attention import IMPLEMENTATION, SpikingAttention, refuse_other_implementation, register
from spikellm.model.cache import cache_name, put_coder
from spikellm.model.modules import SpikingActivation, SpikingLinear, SpikingRMSNorm, WideEmbedding, WideLinear, wide
from spikellm.model.offload import hook_of, present
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.rotation import PARTS, rotate
from spikellm.model.sites import (
    ACTIVATION,
    ATTENTION,
    ATTENTION_NORM,
    DOWN,
    EMBEDDING,
    FINAL_NORM,
    GATE,
    GROUP_AXIS,
    HEAD,
    KEY,
    LAYERS,
    LINEARS,
    MLP_NORM,
    OUTPUT,
    QUERY,
    ROTARY,
    SPIKING_ATTENTION,
    UP,
    VALUE,
    Site,
    check_architecture,
    decoder_layers,
    head_width,
    is_per_token,
    sites,
)


def prepare(
    model: PreTrainedModel,
    *,
    rotation_seed: int | None,
    parts: Collection[RotationPart] = PARTS,
    normalise_after: bool = True,
    query_block: int = 256,
) -> None:
    """Rotate `model` and give every site a transparent neuron slot, in place: the same function, ready for calibration or neurons.

    Args:
        rotation_seed: of R1's random signs; None: no rotation.
        parts: rotations that act.
        normalise_after, query_block: as for `install`.

    Raises:
        ValueError: unsupported architecture; the model is as it was.
    """
    check_architecture(model)
    if rotation_seed is not None:
        rotate(model, seed=rotation_seed, parts=parts)
    install(model, rotated=() if rotation_seed is None else parts, normalise_after=normalise_after, query_block=query_block)


def install(model: PreTrainedModel, *, rotated: Collection[RotationPart], normalise_after: bool = True, query_block: int = 256) -> None:
    """Give every site of `model` a transparent neuron slot, in place.

    Args:
        rotated: the parts that `rotation.rotate` has applied; R3 and R4 get their online halves.
        normalise_after: divide attention's output by the sum of the coded exponentials (see `attention.py`).
        query_block: queries per block of attention [tokens].

    Raises:
        ValueError: unsupported architecture.
    """
    check_architecture(model)
    width = head_width(model.config)
    for layer in decoder_layers(model):
        with present(layer, ahead=False):
            install_block(layer, width, rotated=rotated, normalise_after=normalise_after, query_block=query_block)
    install_ends(model)
    register()
    model.set_attn_implementation(IMPLEMENTATION)
    vars(model)["save_pretrained"] = _refuse_saving  # `checkpoint.py` gives a model that can be saved its own


def install_block(layer: nn.Module, head_width: int, *, rotated: Collection[RotationPart], normalise_after: bool, query_block: int) -> None:
    """The slots of one decoder layer; arguments as in `install`."""
    part: Callable[[str], Any] = layer.get_submodule  # torch knows no class of it
    weight = part(OUTPUT).weight
    for norm in (ATTENTION_NORM, MLP_NORM):
        replace(layer, norm, SpikingRMSNorm.adopt(part(norm)))
    for reader in (QUERY, KEY, VALUE, GATE, UP):
        replace(layer, reader, WideLinear.adopt(part(reader)))
    replace(layer, ACTIVATION, SpikingActivation(part(ACTIVATION)))
    replace(layer, OUTPUT, SpikingLinear.adopt(part(OUTPUT)))
    replace(layer, DOWN, SpikingLinear.adopt(part(DOWN), rotated=RotationPart.R4 in rotated))
    spiking = SpikingAttention(
        head_width,
        rotated=RotationPart.R3 in rotated,
        normalise_after=normalise_after,
        query_block=query_block,
        dtype=wide(weight.dtype),
        device=weight.device,
    )
    layer.register_forward_pre_hook(_refuse_adapters)
    attention = layer.get_submodule(ATTENTION)
    attention.add_module(SPIKING_ATTENTION, spiking)
    attention.register_forward_pre_hook(partial(put_coder, cache_name(attention)), with_kwargs=True)
    attention.register_forward_hook(refuse_other_implementation)


def install_ends(model: PreTrainedModel) -> None:
    """The slot of the final norm, and float32 currents from the embedding and into the logits."""
    part: Callable[[str], Any] = model.get_submodule
    replace(model, EMBEDDING, WideEmbedding.adopt(part(EMBEDDING)))
    replace(model, FINAL_NORM, SpikingRMSNorm.adopt(part(FINAL_NORM)))
    replace(model, HEAD, WideLinear.adopt(part(HEAD)))
    rotary = model.get_submodule(ROTARY)
    vars(rotary)["_apply"] = partial(apply_wide, rotary)
    model.base_model.register_forward_pre_hook(_widen_embeds, with_kwargs=True)


def _widen_embeds(_: nn.Module, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Forward pre-hook: a caller's embeddings become currents as `WideEmbedding` gives them."""
    embeds = keywords.get("inputs_embeds")
    return arguments, keywords if embeds is None else keywords | {"inputs_embeds": embeds.to(wide(embeds.dtype))}


def _refuse_adapters(layer: nn.Module, _: tuple[Any, ...]) -> None:
    """Forward pre-hook of a decoder layer: an adapter (PEFT wraps a Linear and keeps it as `base_layer`) would read around the neurons.

    Raises:
        ValueError: there is one.
    """
    for name in LINEARS:
        if hasattr(layer.get_submodule(name), "base_layer"):
            raise ValueError(
                f"{name} carries an adapter, whose product passes no neuron: merge it into the pretrained model and convert that"
            )


def online_parts(layer: nn.Module) -> list[RotationPart]:
    """Which of R3 and R4 act online in an installed decoder layer."""
    owners: dict[RotationPart, Any] = {
        RotationPart.R3: layer.get_submodule(f"{ATTENTION}.{SPIKING_ATTENTION}"),
        RotationPart.R4: layer.get_submodule(DOWN),
    }
    return [part for part, owner in owners.items() if owner.rotation is not None]


def common_amplitude(model: PreTrainedModel) -> Amplitude:
    """Where the neurons of a converted model have their amplitude from.

    Raises:
        ValueError: some from calibration and some from the token, as no single choice has it.
    """
    found = {site: isinstance(neuron := get_neuron(model, site), PhaseNeuron) and neuron.per_token for site in model_sites(model)}
    for amplitude in Amplitude:
        if all(per_token == is_per_token(site.kind, amplitude) for site, per_token in found.items()):
            return amplitude
    own = [site.name for site, per_token in found.items() if per_token]
    raise ValueError(f"{len(own)} sites have amplitudes of the token, {own[0]} first, and others that should do not; fill them alike")


def _refuse_saving(*_: object, **__: object) -> None:
    """`save_pretrained` of a class that knows no neurons: anybody would open what it writes as a plain model.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "save_pretrained would leave the neurons out: spikellm.model.checkpoint.save(model, folder) writes them, and so does the method "
        "save(folder) of what spikellm.convert returned"
    )


def replace(root: nn.Module, path: str, successor: nn.Module) -> None:
    """Put `successor` in the place of the module at `path` below `root`."""
    module = root.get_submodule(path)
    if hasattr(module, "_hf_hook"):  # accelerate moves the inputs of a block between devices
        add_hook_to_module(successor, module._hf_hook)
    root.set_submodule(path, successor)


def model_sites(model: PreTrainedModel) -> list[Site]:
    """The sites of an installed model, in the order in which a token meets them."""
    return list(sites(len(decoder_layers(model))))


def get_neuron(model: PreTrainedModel, site: Site) -> Slot:
    """What sits in the slot of `site`.

    Raises:
        ValueError: the model has no such slot.
    """
    return getattr(_slot_owner(model, site), site.slot[1])


def _slot_owner(model: PreTrainedModel, site: Site) -> nn.Module:
    owner, attribute = site.slot
    module: nn.Module | None = None
    with suppress(AttributeError):
        module = model.get_submodule(owner)
    if module is None or not isinstance(getattr(module, attribute, None), Slot):
        raise ValueError(f"{site.name}: the model has no slot {owner}.{attribute}; convert the model first")
    return module


def tables(model: PreTrainedModel) -> dict[str, PhaseTable]:
    """The codes of a converted model by site name, as `fill` takes them.

    Raises:
        ValueError: a site carries no neuron.
    """
    neurons = {site.name: get_neuron(model, site) for site in model_sites(model)}
    bare = [name for name, neuron in neurons.items() if type(neuron) is not PhaseNeuron]
    if bare:
        raise ValueError(f"{len(bare)} sites carry no neuron, {bare[0]} first: convert the model (outside `stepped`) before saving it")
    return {name: neuron.table for name, neuron in neurons.items() if isinstance(neuron, PhaseNeuron)}


def set_neuron(model: PreTrainedModel, site: Site, neuron: Slot) -> None:
    """Put `neuron` into the slot of `site`.

    Raises:
        ValueError: the model has no such slot.
    """
    setattr(_slot_owner(model, site), site.slot[1], neuron)


def site_groups(config: Any, kind: SiteKind) -> int:
    """Attention heads at a site that has them, else 1."""
    if kind in (SiteKind.query, SiteKind.softmax, SiteKind.attention_output):
        return config.num_attention_heads
    return config.num_key_value_heads if kind in (SiteKind.key, SiteKind.value) else 1


def fill(
    model: PreTrainedModel, tables: Mapping[str, PhaseTable], *, amplitude: Amplitude = Amplitude.static, compiled: bool = True
) -> None:
    """Put a neuron at every site of an installed model, in place.

    Args:
        tables: site name -> table; must name exactly the model's sites.
        amplitude: token: where Linears read them, tables are of x / m (`neuron.token_amplitude`).
        compiled: see `neuron.encode`.

    Raises:
        ValueError: a site has no table, a table no site, or the model no slots.
    """
    for site in _every_site(model, tables, "tables"):
        place(model, site, tables[site.name], amplitude=amplitude, compiled=compiled)


def place(model: PreTrainedModel, site: Site, table: PhaseTable, *, amplitude: Amplitude = Amplitude.static, compiled: bool) -> None:
    """Put a neuron with `table` into the slot of one site; arguments as in `fill`."""
    device, dtype = _home(model, site)
    table = table.to(device=device, dtype=dtype)
    per_token = is_per_token(site.kind, amplitude)
    set_neuron(model, site, PhaseNeuron(table, axis=GROUP_AXIS[site.kind], per_token=per_token, compiled=compiled))


def occupy(model: PreTrainedModel, occupants: Mapping[str, Slot]) -> None:
    """Put what is no neuron at every site of an installed model, in place: integers (`coding/integers.py`).

    Args:
        occupants: site name -> occupant; must name exactly the model's sites.

    Raises:
        ValueError: a site has no occupant, an occupant no site, or the model no slots.
    """
    occupy_sites(model, _every_site(model, occupants, "occupants"), occupants)


def occupy_sites(model: PreTrainedModel, places: Iterable[Site], occupants: Mapping[str, Slot]) -> None:
    """Put occupants, by site name, at some sites, in place; a site without one gets an empty slot."""
    for site in places:
        device, dtype = _home(model, site)
        set_neuron(model, site, occupants.get(site.name, Slot()).to(device=device, dtype=dtype))


def neurons(tables: Mapping[str, PhaseTable], *, amplitude: Amplitude = Amplitude.static, compiled: bool = True) -> dict[str, Slot]:
    """The neurons that `fill` puts in, as occupants.

    Raises:
        ValueError: a name is no site's.
    """
    found: dict[str, Slot] = {}
    for name, table in tables.items():
        if (site := Site.of(name)) is None:
            raise ValueError(f"{name} is no site")
        per_token = is_per_token(site.kind, amplitude)
        found[name] = PhaseNeuron(table, axis=GROUP_AXIS[site.kind], per_token=per_token, compiled=compiled)
    return found


def _every_site(model: PreTrainedModel, named: Mapping[str, Any], what: str) -> list[Site]:
    """The model's sites, which are those that are named."""
    places = model_sites(model)
    missing = [site.name for site in places if site.name not in named]
    unknown = sorted(set(named) - {site.name for site in places})
    if missing or unknown:
        raise ValueError(f"{what} do not fit the model: {len(missing)} sites without one {missing[:3]}, unknown {unknown[:3]}")
    return places


def _home(model: PreTrainedModel, site: Site) -> tuple[torch.device, torch.dtype]:
    """Where the activations of a site are, and their dtype: as the weights beside it have it, or will when they are brought in."""
    module = model.get_submodule(f"{LAYERS}.{site.layer}" if site.layer is not None else FINAL_NORM)
    weight, hook = next(module.parameters()), hook_of(module)
    return weight.device if hook is None else hook.device, wide(weight.dtype)


def clear(model: PreTrainedModel) -> None:
    """Make every slot transparent again."""
    for site in model_sites(model):
        set_neuron(model, site, Slot())
