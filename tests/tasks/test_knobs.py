"""The settings that losses bring with them: what is read from their source is what the functions themselves say."""

import dataclasses
import inspect
import math
import subprocess
import sys
from pathlib import Path

import pytest

from affcache.settings import Settings, setting
from affcache.tasks import knobs
from affcache.tasks.knobs import KNOBS, KNOBS_OF_LOSSES, Knob, with_knobs
from affcache.tasks.losses import LOSSES
from affcache.training.settings import FitSettings


def test_what_is_read_is_what_the_functions_take() -> None:
    assert {kind: list(of) for kind, of in KNOBS_OF_LOSSES.items()} == {kind: list(of) for kind, of in LOSSES.items()}
    for kind, losses in LOSSES.items():
        for name, loss in losses.items():
            taken = {
                parameter.name: parameter.default
                for parameter in inspect.signature(loss).parameters.values()
                if parameter.kind is inspect.Parameter.KEYWORD_ONLY
            }
            assert KNOBS_OF_LOSSES[kind][name] == set(taken)
            assert {knob: KNOBS[knob].default for knob in taken} == taken
    assert set(KNOBS) == {name for losses in KNOBS_OF_LOSSES.values() for of in losses.values() for name in of}
    assert (KNOBS_OF_LOSSES["values"], KNOBS["label_smoothing"].span) == ({"squared_error": frozenset()}, "in [0, 1)")


def test_they_are_read_without_torch() -> None:
    code = "import sys, affcache.training.settings, affcache.tasks.knobs; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("doc", "inside", "outside"),
    [
        ("in [0, 1): Share.", (0.0, 0.999), (-1e-9, 1.0, math.nan)),
        ("in (0, 1]: Share.", (1e-9, 1.0), (0.0, 1.001, math.nan)),
        ("in [-1, 1]: Share.", (-1.0, 0.0, 1.0), (-1.1, 1.1)),
        ("in (-1, 1): Share.", (-0.9, 0.9), (-1.0, 1.0)),
        ("at least 2: Share.", (2.0, 1e9), (1.999, math.nan)),
        ("more than 0: Share.", (1e-9, 1e9), (0.0, -1.0, math.nan)),
        ("Share.", (-1e9, 0.0, 1e9), ()),
    ],
)
def test_a_range_is_held(doc: str, inside: tuple[float, ...], outside: tuple[float, ...]) -> None:
    knob = Knob("share", 0.0, doc)
    assert all(knob.allows(value) for value in inside)
    assert not any(knob.allows(value) for value in outside)


def test_the_sentence_is_the_docstrings_first_with_the_range() -> None:
    assert Knob("a", 0.0, "in [0, 1): Share of labels (0.5 of them) moved. More of it.").sentence == (
        "Share of labels (0.5 of them) moved, in [0, 1)."
    )
    assert Knob("a", 0.0, "at least 0: Exponent.").sentence == "Exponent, at least 0."
    assert Knob("a", 0.0, "An exponent").sentence == "An exponent."
    assert all(knob.sentence.endswith(".") and len(knob.sentence) < 120 for knob in KNOBS.values())


def test_settings_have_a_field_for_each() -> None:
    @dataclasses.dataclass(frozen=True)
    @with_knobs
    class Some(Settings):
        other: int = setting(3, "Another.")

    fields = {field.name: field for field in dataclasses.fields(Some)}
    assert set(fields) == {"other", *KNOBS}
    for name, knob in KNOBS.items():
        for of in (fields[name], {field.name: field for field in dataclasses.fields(FitSettings)}[name]):
            assert (of.type, of.default) == (float, knob.default)
            assert knob.sentence in of.metadata.values()
        assert getattr(Some(**{name: 0.25}), name) == 0.25
    assert FitSettings(label_smoothing=0.1).label_smoothing == 0.1


def test_a_setting_is_not_taken_over() -> None:
    class Some(Settings):
        label_smoothing: int = 3

    with pytest.raises(ValueError, match="a loss takes label_smoothing, which is a setting already"):
        with_knobs(Some)
    assert Some.label_smoothing == 3


LOSSES_OF_ONES_OWN = '''
def first(logits, labels, *, sharpness: Option = -2, cut: Option = 0.5, strict: bool = True, form: str = "a", given):
    """A loss.

    Args:
        logits: tensor.
        sharpness: at least -3: How sharp it is, said
            over two lines. And more.
        strict: whether it is.
    """

def second(logits, labels, *, cut: Option = CUT, sharpness: Option = SHARPNESS):
    """Another."""

LOSSES: Mapping[str, Mapping[str, Loss]] = {"classes": {"one": first, "two": second}, "values": {"one": second}}
'''


def read(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str) -> tuple[dict[str, Knob], object]:
    (folder / "losses.py").write_text(text)
    monkeypatch.setattr(knobs, "files", lambda package: folder)
    found, of_losses = knobs._read()
    return dict(found), of_losses


def test_numbers_by_keyword_are_knobs_and_nothing_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = LOSSES_OF_ONES_OWN.replace("CUT", "0.5").replace("SHARPNESS", "-2.0")
    found, of_losses = read(tmp_path, monkeypatch, text)
    assert {name: knob.default for name, knob in found.items()} == {"sharpness": -2.0, "cut": 0.5}
    both = frozenset({"sharpness", "cut"})
    assert of_losses == {"classes": {"one": both, "two": both}, "values": {"one": both}}
    assert found["sharpness"].sentence == "How sharp it is, said over two lines, at least -3."
    assert found["cut"].sentence == "cut."
    assert found["sharpness"].allows(-3)
    assert not found["sharpness"].allows(-3.1)


def test_two_losses_with_unlike_defaults_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match="two losses take cut with unlike defaults"):
        read(tmp_path, monkeypatch, LOSSES_OF_ONES_OWN.replace("CUT", "0.6").replace("SHARPNESS", "-2"))


def test_a_default_that_is_no_number_is_no_knob(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found, of_losses = read(tmp_path, monkeypatch, LOSSES_OF_ONES_OWN.replace("SHARPNESS", "2 * CUT"))
    assert set(found) == {"sharpness", "cut"}
    assert of_losses == {"classes": {"one": frozenset(found), "two": frozenset()}, "values": {"one": frozenset()}}
