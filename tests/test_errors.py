"""The tree of errors and the suggestion that messages carry."""

import pytest

from affcache.errors import AffcacheError, ConfigError, InputError, StoreError, did_you_mean


@pytest.mark.parametrize("kind", [InputError, StoreError, ConfigError])
def test_one_except_clause_catches_every_child(kind: type[AffcacheError]) -> None:
    assert issubclass(kind, AffcacheError)
    with pytest.raises(AffcacheError, match="what happened"):
        raise kind("what happened")


def test_no_child_is_an_error_of_another_kind() -> None:
    kinds = {InputError, StoreError, ConfigError}
    assert not any(issubclass(kind, other) for kind in kinds for other in kinds - {kind})
    assert not issubclass(AffcacheError, (OSError, ValueError, RuntimeError))


def test_suggestion_names_the_closest() -> None:
    assert did_you_mean("epoch", ["alpha", "epochs", "rho"]) == " (did you mean 'epochs'?)"


def test_no_suggestion_where_nothing_is_close() -> None:
    assert did_you_mean("epoch", iter(["alpha", "rho"])) == ""
