"""The settings that losses bring with them, read from their source: the command line must not wait for torch."""

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files

from affcache.settings import setting


@dataclass(frozen=True)
class Knob:
    """A number that a loss takes by keyword."""

    name: str
    default: float
    doc: str  # "in [0, 1): What it is.", as the docstring has it; the range may be left out

    @cached_property
    def _parts(self) -> tuple[str, str]:
        found = re.match(r"(in [\[(][^\])]+[\])]|at least \S+|more than \S+): (.*)", self.doc, re.DOTALL)
        return (found[1], found[2]) if found else ("", self.doc)

    @property
    def sentence(self) -> str:
        """What it is, in a sentence, with its range."""
        span, text = self._parts
        first = re.split(r"(?<=[.])\s", f"{text} ")[0].rstrip(". ")
        return f"{first}, {span}." if span else f"{first}."

    def allows(self, value: float) -> bool:
        """Say whether a value is in the range that the docstring gives."""
        span = self._parts[0]
        if span.startswith("in "):
            low, high = (float(end) for end in span[4:-1].split(","))
            above = value >= low if span[3] == "[" else value > low
            return above and (value <= high if span[-1] == "]" else value < high)
        limit = float(span.split()[-1]) if span else 0.0
        return not span or (value >= limit if span.startswith("at least") else value > limit)

    @property
    def span(self) -> str:
        """The range, in words."""
        return self._parts[0]


def _table(tree: ast.Module) -> dict[str, dict[str, str]]:
    """Return ``LOSSES`` with the names of its functions."""
    (table,) = (n.value for n in tree.body if isinstance(n, ast.AnnAssign) and ast.unparse(n.target) == "LOSSES")
    quoted = re.sub(r"(: )(\w+)", r'\1"\2"', ast.unparse(table)) if table else "{}"
    return dict(ast.literal_eval(quoted))


def _knobs_of(function: ast.FunctionDef) -> Iterator[Knob]:
    """Yield what a function takes by keyword with a number as default."""
    text = ast.get_docstring(function) or ""
    docs = {name: " ".join(doc.split()) for name, doc in re.findall(r"^ +(\w+): (.+(?:\n {8}.+)*)", text, re.MULTILINE)}
    for argument, default in zip(function.args.kwonlyargs, function.args.kw_defaults, strict=True):
        number = _number(default)
        if number is not None:
            yield Knob(argument.arg, number, docs.get(argument.arg, argument.arg.replace("_", " ")))


def _number(default: ast.expr | None) -> float | None:
    """Return the number that a default is; None where it is something else."""
    try:
        value = None if default is None else ast.literal_eval(default)
    except ValueError:  # an expression
        return None
    return float(value) if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _read() -> tuple[Mapping[str, Knob], Mapping[str, Mapping[str, frozenset[str]]]]:
    tree = ast.parse((files("affcache.tasks") / "losses.py").read_text(encoding="utf-8"))
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    knobs: dict[str, Knob] = {}
    of_losses: dict[str, dict[str, frozenset[str]]] = {}
    for kind, names in _table(tree).items():
        for name, function in names.items():
            own = list(_knobs_of(functions[function]))
            of_losses.setdefault(kind, {})[name] = frozenset(knob.name for knob in own)
            for knob in own:
                if knobs.setdefault(knob.name, knob).default != knob.default:
                    raise ValueError(f"two losses take {knob.name} with unlike defaults; a setting has one default")
    return knobs, of_losses


KNOBS, KNOBS_OF_LOSSES = _read()  # by name; by kind of task and name of loss


def with_knobs(cls: type) -> type:
    """Give a settings class, before it is made a dataclass, a field for every knob of every loss.

    Raises:
        ValueError: the class has a setting of that name.
    """
    for knob in KNOBS.values():
        if knob.name in cls.__annotations__:
            raise ValueError(f"a loss takes {knob.name}, which is a setting already; call it something else")
        cls.__annotations__[knob.name] = float
        setattr(cls, knob.name, setting(knob.default, knob.sentence))
    return cls
