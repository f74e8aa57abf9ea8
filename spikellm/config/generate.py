"""What stage generate writes on from, and how: the node `generate`."""

from dataclasses import dataclass

from spikellm.config.checks import check


@dataclass(kw_only=True, slots=True)
class GenerateConfig:
    """Text that the spiking model continues."""

    prompt: str | None = None
    """stage generate: text to continue"""
    prompts_file: str | None = None
    """stage generate: UTF-8 file with a prompt a line, instead of `prompt`; empty lines are passed over"""
    max_new_tokens: int = 64
    """tokens that are made for each prompt, at most [tokens]"""
    batch_size: int = 4
    """prompts a forward, padded on the left"""
    temperature: float = 0.0
    """of sampling; 0: the likeliest token each time"""
    top_p: float = 1.0
    """sample among the likeliest tokens that have this share together"""
    seed: int = 0
    """of sampling"""
    beams: int = 1
    """sequences that a beam search keeps; 1: no beam search"""
    raster: int | None = None
    """layer whose spikes on the first text's new tokens are drawn and written to raster.csv; null: none"""

    def __post_init__(self) -> None:
        for key in ("max_new_tokens", "batch_size", "beams"):
            check(getattr(self, key) >= 1, f"generate.{key}", getattr(self, key), "must be at least 1")
        given = f"{self.prompts_file} with generate.prompt={self.prompt}"
        check(self.prompt is None or self.prompts_file is None, "generate.prompts_file", given, "give one of the two")
        check(self.temperature >= 0, "generate.temperature", self.temperature, "must not be negative; 0 takes the likeliest token")
        check(0 < self.top_p <= 1, "generate.top_p", self.top_p, "takes a share above 0 and up to 1")
        cure = "goes with sampling: add generate.temperature=1"
        for key, default in (("top_p", 1.0), ("seed", 0)):
            value = getattr(self, key)
            check(self.temperature > 0 or value == default, f"generate.{key}", value, cure)
        check(self.raster is None or self.raster >= 0, "generate.raster", self.raster, "takes the number of a layer, from 0 on, or null")
