"""Every command: its settings class and the function that does it. The command line and affcache.toml go by it."""

from collections.abc import Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

from affcache.ablation.settings import AblateSettings
from affcache.config import ConfigFile, resolve
from affcache.demonstration import DemoSettings
from affcache.encoders.settings import EncodersSettings
from affcache.exchange.settings import ExportSettings, ImportSettings
from affcache.extraction.settings import DoctorSettings, ExtractSettings
from affcache.faces.settings import FacesSettings
from affcache.prediction.settings import PredictSettings, PublishSettings
from affcache.progress import Listener
from affcache.reporting.settings import ReportSettings
from affcache.scoring.settings import ScoreSettings
from affcache.settings import Settings, default_store, existing_store
from affcache.submission.settings import SubmitSettings
from affcache.training.settings import FitSettings


@dataclass(frozen=True)
class Command:
    """One command."""

    settings: type[Settings]
    function: str  # imported when it is called: torch comes with it
    reads_store: bool = False  # unless told otherwise, the one that extract would write
    like: str = ""  # another command, whose table in affcache.toml counts here too, for the settings that both have


COMMANDS: Mapping[str, Command] = {
    "faces": Command(FacesSettings, "affcache.faces.find:find_faces"),
    "extract": Command(ExtractSettings, "affcache.extraction.extract:extract"),
    "fit": Command(FitSettings, "affcache.training.fit:fit", reads_store=True),
    "score": Command(ScoreSettings, "affcache.scoring.score:score"),
    "predict": Command(PredictSettings, "affcache.prediction.predict:predict"),
    "ablate": Command(AblateSettings, "affcache.ablation.ablate:ablate", reads_store=True),
    "submit": Command(SubmitSettings, "affcache.submission.submit:submit"),
    "report": Command(ReportSettings, "affcache.reporting.report:report"),
    "publish": Command(PublishSettings, "affcache.prediction.publish:publish"),
    "demo": Command(DemoSettings, "affcache.demonstration:demo"),
    "doctor": Command(DoctorSettings, "affcache.extraction.doctor:doctor", like="extract"),
    "encoders": Command(EncodersSettings, "affcache.encoders.listing:list_encoders"),
    "import": Command(ImportSettings, "affcache.exchange.importing:import_embeddings"),
    "export": Command(ExportSettings, "affcache.exchange.exporting:export_embeddings", reads_store=True),
}
NAMES_THE_STORE = ("model", "pretrained", "image_size", "every")  # among extract's settings
SETTINGS: Mapping[str, type[Settings]] = {name: command.settings for name, command in COMMANDS.items()}


def store_of(config: ConfigFile, listener: Listener) -> Path:
    """Return the store to read unless told otherwise: the one that extract would write, or the only one there.

    Raises:
        ConfigError: the former isn't there, and there are several others.
    """
    extract = config.of("extract")
    usual = default_store(**{name: extract[name] for name in NAMES_THE_STORE if name in extract})
    return extract.get("store") or existing_store(listener, usual)


def call(name: str, given: Mapping[str, Any], config: ConfigFile, listener: Listener) -> Any:
    """Do a command with the flags that were given, then what affcache.toml says, then the defaults.

    Raises:
        AffcacheError: whatever the command's function raises.
    """
    command = COMMANDS[name]
    if given.get("resume") or given.get("as_"):  # the run's folder knows the rest
        return resolve_name(command.function)(**given, listener=listener)
    said = {**config.of(name), **given}
    varied = any(map(AblateSettings.varies_store, said.get("vary") or ()))  # in the store's place
    if command.reads_store and "store" not in said and not varied:
        given = {**given, "store": store_of(config, listener)}
    known = [declared.name for declared in fields(command.settings)]  # type: ignore[arg-type]  # it is a dataclass
    like = {key: value for key, value in config.of(command.like).items() if key in known}  # engine is none of doctor's
    values = {**like, **config.of(name), **given}
    return resolve_name(command.function)(resolve(command.settings, name, values, config), listener=listener)
