"""What a check of the configuration says, and how."""


class InputError(ValueError):
    """Wrong input from the user: the message names the key, the value and the cure; the command prints it as one line."""


def check(condition: bool, key: str, value: object, cure: str) -> None:
    """Refuse `value` of `key` with the cure, unless the condition holds.

    Raises:
        InputError: it does not.
    """
    if not condition:
        raise InputError(f"{key}={value}: {cure}")


def check_names(key: str, names: list[str], known: tuple[str, ...]) -> None:
    """Refuse names that are not known, or there twice.

    Raises:
        InputError: naming them.
    """
    unknown = [name for name in names if name not in known]
    check(not unknown, key, f"[{','.join(unknown)}]", f"not known; known: {', '.join(known)}")
    check(len(set(names)) == len(names), key, f"[{','.join(names)}]", "one of them is there twice")
