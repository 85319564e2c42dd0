"""What an ablation trains: named or varied settings, times stores, times seeds. Knows no files but the list."""

import dataclasses
import math
import typing
from collections import ChainMap
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np

from affcache.ablation.settings import AblateSettings
from affcache.errors import ConfigError, did_you_mean
from affcache.settings import as_text, build, default_store, flag, from_text, read_toml
from affcache.tasks.tasks import find_task
from affcache.training.learner import find_head
from affcache.training.settings import FitSettings, TrainingSettings

NOT_VARIED: tuple[str, ...] = ("annotations", "partial", "device", "memory")  # what labels say, or how it is computed
WHY_NOT = {
    "seed": "seeds are varied by --seeds K",
    **{name: f"{flag(name)} is the same for a whole grid" for name in NOT_VARIED},
}
VARIED = tuple(f.name for f in dataclasses.fields(TrainingSettings) if f.name not in NOT_VARIED)
Stores = tuple[Path, ...]  # side by side, or one
NamedValues = tuple[str, dict[str, Any]]  # a name and settings of fit; the name is "" where the settings say it
PUBLISHED = TrainingSettings()
AUC_WEIGHT = 0.2  # of the published variant for action units
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RHOS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Variant:
    """One row of the results: named or varied settings on a store, or on several, trained with every seed."""

    name: str
    values: Mapping[str, Any]  # of the settings that the grid varies
    store: Stores


@dataclass(frozen=True)
class Grid:
    """All variants of an ablation, in their order; one is only made when it is asked for."""

    settings: AblateSettings
    named: Sequence[NamedValues]
    axes: Mapping[str, Sequence[Any]]  # what --vary varies
    stores: Sequence[Stores]  # that are compared
    words: Sequence[str]  # what is varied, for a folder's name
    held_out: float  # share of the training frames on which epochs are chosen; 0 for validation, or a fold

    @property
    def varied(self) -> list[str]:
        """The names of the settings that differ between variants."""
        of_named = [name for _, values in self.named for name in values]
        return list(dict.fromkeys([*of_named, *self.axes]))

    @property
    def _choices(self) -> list[Sequence[Any]]:
        """What a variant takes one of each; the last changes fastest."""
        return [self.named, *self.axes.values(), self.stores]

    def __len__(self) -> int:
        return math.prod(map(len, self._choices))

    @property
    def trials(self) -> int:
        """How many heads are trained."""
        return len(self) * self.settings.seeds * (self.settings.folds or 1)

    def __getitem__(self, index: int) -> Variant:
        if not 0 <= index < len(self):
            raise IndexError(index)
        places = [int(place) for place in np.unravel_index(index, [len(of) for of in self._choices])]
        (name, given), *chosen, store = (of[place] for of, place in zip(self._choices, places, strict=True))
        own = dict(zip(self.axes, chosen, strict=True))
        words = [name] if name else [f"{key}={as_text(value)}" for key, value in given.items()]
        words += [f"{key}={as_text(value)}" for key, value in own.items()]
        if len(self.stores) > 1:
            words.append(self.store_names[places[-1]])
        return Variant(", ".join(words) or "the recipe", {**self._own_values, **given, **own}, store)

    def __iter__(self) -> Iterator[Variant]:
        return (self[index] for index in range(len(self)))

    def fit_settings(self, variant: Variant, seed: int) -> FitSettings:
        """Return the settings of one head.

        Raises:
            ConfigError: a value is out of range, or doesn't go with the others.
        """
        given = {f.name: getattr(self.settings, f.name) for f in dataclasses.fields(TrainingSettings)}
        trained = "all" if self.settings.folds else "train"
        own = {"store": variant.store, "seed": seed, "held_out": self.held_out, "train_on": trained}
        try:
            settings = build(FitSettings, {**given, **variant.values, **own})
            settings.require_fitting(find_task(settings.task))
            find_head(settings.head)
            return settings
        except ConfigError as error:
            raise ConfigError(f"Setting {variant.name} of the grid can't be trained: {error}") from None

    def values_of(self, *names: str) -> list[tuple[Any, ...]]:
        """Return which values variants have of some settings, together, each combination once."""
        own = {name: getattr(self.settings, name) for name in names}
        axes = [[{name: value} for value in self.axes[name]] for name in names if name in self.axes]
        found = [own | given | dict(ChainMap(*chosen)) for (_, given), *chosen in product(self.named, *axes)]
        return list(dict.fromkeys(tuple(each[name] for name in names) for each in found))

    @property
    def store_names(self) -> list[str]:
        """What the stores are called in tables: by their files' names where these tell them apart."""
        stems = [stores_text(stores, short=True) for stores in self.stores]
        return stems if len(set(stems)) == len(stems) else [stores_text(stores) for stores in self.stores]

    @property
    def _own_values(self) -> dict[str, Any]:
        """The recipe's values of what is varied."""
        return {name: getattr(self.settings, name) for name in self.varied}

    def base_index(self) -> int:
        """Return which variant others are compared with: the one named, else the recipe's own values, else the first.

        Raises:
            ConfigError: no variant is called so, or has these values.
        """
        base, names = self.settings.base, [variant.name for variant in self]
        if base in names:
            return names.index(base)
        if not base and (self.settings.preset != "none" or self.settings.list is not None):
            return 0  # a preset and a list begin with it
        wanted = _parse_values(base, names) if base else self._own_values
        for index, variant in enumerate(self):
            if all(variant.values.get(name) == value for name, value in wanted.items()):
                return index
        if not base:
            return 0
        raise ConfigError(
            f"--base is {base!r}, but no setting of the grid has these values. Expected those of one of: "
            f"{_some(names)}."
        )


