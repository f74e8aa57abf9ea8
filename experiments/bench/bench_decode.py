"""Seconds of a generated token over the pretrained model's, after short and long contexts, side by side in one process: `make bench`.

SmolLM2-135M, the default code at each T. A cache of 200 tokens is read from text; the long one repeats it, for the cost of a token does not
depend on which tokens came before. Models and contexts take turns.
"""

import spikellm  # noqa: F401 (before torch, whose threads then sleep while they wait for each other)

# isort: split
import argparse
import statistics
import time
from typing import Any

import torch
from bench import HARDWARE, MODEL, ratio_line, spiking, windows
from surroundings import surroundings
from transformers import DynamicCache, PreTrainedModel

from spikellm.model.load import load_model

SHORT, LONG = 200, 2000
WARM = 3  # tokens before those that are timed


def caches(model: PreTrainedModel, text: torch.Tensor) -> dict[int, DynamicCache]:
    """Those of the two contexts."""
    first = DynamicCache(config=model.config)
    model(text[:, :SHORT], past_key_values=first, use_cache=True, logits_to_keep=1)
    found = {}
    for tokens in (SHORT, LONG):
        found[tokens] = DynamicCache(config=model.config)
        layers: list[Any] = first.layers
        for number, layer in enumerate(layers):
            found[tokens].update(*(part.repeat(1, 1, tokens // SHORT, 1) for part in (layer.keys, layer.values)), number)
    return found


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--T", type=int, nargs="+", default=[8, 6])
    parser.add_argument("--tokens", type=int, default=25)
    arguments = parser.parse_args()
    print(surroundings(), flush=True)
    text = windows(1024)
    networks = {"ann": load_model(MODEL, HARDWARE)} | {f"T={T}": spiking(text, T) for T in arguments.T}
    held = {(name, tokens): cache for name, model in networks.items() for tokens, cache in caches(model, text).items()}
    seconds: dict[tuple[str, int], list[float]] = {place: [] for place in held}
    for number in range(WARM + arguments.tokens):
        for place, cache in held.items():
            start = time.perf_counter()
            networks[place[0]](text[:, number : number + 1], past_key_values=cache, use_cache=True)
            if number >= WARM:
                seconds[place].append(time.perf_counter() - start)
    medians = {place: statistics.median(each) for place, each in seconds.items()}
    print(f"{torch.get_num_threads()} threads, a token of the ANN after {SHORT} and {LONG}: ", end="")
    print(", ".join(f"{1000 * medians['ann', tokens]:.0f} ms" for tokens in (SHORT, LONG)))
    for name in networks:
        for tokens in (SHORT, LONG) if name != "ann" else ():
            pairs = zip(seconds[name, tokens], seconds["ann", tokens], strict=True)
            print(ratio_line(f"{name}, after {tokens}, / ANN", [own / other for own, other in pairs], 1.5))
        print(f"{f'{name}, {LONG} / {SHORT}':24s} {medians[name, LONG] / medians[name, SHORT]:.2f}   (at most 1.3)")


if __name__ == "__main__":
    main()
