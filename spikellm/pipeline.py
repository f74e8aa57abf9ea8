"""The whole way in one call: a pretrained transformers model becomes a spiking one, with a report.

    check      everything that can be refused before a weight is touched
    prepare    rotations R1 .. R4, a slot at every site         (`model/conversion.py`)
    calibrate  prefix tokens, statistics of every site          (`calibration/calibrate.py`)
    search     statistics to codes                              (`search/methods.py`; block by block: `reconstruction/sequential.py`)
    fill       a neuron with its code in every slot             (`model/conversion.py`)
    tune       block by block, where it is asked for            (`reconstruction/tuning.py`)
    compensate weights behind coded inputs, where asked for     (`reconstruction/compensation.py`)
    round      integer weights, where they are asked for        (`reconstruction/rounding.py`; to nearest before calibration)

`python main.py` goes the same way with each result an artefact (`run/fitting.py`), and finds the same codes to the last bit.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any, TypeVar

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from spikellm.calibration.calibrate import calibrate, enough_pieces
from spikellm.config.checks import InputError
from spikellm.config.choices import (
    Amplitude,
    Coding,
    DatasetSource,
    Groups,
    RotationKind,
    Rounding,
    SearchMethod,
    SoftmaxNorm,
    TunedPart,
    own_coding,
)
from spikellm.config.dataset import TextConfig
from spikellm.config.model import HardwareConfig
from spikellm.config.snn import (
    CompensateConfig,
    PrefixConfig,
    RotationConfig,
    SearchConfig,
    SpikingConfig,
    TuneConfig,
    WeightsConfig,
    check_compensation,
    check_tuning,
)
from spikellm.cores import threads
from spikellm.evaluation.texts import cut, read_text, tokenise
from spikellm.model import checkpoint
from spikellm.model.attention import SpikingAttention
from spikellm.model.conversion import clear, fill, prepare
from spikellm.model.intake import not_finite
from spikellm.model.integers import check_groups, round_model
from spikellm.model.prefix import attach_prefix, why_no_prefix
from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.replaced import replace_weights
from spikellm.model.rotation import orders
from spikellm.model.sites import LAYERS, LINEARS, check_architecture, decoder_layers
from spikellm.reconstruction.compensation import compensate_spiking
from spikellm.reconstruction.rounding import round_spiking
from spikellm.reconstruction.sequential import fit_sequentially
from spikellm.reconstruction.tuned import TunedBlock, by_path, retabled
from spikellm.reconstruction.tuning import tune_spiking
from spikellm.report.card import model_card, write_card
from spikellm.search.fit import CodeFit
from spikellm.search.methods import find_codes, search_summary
from spikellm.search.options import Options
from spikellm.store.provenance import versions
from spikellm.store.saved import Provenance, conversion_options, rotation_record
from spikellm.store.sources import fingerprint

Choice = TypeVar("Choice", bound=Enum)


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Conversion:
    """A spiking model, and how well its codes fit; `print` shows it in a few lines."""

    model: PreTrainedModel  # the one that was given, a neuron at every site
    tokenizer: PreTrainedTokenizerBase | None  # where one was given
    prefix_tokens: list[int]  # their keys and values stand before every sequence
    fits: dict[str, CodeFit]  # by name of the site, in the order in which a token meets them
    provenance: Provenance  # how it was made

    @property
    def sites(self) -> list[str]:
        """Names of the sites."""
        return list(self.fits)

    @property
    def relative_error(self) -> float:
        """Weighted squared error of the codes over that of sending nothing: mean of the sites, on text that decided nothing."""
        return search_summary(self.fits).relative_mse

    @property
    def worse_than_base2(self) -> list[str]:
        """Sites that base 2 would have coded better, on text that decided nothing."""
        return [name for name, fit in self.fits.items() if fit.worse_than_base2]

    def save(self, folder: str | Path) -> None:
        """Write model, tokenizer and a model card in transformers' format; `spikellm.load(folder)` reads them back."""
        checkpoint.save(self.model, Path(folder), provenance=self.provenance, tokenizer=self.tokenizer)
        write_card(Path(folder), model_card(self.provenance))

    def __str__(self) -> str:
        found = search_summary(self.fits)
        T, (worst, fit) = next(iter(self.fits.values())).table.T, max(self.fits.items(), key=lambda item: item[1].relative_error)
        return (
            f"{type(self.model).__name__}, spiking: T={T}, {len(self.fits)} sites, prefix tokens {self.prefix_tokens}\n"
            f"relative error {found.relative_mse:.2e}, with base 2 {found.relative_mse_base2:.2e}; "
            f"{found.worse_than_base2} sites were better off with base 2\n"
            f"largest at {worst}: {fit.relative_error:.2e}"
        )


