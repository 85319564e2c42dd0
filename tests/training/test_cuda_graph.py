"""Steps recorded as a CUDA graph: when they are replayed, and (where there is a GPU) that they are the steps."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace

import pytest
import torch

from affcache.tasks.tasks import TASKS
from affcache.training.data import Frames
from affcache.training.learner import Learner
from affcache.training.objective import ClassCounts
from affcache.training.settings import FitSettings

QUICK = FitSettings(hidden_layers=2, hidden_width=16, batch_size=16, rho=0.05, dropout=0.3)


def frames_on(device: str, task: str = "expr", count: int = 70) -> Frames:
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(count, 12, generator=generator).half()
    labels = {
        "expr": torch.randint(0, 8, (count,), generator=generator),
        "au": torch.randint(0, 2, (count, 12), generator=generator),
        "va": torch.rand(count, 2, generator=generator) * 2 - 1,
        "mtl": with_gaps(TASKS["mtl"].draw_labels(count, generator), generator),
    }[task]
    videos = torch.arange(count) // 10
    return Frames(embeddings.to(device), labels.to(device), videos.to(device))


def with_gaps(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Leave out three of ten labels."""
    return labels.masked_fill(torch.rand(labels.shape, generator=generator) < 0.3, torch.nan)


class Replayed:
    """In place of a recorded step: recording changes nothing, a replay makes the step."""

    made: list["Replayed"]

    def __init__(
        self,
        step: Callable[..., torch.Tensor],
        inputs: Sequence[torch.Tensor],
        generators: Iterable[torch.Generator],
    ) -> None:
        self.step, self.shapes, self.replays = step, [tensor.shape for tensor in inputs], 0
        Replayed.made.append(self)

    def __call__(self, inputs: Sequence[torch.Tensor]) -> torch.Tensor:
        assert [tensor.shape for tensor in inputs] == self.shapes
        self.replays += 1
        return self.step(*inputs)


@pytest.fixture
def replayed(monkeypatch: pytest.MonkeyPatch) -> type[Replayed]:
    Replayed.made = []
    monkeypatch.setattr("affcache.training.learner.RecordedStep", Replayed)
    return Replayed


def test_whole_batches_are_replayed_after_a_few_steps(replayed: type[Replayed]) -> None:
    frames, learners = frames_on("cpu"), [Learner([QUICK], TASKS["expr"], 12, torch.device("cpu")) for _ in range(2)]
    learners[0]._records = True
    for _ in range(3):  # epochs of four batches of 16 and one of 6
        losses = [learner.epoch(frames, 1e-3) for learner in learners]
        assert losses[0].equal(losses[1])
    (recorded,) = replayed.made
    assert recorded.replays == 3 * 4 - 3, "all but the warm-up and the odd batches"
    assert learners[0].heads.batches == learners[1].heads.batches == [15]


def test_weights_and_gaps_are_inputs_of_a_recorded_step(replayed: type[Replayed]) -> None:
    frames = replace(frames_on("cpu", "mtl"), weights=torch.linspace(0.1, 1, 70))
    counts = ClassCounts.of(TASKS["mtl"], frames.labels)
    learners = [Learner([QUICK], TASKS["mtl"], 12, torch.device("cpu"), counts) for _ in range(2)]
    learners[0]._records = True
    for _ in range(2):
        losses = [learner.epoch(frames, 1e-3) for learner in learners]
        assert losses[0].equal(losses[1])
    (recorded,) = replayed.made
    assert [len(shape) for shape in recorded.shapes] == [3, 3, 2, 2]


def test_a_restored_learner_records_anew(replayed: type[Replayed]) -> None:
    learner = Learner([QUICK], TASKS["expr"], 12, torch.device("cpu"))
    learner._records = True
    learner.epoch(frames_on("cpu"), 1e-3)
    learner.load_state(learner.state())
    learner.epoch(frames_on("cpu"), 1e-3)
    assert len(replayed.made) == 2


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize(
    ("task", "more"),
    [
        ("expr", {}),
        ("expr", {"rho": 0.0, "clip_norm": 0.5}),
        ("expr", {"cvar_level": "set", "label_smoothing": 0.1, "focal_gamma": 1.0}),
        ("expr", {"cvar_within": "video", "adaptive": True}),
        ("expr", {"class_weights": "balanced", "logit_adjustment": 1.0, "precision": "bf16"}),
        ("au", {"auc_weight": 0.2}),
        ("va", {}),
        ("mtl", {"task_weights": "au=2", "auc_weight": 0.2}),
        ("mtl", {"cvar_level": "set"}),
        ("mtl", {"cvar_within": "class", "class_weights": "none"}),
    ],
)
@pytest.mark.parametrize("weighted", [False, True])
def test_on_a_gpu_replays_are_the_steps(task: str, more: dict[str, object], weighted: bool) -> None:
    device, recipe = torch.device("cuda"), replace(QUICK, **more)  # type: ignore[arg-type]
    frames = frames_on("cuda", task)
    if weighted and recipe.cvar_within == "batch":
        frames = replace(frames, weights=torch.linspace(0.1, 1, len(frames), device=device))
    counts = ClassCounts.of(TASKS[task], frames.labels)
    recipes = [recipe, replace(recipe, seed=1, alpha=0.8, weight_decay=0.1)]
    learners = [Learner(recipes, TASKS[task], 12, device, counts, videos=7) for _ in range(2)]
    learners[0]._records = False
    for rate in (1e-3, 5e-4, 1e-4):
        losses = [learner.epoch(frames, [rate, 2 * rate]) for learner in learners]
        torch.testing.assert_close(losses[1], losses[0])
    assert learners[1]._recorded is not None
    torch.testing.assert_close(learners[1].heads.parameters, learners[0].heads.parameters)
    assert learners[1].heads.batches == learners[0].heads.batches
