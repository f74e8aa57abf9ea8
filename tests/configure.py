"""Configurations as a command line and a sweep give them."""

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from spikellm.config.schema import Config, register
from spikellm.kernels.switch import is_fusing
from spikellm.run.command import compose_config
from tests.places import CONF


def configure(*arguments: str) -> Config:
    """With `--plain`, of a job whose kernels are switched off."""
    return compose_config([*([] if is_fusing() else ["hardware.fused=false"]), *arguments])


def composed(*overrides: str):
    """A sweep's configuration, as its callbacks get it."""
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return GlobalHydra.instance().hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)
