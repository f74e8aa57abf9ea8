"""What results call networks and kinds of site, and what people read for them: one entry each, in the order in which they are shown.

No figure depends on this file: what a kind is to a model and to the search stands in `model/sites.py`.
"""

from enum import Enum, StrEnum
from typing import NamedTuple, Self


class Label(NamedTuple):
    """A name beside figures, and one that explains itself."""

    short: str
    long: str


class NetworkName(StrEnum):
    """Networks that are measured, by their keys in results.json; the docstring under each is what `--help` says of it."""

    label: Label

    def __new__(cls, key: str, label: Label) -> Self:
        """A member is its key, with a label beside."""
        member = str.__new__(cls, key)
        member._value_, member.label = key, label
        return member

    ann = "ann", Label("ANN", "pretrained (ANN)")
    """as pretrained"""
    ann_prefix = "ann_prefix", Label("ANN, prefix", "pretrained, same prefix")
    """the same behind the spiking networks' prefix, rotated"""
    base2 = "base2", Label("base-2 SNN", "base-2 phase code")
    """base-2 phase coding in T steps"""
    snn = "snn", Label("SNN", "fitted code (SNN)")
    """the fitted codes"""
    int_static = "int_static", Label("INT, static", "integers, fixed steps")
    """integers of T + 1 bits (T at the softmax) in the neurons' places, their steps fitted to the calibration text"""
    int_token = "int_token", Label("INT, token", "integers, a step a token")
    """such integers between the least and the largest value of each token"""


NETWORKS: dict[str, Label] = {network.value: network.label for network in NetworkName}


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
