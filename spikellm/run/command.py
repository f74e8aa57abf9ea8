"""The command line around Hydra: what goes in, what an error looks like, how a run is stopped.

Hydra 1.3 refuses `grain=3` where `grain` is a group, and letters beyond ASCII, `=`, `~`, parentheses and quotes inside a value:
`quote_values` puts such values into quotes before Hydra reads them, so that they mean what was typed.
"""

import errno
import os
import re
import shlex
import signal
import sys
from collections.abc import Callable

from hydra import compose, initialize_config_dir
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf.errors import OmegaConfBaseException

from spikellm.config.boundary import is_of_a_library, reason
from spikellm.config.checks import InputError
from spikellm.config.extras import EXTRA, require
from spikellm.config.places import CONF
from spikellm.config.schema import Config, instantiate, register
from spikellm.run.saved import as_given, completed

NUMERIC_GROUPS = ("grain", "timesteps")
# What is reported as one line with exit code 2; anything else is a defect and keeps its traceback.
INPUT_ERRORS = (InputError, HydraException, OmegaConfBaseException, OSError, FloatingPointError)
# Errors of the system that another place cures: always, and where the named file is not there, so that it was to be written.
NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EROFS)
NO_PLACE = (errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.ENAMETOOLONG)

INTERRUPTED, PIPE_CLOSED = 130, 141  # exit codes of a run that was stopped by SIGINT or SIGTERM, and of one whose reader went away
SHOWN = 60  # of an argument, in a message [characters]


def raise_on_termination() -> None:
    """Let SIGTERM end a run as Ctrl-C does: by KeyboardInterrupt, so that whatever is half done is cleared away."""

    def interrupt(number: int, _: object) -> None:
        raise KeyboardInterrupt(signal.Signals(number).name)

    signal.signal(signal.SIGTERM, interrupt)


def exit_code(run: Callable[[], object], program: str) -> int:
    """Call `run`; wrong input ends with one line and 2, an interruption with one line and 130, a defect with its traceback.

    Raises:
        SystemExit: of Hydra, which has printed what there is to say.
    """
    try:
        run()
        sys.stdout.flush()
    except KeyboardInterrupt as error:
        print(explain(error), file=sys.stderr)
        return INTERRUPTED
    except BrokenPipeError:  # `main.py --help | head`: what is still in the buffer must not be tried again on the way out
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return PIPE_CLOSED
    except SystemExit as error:
        if not isinstance(error.code, str):
            raise
        print(f"error: {error.code}", file=sys.stderr)
        return 2
    except Exception as error:
        text = explain(error)
        if not isinstance(error, INPUT_ERRORS):
            if not is_of_a_library(error, error.__traceback__):
                raise
            if isinstance(error.__cause__, OSError):  # logging says "unable to configure" where it cannot write
                text = explain(error.__cause__)
            else:
                text = f"command line: {reason(error)}; {program} --help lists groups, keys and values"
        print(f"error: {text}", file=sys.stderr)
        return 2
    return 0


def explain(error: BaseException) -> str:
    """An error as one line: the message, what Hydra or the system leaves unsaid, and the cure."""
    text = str(error)
    if isinstance(error, KeyboardInterrupt):
        text = f"interrupted ({text or 'SIGINT'}): the same command goes on from here; what was finished is kept and not computed again"
    elif isinstance(error, HydraException):
        text = text.partition("Config search path:")[0].partition("See https://hydra.cc")[0]
        if isinstance(error.__cause__, OmegaConfBaseException):
            text += f" ({str(error.__cause__).splitlines()[0]})"
    elif isinstance(error, OSError):
        text = _explain_os_error(error)
    return " ".join(text.split())


def _explain_os_error(error: OSError) -> str:
    text, place = error.strerror or str(error) or type(error).__name__, error.filename
    if error.errno in NO_SPACE or (place and error.errno in NO_PLACE and not os.path.isfile(place)):
        return f"{place or 'output'}: {text}; hydra.run.dir= and output_root= choose where results are written"
    return f"{place}: {text}" if place else text


