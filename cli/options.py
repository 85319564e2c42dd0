"""Typer commands made from settings classes, so that a setting's name, default and help stand in one place."""

import dataclasses
import inspect
import typing
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import typer

from affcache.settings import Settings, flag, optional

Handler = Callable[[dict[str, Any], bool], None]  # (flags as given, --json)


def parameters_of(
    settings: type[Settings], positional: Sequence[str] = (), first: Sequence[str] = ()
) -> list[inspect.Parameter]:
    """Return a parameter for every field; ``positional`` ones are arguments, and the help begins with ``first``."""
    kinds, declared = typing.get_type_hints(settings), dataclasses.fields(settings)  # type: ignore[arg-type]
    order = {name: position for position, name in enumerate(first)}
    return [
        _parameter(one, kinds[one.name], positional=one.name in positional)
        for one in sorted(declared, key=lambda one: order.get(one.name, len(first)))
    ]


def add(
    app: typer.Typer,
    name: str,
    sentence: str,
    handler: Handler,
    examples: Sequence[str],
    parameters: list[inspect.Parameter],
) -> None:
    """Add a command with the given parameters, and --json; ``sentence`` begins its help, runnable examples end it."""
    option = typer.Option(False, "--json", help="Print one JSON object on standard output and nothing else.")
    json = _keyword("json", option, bool)

    def command(**values: Any) -> None:
        as_json = values.pop("json")
        given = {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}
        handler({key: value for key, value in given.items() if value is not None and value != ()}, as_json)

    every = sorted([*parameters, json], key=lambda p: not isinstance(p.default, typer.models.ArgumentInfo))
    command.__signature__ = inspect.Signature(every)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in every}
    epilog = "\n  ".join(["Examples:\n\n\b", *examples])  # \b: lines stay as they are, to be pasted into a shell
    app.command(name, help=sentence, epilog=epilog)(command)


def argument(name: str, sentence: str) -> inspect.Parameter:
    """Return a positional parameter for a path that may be left out."""
    option = typer.Argument(None, help=sentence, show_default=False, metavar=f"[{name.upper()}]")
    return _keyword(name, option, typing.Optional[Path])  # noqa: UP045


def _parameter(declared: "dataclasses.Field[Any]", kind: Any, *, positional: bool) -> inspect.Parameter:
    """Turn one settings field into an option; None stands for "not given", so that affcache.toml can speak."""
    kind, _ = optional(kind)
    if typing.get_origin(kind) is tuple:
        kind = list[typing.get_args(kind)[0]]  # type: ignore[misc]  # a type made at run time
    sentence = declared.metadata["help"]
    if kind is not bool:
        sentence += f" [default: {_default_text(declared)}]"
    if positional:
        default = typer.Argument(None, help=sentence, metavar=f"[{declared.name.upper()}]", show_default=False)
    else:
        choices = "|".join(declared.metadata["choices"]) or None
        default = typer.Option(None, flag(declared.name), help=sentence, metavar=choices, show_default=False)
    return _keyword(declared.name, default, typing.Optional[kind])  # noqa: UP045


def _keyword(name: str, default: Any, kind: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def _default_text(declared: "dataclasses.Field[Any]") -> str:
    text = declared.metadata["default_text"]
    return text or (f"{declared.default:g}" if isinstance(declared.default, float) else str(declared.default) or "none")
