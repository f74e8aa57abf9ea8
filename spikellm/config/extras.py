"""Libraries that not every run needs, and what to say where one is missing. pyproject.toml has their versions."""

from importlib.util import find_spec

from spikellm.config.checks import InputError

# library, as it is imported -> the extra that installs it
EXTRA = {
    "datasets": "hub",
    "hydra_plugins.hydra_joblib_launcher": "sweep",
    "hydra_plugins.hydra_submitit_launcher": "sweep",
    "jinja2": "report",
    "lm_eval": "eval",
    "matplotlib": "report",
    "wandb": "wandb",
}
PICTURES = ("jinja2", "matplotlib")  # of plots and report.html


def lack(*libraries: str) -> str | None:
    """The first of `libraries` that is not installed, with the command that installs it; None: all are there."""
    absent = next((name for name in libraries if not _is_installed(name)), None)
    return absent and f"{absent} is not installed: pip install 'spikellm[{EXTRA[absent]}]'"


def require(wish: str, *libraries: str) -> None:
    """Check that what the user's `wish` ("tracking=wandb") needs is there.

    Raises:
        InputError: one of `libraries` is not installed.
    """
    if (absent := lack(*libraries)) is not None:
        raise InputError(f"{wish}: {absent}")


def _is_installed(library: str) -> bool:
    try:
        return find_spec(library) is not None
    except ModuleNotFoundError:  # nor is the package that it is in
        return False
