"""Every public name of affcache, with the module it lives in: the only list of them."""

from .ablation.ablate import AblateResult as AblateResult
from .ablation.ablate import ablate as ablate
from .ablation.settings import AblateSettings as AblateSettings
from .demonstration import DemoResult as DemoResult
from .demonstration import DemoSettings as DemoSettings
from .demonstration import demo as demo
from .encoders.encoder import Encoder as Encoder
from .encoders.loading import load_encoder as load_encoder
from .errors import AffcacheError as AffcacheError
from .errors import ConfigError as ConfigError
from .errors import InputError as InputError
from .errors import StoreError as StoreError
from .exchange.exporting import ExportResult as ExportResult
from .exchange.exporting import export_embeddings as export_embeddings
from .exchange.importing import ImportResult as ImportResult
from .exchange.importing import import_embeddings as import_embeddings
from .exchange.settings import ExportSettings as ExportSettings
from .exchange.settings import ImportSettings as ImportSettings
from .extraction.doctor import DoctorResult as DoctorResult
from .extraction.doctor import doctor as doctor
from .extraction.extract import ExtractResult as ExtractResult
from .extraction.extract import extract as extract
from .extraction.settings import DoctorSettings as DoctorSettings
from .extraction.settings import ExtractSettings as ExtractSettings
from .faces.find import FacesResult as FacesResult
from .faces.find import find_faces as find_faces
from .faces.settings import FacesSettings as FacesSettings
from .prediction.model import Model as Model
from .prediction.model import load as load
from .prediction.publish import PublishResult as PublishResult
from .prediction.publish import publish as publish
from .prediction.settings import PublishSettings as PublishSettings
from .progress import Listener as Listener
from .reporting.report import ReportResult as ReportResult
from .reporting.report import report as report
from .reporting.settings import ReportSettings as ReportSettings
from .scoring.score import ScoreResult as ScoreResult
from .scoring.score import score as score
from .scoring.settings import ScoreSettings as ScoreSettings
from .store.reading import EmbeddingStore as EmbeddingStore
from .submission.settings import SubmitSettings as SubmitSettings
from .submission.submit import SubmitResult as SubmitResult
from .submission.submit import submit as submit
from .tasks.tasks import TASKS as TASKS
from .tasks.tasks import Task as Task
from .training.fit import FitResult as FitResult
from .training.fit import fit as fit
from .training.heads import MLPHead as MLPHead
from .training.risk import cvar as cvar
from .training.sam import SAM as SAM
from .training.settings import FitSettings as FitSettings
from .training.sklearn import CVaRMLPClassifier as CVaRMLPClassifier
from .training.sklearn import CVaRMLPMultiLabelClassifier as CVaRMLPMultiLabelClassifier

__all__: list[str]
__version__: str
