"""Errors that the command line turns into exit codes."""


class InputError(ValueError):
    """Bad input that a restart cannot mend; the message: value, constraint, remedy. Exit 2."""


class Restart(RuntimeError):
    """The run stopped early after saving its state: start it again and it goes on. Exit 75."""