@threads(None)
def convert(
    model: PreTrainedModel,
    tokenizer_or_windows: PreTrainedTokenizerBase | Tensor,
    *,
    T: int = 8,
    grain: int | str = 2,
    text: str | None = None,
    window: int = 1024,
    max_windows: int | None = 8,
    coding: str | None = None,
    intervals: int | str = "auto",
    min_grain_length: int = 2,
    amplitude: str = "static",
    max_spikes: int | None = None,
    method: str = "evolution",
    groups: str = "head",
    sequential: bool = False,
    spike_weight: float | None = None,
    softmax_norm: str = "after",
    prefix: bool = True,
    tune_epochs: int = 0,
    tune: str = "neurons",
    compensate: bool = False,
    weight_bits: int | None = None,
    weight_group: int | None = None,
    rounding: str = "gptq",
    rotation_seed: int | None = 0,
    seed: int = 0,
    query_block: int = 256,
    compiled: bool = True,
) -> Conversion:
    """Turn a pretrained LLaMA, Mistral, Qwen2 or Qwen3 model into a spiking one, in place.

    The model is changed: its weights are rotated, its modules replaced, it is in evaluation mode and its weights take no gradients. What is
    wrong with the arguments is told before that. Whatever fails later (activations that overflow, memory) leaves it between the two:
    load it again. The fields of the options in `config/schema.py` say more than what stands here.

    Args:
        model: as `AutoModelForCausalLM.from_pretrained` gives it, in any floating dtype, on the CPU or on GPUs.
        tokenizer_or_windows: the model's tokenizer, which then reads `text`; or token ids [W, L] to calibrate on, 8 windows of 1024, say.
        T: time steps, 1 to 16.
        grain: grains of a code, 1, 2, 3; "auto": as many as a neuron group needs.
        text: to calibrate on, thousands of tokens in the model's own field; None: the language reference that CPython carries.
        window, max_windows: the text is cut into windows of so many tokens, and so many of them are used.
        coding: phase_signed, phase, rate, ttfs or few_spike; None: phase_signed, with another method than evolution phase.
        intervals: of the range of |x|, a table and a wire each; "auto": as many as a neuron group needs. Of phase codes.
        min_grain_length: time steps of a grain, at least.
        amplitude: static: of calibration; token: where a Linear reads the neurons, a share of each token's largest |x|.
        max_spikes: of a neuron, with few_spike.
        method: evolution, gradient (hours) or base2.
        groups: head: one code an attention head, one for each sign at SiLU; site: one a site.
        sequential: codes are fitted block by block on the spiking stream.
        spike_weight: accuracy against spikes; None: 0, phase_signed 1.5.
        softmax_norm: after: exponentials are coded; before: probabilities.
        prefix: outlier tokens get exact keys and values before every sequence.
        tune_epochs: passes over the text, block by block, in which gradients move the tables; 0: none.
        tune: neurons: tables alone; all: the weights of the decoder's Linears too.
        compensate: weights of o, gate and up are re-fitted block by block behind what the neurons send, in closed form.
        weight_bits: 8 or 4: integer weights in the decoder's Linears; None: weights as they are.
        weight_group: inputs of an output that share a scale; None: all.
        rounding: gptq: against the inputs that the codes send; nearest: each weight by itself, before calibration.
        rotation_seed: of R1's signs; None: no rotation.
        seed: of the search.
        query_block: queries per block of attention [tokens].
        compiled: neurons and the search run fused.

    Returns:
        The spiking model and its codes with their errors.

    Raises:
        ValueError: a model that is spiking already, of another architecture, without weights or with weights that are no numbers; T and
            grain that do not fit each other, an unknown choice; too little text, or tokens that the model does not have.
    """
    HardwareConfig(fused=compiled, query_block=query_block)  # refuses what is out of range
    options = Options(
        snn=SpikingConfig(
            T=T,
            grain=str(grain),
            min_grain_length=min_grain_length,
            coding=_choice(Coding, "coding", own_coding(method, None) if coding is None else coding),
            intervals=str(intervals),
            amplitude=_choice(Amplitude, "amplitude", amplitude),
            max_spikes=max_spikes,
            softmax_norm=_choice(SoftmaxNorm, "softmax_norm", softmax_norm),
        ),
        search=SearchConfig(
            method=_choice(SearchMethod, "method", method),
            groups=_choice(Groups, "groups", groups),
            sequential=sequential,
            spike_weight=spike_weight,
        ),
        seed=seed,
        compiled=compiled,
    )
    weights = WeightsConfig(bits=weight_bits, group_size=weight_group, rounding=_choice(Rounding, "rounding", rounding))
    tuning = TuneConfig(epochs=tune_epochs, what=_choice(TunedPart, "tune", tune))
    compensation = CompensateConfig(enabled=compensate)
    check_tuning(tuning, options.snn.coding, weights)
    check_compensation(compensation, weights)
    _check_model(model)
    if prefix and (reason := why_no_prefix(model.config)):
        raise InputError(f"prefix=True with {reason}; take prefix=False")
    if weights.bits is not None:
        try:
            check_groups(model.config, weight_group)
        except ValueError as error:
            raise InputError(f"weight_group={weight_group}: {error}") from error
    tokenizer = None if isinstance(tokenizer_or_windows, Tensor) else tokenizer_or_windows
    if isinstance(tokenizer_or_windows, Tensor):
        windows = tokenizer_or_windows
        if text is not None:
            raise InputError("text goes with a tokenizer, which cuts it into windows; leave it out beside windows")
    else:
        windows = _windows(tokenizer_or_windows, text, window, max_windows)
    _check_windows(windows, model.config.vocab_size)
    prefixed, after = PrefixConfig(enabled=prefix), options.snn.softmax_norm is SoftmaxNorm.after
    prepare(model.eval().requires_grad_(False), rotation_seed=rotation_seed, normalise_after=after, query_block=query_block)
    if weights.bits is not None and weights.rounding is Rounding.nearest:
        round_model(model, bits=weights.bits, group_size=weights.group_size)
    try:
        found = calibrate(model, windows, prefixed, amplitude=options.snn.amplitude)
        if sequential:
            fits = fit_sequentially(model, windows, options)
        else:
            fits = find_codes({name: site.to(model.device) for name, site in found.statistics.items()}, options)
    except ValueError as error:
        raise ValueError(f"{error}; the model is rotated by now and has no neurons: load it again") from error
    tables = {name: fit.table for name, fit in fits.items()}
    fill(model, tables, amplitude=options.snn.amplitude, compiled=compiled)
    tuned: dict[int, TunedBlock] = {}
    own = _weights(model) if tuning.what is TunedPart.all and compensate else {}
    if tuning.epochs:
        tuned = tune_spiking(model, windows, tuning, seed=seed)
        tables = {name: table for block in tuned.values() for name, table in block.tables.items()}
        fits = {name: retabled(fit, tables.get(name), found.statistics[name]) for name, fit in fits.items()}
        tables = {name: fit.table for name, fit in fits.items()}
    if compensation.enabled:
        replace_weights(model, own)  # of the ANN, whose stream is wanted
        compensate_spiking(model, windows, compensation, tuned=by_path(tuned))
    if weights.bits is not None and weights.rounding is Rounding.gptq:
        round_spiking(model, windows, bits=weights.bits, group_size=weights.group_size)
        clear(model)
        attach_prefix(model, found.prefix_tokens)  # keys and values of the rounded weights
        fill(model, tables, amplitude=options.snn.amplitude, compiled=compiled)
    rotation = RotationConfig(kind=RotationKind.none) if rotation_seed is None else RotationConfig(seed=rotation_seed)
    nodes = {"snn": options.snn, "rotation": rotation, "weights": weights, "prefix": prefixed, "search": options.search}
    nodes |= {"tune": tuning, "compensate": compensation}
    made = _provenance(model, windows, nodes, seed, found.prefix_tokens, fits)
    return Conversion(model=model, tokenizer=tokenizer, prefix_tokens=found.prefix_tokens, fits=fits, provenance=made)


