"""The name of transformers' model class, for annotations alone.

Its module takes seconds to import, as long as torch and all else together: a run that finds everything in the store, `--help` and a plan
build no model. Whoever does reaches for `transformers.AutoModelForCausalLM`, which brings it.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from transformers import PreTrainedModel
else:
    from torch.nn import Module as PreTrainedModel

__all__ = ["PreTrainedModel"]