def build_grid(settings: AblateSettings) -> Grid:
    """Read what is varied.

    Raises:
        ConfigError: nothing is varied, an unknown setting, a value of the wrong kind, the same twice, or a list that
            can't be read.
    """
    if settings.preset == "none" and settings.list is None and not settings.vary and not settings.folds:
        raise ConfigError(
            "Nothing is varied. Expected --vary NAME=VALUES, such as --vary alpha=0.3,0.5,1 or --vary "
            "store=a.h5,b.h5, or --preset or --list FILE, or --folds K. (Several --store stand side by side.)"
        )
    named: Sequence[NamedValues] = [("", {})]
    if settings.preset != "none":
        named = preset_values(settings.preset, settings)
    if settings.list is not None:
        named = read_list(settings.list)
    axes: dict[str, Sequence[Any]] = {}
    stores: Sequence[Stores] = [settings.store or (default_store(),)]
    for text in settings.vary:
        if settings.varies_store(text):
            stores = parse_stores(text)  # in place of --store
            continue
        name, values = parse_axis(text)
        if name in axes or any(name in of for _, of in named):
            raise ConfigError(f"--vary {text}: {name} is varied twice. Expected all its values in one place.")
        axes[name] = values
    heldout = settings.chosen_on == "heldout" and not settings.folds  # folds hold others of them out
    held_out = settings.held_out if heldout else 0.0
    words = [settings.preset] if settings.preset != "none" else [settings.list.stem] if settings.list else []
    words += [*axes, *(["stores"] if len(stores) > 1 else []), *(["heldout"] if held_out else [])]
    words += [f"folds{settings.folds}"] if settings.folds else []
    return Grid(settings, named, axes, stores, words, held_out)


def parse_axis(text: str) -> tuple[str, list[Any]]:
    """Read ``alpha=0.3,0.5,1``: a setting of fit and its values.

    Raises:
        ConfigError: not of that form, an unknown setting, a value of the wrong kind or given twice.
    """
    name, sign, listed = text.partition("=")
    name = name.strip().replace("-", "_")
    if not sign or not listed.strip():
        raise ConfigError(f"--vary {text!r} can't be read. Expected NAME=VALUE,VALUE such as --vary alpha=0.3,0.5,1.")
    values = [_value(name, part.strip(), f"--vary {text}") for part in listed.split(",")]
    if len(set(values)) < len(values):
        raise ConfigError(f"--vary {text} names a value twice. Expected each once; --seeds repeats a setting.")
    return name, values


