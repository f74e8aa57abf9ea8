"""Speed and memory on a GPU of the spiking network against the ANN with sdpa, and of stepped execution against folded, in one process.

Decoder layers of LLaMA-3-8B's shape with random bfloat16 weights, made on the device: no files, and a vocabulary so small that layers are
what is timed. Every site has a code of two intervals of signed digits, a table per head; spikes of random weights are no trained model's,
but a kernel's time does not depend on them. Medians of some repeats; networks take turns. `--device cpu --tiny` shows that the script runs.
"""

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, LlamaConfig, PreTrainedModel

from spikellm.coding.grains import base2_amplitudes, default_v0
from spikellm.coding.neuron import PhaseTable
from spikellm.config.labels import SiteKind
from spikellm.execution.stepped import stepped
from spikellm.kernels.encode import Digits, Rows
from spikellm.model.conversion import fill, model_sites, prepare, site_groups
from spikellm.model.prefix import attach_prefix

LLAMA3_8B = {"hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8, "head_dim": 128}
TINY = {"hidden_size": 64, "intermediate_size": 144, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16}
VOCABULARY = 1024


def network(layers: int, sizes: dict[str, Any], device: str) -> PreTrainedModel:
    """The ANN; every call makes the same."""
    config = LlamaConfig(**sizes, num_hidden_layers=layers, vocab_size=VOCABULARY, max_position_embeddings=8192)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa")
    return model.eval().requires_grad_(False)


def table(tau: float, groups: int, T: int) -> PhaseTable:
    """Signed digits, base 2 up to tau / 4 and from there on."""
    rows = [Rows(base2_amplitudes(each, T), base2_amplitudes(each, T), base2_amplitudes(each, T), default_v0(each, T))
            for each in (torch.full([groups], tau / 4), torch.full([groups], tau))]  # fmt: skip
    whole = (torch.cat(parts) for parts in zip(*rows, strict=True))
    return PhaseTable(*whole, digits=Digits(signed=True, intervals=2), cuts=torch.full([1, groups], tau / 4))


def spiking(model: PreTrainedModel, T: int) -> PreTrainedModel:
    """The same with neurons, behind a token of prefix."""
    prepare(model, rotation_seed=0)
    attach_prefix(model, [1])
    taus = {site.name: (1.0 if site.kind is SiteKind.softmax else 4.0, site_groups(model.config, site.kind)) for site in model_sites(model)}
    fill(model, {name: table(*each, T) for name, each in taus.items()})
    return model


def wait(device: str) -> None:
    """Until what was asked for is done."""
    if device != "cpu":
        torch.cuda.synchronize()


def seconds(works: dict[str, Callable[[], object]], device: str, repeats: int) -> dict[str, list[float]]:
    """Of every work, repeat by repeat; each is done twice before: kernels are compiled, memory is had."""
    found: dict[str, list[float]] = {name: [] for name in works}
    for number in range(2 + repeats):
        for name, work in works.items():
            wait(device)
            start = time.perf_counter()
            work()
            wait(device)
            if number >= 2:
                found[name].append(time.perf_counter() - start)
    return found


def peak_mib(work: Callable[[], object], device: str) -> float:
    """Memory that a work takes beyond what was held before [MiB]; not known on a CPU."""
    if device == "cpu":
        return float("nan")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    work()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def show(what: str, name: str, spent: list[float], other: list[float], memory: float) -> None:
    """A row."""
    ratios = [own / base for own, base in zip(spent, other, strict=True)]
    spread = f"{statistics.median(ratios):6.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
    print(f"| {what:<24} | {name:<8} | {1000 * statistics.median(spent):9.2f} | {spread:<22} | {memory:8.0f} |", flush=True)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--T", type=int, default=6)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--window", type=int, default=2048)
    parser.add_argument("--context", type=int, default=2000)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--precision", choices=["ieee", "tf32x3"], default="ieee", help="of products in attention: kernels/gpu.py")
    parser.add_argument("--tiny", action="store_true")
    given = parser.parse_args()
    device = given.device
    if device != "cpu":
        from spikellm.kernels import gpu

        gpu.PRECISION = given.precision
    sizes = TINY if given.tiny else LLAMA3_8B
    networks = {"ann": network(given.layers, sizes, device), "folded": spiking(network(given.layers, sizes, device), given.T)}
    tokens = torch.randint(2, VOCABULARY, (1, max(given.window, given.context + 1)), device=device)
    name = "cpu" if device == "cpu" else torch.cuda.get_device_name()
    print(f"{name}, PyTorch {torch.__version__}, {given.layers} layers, T={given.T}, products of attention: {given.precision}\n")
    print("| work | network | ms | over the ANN's (stepped: over folded), median (range) | peak MiB |\n| --- | --- | --- | --- | --- |")

    def forward(model: PreTrainedModel, text: Tensor, steps: bool = False) -> Callable[[], object]:
        def work() -> None:
            with stepped(model, chunk=1) if steps else nullcontext():
                model(text, use_cache=False, logits_to_keep=1)

        return work

    def decode(model: PreTrainedModel) -> Callable[[], object]:
        cache = DynamicCache(config=model.config)
        model(tokens[:, : given.context], past_key_values=cache, use_cache=True, logits_to_keep=1)
        return lambda: model(tokens[:, given.context : given.context + 1], past_key_values=cache, use_cache=True)

    prefill = {name: forward(model, tokens[:, : given.window]) for name, model in networks.items()}
    prefill["stepped"] = forward(networks["folded"], tokens[:, : given.window], steps=True)
    step = {name: decode(model) for name, model in networks.items()}
    for what, works in ((f"{given.window} tokens", prefill), (f"a token after {given.context}", step)):
        spent = seconds(works, device, given.repeats)
        for name, work in works.items():
            show(what, name, spent[name], spent["folded" if name == "stepped" else "ann"], peak_mib(work, device))


if __name__ == "__main__":
    main()
