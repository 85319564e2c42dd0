"""Ridge regression in closed form: a linear head and a first baseline, without epochs. Knows tensors, not files.

With weights w per frame, features z standardised by their weighted mean and deviation, and mean_w the weighted mean,
the head of strength lambda minimises

    mean_w |y - z W - b|^2 + lambda |W|^2        (b is free)

    R = mean_w(z' z), k = mean_w(z' (y - mean y)),  W = (R + lambda I)^-1 k

(Hoerl and Kennard, Ridge regression: biased estimation for nonorthogonal problems, Technometrics 12, 1970). R is the
correlation matrix: its eigenvalues are 1 on average, so lambda means the same for any encoder and any number of frames.
scikit-learn's ``Ridge(alpha=lambda * sum(w))`` on z solves the same.
"""

import math
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import TypeAlias

import scipy.linalg
import torch
from torch import nn
from torch.nn.functional import one_hot

from affcache.errors import InputError
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Task
from affcache.training.data import AS_STORED, CONSTANT, FrameSource, Scaler, without_scaler
from affcache.training.epochs import Best, Entry, Epochs, metric_of
from affcache.training.heads import linear_head
from affcache.training.learner import Tensors, predict
from affcache.training.objective import ClassCounts
from affcache.training.settings import FitSettings

# 1e-4 to 1e2 in 13 half-decades: from barely any shrinking to barely any weight left
STRENGTHS = tuple(10 ** (half_decade / 2) for half_decade in range(-8, 5))
FEWEST = 2  # frames with a label that an output is solved from
MOST_PRODUCTS = 5e11  # of a baseline: 15 seconds on two cores