def _provenance(
    model: PreTrainedModel, windows: Tensor, nodes: Mapping[str, Any], seed: int, prefix_tokens: list[int], fits: dict[str, CodeFit]
) -> Provenance:
    """What is known of a model that was given: its name, and the commit where it came from the hub."""
    path, revision, rotation = str(model.config.name_or_path or ""), getattr(model.config, "_commit_hash", None), nodes["rotation"]
    name = Path(path).name or type(model).__name__
    return Provenance(
        model=name,
        path=name if Path(path).is_dir() else path or name,
        revision=revision,
        calibration=fingerprint(windows.tolist()),
        prefix_tokens=prefix_tokens,
        options=conversion_options(nodes, seed),
        rotation=rotation_record(rotation, orders(model.config, rotation.acting), {"model": path, "commit": revision}),
        search=search_summary(fits),
        relative_error={name: fit.relative_error for name, fit in fits.items()},
        versions=versions(),
    )


def _weights(model: PreTrainedModel) -> dict[str, Tensor]:
    """Of the decoder's Linears, by path; on the CPU."""
    paths = [f"{LAYERS}.{layer}.{name}" for layer in range(len(decoder_layers(model))) for name in LINEARS]
    return {path: model.get_parameter(f"{path}.weight").cpu() for path in paths}