def parse_stores(text: str) -> list[Stores]:
    """Read ``store=a.h5,b.h5,a.h5+b.h5``: stores to compare, of which + puts some side by side.

    Raises:
        ConfigError: none, or the same twice.
    """
    parts = [part.strip() for part in text.partition("=")[2].split(",")]
    stores = [(Path(part),) if Path(part).exists() else tuple(map(Path, part.split("+"))) for part in parts]
    empty = any(not name for part in parts for name in part.split("+"))
    if empty or len(set(stores)) < len(stores):
        raise ConfigError(
            f"--vary {text!r} can't be read. Expected stores, each once, such as --vary store=a.h5,b.h5,a.h5+b.h5."
        )
    return stores


def stores_text(stores: Stores, *, short: bool = False) -> str:
    """Return what a store, or several side by side, are called: by their paths, or by their files' names alone."""
    return "+".join(store.stem if short else str(store) for store in stores)


def read_list(path: Path) -> list[NamedValues]:
    """Read named settings: a TOML table for each, with the settings of fit in it.

    Raises:
        ConfigError: the file can't be read, is empty, or a setting is unknown or of the wrong kind.
    """
    try:
        tables = read_toml(path)
    except (OSError, ValueError) as error:
        raise ConfigError(f"--list {path} can't be read: {error}. Expected a TOML file of tables.") from None
    loose = [name for name, table in tables.items() if not isinstance(table, dict)]
    if loose or not tables:
        found = f"{', '.join(loose)} outside of any table" if loose else "no table"
        raise ConfigError(
            f"--list {path}: {found}. Expected a table for each setting, such as [cvar] with alpha = 0.5."
        )
    return [
        (name, {key: _value(key, value, f"--list {path}, [{name}]") for key, value in table.items()})
        for name, table in tables.items()
    ]


def _parse_values(base: str, names: Sequence[str]) -> dict[str, Any]:
    """Read ``alpha=1,rho=0``: one value each; ``names`` are what could have been meant."""
    values = {}
    for part in base.split(","):
        name, sign, value = part.strip().partition("=")
        if not sign:
            raise ConfigError(
                f"--base is {base!r}, which no setting is called{did_you_mean(base, names)}. Expected one of "
                f"{_some(names)}, or values such as alpha=1,rho=0."
            )
        name = name.strip().replace("-", "_")
        values[name] = _value(name, value.strip(), "--base")
    return values


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (", ..." if len(names) > 8 else "")


def _value(name: str, value: Any, where: str) -> Any:
    """Return the value of a setting that may be varied, given as text or as TOML has it."""
    if name not in VARIED:
        unknown = f"{name!r} is no setting of fit{did_you_mean(name, VARIED)}"
        raise ConfigError(f"{where}: {WHY_NOT.get(name, unknown)}. Expected one of: {', '.join(VARIED)}.")
    try:
        return from_text(str(value), typing.get_type_hints(TrainingSettings)[name])
    except ValueError as error:
        raise ConfigError(f"{where}: {name} is {value!r}; expected {error}.") from None


def preset_values(preset: str, recipe: TrainingSettings) -> Sequence[NamedValues]:
    """Return what a preset names; the one that others are compared with comes first.

    Where the recipe has CVaR, SAM or the AUC term on, the preset's variants with them use its values.
    """
    if preset == "alpha":
        return [("", {"alpha": alpha}) for alpha in reversed(ALPHAS)]
    if preset == "rho":
        return [("", {"rho": rho}) for rho in RHOS]
    alpha = recipe.alpha if recipe.alpha < 1 else PUBLISHED.alpha
    losses = {"erm": {"alpha": 1.0}, "cvar": {"alpha": alpha}}
    if find_task(recipe.task).kind == "units":
        losses["erm"]["auc_weight"] = losses["cvar"]["auc_weight"] = 0.0
        losses["cvar+auc"] = {"alpha": alpha, "auc_weight": recipe.auc_weight or AUC_WEIGHT}
    sharpness = {"": {"rho": 0.0}, "+sam": {"rho": recipe.rho or PUBLISHED.rho}}
    return [(loss + sam, {**of, **rho}) for loss, of in losses.items() for sam, rho in sharpness.items()]
