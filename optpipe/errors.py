"""The four ways a run can fail, one exit code each."""


class InputError(ValueError):
    """The user asked for something impossible; found before any work. Exit code 2."""


class GateError(RuntimeError):
    """An artifact does not agree with what it was made from, or is not good enough. Exit code 3."""


class TimingError(RuntimeError):
    """A verdict of the benchmark is INVALID: what was timed is no measurement. Exit code 5."""


class StageError(RuntimeError):
    """A stage broke while it worked; the log holds the traceback. Exit code 4."""


def one_line(error: BaseException) -> str:
    """The message of an error on one line, at most 300 characters; its kind if it has none."""
    return " ".join(str(error).split())[:300] or type(error).__name__
