"""The authors' published codes against base 2 and against our fit, on Gaussian and Laplacian inputs.

Prints the two tables of README.md. A code is compared without its amplitude, which belongs to a site of another model: every code
gets its tau by the same rule on the same inputs, once the authors' (the largest input) and once the tau of least squared error.
"""

import argparse
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm

from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics
from spikellm.coding.codes import Codes, base2_codes
from spikellm.config.choices import Coding
from spikellm.config.snn import SpikingConfig
from spikellm.kernels.encode import BINARY, respond
from spikellm.search.fit import part_points
from spikellm.search.options import Options
from spikellm.search.points import weighted_points
from spikellm.search.published import read_neurons
from spikellm.search.search import evolution

PUBLISHED = Path(__file__).resolve().parents[3] / "shared" / "data" / "published_neurons"
INPUTS = 3 * 2**20  # of each distribution, a third for fitting, for choosing and for reporting errors
AMPLITUDES = torch.logspace(-2, 0.25, 100, base=2)  # tau as a share of the largest input: 1/4 to 1.19
CHUNK = 2**22  # elements of a buffer


def gaussian(generator: torch.Generator) -> Tensor:
    return torch.randn(INPUTS, generator=generator)


def laplacian(generator: torch.Generator) -> Tensor:
    return torch.empty(INPUTS).exponential_(generator=generator)  # of |x|, all that a code sees


def observe(draw: Callable[[torch.Generator], Tensor]) -> SiteStatistics:
    """Statistics of inputs with unit scale."""
    observer = Observer(draw.__name__)
    for part, inputs in zip((FIT, CHOOSE, REPORT), draw(torch.Generator().manual_seed(0)).chunk(3), strict=True):
        observer.part = part
        observer(inputs[None])
    return observer.result()


def stack(codes: list[Codes]) -> Codes:
    return Codes(values=torch.cat([code.values for code in codes]), assignment=torch.cat([code.assignment for code in codes]))


def with_tau(codes: Codes, tau: Tensor) -> Codes:
    """The same codes with other amplitudes; v0 follows, its unit is a share of tau."""
    values = codes.values.clone()
    values[..., 0] = tau.log()
    return replace(codes, values=values)


def without_v0(codes: Codes) -> Codes:
    values = codes.values.clone()
    values[..., 1] = 0
    return replace(codes, values=values)


def errors(x: Tensor, weight: Tensor, codes: Codes) -> Tensor:
    """Squared errors [K] of K codes on weighted points [P], relative to the points' mean square."""
    number = max(1, CHUNK // len(x))
    rows = codes.spell()
    parts = [slice(start, start + number) for start in range(0, len(codes.values), number)]
    found = [(weight * (respond(x[None], rows.at(part), BINARY)[0] - x).square()).sum(-1) for part in parts]
    return torch.cat(found) / (weight * x.square()).sum()


def best_tau(site: SiteStatistics, codes: Codes) -> Tensor:
    """tau [K] of least squared error on the fitting part."""
    x, weight, _ = (part[0] for part in weighted_points(site, 2 ** (codes.assignment.shape[-1] + 3)))  # eight points per level
    tau = AMPLITUDES * site.known_maximum.max()
    candidates = [errors(x, weight, with_tau(codes, each.expand(len(codes.values)))) for each in tau]
    return tau[torch.stack(candidates).argmin(0)]


def deviation(raw: Codes) -> tuple[float, float, float, float]:
    """How far codes are from base 2: largest |base - 2|, share of equal outputs, rms and largest difference of the outputs [base-2 steps].

    On 4096 inputs spread evenly over 0 .. tau (1 - 2^-T); a difference of outputs counts from half a step on.
    """
    T = raw.assignment.shape[-1]
    codes = with_tau(raw, torch.ones(len(raw.values)))
    x = (torch.arange(4096) + 0.5) / 4096 * (1 - 2.0**-T)

    def outputs(code: Codes) -> Tensor:
        theta, h, d, v0 = code.spell()
        v = x + v0[:, None]
        y = torch.zeros_like(v)
        for t in range(T):
            z = v > theta[:, t, None]
            v, y = v - h[:, t, None] * z, y + d[:, t, None] * z
        return y

    steps = (outputs(codes) - outputs(base2_codes(torch.ones(1), T))) * 2.0**T
    bases = torch.cat(codes.bases(), -1).exp2()
    same = (steps.abs() < 0.5).float().mean().item()
    return (bases - 2).abs().max().item(), same, steps.square().mean().sqrt().item(), steps.abs().max().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, nargs="?", default=PUBLISHED, help="of the published .pth files [default: %(default)s]")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    files = sorted(arguments.folder.glob("*.pth"))
    if not files:
        parser.error(f"no .pth files in {arguments.folder}")
    sites = {draw.__name__: observe(draw) for draw in (gaussian, laplacian)}
    likeness, comparison = [], []
    for path in tqdm(files, unit="file", disable=None):
        raw = read_neurons(path)
        codes = stack(list(raw.values()))
        T, G = codes.assignment.shape[-1], codes.G
        model = re.sub(r"(-hf)?-T-.*", "", path.stem)
        base, same, rms, most = deviation(codes)
        likeness.append(f"| {model} | {T} | {G} | {len(raw)} | {base:.3f} | {same:.1%} | {rms:.2f} | {most:.1f} |")
        snn = SpikingConfig(T=T, grain=str(G), coding=Coding.phase, intervals="1")
        fits = evolution(sites, Options(snn=snn, seed=arguments.seed, compiled=False))
        for name, site in sites.items():
            x, weight, _ = (part[0] for part in part_points(site, REPORT))
            maximum = site.known_maximum.max()
            base2 = base2_codes(maximum[None], T)
            largest = with_tau(codes, maximum.expand(len(codes.values)))
            fitted = errors(x, weight, with_tau(codes, best_tau(site, codes)))
            values = [
                errors(x, weight, base2).item(),
                errors(x, weight, largest).median().item(),
                errors(x, weight, without_v0(largest)).median().item(),
                errors(x, weight, with_tau(base2, best_tau(site, base2))).item(),
                fitted.median().item(),
                fitted.min().item(),
                fits[name].relative_error,
            ]
            cells = " | ".join(f"{value:.3g}" for value in values)
            comparison.append(f"| {model} | {T} | {G} | {name} | {cells} | {values[-3] / values[-1]:.2f} | {values[-2] / values[-1]:.2f} |")
    print("\n| model | T | G | codes | max abs(base - 2) | equal outputs | rms difference | largest |\n|" + "---|" * 8)
    print("\n".join(likeness))
    tau = "| base 2, best tau | published, best tau | best of them | ours | published / ours | best / ours |"
    print(f"\n| model | T | G | input | base 2 | published | published, v0 = 0 {tau}\n|" + "---|" * 13)
    print("\n".join(comparison))


if __name__ == "__main__":
    main()
