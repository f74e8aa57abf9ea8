"""How many sequences a forward takes where nobody says it.

A product of few rows waits for the weights that it reads, and every operation has its start. From so many rows on neither is felt
(experiments/bench/README.md); more of them only take memory.
"""

import psutil
import torch

from spikellm.model.blocks import rows_of_token
from spikellm.model.pretrained import PreTrainedModel

CORE_ROWS, CUDA_ROWS = 512, 8192  # of a product: on each core of a CPU, on a GPU
SHARE = 4  # activations take this part of the memory that is free
WIDE_COPIES, STATE_COPIES, LOGIT_COPIES = (
    5,
    4,
    3,
)  # of these rows that live together, in float32: the MLP's, the hidden state's, all logits'


def sequences(model: PreTrainedModel, length: int, *, logits: bool = False) -> int:
    """Sequences of so many tokens that a forward gains from, at most as many as there is memory for; at least one.

    Args:
        length: of one [tokens].
        logits: whether all logits of the forward are there at once.
    """
    config, cuda = model.config, model.device.type == "cuda"
    numbers = (
        WIDE_COPIES * config.intermediate_size + STATE_COPIES * config.hidden_size + (LOGIT_COPIES * config.vocab_size if logits else 0)
    )
    free = torch.cuda.mem_get_info(model.device)[0] if cuda else psutil.virtual_memory().available
    wanted = CUDA_ROWS if cuda else CORE_ROWS * torch.get_num_threads()
    return max(1, min(wanted, free // SHARE // (4 * numbers)) // (length * rows_of_token(model)))
