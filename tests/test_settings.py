"""Settings classes: ranges, choices, every problem at once, and where a store lies unless said otherwise."""

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest

from affcache.commands import SETTINGS
from affcache.errors import ConfigError
from affcache.extraction.settings import ExtractSettings
from affcache.scoring.settings import ScoreSettings
from affcache.settings import Settings, default_store, flag
from affcache.training.settings import FitSettings


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (FitSettings, "epochs", 0, "at least 1"),
        (FitSettings, "hidden_width", 0, "at least 1"),
        (FitSettings, "batch_size", 1, "at least 2"),
        (FitSettings, "lr", 0, "more than 0"),
        (FitSettings, "lr", math.nan, "more than 0"),
        (FitSettings, "lr_half_period", 0.0, "more than 0"),
        (FitSettings, "lr_minimum", -1e-9, "at least 0"),
        (FitSettings, "weight_decay", -1, "at least 0"),
        (FitSettings, "rho", -0.1, "at least 0"),
        (FitSettings, "hidden_layers", -1, "at least 0"),
        (FitSettings, "seed", -1, "at least 0"),
        (FitSettings, "alpha", 0, "more than 0 and at most 1"),
        (FitSettings, "alpha", 1.1, "more than 0 and at most 1"),
        (FitSettings, "alpha", math.nan, "more than 0 and at most 1"),
        (FitSettings, "dropout", 1, "at least 0 and less than 1"),
        (FitSettings, "dropout", -0.1, "at least 0 and less than 1"),
        (FitSettings, "normalize", "L2", "one of none, l2"),
        (ScoreSettings, "split", "test", "one of validation, train"),
        (ExtractSettings, "precision", "fp64", "one of auto, fp32, bf16, fp16"),
        (ExtractSettings, "activation", "relu", "one of auto, quick_gelu, gelu"),
        (ExtractSettings, "batch_size", 0, "at least 1"),
        (ExtractSettings, "workers", 0, "at least 1"),
        (ExtractSettings, "crops", (), "at least one folder"),
    ],
)
def test_values_out_of_range_are_refused_by_flag(kind: type[Settings], name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{flag(name)} is ")
    assert f"expected {expected}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [{"alpha": 1}, {"alpha": 1e-6}, {"rho": 0}, {"dropout": 0}, {"hidden_layers": 0}, {"lr_minimum": 0}, {"epochs": 1},
     {"batch_size": 2}, {"weight_decay": 0}],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_fine(values: dict[str, Any]) -> None:
    settings = FitSettings(**values)
    assert {name: getattr(settings, name) for name in values} == values


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        FitSettings(epochs=0, alpha=2, dropout=1.5, normalize="max", resume=True)
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--normalize", "--epochs", "--alpha", "--dropout", "--resume"]


@pytest.mark.parametrize("kind", SETTINGS.values())
def test_every_field_has_a_sentence_and_a_default_that_holds(kind: type[Settings]) -> None:
    settings = kind()
    for declared in dataclasses.fields(settings):
        sentence = declared.metadata["help"]
        assert sentence.endswith((".", "..."))
        if declared.default is None:
            assert declared.metadata["default_text"], f"{declared.name}: None needs words"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3
    assert (kind.__doc__ or "").strip()


def test_the_defaults_are_the_recipe_paper() -> None:
    recipe = FitSettings()
    assert (recipe.hidden_layers, recipe.hidden_width, recipe.dropout) == (3, 768, 0.6)
    assert (recipe.lr, recipe.weight_decay, recipe.rho) == (1e-3, 1e-4, 0.5)
    assert (recipe.lr_minimum, recipe.lr_half_period) == (1e-5, 0.25)
    assert (recipe.batch_size, recipe.epochs, recipe.alpha) == (32, 32, 0.5)
    assert recipe.normalize == "none"


@pytest.mark.parametrize(
    ("model", "pretrained", "name"),
    [
        ("ViT-L-14", "openai", "ViT-L-14-openai.h5"),
        ("ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32-laion2b_s34b_b79k.h5"),
        ("ViT-B-32", "weights/my-clip.pt", "ViT-B-32-my-clip.h5"),
        ("ViT-B-32", "", "ViT-B-32.h5"),
        ("ViT-B-32", "random:0", "ViT-B-32-random-0.h5"),
        ("hf-hub:owner/some-model", "openai", "some-model.h5"),
        ("local-dir:../shared/real/encoder", "openai", "encoder.h5"),
        ("local-dir:models/tiny/", "", "tiny.h5"),
        ("local-dir:models/tiny", "random:3", "tiny-random-3.h5"),
        ("ViT/weird:name", "a/b", "ViT-weird-name-a-b.h5"),
    ],
)
def test_the_default_store_is_named_after_the_encoder(model: str, pretrained: str, name: str) -> None:
    assert default_store(model, pretrained) == Path("data/features") / name


def test_the_bare_default_store_is_clips() -> None:
    assert default_store() == Path("data/features/ViT-L-14-openai.h5")
