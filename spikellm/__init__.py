"""SpikeLLM: pretrained LLaMA-family models to spiking networks by distribution-aware multi-granularity phase coding.

Reading order of the code: README.md.
"""

from importlib import import_module
from typing import Any

from spikellm.cores import sleep_while_waiting
from spikellm.registration import teach_transformers

__version__ = "0.1.0"

# Name -> module; imported on first use, so that `import spikellm` costs no torch. No name may be a module's, whose import would
# replace it.
_PUBLIC = {
    "PhaseNeuron": "coding.neuron",
    "PhaseTable": "coding.neuron",
    "convert": "pipeline",
    "count_spikes": "spikes.accounts",
    "load": "model.checkpoint",
    "perplexity": "evaluation.perplexity",
    "stepped": "execution.stepped",
}
__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name not in _PUBLIC:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f"{__name__}.{_PUBLIC[name]}"), name)


sleep_while_waiting()  # first: what comes next may import torch
teach_transformers()
