"""What can go wrong through the user's input, as one small tree of exceptions.

AffcacheError
├── InputError     crops, labels, or a path that is not what it should be
├── StoreError     an embedding store or a run: incomplete, corrupt, in use, or made with another encoder
└── ConfigError    a setting: unknown, out of range, or missing

Every message says what happened, what was expected, and what to do next. The command line catches these and nothing
else; any other exception is a bug and shows its traceback.
"""

from collections.abc import Iterable
from difflib import get_close_matches


class AffcacheError(Exception):
    """Base of every error affcache raises on purpose."""


class InputError(AffcacheError):
    """Crops, labels or a path are not what affcache can work with."""


class StoreError(AffcacheError):
    """An embedding store, or a run that depends on one, is incomplete, corrupt, in use or mismatched."""


class ConfigError(AffcacheError):
    """A setting is unknown, out of range or missing."""


def first_line(error: BaseException) -> str:
    """Return the first line of what an error of another library says, or its kind where it says nothing."""
    return str(error).strip().partition("\n")[0] or type(error).__name__


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """Return `` (did you mean 'x'?)`` for the closest of ``known``, or an empty string when none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f" (did you mean {close[0]!r}?)" if close else ""
