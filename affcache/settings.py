"""Settings: what their classes are made of, and where a value comes from: flag, affcache.toml, or default."""

import dataclasses
import inspect
import os
import sys
import types
import typing
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from affcache.errors import ConfigError, did_you_mean
from affcache.files import read_bytes, written_by_others
from affcache.progress import Listener

CROPS = (Path("data/Aff-Wild2/cropped_aligned"), Path("data/Aff-Wild2/cropped_aligned_new_50_vids"))
ANNOTATIONS = Path("data/Aff-Wild2/annotations")
FEATURES = Path("data/features")
RUNS = Path("runs")
MODEL, PRETRAINED = "ViT-L-14", "openai"
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
CONFIG_NAME = "affcache.toml"
LARGEST_TOML = 2**20  # bytes
SHARED_KEYS = ("crops", "annotations", "store", "model", "pretrained", "device", "seed")
NOT_SHARED = {
    "score": ("store", "annotations"),  # a run is scored on what it was trained on, unless said for score itself
    "report": ("store", "annotations"),
    "submit": ("store",),  # the test videos' store is another than that of training
    "demo": SHARED_KEYS,  # brings its own data and encoder
}
_EXPECTED = {Path: "a path", str: "a text", int: "a whole number", float: "a number"}


def setting(default: Any, sentence: str, *, choices: tuple[str, ...] = (), default_text: str = "") -> Any:
    """Declare one field: its default, a sentence on what it is (with the unit), and what values it may take."""
    return field(default=default, metadata={"help": sentence, "choices": choices, "default_text": default_text})


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises OSError or ValueError where that can't be done."""
    try:
        return tomllib.loads(read_bytes(path, LARGEST_TOML).decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("it is nested too deep") from None


class Settings:
    """Base of the settings classes: checks choices and ranges, and reports every problem at once."""

    def __post_init__(self) -> None:
        problems = []
        for declared in dataclasses.fields(self):  # type: ignore[arg-type]  # subclasses are dataclasses
            choices, value = declared.metadata["choices"], getattr(self, declared.name)
            if choices and value not in choices:
                problems.append(f"{flag(declared.name)} is {value!r}; expected one of {', '.join(choices)}.")
        problems += self.problems()
        if problems:
            raise ConfigError("\n".join(problems))

    def problems(self) -> Iterator[str]:
        """Yield a sentence for each value that is out of range. Subclasses add theirs."""
        yield from ()

    def at_least(self, name: str, smallest: float, *, excluded: bool = False) -> Iterator[str]:
        """Yield a problem unless the number is at least ``smallest`` (or above it, when that is ``excluded``)."""
        value = getattr(self, name)
        if value is not None and not (value > smallest if excluded else value >= smallest):
            yield f"{flag(name)} is {value}; expected {'more than' if excluded else 'at least'} {smallest}."


def flag(name: str) -> str:
    """Return the command-line flag of a field."""
    return "--" + name.replace("_", "-")


def default_store(model: str = MODEL, pretrained: str = PRETRAINED) -> Path:
    """Return where the store of an encoder lies unless said otherwise: data/features/<model>-<pretrained>.h5."""
    if model.startswith(("hf-hub:", "local-dir:")):
        own = model.partition(":")[2].rstrip("/").rpartition("/")[2]
        parts = [own, pretrained if pretrained.startswith("random:") else ""]
    else:
        parts = [model, Path(pretrained).stem if Path(pretrained).suffix else pretrained]
    name = "-".join(part.replace("/", "-").replace(":", "-") for part in parts if part)
    return FEATURES / f"{name}.h5"


AnySettings = TypeVar("AnySettings", bound=Settings)
R = TypeVar("R")
Commands = Mapping[str, type[Settings]]


@dataclass(frozen=True)
class ConfigFile:
    """The checked contents of an affcache.toml: values per command; shared keys already spread over the commands."""

    path: Path | None = None
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    foreign: tuple[Path, ...] = ()  # nearer ones that aren't read, since others could have written them

    def of(self, command: str) -> Mapping[str, Any]:
        """Return what the file sets for one command."""
        return self.values.get(command, {})

    @property
    def store(self) -> Path:
        """The store that ``fit`` reads when none is named: the one ``extract`` would write with these settings."""
        extract = self.of("extract")
        named: Path | None = extract.get("store")
        return named or default_store(extract.get("model", MODEL), extract.get("pretrained", PRETRAINED))


def find_config(start: Path, commands: Commands) -> ConfigFile:
    """Read the nearest affcache.toml in ``start`` or a folder above it; an empty one where there is none.

    The search ends at the user's home, and at the root of a repository. A file that belongs to another user than the
    caller or root, or that everybody may write, isn't read: it could say what to overwrite.

    A table per command ([extract], [fit], ...) holds that command's settings; a shared key before the first table
    (crops, annotations, store, model, pretrained, device, seed) counts for every command that has it. Relative paths
    are relative to the file.

    Args:
        start: where to begin looking.
        commands: every command with its settings class, as in ``affcache.commands``.

    Raises:
        ConfigError: it can't be read, isn't TOML, or has unknown keys or values of the wrong type: all at once.
    """
    foreign: list[Path] = []
    home = os.path.expanduser("~")  # noqa: PTH111  # pathlib fails for a user without one
    for folder in (start.absolute(), *start.absolute().parents):
        path = folder / CONFIG_NAME
        if os.path.lexists(path):
            if not written_by_others(path):
                return replace(_read_config(path, commands), foreign=tuple(foreign))
            foreign.append(path)
        if str(folder) == home or os.path.lexists(folder / ".git"):
            break
    return ConfigFile(foreign=tuple(foreign))


def resolve(settings: type[AnySettings], command: str, given: Mapping[str, Any], config: ConfigFile) -> AnySettings:
    """Build a command's settings from the flags that were given (not None), then the file, then the defaults.

    Raises:
        ConfigError: unknown names or values out of range, all of them at once.
    """
    named = {name: value for name, value in given.items() if value is not None}
    return build(settings, {**config.of(command), **named})


def build(settings: type[AnySettings], values: Mapping[str, Any], *, over: AnySettings | None = None) -> AnySettings:
    """Build settings from names and values, with a suggestion for a name that doesn't exist.

    What ``over`` has stays where no value is given. Paths may be given as text.

    Raises:
        ConfigError: unknown names or values out of range.
    """
    known = [f.name for f in dataclasses.fields(settings)]  # type: ignore[arg-type]  # subclasses are dataclasses
    if over is not None:
        if not isinstance(over, settings):
            raise ConfigError(
                f"{over!r} was given as settings. Expected {settings.__name__}, or settings by name, such as "
                f"{known[0]}=..."
            )
        values = {**{name: getattr(over, name) for name in known}, **values}
    unknown = [f"Unknown setting {name!r}{did_you_mean(name, known)}." for name in values if name not in known]
    if unknown:
        raise ConfigError("\n".join([*unknown, f"Expected some of: {', '.join(known)}."]))
    problems: list[str] = []
    converted = _converted(settings, values.items(), Path(), problems)
    if problems:
        raise ConfigError("\n".join(f"{problem}." for problem in problems))
    return settings(**converted)


def _read_config(path: Path, commands: Commands) -> ConfigFile:
    try:
        content = read_toml(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Correct that line.") from None
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read: {error.strerror}. Expected a TOML file of at most {LARGEST_TOML:,} bytes. Give "
            "yourself the right to read it, or remove it."
        ) from None
    shared = {key: value for key, value in content.items() if not isinstance(value, dict)}
    tables = {key: value for key, value in content.items() if isinstance(value, dict)}
    problems = [_misplaced(key, value, commands) for key, value in shared.items() if key not in SHARED_KEYS]
    values = {}
    for command, settings in commands.items():
        known, table = typing.get_type_hints(settings), tables.get(command, {})
        unknown = [name for name in table if name not in known]
        problems += [f"unknown key {name!r} in [{command}]{did_you_mean(name, known)}" for name in unknown]
        own = {key: shared[key] for key in shared if key in SHARED_KEYS and key not in NOT_SHARED.get(command, ())}
        given = [(name, value) for name, value in (*own.items(), *table.items()) if name in known]  # a table wins
        values[command] = _converted(settings, given, path.parent, problems)
    problems += [f"unknown table [{name}]{did_you_mean(name, commands)}" for name in tables if name not in commands]
    if problems:
        raise ConfigError(
            f"{path}: {'; '.join(dict.fromkeys(problems))}. Expected tables {', '.join(f'[{c}]' for c in commands)} "
            f"with the settings that 'affcache COMMAND --help' lists, or {', '.join(SHARED_KEYS)} before them."
        )
    return ConfigFile(path, values)


def _misplaced(key: str, value: Any, commands: Commands) -> str:
    """Say what is wrong with a key before the first table."""
    if key in commands:
        return f"{key} is {value!r}, expected a table [{key}]"
    tables = [f"[{command}]" for command, settings in commands.items() if key in typing.get_type_hints(settings)]
    hint = f" (it belongs in {' or '.join(tables)})" if tables else did_you_mean(key, [*SHARED_KEYS, *commands])
    return f"unknown key {key!r}{hint}"


def _converted(
    settings: type[Settings], given: Iterable[tuple[str, Any]], folder: Path, problems: list[str]
) -> dict[str, Any]:
    """Return values in the types of their settings, the last one of each; what is wrong with some goes to problems."""
    kinds, converted = typing.get_type_hints(settings), {}
    for name, value in given:
        try:
            converted[name] = _convert(value, kinds[name], folder)
        except TypeError as error:
            problems.append(f"{name} is {value!r}, expected {error}")
    return converted


def _convert(value: Any, kind: Any, folder: Path) -> Any:
    """Convert to ``kind``; paths become absolute from ``folder``. Raises TypeError saying what was expected."""
    kind, may_be_none = optional(kind)
    if value is None and may_be_none:
        return None
    if typing.get_origin(kind) is tuple:
        if isinstance(value, Mapping):  # of names to values, as --vary has them
            value = [f"{name}={','.join(map(as_text, of))}" for name, of in value.items()]
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(entry, typing.get_args(kind)[0], folder) for entry in entries)
    if kind is Path and isinstance(value, (str, Path)) and "\0" not in str(value):
        return folder / Path(value).expanduser()
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(_EXPECTED.get(kind, "true or false"))
    return value


