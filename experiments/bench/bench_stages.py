"""What calibration costs in forwards of the pretrained model, what the search costs, how both grow, what batches gain: `make bench`.

SmolLM2-135M on windows of the embedded text. Ratios are taken turn by turn in one process, medians and ranges of the repeats. Growth is the
exponent e of cost ~ size^e, fitted to three sizes each a factor of two apart: 1 is linear.
"""

import spikellm  # noqa: F401 (before torch, whose threads then sleep while they wait for each other)

# isort: split
import argparse
import math
import statistics
import time
from collections.abc import Callable, Sequence
from functools import partial

import torch
from bench import HARDWARE, MODEL, peak_mib, ratio_line, windows
from surroundings import surroundings
from torch import Tensor
from transformers import PreTrainedModel

from spikellm.calibration.calibrate import calibrate
from spikellm.config.snn import PrefixConfig, SearchConfig, SpikingConfig
from spikellm.evaluation.batches import sequences
from spikellm.evaluation.perplexity import perplexity
from spikellm.model.conversion import fill, prepare
from spikellm.model.load import load_model
from spikellm.search.options import Options
from spikellm.search.search import base2, evolution


def seconds(work: Callable[[], object]) -> float:
    """Of one call."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def exponent(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The slope of log cost over log size, by least squares."""
    x, y = ([math.log(each) for each in part] for part in (sizes, costs))
    mean_x, mean_y = statistics.mean(x), statistics.mean(y)
    return sum((a - mean_x) * (b - mean_y) for a, b in zip(x, y, strict=True)) / sum((a - mean_x) ** 2 for a in x)


def options(T: int) -> Options:
    """Of the default search at T."""
    return Options(snn=SpikingConfig(T=T, grain="2" if T > 3 else "1"), search=SearchConfig(), seed=0)


def observed_model(layers: int | None = None) -> PreTrainedModel:
    """Rotated, with slots; its first layers alone."""
    model = load_model(MODEL, HARDWARE)
    if layers is not None:
        model.model.layers = model.model.layers[:layers]
        model.config.num_hidden_layers = layers
    prepare(model, rotation_seed=0, query_block=HARDWARE.query_block)
    return model


def grown(name: str, sizes: Sequence[int], cost: Callable[[int], float], repeats: int) -> None:
    """Print seconds at each size, and the exponent."""
    found = [statistics.median(cost(size) for _ in range(repeats)) for size in sizes]
    listed = ", ".join(f"{size}: {each:.2f} s" for size, each in zip(sizes, found, strict=True))
    print(f"{name:36s} ^ {exponent(sizes, found):.2f}   ({listed})")


def batched(name: str, model: PreTrainedModel, text: Tensor, repeats: int) -> None:
    """Print what short windows gain from sharing a forward: milliseconds a token with 1, 2, 4 .. of them, and the number chosen."""
    for length in (64, 256, 512, 1024):
        found = []
        for size in (1, 2, 4, 8, 16, 32):
            if size > 1 and size * length > 4096:
                break
            some = text.flatten()[: max(size, 1024 // length) * length].view(-1, length)
            times = [seconds(partial(perplexity, model, some, batch_size=size)) for _ in range(repeats)]
            found.append(f"{size}: {1e3 * min(times) / some.numel():.2f}")
        print(f"{name}, windows of {length:<4d} ms a token by windows a forward  {'  '.join(found)}   chosen: {sequences(model, length)}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--windows", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(surroundings(), flush=True)
    text = windows(arguments.window * arguments.windows).view(arguments.windows, -1)
    ann, model, prefix = load_model(MODEL, HARDWARE), observed_model(), PrefixConfig()

    @torch.no_grad()
    def forward(some: Tensor) -> None:
        for window in some.split(1):
            ann(window)

    forward(text[:1])
    print(f"calibration of {arguments.windows} windows of {arguments.window} tokens, {torch.get_num_threads()} threads")
    ratios, found = [], calibrate(model, text[:, :256], prefix)
    for _ in range(arguments.repeats):
        plain = seconds(lambda: forward(text))
        start = time.perf_counter()
        found = calibrate(model, text, prefix)
        ratios.append((time.perf_counter() - start) / plain)
    print(ratio_line("calibration / forward", ratios, 2.0))
    print(f"{'peak above the weights':24s} {peak_mib(lambda: calibrate(model, text, prefix)):.0f} MiB")

    groups = sum(site.counts.shape[1] for site in found.statistics.values())
    times = [seconds(lambda: evolution(found.statistics, options(8))) for _ in range(3)]
    print(f"{'search, T=8, G=2':24s} {statistics.median(times):.1f} s   ({groups} groups; at most 10)")

    few = text[:, :512]
    print("growth:")
    grown("calibration over windows", (2, 4, 8), lambda size: seconds(lambda: calibrate(model, few[:size], prefix)), 1)
    lengths = (512, 1024, 2048)
    grown("calibration over tokens of a window", lengths, lambda size: seconds(lambda: calibrate(model, text[:2, :size], prefix)), 1)
    shallow = {layers: observed_model(layers) for layers in (5, 10, 20)}
    grown("calibration over layers", tuple(shallow), lambda size: seconds(lambda: calibrate(shallow[size], few[:2], prefix)), 1)
    grown("search over T", (4, 6, 8), lambda T: seconds(lambda: evolution(found.statistics, options(T))), 1)
    tables = {name: fit.table for name, fit in base2(found.statistics, options(8)).items()}
    fill(model, tables, compiled=True)
    perplexity(model, few[:1], label="warm-up")
    grown("forward, base 2 at T=8, over tokens", lengths, lambda size: seconds(lambda: perplexity(model, text[:1, :size], label="")), 3)
    print("batches:")
    for name, each in (("ann", ann), ("snn", model)):
        batched(name, each, text, 3)


if __name__ == "__main__":
    main()
