"""Every command with its settings class: the command line and affcache.toml go by it."""

from affcache.ablation.settings import AblateSettings
from affcache.demonstration import DemoSettings
from affcache.exchange.settings import ExportSettings, ImportSettings
from affcache.extraction.settings import DoctorSettings, ExtractSettings
from affcache.reporting.settings import ReportSettings
from affcache.scoring.settings import ScoreSettings
from affcache.settings import Settings
from affcache.submission.settings import SubmitSettings
from affcache.training.settings import FitSettings

COMMANDS: dict[str, type[Settings]] = {
    "extract": ExtractSettings,
    "fit": FitSettings,
    "score": ScoreSettings,
    "ablate": AblateSettings,
    "submit": SubmitSettings,
    "report": ReportSettings,
    "demo": DemoSettings,
    "doctor": DoctorSettings,
    "import": ImportSettings,
    "export": ExportSettings,
}