def _choice(kind: type[Choice], key: str, value: str) -> Choice:
    known: Mapping[str, Choice] = {each.value: each for each in kind}
    if value not in known:
        raise InputError(f"{key}={value!r}: unknown; there is {', '.join(known)}")
    return known[value]


def _windows(tokenizer: PreTrainedTokenizerBase, text: str | None, window: int, max_windows: int | None) -> Int[Tensor, "W L"]:
    options = TextConfig(source=DatasetSource.pydocs, split="calibration", window=window, max_windows=max_windows)
    tokens = tokenise(read_text(options, "text") if text is None else text, tokenizer, "text")
    return cut(tokens, window=window, max_windows=max_windows, what="text", option="window")


def _check_model(model: PreTrainedModel) -> None:
    check_architecture(model)
    kind = type(model).__name__
    if any(isinstance(module, SpikingAttention) for module in model.modules()):
        raise InputError(f"{kind}: has neurons or slots for them already; load the pretrained model again")
    empty = [name for name, weight in model.named_parameters() if weight.is_meta]
    if empty:
        raise InputError(
            f"{kind}: {len(empty)} weights are on the meta device ({empty[0]} first), never loaded or offloaded; "
            "load the model with from_pretrained, onto devices that hold it"
        )
    other = [f"{name} ({weight.dtype})" for name, weight in model.named_parameters() if not weight.is_floating_point()]
    if other:
        raise InputError(f"{kind}: {len(other)} weights are no floating-point numbers ({other[0]} first); load it without quantization")
    if found := not_finite(model):
        raise InputError(f"{kind}: {found}; take bfloat16 or float32 for a wider range, or fetch the weights again")


def _check_windows(windows: Tensor, vocabulary: int) -> None:
    shape = tuple(windows.shape)
    if windows.ndim != 2 or not windows.numel() or windows.is_floating_point() or windows.dtype is torch.bool:
        raise InputError(f"windows of shape {shape}, {windows.dtype}: must be token ids [windows, tokens]; one row is ids[None]")
    if (low := int(windows.min())) < 0 or (high := int(windows.max())) >= vocabulary:
        wrong = low if low < 0 else high
        raise InputError(f"windows: token {wrong} is not in the model's vocabulary (vocab_size={vocabulary}); take the model's tokenizer")
    enough_pieces(windows, option="window")
