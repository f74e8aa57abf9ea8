"""Where things lie: in a checkout `conf/` is beside the package and results go below it; of an installed package `conf/` is inside."""

from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1]
CHECKOUT = None if (PACKAGE / "conf").is_dir() else PACKAGE.parent  # None: installed
CONF = (CHECKOUT or PACKAGE) / "conf"


def project_root() -> Path:
    """The folder below which `outputs/` is: the checkout, or the current folder where the package is installed."""
    return CHECKOUT or Path.cwd()
