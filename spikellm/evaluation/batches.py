"""How many sequences a forward takes where nobody says it.

A product of few rows waits for the weights that it reads, and every operation has its start. From so many rows on neither is felt
(experiments/bench/README.md); more of them only take memory.
"""

import psutil
import torch

from spikellm.model.pretrained import PreTrainedModel
from spikellm.model.sites import EMBEDDING

CORE_ROWS, CUDA_ROWS = 512, 8192  # of a product: on each core of a CPU, on a GPU
SHARE = 4  # activations take this part of the memory that is free
WIDE, HIDDEN, LOGITS = 5, 4, 3  # of these rows that live together, in float32: the MLP's, the hidden state's, the logits'


def sequences(model: PreTrainedModel, length: int, *, logits: bool = False) -> int:
    """Sequences of so many tokens that a forward gains from, at most as many as there is memory for; at least one.

    Args:
        length: of one [tokens].
        logits: whether all logits of the forward are there at once.
    """
    config, cuda = model.config, model.device.type == "cuda"
    rows = length * getattr(model.get_submodule(EMBEDDING), "T", 1)  # every time step has its own, see `SteppedEmbedding`
    numbers = WIDE * config.intermediate_size + HIDDEN * config.hidden_size + (LOGITS * config.vocab_size if logits else 0)
    free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
    wanted = CUDA_ROWS if cuda else CORE_ROWS * torch.get_num_threads()
    return max(1, min(wanted, free // SHARE // (4 * numbers)) // rows)
