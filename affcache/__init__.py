"""affcache: encode face crops once with a frozen CLIP, then train and score facial affect heads in minutes.

    affcache.extract(crops=(folder,), store="faces.h5")        # crops -> embedding store, once
    affcache.fit(task="expr", store="faces.h5", run="runs/a")  # store + labels -> a run folder
    affcache.ablate(task="expr", store="faces.h5", vary={"alpha": [0.5, 1]})  # a grid off one read of the store
    affcache.score(run="runs/a")                               # run -> metrics and files

Names load on first use, so that ``import affcache`` and ``affcache --help`` don't wait for torch.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from affcache.ablate_settings import AblateSettings
    from affcache.ablations.ablating import AblateResult, ablate
    from affcache.bench.ablation import BenchAblateResult, bench_ablate
    from affcache.bench.extraction import BenchExtractResult, bench_extract
    from affcache.bench.fit import BenchFitResult, bench_fit
    from affcache.bench.store import BenchStoreResult, bench_store
    from affcache.bench_settings import (
        BenchAblateSettings,
        BenchExtractSettings,
        BenchFitSettings,
        BenchStoreSettings,
    )
    from affcache.checkup import DoctorResult, doctor
    from affcache.demonstration import DemoResult, demo
    from affcache.encoder import Encoder
    from affcache.encoder_loading import load_encoder
    from affcache.errors import AffcacheError, ConfigError, InputError, StoreError
    from affcache.estimators import CVaRMLPClassifier, CVaRMLPMultiLabelClassifier
    from affcache.extraction import ExtractResult, extract
    from affcache.fit_settings import FitSettings
    from affcache.fitting import FitResult, fit
    from affcache.heads import MLPHead
    from affcache.interop.exporting import ExportResult, export_embeddings
    from affcache.interop.importing import ImportResult, import_embeddings
    from affcache.listener import Listener
    from affcache.reports.reporting import ReportResult, report
    from affcache.risk import cvar
    from affcache.sam import SAM
    from affcache.sample import write_sample
    from affcache.score_settings import ReportSettings, ScoreSettings, SubmitSettings
    from affcache.scoring import ScoreResult, score
    from affcache.settings import (
        DemoSettings,
        DoctorSettings,
        ExportSettings,
        ExtractSettings,
        ImportSettings,
    )
    from affcache.store import EmbeddingStore
    from affcache.submitting import SubmitResult, submit
    from affcache.tasks import TASKS, Task

__version__ = "0.1.0"

_MODULE_OF = {
    "AblateResult": "ablations.ablating",
    "AblateSettings": "ablate_settings",
    "AffcacheError": "errors",
    "BenchAblateResult": "bench.ablation",
    "BenchAblateSettings": "bench_settings",
    "BenchExtractResult": "bench.extraction",
    "BenchExtractSettings": "bench_settings",
    "BenchFitResult": "bench.fit",
    "BenchFitSettings": "bench_settings",
    "BenchStoreResult": "bench.store",
    "BenchStoreSettings": "bench_settings",
    "CVaRMLPClassifier": "estimators",
    "CVaRMLPMultiLabelClassifier": "estimators",
    "ConfigError": "errors",
    "DemoResult": "demonstration",
    "DemoSettings": "settings",
    "DoctorResult": "checkup",
    "DoctorSettings": "settings",
    "EmbeddingStore": "store",
    "Encoder": "encoder",
    "ExportResult": "interop.exporting",
    "ExportSettings": "settings",
    "ExtractResult": "extraction",
    "ExtractSettings": "settings",
    "FitResult": "fitting",
    "FitSettings": "fit_settings",
    "ImportResult": "interop.importing",
    "ImportSettings": "settings",
    "InputError": "errors",
    "Listener": "listener",
    "MLPHead": "heads",
    "ReportResult": "reports.reporting",
    "ReportSettings": "score_settings",
    "SAM": "sam",
    "ScoreResult": "scoring",
    "ScoreSettings": "score_settings",
    "StoreError": "errors",
    "SubmitResult": "submitting",
    "SubmitSettings": "score_settings",
    "TASKS": "tasks",
    "Task": "tasks",
    "ablate": "ablations.ablating",
    "bench_ablate": "bench.ablation",
    "bench_extract": "bench.extraction",
    "bench_fit": "bench.fit",
    "bench_store": "bench.store",
    "cvar": "risk",
    "demo": "demonstration",
    "doctor": "checkup",
    "export_embeddings": "interop.exporting",
    "extract": "extraction",
    "fit": "fitting",
    "import_embeddings": "interop.importing",
    "load_encoder": "encoder_loading",
    "report": "reports.reporting",
    "score": "scoring",
    "submit": "submitting",
    "write_sample": "sample",
}

__all__ = [
    "SAM",
    "TASKS",
    "AblateResult",
    "AblateSettings",
    "AffcacheError",
    "BenchAblateResult",
    "BenchAblateSettings",
    "BenchExtractResult",
    "BenchExtractSettings",
    "BenchFitResult",
    "BenchFitSettings",
    "BenchStoreResult",
    "BenchStoreSettings",
    "CVaRMLPClassifier",
    "CVaRMLPMultiLabelClassifier",
    "ConfigError",
    "DemoResult",
    "DemoSettings",
    "DoctorResult",
    "DoctorSettings",
    "EmbeddingStore",
    "Encoder",
    "ExportResult",
    "ExportSettings",
    "ExtractResult",
    "ExtractSettings",
    "FitResult",
    "FitSettings",
    "ImportResult",
    "ImportSettings",
    "InputError",
    "Listener",
    "MLPHead",
    "ReportResult",
    "ReportSettings",
    "ScoreResult",
    "ScoreSettings",
    "StoreError",
    "SubmitResult",
    "SubmitSettings",
    "Task",
    "ablate",
    "bench_ablate",
    "bench_extract",
    "bench_fit",
    "bench_store",
    "cvar",
    "demo",
    "doctor",
    "export_embeddings",
    "extract",
    "fit",
    "import_embeddings",
    "load_encoder",
    "report",
    "score",
    "submit",
    "write_sample",
]


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'affcache' has no attribute {name!r}")
    value = getattr(import_module(f"affcache.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
