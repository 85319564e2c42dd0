"""What each command does: resolve its settings, call one library function, print what that returns."""

import json
import sys
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import typer
from rich.console import Console
from rich.text import Text

import affcache
from affcache.ablation.settings import AblateSettings
from affcache.commands import COMMANDS
from affcache.demonstration import DemoSettings
from affcache.errors import AffcacheError
from affcache.extraction.settings import ExtractSettings
from affcache.progress import metric_name
from affcache.reporting.settings import ReportSettings
from affcache.scoring.settings import ScoreSettings
from affcache.settings import ConfigFile, find_config, resolve
from affcache.submission.settings import SubmitSettings
from affcache.training.settings import FitSettings

from .console import ConsoleListener, rate_text
from .tables import ablation_table, fact_table, rule_text, score_table

INPUT_ERROR, INTERRUPTED = 2, 130
INTERRUPTED_MESSAGE = (
    "Interrupted. What was finished is kept: 'affcache extract' and 'affcache ablate' continue with the same command, "
    "'affcache fit' with --run DIR --resume."
)

Work = Callable[[ConsoleListener, ConfigFile], Any]


def start(app: typer.Typer, name: str) -> None:
    """Run a command line. With --json, a wrong flag or value is one JSON object on standard output too."""
    if "--json" not in sys.argv:
        app(prog_name=name)
    try:
        sys.exit(app(prog_name=name, standalone_mode=False) or 0)
    except Exception as error:
        show, message = getattr(error, "show", None), getattr(error, "format_message", None)
        if show is None or message is None:  # what Typer raises at words that it can't parse has both
            raise
        show()
        print(json.dumps({"error": "UsageError", "message": message()}))
        sys.exit(INPUT_ERROR)


def run(as_json: bool, work: Work, show: Callable[[Any], None]) -> None:
    """Do a command's work, print its result, and turn what went wrong into a message and an exit code."""
    with ConsoleListener() as listener:
        try:
            with redirect_stdout(sys.stderr):  # Ray prints what it has to say of lost workers
                result = work(listener, find_config(Path.cwd(), COMMANDS))
        except AffcacheError as error:
            listener.message(f"Error: {error}")
            if as_json:
                print(json.dumps({"error": type(error).__name__, "message": str(error)}))
            raise typer.Exit(INPUT_ERROR) from None
        except KeyboardInterrupt:
            listener.message(INTERRUPTED_MESSAGE)
            if as_json:
                print(json.dumps({"error": "Interrupted", "message": INTERRUPTED_MESSAGE}))
            raise typer.Exit(INTERRUPTED) from None
    if as_json:
        print(json.dumps(result if isinstance(result, dict) else result.to_json()))
    else:
        show(result)


def out(*things: Any) -> None:
    """Print for people on standard output."""
    console = Console(highlight=False, markup=False, emoji=False)  # a path may hold [brackets] and :colons:
    for thing in things:
        console.print(thing, soft_wrap=isinstance(thing, str))