@dataclass(frozen=True, eq=False)
class RidgePath:
    """The ridge heads of all strengths, after one pass over the frames and one eigendecomposition.

    The correlation matrix is R = V diag(eigenvalues) V'. All tensors are float64, on the device of the embeddings.
    """

    mean: torch.Tensor  # (D,) weighted mean of the embeddings, after normalising
    inverse_deviation: torch.Tensor  # (D,) 1 / standard deviation; 0 for a constant feature
    target_mean: torch.Tensor  # (C,) weighted
    eigenvalues: torch.Tensor  # (D,) rising, at least 0
    eigenvectors: torch.Tensor  # (D, D) V, one per column
    projected: torch.Tensor  # (D, C) V' k

    @classmethod
    def from_blocks(
        cls,
        blocks: Iterable[torch.Tensor],
        width: int,
        targets: torch.Tensor,
        weights: torch.Tensor,
        scaler: Scaler = AS_STORED,
    ) -> "RidgePath":
        """Read the frames once.

        Args:
            blocks: finite embeddings (B, width), one block after the other, of any float type, on one device.
            width: D.
            targets: finite float tensor (n, C), what the head is to give.
            weights: finite float tensor (n,), each at least 0, in any scale.
            scaler: what is done to each embedding first.

        Raises:
            InputError: fewer than two frames have a weight.
        """
        if (weighed := int(weights.count_nonzero())) < FEWEST:
            raise InputError(
                f"A ridge head needs at least 2 frames with a label, and there are {weighed}. Expected the training "
                "split. Check that --annotations and the store are of the same videos."
            )
        moments = _Moments(width, targets.shape[1])
        start = 0
        for block in blocks:
            x, rows = scaler(_float64(block, block.device)), slice(start, start + len(block))  # (B, D)
            start = rows.stop
            moments.add(x, _float64(targets[rows], x.device), _float64(weights[rows], x.device))
        variance = moments.scatter.diagonal() / moments.weight  # (D,)
        deviation = variance.sqrt()
        varies = deviation > CONSTANT * moments.mean.abs()
        inverse = torch.where(varies, 1 / deviation, 0.0)  # (D,)
        correlation = moments.scatter / moments.weight * inverse * inverse[:, None]  # (D, D)
        cross = moments.cross / moments.weight * inverse[:, None]  # (D, C)
        eigenvalues, eigenvectors = _eigh(correlation)  # (D,), (D, D)
        return cls(
            mean=moments.mean,
            inverse_deviation=inverse,
            target_mean=moments.target_mean,
            eigenvalues=eigenvalues.clamp(min=0),  # rounding may leave -1e-16
            eigenvectors=eigenvectors,
            projected=eigenvectors.T @ cross,
        )

    def solution(self, strength: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the head of one strength: weight (C, D) and bias (C,), both float32, as torch's Linear keeps them.

        They apply to embeddings as the scaler leaves them; ridge's own standardisation is folded in.

        Args:
            strength: lambda, more than 0; see ``STRENGTHS``.

        Raises:
            ValueError: strength out of range.
        """
        if not (strength > 0 and math.isfinite(strength)):
            raise ValueError(f"strength is {strength}; expected a finite number above 0")
        shrunk = self.projected / (self.eigenvalues + strength)[:, None]  # (D, C)
        standardised = self.eigenvectors @ shrunk  # (D, C)
        weight = (standardised * self.inverse_deviation[:, None]).T.float().contiguous()  # (C, D)
        # from the rounded weight: the mean prediction stays the mean target also far from zero
        bias = self.target_mean - weight.double() @ self.mean  # (C,)
        return weight, bias.float()


class _Moments:
    """Weighted means of the frames read so far, and sums of products centred on them.

    Raw sums of products would cancel where a mean is far from zero. So each block is centred on its own mean and merged
    (Chan, Golub and LeVeque, Algorithms for computing the sample variance, The American Statistician 37, 1983).
    ``scatter`` (D, D) is the sum of w (x - mean)' (x - mean), ``cross`` (D, C) of w (x - mean)' (y - target_mean).
    """

    def __init__(self, width: int, outputs: int) -> None:
        self.weight = 0.0
        self.mean, self.target_mean, self.scatter, self.cross = (
            torch.zeros(shape, dtype=torch.float64)
            for shape in ((width,), (outputs,), (width, width), (width, outputs))
        )

    def add(self, x: torch.Tensor, y: torch.Tensor, w: torch.Tensor) -> None:
        """Merge a block of embeddings (B, D), targets (B, C) and weights (B,), all float64; overwrites x and y."""
        weight = float(w.sum())
        if weight == 0:
            return
        if self.scatter.device != x.device:
            parts = (self.mean, self.target_mean, self.scatter, self.cross)
            self.mean, self.target_mean, self.scatter, self.cross = (part.to(x.device) for part in parts)
        mean, target_mean = w @ x / weight, w @ y / weight  # (D,), (C,)
        root = w.sqrt()[:, None]
        x.sub_(mean).mul_(root)
        y.sub_(target_mean).mul_(root)
        # 100,000 x 768 collinear rows on 2 cores: 1.6 s in float64, 1.3 s with these products in float32, 0.9 s all in
        # float32. Float32 products alone put the weights off by 7e-4 (relative) at strength 1e-4, by 5e-6 at 1.
        self.scatter.addmm_(x.T, x)
        self.cross.addmm_(x.T, y)
        total = self.weight + weight
        step, target_step = mean - self.mean, target_mean - self.target_mean
        self.scatter.addr_(step, step, alpha=self.weight * weight / total)
        self.cross.addr_(step, target_step, alpha=self.weight * weight / total)
        self.mean += step * (weight / total)
        self.target_mean += target_step * (weight / total)
        self.weight = total


def _eigh(symmetric: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return eigenvalues (D,), rising, and eigenvectors (D, D) of a symmetric matrix (D, D)."""
    try:
        return torch.linalg.eigh(symmetric)
    except RuntimeError:  # met where nearly all features were constant: this way takes longer, and ends
        values, vectors = scipy.linalg.eigh(symmetric.cpu().numpy(), driver="ev")
        return torch.from_numpy(values).to(symmetric), torch.from_numpy(vectors).to(symmetric)


def _float64(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """Return a float64 copy on a device, which may be overwritten."""
    return values.to(device, torch.float64, copy=True)


class Ridge:
    """A run of ``fit --head ridge``: linear heads in closed form, one for each strength, the best kept.

    Outputs are fitted to 1 and -1 (values to themselves), so that the probabilities that ``score`` writes decide well
    but aren't calibrated.

    Args:
        settings: of them only normalize, class_weights and strength matter.
        task: what is predicted.
        width: D, the width of an embedding.
        scaler: what is done to embeddings first; None where that needs no training frames.
    """

    unit = "strength"

    def __init__(self, settings: FitSettings, task: Task, width: int, scaler: Scaler | None = None) -> None:
        self.settings = settings
        self.task = task
        self.width = width
        self.scaler = scaler or Scaler(settings.normalize)
        self.best = [Best()]
        self.strengths = STRENGTHS if settings.strength is None else (settings.strength,)
        self.steps = len(self.strengths)

    def run(self, train: FrameSource, validation: FrameSource) -> Iterator[list[Entry]]:
        """Solve, and evaluate all strengths in one pass over the validation frames; yield a line for each."""
        heads = self._solve(train)
        logits = predict(heads, validation, self.scaler)  # (H, n, C)
        labels = validation.labels.to(logits.device)
        for number, (strength, head, of_head) in enumerate(zip(self.strengths, heads, logits, strict=True), start=1):
            start = time.perf_counter()
            value = metric_of(self.task, of_head, labels, validation.videos)
            entry = {"epoch": number, "strength": strength, self.task.metric: value}
            entry["seconds"] = round(time.perf_counter() - start, 3)
            self.best[0].take(entry, value, {**head.state_dict(), **self.scaler.tensors()})
            yield [entry]

    def predict_best(self, frames: FrameSource) -> torch.Tensor:
        """Return the logits (1, n, C) of the best strength's head."""
        head = self._head(without_scaler(self.best[0].head), frames.labels.device)
        return predict([head], frames, self.scaler)

    def _head(self, state: Tensors, device: torch.device) -> nn.Module:
        with torch.device("meta"):  # no weights are drawn: the caller's random numbers stay his own
            head = linear_head(self.width, self.task.outputs)
        head.load_state_dict(state, assign=True)
        return head.to(device)

    def _solve(self, train: FrameSource) -> list[nn.Module]:
        """Return a linear head for each strength, where the frames are."""
        parts = self.task.parts or (self.task,)
        labels = self.task.split(train.labels) if isinstance(self.task, MultiTask) else [train.labels]
        each = [self._targets(part, own) for part, own in zip(parts, labels, strict=True)]
        targets, weights = (torch.cat(of, dim=1) for of in zip(*each, strict=True))  # (n, C) each
        weight = torch.zeros(self.steps, self.task.outputs, self.width, device=targets.device)
        bias = weight.new_zeros(weight.shape[:2])
        of_classes = torch.tensor([part.has_classes for part in parts for _ in range(part.outputs)]).to(weight.device)
        few = weights.count_nonzero(0) < FEWEST  # (C,)
        for own, outputs in _alike(weights):
            if few[outputs].all() and not few.all():  # nothing is known of them: absent, or the middle of the range
                bias[:, outputs] = torch.where(of_classes[outputs], -1.0, 0.0)
                continue
            blocks = train.evaluation_batches()
            path = RidgePath.from_blocks(blocks, self.width, targets[:, outputs], own, self.scaler)
            for number, strength in enumerate(self.strengths):
                weight[number, outputs], bias[number, outputs] = path.solution(strength)
        states = zip(weight, bias, strict=True)
        return [self._head({"output_layer.weight": w, "output_layer.bias": b}, w.device) for w, b in states]

    def _targets(self, task: Task, labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return what the outputs of a task are to give (n, C), and how much each counts (n, C)."""
        labelled, filled = task.labelled(labels), task.filled(labels)
        weights = labelled.double()
        if task.has_classes:
            present = one_hot(filled, task.outputs) if task.exclusive else filled
            targets = 2.0 * present - 1  # (n, C)
        else:
            targets = task.logits(filled.double()).float()
        counts = ClassCounts.of(task, labels)
        if task.exclusive and counts is not None and self.settings.class_weights == "balanced":
            weights = weights * counts.balanced().to(weights)[filled]
        return targets, weights.unsqueeze(1).expand(targets.shape) if weights.dim() == 1 else weights


def _alike(weights: torch.Tensor) -> Iterator[tuple[torch.Tensor, list[int]]]:
    """Yield weights of frames (n,), each with the outputs that have them, of weights (n, C)."""
    left = list(range(weights.shape[1]))
    while left:
        first = weights[:, left[0]]
        alike = [output for output in left if torch.equal(weights[:, output], first)]
        yield first, alike
        left = [output for output in left if output not in alike]


def ridge_baseline(task: Task, width: int, train: FrameSource, validation: FrameSource) -> float | None:
    """Return the metric on validation frames of the best ridge head, balanced between classes: what a head has to beat.

    None where that would take more than some seconds.
    """
    if len(train) * width**2 > MOST_PRODUCTS:
        return None
    balanced = any(one.exclusive for one in task.parts or (task,))
    ridge = Ridge(FitSettings(head="ridge", class_weights="balanced" if balanced else "none"), task, width)
    return max(entry[task.metric] for (entry,) in ridge.run(train, validation))


Run: TypeAlias = Epochs | Ridge  # what trains heads in steps that have a metric each
