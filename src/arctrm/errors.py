"""The exception tree. A message is one sentence: where, what was got, what is allowed, the cure."""


class ArctrmError(Exception):
    """Base of every error that arctrm raises on purpose; the command exits with `exit_code`."""

    exit_code = 1


class UserError(ArctrmError):
    """Something the user gave cannot be used; exit code 2."""

    exit_code = 2


class ConfigError(UserError):
    """A configuration file, override or environment variable is wrong."""


class TaskError(UserError):
    """A task file, or the task in it, is not a valid ARC task."""


class DataError(UserError):
    """A data source, a built data set or a folder cannot be used."""


class OverlapError(DataError):
    """The training mix contains test pairs of the evaluated split."""


class CheckpointError(UserError):
    """A checkpoint is missing, truncated, or made for another configuration or id map."""


class ResourceError(ArctrmError):
    """The machine ran out of memory or disk; the message names the key to lower. Exit code 1."""


class Interrupted(ArctrmError):
    """Ctrl-C; the message is one that the interrupted command gave, or empty."""

    exit_code = 130
