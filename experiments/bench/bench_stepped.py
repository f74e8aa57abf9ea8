"""Speed and memory of stepped execution against folded, side by side in one process: `make bench`.

SmolLM2-135M, one window of 512 tokens, base-2 tables: seconds of a stepped forward over those of the folded one just before it, median and
range of the repeats. Peaks are weights and activations, as in bench.py.
"""

import spikellm  # before torch, whose threads then sleep while they wait for each other

# isort: split
import argparse
import statistics
import time
from contextlib import nullcontext
from functools import partial

import torch
from bench import HARDWARE, MODEL, peak_mib, ratio_line, windows
from surroundings import surroundings
from torch import Tensor
from transformers import PreTrainedModel

from spikellm.evaluation.perplexity import perplexity
from spikellm.execution.memory import peak_bytes
from spikellm.execution.stepped import stepped
from spikellm.model.load import load_model

MOST = {6: 4.5, 8: 6.0}  # times the folded seconds


def seconds(model: PreTrainedModel, text: Tensor, chunk: int | None) -> float:
    """Of a forward and its logits; chunk 0: folded [s]."""
    with nullcontext() if chunk == 0 else stepped(model, chunk=chunk):
        start = time.perf_counter()
        perplexity(model, text, label="timed")
        return time.perf_counter() - start


def measure(T: int, window: int, repeats: int) -> None:
    """Print what T steps cost."""
    text = windows(window)
    model = spikellm.convert(load_model(MODEL, HARDWARE), text, T=T, grain=1, method="base2").model
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    ways: dict[str, int | None] = {"folded": 0, "stepped": None, "stepped, step_chunk=1": 1}
    peaks = {}
    for name, chunk in ways.items():
        seconds(model, text, chunk)
        peaks[name] = weights + peak_mib(partial(seconds, model, text, chunk))
    taken: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, chunk in ways.items():
            taken[name].append(seconds(model, text, chunk))
    folded = taken["folded"]
    print(f"T={T}, window {window}, {torch.get_num_threads()} threads, folded {statistics.median(folded):.2f} s, {peaks['folded']:.0f} MiB")
    for name, chunk in ways.items():
        if chunk == 0:
            continue
        ratios = [own / other for own, other in zip(taken[name], folded, strict=True)]
        print(ratio_line(name, ratios, MOST.get(T, T)))
        estimate = peak_bytes(model, window, chunk=chunk or T) / 2**20
        ratio = peaks[name] / peaks["folded"]
        print(f"{'':24s} peak {peaks[name]:.0f} MiB, {ratio:.2f} of folded; estimated {estimate:.0f} MiB", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, nargs="+", default=[6, 8])
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    print(surroundings(), flush=True)
    for T in arguments.T:
        measure(T, arguments.window, arguments.repeats)


if __name__ == "__main__":
    main()
