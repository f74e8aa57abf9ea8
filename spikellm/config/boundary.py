"""Where a library is entered: whatever goes wrong inside becomes one line about the user's value.

Libraries raise dozens of unrelated types for a damaged file (SafetensorError, UnpicklingError, KeyError, ..), and the place that
calls them is the only one that knows which key and which file are meant. It says so once:

    with blamed_on(f"model.path={path}", "give a folder in transformers' format"):
        model = AutoModelForCausalLM.from_pretrained(path)

What counts is where an error comes from, not its type. The library's: raised below the call that stands in the `with`, and no function of
this package in between. An error of our own code inside, or of a function that the library calls back, is a defect and keeps its traceback;
so write only the library's calls into the `with`. Errors of the system (OSError), undecodable bytes and types that a library defines
count wherever they are raised: compiled code leaves no frame.
"""

import stat
from pathlib import Path
from types import TracebackType

from spikellm.config.checks import InputError

PACKAGE = str(Path(__file__).parents[1])
LONGEST = 240  # of a library's message, in one line [characters]


class blamed_on:  # noqa: N801 (it reads as a statement)
    """Within: an error of a library becomes `InputError("WHAT: its message; CURE")`. InputErrors and defects pass.

    Args:
        what: the user's value, as in "model.path=/models/llama", with the file where there is one.
        cure: what to do about it.
    """

    def __init__(self, what: str, cure: str) -> None:
        self.what, self.cure = what, cure

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if isinstance(error, Exception) and not isinstance(error, InputError) and is_of_a_library(error, trace):
            raise InputError(f"{self.what}: {reason(error)}; {self.cure}") from error


def read_file(path: str | Path, what: str, cure: str) -> bytes:
    """The content of a file that a user names; a pipe, which may never come, or a device, which may never end, is not opened.

    Args:
        what, cure: as in `blamed_on`.

    Raises:
        InputError: there is none, it is of another kind, or it cannot be read.
    """
    with blamed_on(what, cure):
        place = Path(path).expanduser()
        mode = place.stat().st_mode
    if not stat.S_ISREG(mode):
        raise InputError(f"{what}: it is {'a folder' if stat.S_ISDIR(mode) else 'a pipe, socket or device'}, not a file; {cure}")
    with blamed_on(what, cure):
        return place.read_bytes()


def reason(error: BaseException) -> str:
    """What an error says, in one line that is not too long, with its type where the message alone may say little."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text[:LONGEST]}" + (" .." if len(text) > LONGEST else "") if text else type(error).__name__


def is_of_a_library(error: Exception, trace: TracebackType | None) -> bool:
    """See the module's text; `trace` begins in the function with the `with`. A full memory is nobody's input."""
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return False
    ours = []
    while trace is not None:
        ours.append(trace.tb_frame.f_code.co_filename.startswith(PACKAGE))
        trace = trace.tb_next
    if any(ours[1:]):
        return False
    compiled = isinstance(error, OSError | UnicodeError) or type(error).__module__ != "builtins"
    return len(ours) > 1 or compiled
