"""Speed and error of the default search against the authors' on the same sites, side by side in one process: `make bench`.

Prints seconds per site, their ratio, and at how many of the sites timed with both the default has the lower error. The authors' search
runs with their settings (20 x (50 + 50 + 1) steps on 100,000 activations of a site), so only on a few sites, spread over the model;
--sites 271 takes hours on a CPU. Statistics are those of a run's calibration (--calibration FOLDER, or the newest in outputs/), and
random distributions where there is none. Errors are on the fitting objective and on the reporting part before any fallback to base 2.
"""

import spikellm  # noqa: F401 (before torch, whose threads then sleep while they wait for each other)

# isort: split
import argparse
import time
from pathlib import Path

import torch
from surroundings import surroundings
from tqdm.auto import tqdm

from spikellm.calibration.calibrate import Calibration
from spikellm.calibration.statistics import CHOOSE, FIT, REPORT, Observer, SiteStatistics
from spikellm.coding.neuron import PhaseTable
from spikellm.config.choices import Coding
from spikellm.config.places import project_root
from spikellm.config.snn import SearchConfig, SpikingConfig
from spikellm.search.fit import part_points
from spikellm.search.gradient import descend_grains, draw_samples
from spikellm.search.options import Options
from spikellm.search.points import table_sums
from spikellm.search.search import evolution, group_maxima

RANDOM_SITES = 271


def random_statistics(count: int) -> dict[str, SiteStatistics]:
    """Sites between Gaussian and heavy-tailed."""
    generator = torch.Generator().manual_seed(0)
    sites = {}
    for index in range(count):
        observer = Observer(f"random.{index}")
        for part in (FIT, CHOOSE, REPORT):
            observer.part = part
            observer(torch.randn(1, 2**16, generator=generator).abs() ** (1 + 1.5 * index / count))
        sites[observer.site] = observer.result()
    return sites


def newest_calibration() -> Path | None:
    folders = (project_root() / "outputs" / "artifacts" / "calibrate").glob("*/calibration.json")
    return max((path.parent for path in folders), key=lambda path: path.stat().st_mtime, default=None)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calibration", type=Path, default=newest_calibration(), help="a folder below outputs/artifacts/calibrate")
    parser.add_argument("--T", type=int, default=8)
    parser.add_argument("--grain", type=int, default=3)
    parser.add_argument(
        "--sites", type=int, default=2, choices=range(1, RANDOM_SITES + 1), metavar="N", help="timed with the authors' search"
    )
    parser.add_argument("--samples", type=int, default=SearchConfig().gradient_samples)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    print(surroundings(), flush=True)
    found = Calibration.load(arguments.calibration).statistics if arguments.calibration else random_statistics(RANDOM_SITES)
    sites = {name: site.merged() for name, site in found.items()}  # one table a site, as the authors have it
    T, G = arguments.T, arguments.grain
    schedule = SearchConfig(gradient_samples=arguments.samples)
    options = Options(snn=SpikingConfig(T=T, grain=str(G), coding=Coding.phase, intervals="1"), search=schedule, seed=arguments.seed)

    start = time.perf_counter()
    fits = evolution(sites, options)
    ours = (time.perf_counter() - start) / len(sites)

    count = min(arguments.sites, len(sites))
    # the middles of equal parts: of 271 sites, two are of two kinds
    spread = [int((part + 0.5) / count * len(sites)) for part in range(count)]
    names = [list(sites)[index] for index in spread]
    chosen = {name: sites[name] for name in names}
    start = time.perf_counter()
    generator = torch.Generator().manual_seed(options.seed)
    samples = torch.stack([draw_samples(site, 0, arguments.samples, generator) for site in chosen.values()])
    with tqdm(total=len(chosen) * schedule.gradient_outer, desc="the authors' search", unit="round", disable=None) as bar:
        codes, objective = descend_grains(samples, group_maxima(chosen), options, G=G, progress=bar.update)
    theirs = (time.perf_counter() - start) / len(chosen)

    lower = {"fitting": 0, "reporting": 0}
    print(f"\nT={T}, G={G}, {torch.get_num_threads()} threads, statistics of {arguments.calibration or 'random sites'}")
    print("relative squared error on the reporting part, in units of base 2's:")
    for index, name in enumerate(names):
        fit, code = fits[name], codes.at(slice(index, index + 1))
        x, weight, count = part_points(chosen[name], REPORT)
        theirs_held = table_sums(x, weight, count, [PhaseTable(*code.spell())], compiled=False)[0, 0]
        lower["fitting"] += bool(fit.objective[0] < objective[index])
        lower["reporting"] += bool(fit.error[0] < theirs_held[0])
        units = fit.error_base2[0].clamp_min(1e-30)
        print(f"  {name:48}  authors' {(theirs_held[0] / units).item():.3f}   default {(fit.error[0] / units).item():.3f}")
    print(f"seconds per site   authors' {theirs:.2f} ({len(names)} sites)   default {ours:.4f} ({len(sites)} sites)")
    print(f"ratio {theirs / ours:.0f}   (at least 500)")
    shares = ", ".join(f"{number} of {len(names)} ({part})" for part, number in lower.items())
    print(f"lower error with the default at {shares}   (at least 95 %)")


if __name__ == "__main__":
    main()
