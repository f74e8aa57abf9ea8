"""Networks of one converted model whose decoder layers lie on disk: perplexities from one reading of the layers.

Networks that share the weights go through each block in turn (`blocks.walk_side_by_side`): the block's slots are filled for one of them,
its windows go through, then for the next. Another change of weights is another reading. Hidden states of all networks are there at once.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cache

from spikellm.coding.neuron import Slot
from spikellm.config.labels import NetworkName
from spikellm.evaluation.figures import KeptPasses, Measurement, Windows
from spikellm.evaluation.networks import Networks, Variant
from spikellm.evaluation.perplexity import network_perplexities
from spikellm.model.blocks import Block, Occupy
from spikellm.model.conversion import occupy_sites
from spikellm.model.pretrained import PreTrainedModel


class SideBySide:
    """See the module's text.

    Args:
        models: have the converted model.
        prefix_tokens: of all networks.
        variants: the networks, made no earlier than one is measured.
    """

    def __init__(
        self, models: Networks, prefix_tokens: Callable[[], list[int]], variants: Mapping[NetworkName, Callable[[], Variant]]
    ) -> None:
        self.models, self.prefix_tokens = models, prefix_tokens
        self.variants = {name: cache(variant) for name, variant in variants.items()}

    @property
    def joins(self) -> bool:
        """Whether layers lie on disk."""
        return self.models.offloaded

    def build(self, name: NetworkName) -> PreTrainedModel:
        """The converted model as one of the networks."""
        return self.models.take(self.variants[name](), self.prefix_tokens())

    def measure(
        self, names: Sequence[NetworkName], windows: Windows, text: str, kept: KeptPasses, batch_size: int | None
    ) -> Iterator[tuple[NetworkName, Measurement]]:
        """Perplexities of some of the networks.

        Raises:
            FloatingPointError: the loss of one is not finite; those of the same reading that are have come before.
        """
        waiting = {name: self.variants[name]() for name in names}
        while waiting:
            change = next(iter(waiting.values())).change
            model = self.models.transparent(self.prefix_tokens(), change)
            own = {name: occupying(model, variant.occupants) for name, variant in waiting.items() if variant.change == change}
            waiting = {name: variant for name, variant in waiting.items() if name not in own}
            ids, passes = windows(model.config.vocab_size), kept(list(own))
            for name, found in network_perplexities(model, ids, own, label=text, passes=passes, batch_size=batch_size):
                yield name, Measurement(**asdict(found))


def occupying(model: PreTrainedModel, occupants: Mapping[str, Slot]) -> Occupy:
    """Puts the occupants of a block, by site name, into its slots."""

    def occupy(block: Block) -> None:
        occupy_sites(model, block.sites, occupants)

    return occupy
