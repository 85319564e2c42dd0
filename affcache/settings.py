"""Settings: what their classes are made of, and how values become theirs."""

import dataclasses
import inspect
import operator
import re
import sys
import types
import typing
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from typing import Any, TypeVar

from affcache.errors import ConfigError, did_you_mean
from affcache.files import read_bytes
from affcache.progress import Listener

CROPS = (Path("data/Aff-Wild2/cropped_aligned"), Path("data/Aff-Wild2/cropped_aligned_new_50_vids"))
CROPS_TEXT = "data/Aff-Wild2/cropped_aligned and cropped_aligned_new_50_vids beside it"
ANNOTATIONS = Path("data/Aff-Wild2/annotations")
FEATURES = Path("data/features")
STORE_TEXT = "data/features/<model>-<pretrained>.h5"  # of ``default_store``, for help
RUNS = Path("runs")
HUB = "hf-hub:"  # begins the names of what lies on the Hugging Face hub
MODEL, PRETRAINED = "ViT-L-14", "openai"
OWN_FILES = ("local-dir", "onnx")  # kinds of encoders that are named by a path
MODEL_TEXT = (
    "open_clip model name, hf-hub:OWNER/NAME, local-dir:FOLDER, timm:NAME.TAG, onnx:FILE or python:MODULE:NAME."
)
if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib
TOML = ".toml"  # ends the names of files
LARGEST_TOML = 2**20  # bytes
MOST_DOTS = 200  # in a line of it
_LIMITS = {"at_least": operator.ge, "more_than": operator.gt, "at_most": operator.le, "less_than": operator.lt}
_EXPECTED = {Path: "a path", str: "a text", int: "a whole number", float: "a number", bool: "true or false"}


def setting(default: Any, sentence: str, *, choices: tuple[str, ...] = (), default_text: str = "") -> Any:
    """Declare one field: its default, a sentence on what it is (with the unit), and what values it may take."""
    return field(default=default, metadata={"help": sentence, "choices": choices, "default_text": default_text})


def read_toml(path: Path) -> dict[str, Any]:
    """Read a TOML file; raises OSError or ValueError where that can't be done."""
    text = read_bytes(path, LARGEST_TOML).decode("utf-8-sig")
    if any(line.count(".") > MOST_DOTS for line in text.split("\n")):  # a key of so many parts takes gigabytes
        raise ValueError(f"it has a line with more than {MOST_DOTS} dots")
    try:
        return tomllib.loads(text)
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

    def expect(self, *names: str, **limits: float) -> Iterator[str]:
        """Yield a problem for each number beyond a limit: at_least, more_than, at_most or less_than; None has none."""
        words = " and ".join(f"{limit.replace('_', ' ')} {end}" for limit, end in limits.items())
        for name in names:
            value = getattr(self, name)
            if value is not None and not all(_LIMITS[limit](value, end) for limit, end in limits.items()):
                yield f"{flag(name)} is {value}; expected {words}."


def flag(name: str) -> str:
    """Return the command-line flag of a field; a word of Python's ends in an underscore there: --from of from_."""
    return "--" + name.rstrip("_").replace("_", "-")


def default_store(
    model: str = MODEL, pretrained: str = PRETRAINED, image_size: int | None = None, every: int = 1
) -> Path:
    """Return where the store of an encoder lies unless said otherwise: data/features/<model>-<pretrained>.h5."""
    kind, _, own = model.partition(":")
    if kind in (*OWN_FILES, "hf-hub"):
        last = own.rstrip("/").rpartition("/")[2]
        model = f"onnx-{last.replace('.onnx', '')}" if kind == "onnx" else last
    if kind in (*OWN_FILES, "hf-hub", "timm", "python") and not pretrained.startswith("random:"):
        pretrained = pretrained if kind == "timm" and Path(pretrained).suffix else ""  # the name says the weights
    tag = Path(pretrained).stem if Path(pretrained).suffix else pretrained
    marks = [f"{image_size}px" if image_size else "", f"every-{every}" if every > 1 else ""]
    name = "-".join(re.sub(r"[/\\:#]", "-", part) for part in (model, tag, *marks) if part)
    return FEATURES / f"{name}.h5"


def existing_store(listener: Listener, path: Path | None = None) -> Path:
    """Return a default store; where it isn't there, the only one beside it. Raises ConfigError if there are several."""
    path = path or default_store()
    every = [] if path.exists() else sorted(path.parent.glob("*.h5"))
    beside = [str(one) for one in every if one.suffixes[-2:-1] != [".flip"]]  # a view lies beside its store
    if len(beside) > 1:
        raise ConfigError(
            f"There is no {path}, but {', '.join(beside)}. Expected one. Say which: --store FILE, or for info, verify "
            "and export its name alone."
        )
    if beside:
        listener.message(f"store: {beside[0]}, the only one there; {path.name} isn't")
    return Path(beside[0]) if beside else path  # of which whoever opens it says that it isn't there


