"""The command line around Hydra: what goes in, what an error looks like, how a run is stopped.

Numeric option groups: Hydra 1.3 refuses `grain=3` where `grain` is a group, so `quote_numeric_options` writes
`grain='3'` before Hydra reads the command line.
"""

import re
import shlex
import signal

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from spikellm.config import PROJECT_ROOT, Config, InputError, register

NUMERIC_GROUPS = ("grain", "timesteps")
# What main.py reports as one line with exit code 2; anything else is a defect and keeps its traceback.
INPUT_ERRORS = (InputError, HydraException, OmegaConfBaseException, OSError, FloatingPointError)


INTERRUPTED = 130  # exit code of a run that was stopped by SIGINT or SIGTERM


def raise_on_termination() -> None:
    """Let SIGTERM end a run as Ctrl-C does: by KeyboardInterrupt, so that whatever is half done is cleared away."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, interrupt)


def explain(error: BaseException) -> str:
    """An error as one line: the message, what Hydra or the system leaves unsaid, and the cure."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        text = f"interrupted ({text or 'SIGINT'}): the same command goes on from here; what was finished is kept and not computed again"
    elif isinstance(error, HydraException):
        text = text.partition("Config search path:")[0]
        if isinstance(error.__cause__, OmegaConfBaseException):
            text += f" ({str(error.__cause__).splitlines()[0]})"
    elif isinstance(error, OSError):
        text = f"{error.filename or 'output'}: {error.strerror or error}; hydra.run.dir= and output_root= choose where results are written"
    return " ".join(text.split())


def quote_numeric_options(arguments: list[str]) -> list[str]:
    """The command line with bare integers of the numeric groups quoted: grain=1,2 -> grain='1','2'.

    Raises:
        InputError: range() or choice() of a numeric group, which cannot be quoted.
    """
    groups = "|".join(NUMERIC_GROUPS)
    quoted = []
    for argument in arguments:
        if match := re.fullmatch(rf"({groups})=(\d+|auto)(,(\d+|auto))*", argument):
            group, _, options = argument.partition("=")
            argument = f"{group}=" + ",".join(f"'{option}'" for option in options.split(","))
        elif match := re.match(rf"({groups})=\s*(range|choice|interval|glob)\(", argument):
            raise InputError(f"{argument}: {match[2]}() does not work for the group {match[1]}; list the options, as in {match[1]}=1,2,3")
        quoted.append(argument)
    return quoted


def compose_config(overrides: list[str]) -> Config:
    """The checked configuration of `python main.py OVERRIDE ..`, for scripts and notebooks: `run_stages(compose_config([..]))`.

    Raises:
        InputError, HydraException, OmegaConfBaseException: an unknown key or option, a value out of range.
    """
    register()
    with initialize_config_dir(config_dir=str(PROJECT_ROOT / "conf"), version_base="1.3"):
        config = OmegaConf.to_object(compose("config", overrides=quote_numeric_options(overrides)))
    assert isinstance(config, Config)
    return config


def command_line(arguments: list[str]) -> str:
    """The command that repeats a run, as a person would type it: `quote_numeric_options` undone, quoted for the shell."""
    groups = "|".join(NUMERIC_GROUPS)
    typed = [argument.replace("'", "") if re.match(rf"({groups})=", argument) else argument for argument in arguments]
    return " ".join(["python main.py", *map(shlex.quote, typed)])
