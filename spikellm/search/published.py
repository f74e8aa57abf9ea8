"""Neuron files of the method's authors, read into codes.

A file maps the authors' name of a site (KINDS) to a tuple

    (G, assignment [T], B [G], tau, H [G], Theta [G])        and, at softmax and SiLU sites, v0 as a 7th item

in the convention of `coding/grains.py`: exponents count from the first phase, tau is the site's largest activation in the authors' rotated
model. tau belongs to that model and rotation; nothing in the file tells which rotation.

Source: the files that accompany Zheng et al., ICLR 2026 (njzhenghy/SpikingLLM). The authors' loader takes v0 = tau 2^-T / 2 at every
site and ignores the stored one; both can be had here. The files are pickles: they are read with `weights_only`, which runs no code.

What is imported stays as it is: where a code is worse than base 2 on the calibration data, it is kept all the same.
"""

import hashlib
import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor

from spikellm.calibration.statistics import SiteStatistics
from spikellm.coding.codes import Codes
from spikellm.config.boundary import read_file
from spikellm.config.checks import InputError
from spikellm.config.choices import ImportV0
from spikellm.config.labels import SiteKind
from spikellm.model.sites import Site
from spikellm.search.fit import CodeFit
from spikellm.search.options import Options

SHOWN = 3  # site names in a message
# The authors' names of the kinds of site, behind `model.layers.3.` where a site lies in a layer.
KINDS = {
    "input_layernorm.output": SiteKind.attention_input,
    "self_attn.q_Identity.input": SiteKind.query,
    "self_attn.k_Identity.input": SiteKind.key,
    "self_attn.v_Identity.input": SiteKind.value,
    "self_attn.softmax_Identity.input": SiteKind.softmax,
    "self_attn.o_proj.input": SiteKind.attention_output,
    "post_attention_layernorm.output": SiteKind.mlp_input,
    "mlp.silu_Identity.input": SiteKind.activation,
    "mlp.down_proj.input": SiteKind.mlp_product,
    "model.norm.output": SiteKind.head_input,
}


def _refusal(path: Path, text: str) -> InputError:
    return InputError(f"search.import_file={path}: {text}")


def file_hash(path: Path) -> str:
    """sha256 of a neuron file.

    Raises:
        InputError: it cannot be read.
    """
    what, cure = f"search.import_file={path}: cannot be read", "give the path of one of the authors' .pth files"
    return hashlib.sha256(read_file(path, what, cure)).hexdigest()


def own_name(name: str) -> str:
    """The name (`model/sites.py`) of the site that the authors call `name`; as it is where that is none of theirs."""
    match = re.fullmatch(r"(?:model\.layers\.(0|[1-9]\d*)\.)?(.+)", name)
    if match is None or match[2] not in KINDS:
        return name
    return Site(KINDS[match[2]], None if match[1] is None else int(match[1])).name


def read_neurons(path: Path, *, T: int | None = None, G: int | None = None, stored_v0: bool = True) -> dict[str, Codes]:
    """One code per site by its name (`model/sites.py`), in the order of the file; shapes [1, ..], float32.

    Args:
        T: time steps that every code must have; None: whatever the first one has.
        G: grains that every code must have; None: whatever the first one has.
        stored_v0: take v0 from the file where it has one; otherwise tau 2^-T / 2.

    Raises:
        InputError: the file cannot be read, is no neuron file, or has other T or G.
    """
    file_hash(path)  # a missing file gets its own message
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # bytes that are no pickle can raise nearly anything
        reason = str(error).strip().partition("\n")[0]
        raise _refusal(path, f"torch.load cannot read it ({reason}); give one of the authors' .pth files, fetched whole") from error
    if not isinstance(content, dict) or not content:
        raise _refusal(path, f"holds a {type(content).__name__}, not neurons by site name; give one of the authors' .pth files")
    codes: dict[str, Codes] = {}
    for name, entry in content.items():
        if not isinstance(name, str):
            raise _refusal(path, f"holds {name!r} among its keys, not names of sites alone; give one of the authors' .pth files")
        try:
            code = codes[own_name(name)] = _read_entry(entry, stored_v0)
        except (ValueError, TypeError, RuntimeError) as error:  # an entry can be anything that a pickle holds
            cure = "a neuron is (G, assignment, B, tau, H, Theta[, v0])"
            raise _refusal(path, f"the neuron at {name} is not one: {' '.join(str(error).split())}; {cure}") from error
        steps, grains = code.assignment.shape[-1], code.G
        T, G = T or steps, G or grains
        if steps != T:
            raise _refusal(path, f"has T={steps} at {name}, but snn.T={T}; set snn.T={steps} or import another file")
        if grains != G:
            raise _refusal(path, f"has G={grains} at {name}, but grain={G}; set grain={grains} or import another file")
    return codes