AnySettings = TypeVar("AnySettings", bound=Settings)
Complete = Callable[[AnySettings, Collection[str]], AnySettings]
R = TypeVar("R")


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
    found = converted(settings, values.items(), Path(), problems)
    if problems:
        raise ConfigError("\n".join(f"{problem}." for problem in problems))
    return settings(**found)


def converted(
    settings: type[Settings], given: Iterable[tuple[str, Any]], folder: Path, problems: list[str]
) -> dict[str, Any]:
    """Return values in the types of their settings, the last one of each; what is wrong with some goes to problems."""
    kinds, converted = typing.get_type_hints(settings), {}
    for name, value in given:
        try:
            if name in ("model", "pretrained", "task"):
                every = isinstance(value, (list, tuple))
                value = [_located(name, one, folder) for one in value] if every else _located(name, value, folder)
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
        if value is None:
            return ()
        if isinstance(value, Mapping):  # of names to values, as --vary has them
            each = {name: [of] if isinstance(of, (str, Path)) else of for name, of in value.items()}
            value = [f"{name}={','.join(map(as_text, of))}" for name, of in each.items()]
        entries = value if isinstance(value, (list, tuple)) else [value]
        return tuple(_convert(entry, typing.get_args(kind)[0], folder) for entry in entries)
    if kind is Path and isinstance(value, (str, Path)) and "\0" not in str(value):
        return _expanded(value, folder)
    if kind is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise TypeError(_EXPECTED[kind])
    return value


def _expanded(path: str | Path, folder: Path) -> Path:
    if str(path).startswith(HUB):  # a published head
        return Path(path)
    try:
        return folder / Path(path).expanduser()
    except RuntimeError:
        raise TypeError("a path; ~ names the home folder of a user who isn't there") from None


def _located(name: str, text: Any, folder: Path) -> Any:
    """Take the path in local-dir:FOLDER, onnx:FILE, FILE or TAG:FILE as paths are taken; leave other names alone."""
    if not isinstance(text, str):
        return text
    if name == "task":
        return str(_expanded(text, folder)) if text.lower().endswith(TOML) else text
    before, colon, path = text.partition(":") if name == "model" else text.rpartition(":")
    if (name == "model" and before in OWN_FILES) or (name == "pretrained" and ("/" in path or Path(path).suffix)):
        return f"{before}{colon}{_expanded(path, folder)}"
    return text


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
    try:
        return {"true": True, "false": False}[text.lower()] if kind is bool else kind(text)
    except (KeyError, ValueError):
        raise ValueError(_EXPECTED[kind]) from None


def as_text(value: Any) -> str:
    """Write a value as ``from_text`` reads it."""
    if value is None or isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (list, tuple)):  # stores side by side
        return "+".join(map(as_text, value))
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
        yield from self.expect("actors", at_least=1)
        if self.engine == "ray":
            if self.ray_address is not None and "://" in self.ray_address:
                yield f"--ray-address is {self.ray_address}; expected auto or HOST:PORT, on a machine of the cluster."
            return
        for name, value in (("--ray-address", self.ray_address), ("--actors", self.actors)):
            if value is not None:
                yield f"{name} is {value}, which is of use to --engine ray only. Give that too, or leave it out."


def command(
    kind: type[AnySettings], complete: Complete[AnySettings] = lambda settings, given: settings
) -> Callable[[Callable[[AnySettings, Listener], R]], Callable[..., R]]:
    """Let a function of a command's settings and a listener be called with settings by name, or with none.

    ``fit(task="au", store=path)`` is ``fit(FitSettings(task="au", store=path))``, and what isn't said is the default,
    or what ``complete`` makes of the settings and the names of those that were given.
    """

    def decorate(function: Callable[[AnySettings, Listener], R]) -> Callable[..., R]:
        @wraps(function)
        def call(settings: AnySettings | None = None, /, *, listener: Listener | None = None, **values: Any) -> R:
            own = [name for name in usual if settings and getattr(settings, name) != usual[name]]
            given = [*own, *(name for name, value in values.items() if value is not None)]
            return function(complete(build(kind, values, over=settings), given), listener or Listener())

        keyword = inspect.Parameter.KEYWORD_ONLY
        usual = {f.name: f.default for f in dataclasses.fields(kind)}  # type: ignore[arg-type]
        defaults = {"listener": None, **usual}
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
