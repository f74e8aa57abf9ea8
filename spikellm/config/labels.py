"""What results call networks and kinds of site, and what people read for them: one entry each, in the order in which they are shown.

No figure depends on this file: what a kind is to a model and to the search stands in `model/sites.py`.
"""

from enum import Enum
from typing import NamedTuple


class Label(NamedTuple):
    """A name beside figures, and one that explains itself."""

    short: str
    long: str


# Networks that are measured, by their keys in results.json and in dataset.zero_shot.networks.
NETWORKS = {
    "ann": Label("ANN", "pretrained (ANN)"),
    "ann_prefix": Label("ANN, prefix", "pretrained, same prefix"),
    "base2": Label("base-2 SNN", "base-2 phase code"),
    "snn": Label("SNN", "fitted code (SNN)"),
}


class SiteKind(Enum):
    """The ten kinds of site; the member's name stands in results and in names of sites, the value is what people read."""

    attention_input = "attention input"
    query = "query"
    key = "key"
    value = "value"
    softmax = "softmax"
    attention_output = "attention output"
    mlp_input = "MLP input"
    activation = "SiLU"
    mlp_product = "MLP product"
    head_input = "final norm"