def _read_entry(entry: object, stored_v0: bool) -> Codes:
    """The code that one tuple spells; ValueError says what is wrong with it."""
    if not isinstance(entry, (tuple, list)) or len(entry) not in (6, 7):
        raise ValueError(f"found {type(entry).__name__}" + (f" of {len(entry)} items" if isinstance(entry, (tuple, list)) else ""))
    G, assignment, B, tau, H, Theta = entry[:6]
    if not isinstance(G, int) or G < 1:
        raise ValueError(f"G={G!r}")
    grains = torch.as_tensor(assignment)
    steps = grains.diff() if grains.ndim == 1 else None
    if steps is None or grains.is_floating_point() or grains[0] != 0 or grains[-1] != G - 1 or ((steps != 0) & (steps != 1)).any():
        raise ValueError(f"assignment {assignment} does not run through the grains 0 .. {G - 1}")
    for letter, bases in (("B", B), ("H", H), ("Theta", Theta)):
        if not isinstance(bases, Tensor) or bases.shape != (G,) or not (bases.isfinite() & (bases > 0)).all():
            raise ValueError(f"{letter}={bases!r} is not {G} positive numbers")
    amplitude = torch.as_tensor(tau, dtype=torch.float64)
    if amplitude.numel() != 1 or not amplitude.isfinite() or amplitude <= 0:
        raise ValueError(f"tau={tau!r} is not a positive number")
    step = amplitude * 2.0 ** -(len(grains) + 1)  # v0 by the rule, and the unit of v0 in `Codes`
    v0 = torch.as_tensor(entry[6], dtype=torch.float64) if len(entry) == 7 and stored_v0 else step
    if v0.numel() != 1 or not v0.isfinite():
        raise ValueError(f"v0={entry[6]!r} is not a number")
    first = torch.stack([amplitude.log().reshape(()), (v0 / step).reshape(()), torch.zeros((), dtype=torch.float64)])
    values = torch.cat([first, *(bases.double().log2() for bases in (B, H, Theta))])
    code = Codes(values=values[None].float(), assignment=grains[None].long())
    if not all(row.isfinite().all() for row in code.spell()):
        raise ValueError("its bases and tau give phases beyond what float32 holds")
    return code


def _check_names(path: Path, found: Collection[str], wanted: Collection[str]) -> None:
    def some(names: set[str]) -> str:
        return ", ".join(sorted(names)[:SHOWN]) + (", .." if len(names) > SHOWN else "")

    missing, unknown = set(wanted) - set(found), set(found) - set(wanted)
    if missing or unknown:
        parts = [f"lacks {len(missing)} sites of the model ({some(missing)})"] if missing else []
        parts += [f"has {len(unknown)} sites that the model lacks ({some(unknown)})"] if unknown else []
        raise _refusal(path, f"{len(found)} sites, the model {len(wanted)}: it {' and '.join(parts)}; import the file of this model")


def configured_neurons(options: Options) -> tuple[Path, dict[str, Codes]]:
    """search.import_file and what `read_neurons` finds in it.

    Raises:
        InputError: the file cannot be read, or does not fit T or grain.
    """
    assert options.search.import_file is not None
    path, stored_v0 = Path(options.search.import_file), options.search.import_v0 is ImportV0.stored
    return path, read_neurons(path, T=options.T, G=options.snn.grains, stored_v0=stored_v0)


def imported(statistics: Mapping[str, SiteStatistics], options: Options) -> dict[str, CodeFit]:
    """The codes of search.import_file, one per site, with errors and firing rates on the calibration statistics; no objective (NaN).

    Args:
        statistics: by site name; the file must have exactly these sites.
        options: T, grain, import_file, import_v0.

    Raises:
        InputError: the file cannot be read, or does not fit the model, T or grain.
    """
    path, codes = configured_neurons(options)
    _check_names(path, codes.keys(), statistics.keys())
    fits = {}
    for name, site in statistics.items():
        merged = site.merged()  # the files have one code per site
        device = merged.counts.device
        code = Codes(values=codes[name].values.to(device), assignment=codes[name].assignment.to(device))
        fits[name] = CodeFit.assess(merged, [(code, torch.full((1,), torch.nan, device=device))], fall_back=False)
    return fits
