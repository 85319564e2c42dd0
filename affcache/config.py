"""affcache.toml: where it is looked for, whom it may be of, and what it may say."""

import os
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from affcache.errors import ConfigError, did_you_mean
from affcache.files import written_by_others
from affcache.settings import LARGEST_TOML, TOML, AnySettings, Settings, build, converted, read_toml

CONFIG_NAME = "affcache.toml"
OWN_TASKS = "task"  # the table of tables, one for each task of the user's own
SHARED_KEYS = ("crops", "annotations", "store", "model", "pretrained", "device", "seed")
NOT_SHARED = {
    "score": ("store", "annotations"),  # a run is scored on what it was trained on, unless said for score itself
    "report": ("store", "annotations"),
    "submit": ("store",),  # the test videos' store is another than that of training
    "faces": ("model", "pretrained"),  # an encoder is of use there, and loaded where it is asked for alone
    "predict": ("store", "model", "pretrained"),  # a run knows its encoder, and inputs are named
    "demo": SHARED_KEYS,  # brings its own data and encoder
}
Commands = Mapping[str, type[Settings]]


@dataclass(frozen=True)
class ConfigFile:
    """The checked contents of an affcache.toml: values per command; shared keys already spread over the commands."""

    path: Path | None = None
    values: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    foreign: tuple[Path, ...] = ()  # nearer ones that aren't read, since others could have written them
    own_tasks: frozenset[str] = frozenset()  # names in [task.NAME]

    def of(self, command: str) -> Mapping[str, Any]:
        """Return what the file sets for one command."""
        return self.values.get(command, {})

    def for_task(self, task: str) -> "ConfigFile":
        """Return the file as it counts for a task: one of the user's own says where its labels are."""
        if task not in self.own_tasks and not task.lower().endswith(TOML):
            return self
        without = {name: {k: v for k, v in own.items() if k != "annotations"} for name, own in self.values.items()}
        return replace(self, values=without)


def find_config(start: Path, commands: Commands) -> ConfigFile:
    """Read the nearest affcache.toml in ``start`` or a folder above it; an empty one where there is none.

    The search ends at the user's home, and at the root of a repository. A file that belongs to another user than the
    caller or root, or that everybody may write, isn't read: it could say what to overwrite.

    A table per command ([extract], [fit], ...) holds that command's settings; a shared key before the first table
    (crops, annotations, store, model, pretrained, device, seed) counts for every command that has it. [task.NAME]
    defines a task, which is read once it is asked for. Relative paths are relative to the file.

    Args:
        start: where to begin looking.
        commands: every command with its settings class, as in ``affcache.commands``.

    Raises:
        ConfigError: it can't be read, isn't TOML, or has unknown keys or values of the wrong type: all at once.
    """
    path, foreign = _nearest(start)
    return replace(_read_config(path, commands) if path else ConfigFile(), foreign=foreign)


def find_own_tasks(start: Path) -> tuple[Path, Mapping[str, Any]]:
    """Return the nearest affcache.toml, found as ``find_config`` does, and what its tables [task.NAME] say, by name.

    Raises:
        ConfigError: it can't be read, or isn't TOML.
    """
    path, _ = _nearest(start)
    tables = _content(path).get(OWN_TASKS) if path else None
    return path or start / CONFIG_NAME, tables if isinstance(tables, dict) else {}


def _nearest(start: Path) -> tuple[Path | None, tuple[Path, ...]]:
    """Return the affcache.toml that counts in a folder, and nearer ones that others could have written."""
    foreign: list[Path] = []
    home = os.path.expanduser("~")  # noqa: PTH111  # pathlib fails for a user without one
    for folder in (start.absolute(), *start.absolute().parents):
        path = folder / CONFIG_NAME
        if os.path.lexists(path):
            if not written_by_others(path):
                return path, tuple(foreign)
            foreign.append(path)
        if str(folder) == home or os.path.lexists(folder / ".git"):
            break
    return None, tuple(foreign)


def resolve(settings: type[AnySettings], command: str, given: Mapping[str, Any], config: ConfigFile) -> AnySettings:
    """Build a command's settings from the flags that were given (not None), then the file, then the defaults.

    Raises:
        ConfigError: unknown names or values out of range, all of them at once.
    """
    named = {name: value for name, value in given.items() if value is not None}
    return build(settings, {**config.of(command), **named})


def _content(path: Path) -> dict[str, Any]:
    try:
        return read_toml(path)
    except ValueError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}. Correct that line.") from None
    except OSError as error:
        raise ConfigError(
            f"{path} can't be read: {error.strerror}. Expected a TOML file of at most {LARGEST_TOML:,} bytes. Give "
            "yourself the right to read it, or remove it."
        ) from None


def _read_config(path: Path, commands: Commands) -> ConfigFile:
    content = _content(path)
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
        values[command] = converted(settings, given, path.parent, problems)
    own_tasks = tables.pop(OWN_TASKS, {})
    problems += [f"{key!r} in [{OWN_TASKS}]" for key, value in own_tasks.items() if not isinstance(value, dict)]
    named = (*commands, OWN_TASKS)
    problems += [f"unknown table [{name}]{did_you_mean(name, named)}" for name in tables if name not in commands]
    if problems:
        raise ConfigError(
            f"{path}: {'; '.join(dict.fromkeys(problems))}. Expected tables {', '.join(f'[{c}]' for c in commands)} "
            f"with the settings that 'affcache COMMAND --help' lists, [{OWN_TASKS}.NAME] with a task of your own, or "
            f"{', '.join(SHARED_KEYS)} before them."
        )
    return ConfigFile(path, values, own_tasks=frozenset(own_tasks))


def _misplaced(key: str, value: Any, commands: Commands) -> str:
    """Say what is wrong with a key before the first table."""
    if key in commands:
        return f"{key} is {value!r}, expected a table [{key}]"
    tables = [f"[{command}]" for command, settings in commands.items() if key in typing.get_type_hints(settings)]
    hint = f" (it belongs in {' or '.join(tables)})" if tables else did_you_mean(key, [*SHARED_KEYS, *commands])
    return f"unknown key {key!r}{hint}"