def optional(kind: Any) -> tuple[Any, bool]:
    """Return the type of a setting without None, and whether it may be None."""
    parts = typing.get_args(kind) if typing.get_origin(kind) in (types.UnionType, typing.Union) else (kind,)
    return next(part for part in parts if part is not type(None)), type(None) in parts


def from_text(text: str, kind: Any) -> Any:
    """Turn text into the value of a setting of type ``kind``: 0.5, 32, true, none, l2.

    Raises:
        ValueError: it is none; says what was expected.
    """
    kind, may_be_none = optional(kind)
    if may_be_none and text.lower() == "none":
        return None
    if kind is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError("true or false")
        return text.lower() == "true"
    try:
        return kind(text)
    except ValueError:
        raise ValueError(_EXPECTED.get(kind, "another value")) from None


def as_text(value: Any) -> str:
    """Write a value as ``from_text`` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    return f"{value:g}" if isinstance(value, float) and float(f"{value:g}") == value else str(value)


@dataclass(frozen=True)
class EngineSettings(Settings):
    """What work that a cluster can do has in common."""

    engine: str = setting(
        "local",
        "What does the work: this process, or the workers of a Ray cluster, which pip install 'affcache[ray]' enables.",
        choices=("local", "ray"),
    )
    ray_address: str | None = setting(
        None,
        "Running Ray cluster to use: auto, or HOST:PORT.",
        default_text="what RAY_ADDRESS says, else one is started on this machine for the run",
    )
    actors: int | None = setting(
        None, "Workers of the Ray cluster that are used.", default_text="one per GPU; without GPUs, one per node"
    )

    def problems(self) -> Iterator[str]:
        yield from super().problems()
        yield from self.at_least("actors", 1)
        if self.engine == "ray":
            if self.ray_address is not None and "://" in self.ray_address:
                yield (f"--ray-address is {self.ray_address}; expected auto or HOST:PORT, on a machine of the cluster.")
            return
        for name, value in (("--ray-address", self.ray_address), ("--actors", self.actors)):
            if value is not None:
                yield f"{name} is {value}, which is of use to --engine ray only. Give that too, or leave it out."


def command(kind: type[AnySettings]) -> Callable[[Callable[[AnySettings, Listener], R]], Callable[..., R]]:
    """Let a function of a command's settings and a listener be called with settings by name, or with none.

    ``fit(task="au", store=path)`` is ``fit(FitSettings(task="au", store=path))``, and what isn't said is the default.
    """

    def decorate(function: Callable[[AnySettings, Listener], R]) -> Callable[..., R]:
        @wraps(function)
        def call(settings: AnySettings | None = None, /, *, listener: Listener | None = None, **values: Any) -> R:
            return function(build(kind, values, over=settings), listener or Listener())

        keyword = inspect.Parameter.KEYWORD_ONLY
        defaults = {"listener": None, **{f.name: f.default for f in dataclasses.fields(kind)}}  # type: ignore[arg-type]
        named = [inspect.Parameter(name, keyword, default=default) for name, default in defaults.items()]
        first = inspect.Parameter("settings", inspect.Parameter.POSITIONAL_ONLY, default=None)
        call.__signature__ = inspect.Signature([first, *named])  # type: ignore[attr-defined]
        call.__doc__ = f"""{inspect.getdoc(function)}

Args:
    settings: all of them, a {kind.__name__}; or none.
    listener: receives messages, warnings and progress.
    The others are single settings by name; what they mean stands in {kind.__module__}.
"""
        return call

    return decorate
