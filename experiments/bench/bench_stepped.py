"""Speed and memory of stepped execution against folded, side by side in one process: `make bench`.

SmolLM2-135M, one window of 512 tokens, T=6, base-2 tables; the median of some repeats. Seconds are those of this process on its
cores (CPU time), which other work on the machine changes little. Peaks are weights and activations, as in bench.py.
"""

import spikellm  # before torch, whose threads then sleep while they wait for each other

# isort: split
import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial

import torch
from bench import HARDWARE, MODEL, peak_mib, windows

from spikellm.evaluation.perplexity import perplexity
from spikellm.execution.memory import peak_bytes
from spikellm.execution.stepped import stepped
from spikellm.model.load import load_model


def seconds(work: Callable[[], object], repeats: int) -> float:
    """Median CPU time of a call [s]."""
    times = []
    for _ in range(repeats):
        start = time.process_time()
        work()
        times.append(time.process_time() - start)
    return statistics.median(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, default=6)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    text = windows(arguments.window)
    model = spikellm.convert(load_model(MODEL, HARDWARE), text, T=arguments.T, grain=1, method="base2").model
    weights = sum(parameter.numel() * parameter.element_size() for parameter in model.parameters()) / 2**20
    print(f"window {arguments.window}, T={arguments.T}, {torch.get_num_threads()} threads, weights {weights:.0f} MiB")
    reference: tuple[float, float] | None = None
    for name, chunk in (("folded", None), ("stepped, all T steps a product", arguments.T), ("stepped, snn.step_chunk=1", 1)):
        with stepped(model, chunk=chunk) if chunk else nullcontext():
            perplexity(model, text, label=f"{name}, warm-up")
            peak = weights + peak_mib(partial(perplexity, model, text, label=f"{name}, memory"))
            spent = seconds(partial(perplexity, model, text, label=name), arguments.repeats)
        line = f"{name:<32} {spent:7.2f} s  {peak:6.0f} MiB"
        if reference and chunk:
            estimate = peak_bytes(model, arguments.window, chunk=chunk) / 2**20
            line += f"   ratios {spent / reference[0]:.2f} (at most {1.5 * arguments.T:.0f})  {peak / reference[1]:.2f}"
            line += f" {'(at most 1.5)' if chunk == 1 else ''}   estimated peak {estimate:.0f} MiB"
        reference = reference or (spent, peak)
        print(line, flush=True)


if __name__ == "__main__":
    main()
