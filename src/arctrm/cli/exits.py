"""How a command may end besides an error of its own; loaded before Typer, so nothing heavy."""

from arctrm.errors import ArctrmError, UserError

DEBUG_FLAG = "--debug"
DEBUG_VARIABLE = "ARCTRM_DEBUG"


class Interrupted(ArctrmError):
    """Ctrl-C; the message is one that the interrupted command gave, or empty."""

    exit_code = 130


class CommandLineError(UserError):
    """An option, argument or command that does not exist, is missing, or is of the wrong type."""
