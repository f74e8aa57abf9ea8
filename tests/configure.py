"""Configurations as a command line and a sweep give them."""

from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode

from spikellm.config.schema import Config, register
from spikellm.run.command import compose_config
from tests.places import CONF


def configure(*arguments: str) -> Config:
    return compose_config(list(arguments))


def composed(*overrides: str):
    """A sweep's configuration, as its callbacks get it."""
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return GlobalHydra.instance().hydra.compose_config("config", list(overrides), run_mode=RunMode.MULTIRUN)
