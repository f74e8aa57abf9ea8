"""What every method of finding codes is told: nodes of the configuration, so that defaults and their checks have one home."""

from dataclasses import dataclass, field

from spikellm.config.choices import Coding
from spikellm.config.schema import Config
from spikellm.config.snn import SearchConfig, SpikingConfig
from spikellm.kernels.encode import Digits
from spikellm.model.sites import ONE_SYNAPSE, Site

MAX_GRAINS = 3  # of grain=auto
MAX_INTERVALS = 3  # of snn.intervals=auto
CLASSIC = (Coding.rate, Coding.ttfs, Coding.few_spike)


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """Each method reads what concerns it."""

    snn: SpikingConfig  # T, grain, min_grain_length, coding, max_spikes
    search: SearchConfig = field(default_factory=SearchConfig)
    seed: int = 0  # the same seed and statistics give the same codes
    compiled: bool = True  # fuse the evaluation of candidates

    @classmethod
    def of(cls, config: Config) -> "Options":
        """The options that a job's configuration gives."""
        return cls(snn=config.snn, search=config.search, seed=config.seed, compiled=config.hardware.fused)

    @property
    def method(self) -> str:
        """The configured one of METHODS."""
        if self.snn.coding in CLASSIC:
            return "classic"
        return "imported" if self.search.import_file is not None else self.search.method.value

    @property
    def T(self) -> int:
        """Time steps; further down the codes know their own."""
        return self.snn.T

    @property
    def min_length(self) -> int:
        """Phases of a grain, at least."""
        return self.snn.min_grain_length

    @property
    def most_grains(self) -> int:
        """Grains that a code may have; of grain=auto as many as are tried."""
        return self.snn.grains or min(MAX_GRAINS, max(1, self.T // self.min_length))

    @property
    def most_intervals(self) -> int:
        """Intervals that a code may have; of snn.intervals=auto as many as are tried."""
        return self.snn.interval_count or MAX_INTERVALS

    @property
    def digits(self) -> Digits:
        """What the coding lets neurons send; the partition is the statistics' and the codes'."""
        coding = self.snn.coding
        return Digits(signed=coding is Coding.phase_signed, max_spikes=1 if coding is Coding.ttfs else self.snn.max_spikes)

    def spike_price(self, site: str) -> float:
        """Relative squared error for which one spike less a neuron is a fair exchange, weight 2^-((4T+11)/3); 0: spikes cost nothing.

        One price for all sites makes their errors alike, as the best allocation of a rate has them (reverse water-filling). It falls with
        T, since the weight is to say how far to go from what T steps can do, between the 2^-T and the 4^-T that a step and its
        square have. Where a spike reaches a single synapse, it costs nothing: the site keeps its accuracy.
        """
        place = Site.of(site)
        if place is not None and place.kind in ONE_SYNAPSE:
            return 0.0
        return self.search.weight_of_spikes(self.snn.coding) * 2.0 ** -((4 * self.T + 11) / 3)
