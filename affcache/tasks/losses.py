"""Losses of frames, none of them averaged yet, so that CVaR goes over any; and terms of whole batches.

Knows tensors only. Shapes may have leading axes, such as H heads side by side; what is a number for one head is then a
tensor of as many axes as the losses have: (H, 1) or (H, 1, 1).
"""

from collections.abc import Callable, Mapping

import torch
from torch.nn import functional

Option = float | torch.Tensor
Loss = Callable[..., torch.Tensor]  # logits (..., B, C), labels -> losses (..., B) or (..., B, C)


def cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    label_smoothing: Option = 0.0,
    focal_gamma: Option = 0.0,
) -> torch.Tensor:
    """Cross-entropy of each frame.

    Args:
        logits: float tensor (..., B, C).
        labels: int64 tensor (..., B) of class indices.
        label_smoothing: in [0, 1): Share of each label spread evenly over the classes.
        focal_gamma: at least 0: Exponent of the focal loss, 0 being plain cross-entropy. Losses are multiplied by
            ``(1 - p) ** gamma``, p being the label's probability (Lin, Goyal, Girshick, He and Dollar, Focal Loss for
            Dense Object Detection, 2017).

    Returns:
        float tensor (..., B), each at least 0.
    """
    if _off(label_smoothing) and _off(focal_gamma):
        flat = functional.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction="none")
        return flat.view(labels.shape)  # (..., B)
    log_probabilities = functional.log_softmax(logits, dim=-1)  # (..., B, C)
    own = log_probabilities.gather(-1, labels.unsqueeze(-1)).squeeze(-1)  # (..., B)
    losses = -own
    if not _off(label_smoothing):
        losses = (1 - label_smoothing) * losses - label_smoothing * log_probabilities.mean(-1)
    if _off(focal_gamma):
        return losses
    miss = (1 - own.exp()).clamp(min=torch.finfo(own.dtype).tiny)  # 0 has no gradient under an exponent below 1
    return losses * miss**focal_gamma


def binary_cross_entropy(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    label_smoothing: Option = 0.0,
    focal_gamma: Option = 0.0,
) -> torch.Tensor:
    """Binary cross-entropy of each frame and action unit.

    Args:
        logits: float tensor (..., B, C).
        labels: tensor (..., B, C) of 0 and 1.
        label_smoothing: in [0, 1): Share by which labels move towards one half.
        focal_gamma: at least 0: Exponent of the focal loss, as for ``cross_entropy``.

    Returns:
        float tensor (..., B, C), each at least 0.
    """
    targets = labels.to(logits.dtype)
    if not _off(label_smoothing):
        targets = targets + (0.5 - targets) * label_smoothing
    losses = functional.binary_cross_entropy_with_logits(logits, targets, reduction="none")  # (..., B, C)
    if _off(focal_gamma):
        return losses
    miss = torch.sigmoid(torch.where(labels > 0, -logits, logits))  # 1 - the label's probability
    miss = miss.clamp(min=torch.finfo(miss.dtype).tiny)  # as in ``cross_entropy``
    return losses * miss**focal_gamma


def squared_error(outputs: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Squared error (..., B, C) of each frame and value."""
    return (outputs - labels.to(outputs.dtype)).square()


def pairwise_auc_loss(
    logits: torch.Tensor,
    labels: torch.Tensor,
    *,
    margin: float = 0.6,
    power: float = 2.0,
    counts: torch.Tensor | None = None,
) -> torch.Tensor:
    """How far present frames are from scoring higher than absent ones: a smooth stand-in for 1 - AUC.

    The mean over all pairs of a present and an absent frame of ``relu(margin - (s_present - s_absent)) ** power``, then
    over all C units, where one that lacks either in the batch counts 0: the form, and its defaults, of the code of
    arXiv 2403.09915.

    Args:
        logits: float tensor (..., B, C).
        labels: tensor (..., B, C) of 0 and 1.
        margin, power: of the formula above.
        counts: tensor (..., B, C), how much each label counts, 0 where there is none; None where all do alike.

    Returns:
        float tensor (...), at least 0.
    """
    positive = labels.to(logits.dtype)  # (..., B, C)
    gaps = logits.unsqueeze(-2) - logits.unsqueeze(-3)  # (..., B, B, C)
    pairs = positive.unsqueeze(-2) * (1 - positive).unsqueeze(-3)
    if counts is not None:
        pairs = pairs * (counts.unsqueeze(-2) * counts.unsqueeze(-3))
    short = (margin - gaps).clamp(min=0) ** power * pairs
    of_units = short.sum((-3, -2)) / _at_least_tiny(pairs.sum((-3, -2)))  # (..., C)
    return of_units.mean(-1)


def concordance(outputs: torch.Tensor, labels: torch.Tensor, *, counts: torch.Tensor | None = None) -> torch.Tensor:
    """Concordance correlation coefficient of each column over the frames: 2 cov / (var + var + (mean - mean)^2).

    Lin, A concordance correlation coefficient to evaluate reproducibility, Biometrics 45, 1989; population moments.

    Args:
        outputs, labels: float tensors (..., B, C).
        counts: tensor (..., B, C), how much each label counts, 0 where there is none; None where all do alike.

    Returns:
        float tensor (..., C) in [-1, 1]; 0 where both are constant.
    """
    labels = labels.to(outputs.dtype)

    def mean(values: torch.Tensor, *, keepdim: bool = False) -> torch.Tensor:
        if counts is None:
            return values.mean(-2, keepdim=keepdim)
        of_all = _at_least_tiny(counts.to(values.dtype).sum(-2, keepdim=keepdim))
        return (values * counts).sum(-2, keepdim=keepdim) / of_all

    mean_outputs, mean_labels = mean(outputs, keepdim=True), mean(labels, keepdim=True)
    covariance = mean((outputs - mean_outputs) * (labels - mean_labels))  # (..., C)
    variances = mean((outputs - mean_outputs).square()) + mean((labels - mean_labels).square())
    spread = variances + (mean_outputs - mean_labels).squeeze(-2).square()
    size = (mean_outputs.square() + mean_labels.square()).squeeze(-2)
    rounding = spread <= torch.finfo(outputs.dtype).eps ** 2 * size  # all there is: equal constants agree by chance
    return torch.where(rounding, 0.0, 2 * covariance / _at_least_tiny(spread))


def _at_least_tiny(sums: torch.Tensor) -> torch.Tensor:
    return sums.clamp(min=torch.finfo(sums.dtype).tiny)


def _off(option: Option) -> bool:
    return not isinstance(option, torch.Tensor) and option == 0


# Losses by the kind of task they are for, the usual one first; --loss takes a name. A further loss is a function above
# and its name here: what it takes by keyword, with a number as default, is a setting of that name, whose range and
# sentence are the docstring's.
LOSSES: Mapping[str, Mapping[str, Loss]] = {
    "classes": {"cross_entropy": cross_entropy},
    "units": {"binary_cross_entropy": binary_cross_entropy},
    "values": {"squared_error": squared_error},
}