def extract(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache extract``."""

    def show(result: Any) -> None:
        shares = ", ".join(f"{stage} {share:.0%}" for stage, share in result.shares.items())
        view = "" if result.view == "plain" else f" (view {result.view}, in {result.view_store})"
        facts = {
            "store": result.store,
            "rows": f"{result.rows:,}: {result.encoded:,} encoded, {result.unreadable:,} unreadable{view}",
        }
        if result.engine == "ray":
            facts["cluster"] = f"workers: {result.actors}, nodes: {result.nodes}"
        if result.encoded_now:
            facts["this run"] = (
                f"{result.encoded_now:,} crops in {result.seconds:.1f} s, {rate_text(result.rate, 'crop')}"
            )
            facts["time"] = shares
            facts["bottleneck"] = result.bottleneck
        else:
            facts["this run"] = "nothing to do: the store is complete"
        if result.converted:
            facts["converted"] = ", ".join(f"{count:,} {mode}" for mode, count in result.converted.items())
        if result.unreadable_list:
            facts["unreadable"] = f"listed in {result.unreadable_list}"
        out(fact_table(facts), f"next: affcache fit --task expr --store {result.store} --annotations DIR")

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.extract(resolve(ExtractSettings, "extract", given, config), listener=listener)

    run(as_json, work, show)


def fit(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache fit``."""

    def show(result: Any) -> None:
        metric = metric_name(result.metric)
        tried = "strength" if result.head == "ridge" else "epoch"
        facts = {
            "run": result.run,
            "best": f"{metric} {result.value:.3f} on validation, {tried} {result.best_epoch} of {result.epochs}",
            "time": f"{result.seconds:.1f} s on {result.device}",
        }
        out(fact_table(facts), f"next: affcache score {result.run}")

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        store = {} if "store" in given or "store" in config.of("fit") else {"store": config.store}
        return affcache.fit(resolve(FitSettings, "fit", {**given, **store}, config), listener=listener)

    run(as_json, work, show)


def score(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache score``."""

    def show(result: Any) -> None:
        title = f"{result.task} on {result.split}: {', '.join(result.runs)}, {result.frames:,} frames"
        losses = f"loss {result.loss:.3f}"
        if result.alpha < 1:
            losses += f", the worst {result.alpha:.0%} of losses {result.cvar:.3f} (CVaR)"
        if result.calibration_error is not None:
            losses += f", calibration error {result.calibration_error:.3f}"
        out(title, score_table(result.scores), losses)
        if result.rule.fitted_on:
            note = ", optimistic: these are the frames it is scored on" if result.rule.optimistic else ""
            out(f"decided by a rule fitted on {result.rule.fitted_on}{note}: {rule_text(result.rule)}")
        if result.against:
            of = result.against["difference"]
            out(
                f"{result.against['run']} has {result.against['value']:.3f}: "
                f"the difference is {of['value']:+.3f}, 95 % {of['low']:+.3f} to {of['high']:+.3f}"
            )
        written = [result.scores_file, result.predictions_file, *result.figures]
        out(f"written: {', '.join(written)}")

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.score(resolve(ScoreSettings, "score", given, config), listener=listener)

    run(as_json, work, show)


def report(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache report``."""

    def show(result: Any) -> None:
        facts = {
            "out": f"{result.out} ({result.bytes / 1e6:,.1f} MB); open it in a browser",
            "shows": f"{result.frames:,} frames, the hardest {result.hardest}, {result.suspicious} doubtful labels",
            "pictures": f"{result.pictures} crops",
        }
        out(fact_table(facts))

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.report(resolve(ReportSettings, "report", given, config), listener=listener)

    run(as_json, work, show)


def submit(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache submit``."""

    def show(result: Any) -> None:
        facts = {
            "out": result.out,
            "lines": f"{result.lines:,} of {result.videos:,} videos, all that were asked for; read back and checked",
            "filled": f"{result.filled:,} frames without a crop, from their neighbours",
        }
        if result.videos_without_crops:
            facts["no crop at all"] = ", ".join(result.videos_without_crops)
        if result.rule.fitted_on or result.rule.smooth != "none":
            facts["rule"] = rule_text(result.rule)
        out(fact_table(facts))

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.submit(resolve(SubmitSettings, "submit", given, config), listener=listener)

    run(as_json, work, show)


def ablate(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache ablate``."""

    def show(result: Any) -> None:
        out(ablation_table(result.rows, result.heldout))
        chosen = "held-out training videos" if result.heldout else "validation itself, which flatters"
        facts = {
            "heads": f"{result.cells:,}, {result.trained:,} trained now in {result.seconds:.0f} s on {result.device}",
            "epochs chosen on": chosen,
            "written": f"{result.out}: results.csv, summary.csv, .md and .tex, figures/",
        }
        for best in result.best:
            chosen = f" ({best['selected']:.3f} where it was chosen)" if result.heldout else ""
            name = f"best run, {best['task']}" if len(result.best) > 1 else "best run"
            facts[name] = f"{best['setting']}, seed {best['seed']}: {best['value']:.3f} on validation{chosen}"
        out(fact_table(facts))
        for best in result.best:
            out(f"next: affcache score {best['run']}" if best["run"] else f"next: {best['fit']}")

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        store = {} if "store" in given or "store" in config.of("ablate") else {"store": (config.store,)}
        return affcache.ablate(resolve(AblateSettings, "ablate", {**given, **store}, config), listener=listener)

    run(as_json, work, show)


def demo(given: dict[str, Any], as_json: bool) -> None:
    """Handle ``affcache demo``."""

    def show(result: Any) -> None:
        for task, scored in result.scores.items():
            out(f"{task}: {scored.frames:,} validation frames of the sample", score_table(scored.scores))
        out(Text(result.notice, style="yellow"), f"written: {result.out}")
        out(f"next: affcache report {next(iter(result.scores.values())).run}")

    def work(listener: ConsoleListener, config: ConfigFile) -> Any:
        return affcache.demo(resolve(DemoSettings, "demo", given, config), listener=listener)

    run(as_json, work, show)