def quote_values(arguments: list[str]) -> list[str]:
    """The command line as Hydra can read it: grain=1,2 -> grain='1','2'; path=/d/ü.txt -> path="/d/ü.txt"; a leading ~ is the home folder.

    Lists, dicts, sweeps and functions are left to Hydra.

    Raises:
        InputError: an argument without a key; a value that Hydra cannot read and that may be meant as one of those, with the quoting that
            works; range() or choice() of a numeric group, no name where a group takes one; a launcher that is not installed.
    """
    parser = OverridesParser.create()
    return [argument if argument.startswith("-") or "=" not in argument else _quote(parser, argument) for argument in arguments]


def _quote(parser: OverridesParser, argument: str) -> str:
    key, _, value = argument.partition("=")
    if not key.strip("+~ "):
        raise InputError(f"{argument[:SHOWN]}: there is no key before the =; write KEY=VALUE")
    group = key.partition("@")[0]
    if key in NUMERIC_GROUPS and re.fullmatch(r"(\d+|auto)(,(\d+|auto))*", value):
        return f"{key}=" + ",".join(f"'{option}'" for option in value.split(","))
    if key in NUMERIC_GROUPS and (match := re.match(r"\s*(range|choice|interval|glob)\(", value)):
        raise InputError(f"{argument}: {match[1]}() does not work for the group {key}; list the options, as in {key}=1,2,3")
    if value.startswith("~"):
        value = os.path.expanduser(value)
    override = _parse(parser, f"{key}={value}")
    if override is None:
        quoted = f"{key}={_in_quotes(value)}"
        if (understood := _parse(parser, quoted)) is None or understood.value() != value:
            return argument  # the key is wrong: Hydra says so
        if re.match(r"[\[{]|\w+\(.*\)$", value) or "," in value:
            raise InputError(f"{argument[:SHOWN]}: no list, dict, function or sweep that can be read; as a text: {shlex.quote(quoted)}")
        return quoted
    if (CONF / group).is_dir() and not override.is_sweep_override() and not _names_options(override, group):
        options = ", ".join(sorted(path.stem for path in (CONF / group).glob("*.yaml")))
        raise InputError(f"{argument[:SHOWN]}: the group {group} takes the name of an option: {options}")
    if group == "hydra/launcher" and (plugin := f"hydra_plugins.hydra_{value.partition('_')[0]}_launcher") in EXTRA:
        require(argument, plugin)
    return f"{key}={value}"


def _parse(parser: OverridesParser, argument: str) -> Override | None:
    """None where Hydra cannot read the argument."""
    try:
        return parser.parse_override(argument)
    except HydraException:
        return None
    except Exception as error:  # a number of 5000 digits
        raise InputError(f"{argument[:SHOWN]} ..: cannot be read ({reason(error)})") from error


def _names_options(override: Override, group: str) -> bool:
    value = override.value()
    if group == "experiment" and value is None:
        return True
    return isinstance(value, str) or (isinstance(value, list) and all(isinstance(option, str) for option in value))


def _in_quotes(value: str) -> str:
    """In Hydra's double quotes: backslashes count as such only before a quote."""
    return '"' + re.sub(r'(\\*)("|$)', lambda match: 2 * match[1] + ("\\" + match[2] if match[2] else ""), value) + '"'


def compose_config(overrides: list[str]) -> Config:
    """The checked configuration of `python main.py OVERRIDE ..`, for scripts and notebooks: `run_stages(compose_config([..]))`.

    Raises:
        InputError, HydraException, OmegaConfBaseException: an unknown key or option, a value out of range.
    """
    register()
    with initialize_config_dir(config_dir=str(CONF), version_base="1.3"):
        return instantiate(compose("config", overrides=completed(quote_values(overrides))))


def command_line(program: str, arguments: list[str]) -> str:
    """The command that repeats a run, as a person would type it: without what a saved model says, `quote_values` undone."""
    return " ".join([program, *(shlex.quote(_as_typed(argument)) for argument in as_given(arguments))])


def _as_typed(argument: str) -> str:
    """The bare value where `quote_values` gives it back its quotes."""
    key, _, value = argument.partition("=")
    bare = f"{key}={value.replace(chr(39), '')}"
    if key in NUMERIC_GROUPS and quote_values([bare]) == [argument]:
        return bare
    bare = f"{key}={value[1:-1]}"
    try:
        return bare if value.startswith('"') and quote_values([bare]) == [argument] else argument
    except InputError:
        return argument
