"""Decision rules that are fitted: a bias for each class, a threshold for each action unit. Knows arrays only.

Macro F1 asks for other decisions than accuracy: a rare class is worth deciding for where it is unlikely. Both fits are
exact sweeps over all decisions that a bias or a threshold can change, not searches.
"""

from typing import Any

import numpy as np
import numpy.typing as npt

Values = npt.NDArray[np.float64]
Labels = npt.NDArray[np.int64]
ROUNDS = 20  # over all classes, at most; it ends once none improves


def fit_biases(probabilities: npt.NDArray[Any], labels: Labels) -> Values:
    """Find the biases on log probabilities that raise macro F1, one class after the other until none helps.

    Of each class all biases that change a decision are tried, the others' being fixed, so that macro F1 never falls.

    Args:
        probabilities: float (n, C), each above 0 or so.
        labels: int (n,) of class indices.

    Returns:
        float64 (C,), to be added to log probabilities before the largest is taken; 0 where nothing helps.
    """
    scores = np.log(np.maximum(probabilities, np.finfo(np.float64).tiny).astype(np.float64))  # (n, C)
    biases = np.zeros(scores.shape[1])
    best = _macro_f1(labels, scores.argmax(axis=1), scores.shape[1])
    for _ in range(ROUNDS):
        before = best
        for one in range(len(biases)):
            value, bias = _best_bias(scores + biases, labels, one)
            if value > best + 1e-12:
                best = value
                biases[one] += bias
        if best <= before:
            break
    return biases - biases.mean()


def _best_bias(scores: Values, labels: Labels, one: int) -> tuple[float, float]:
    """Return the best macro F1 over all biases of one class, and that bias."""
    frames, classes = scores.shape
    others = scores.copy()
    others[:, one] = -np.inf
    rival = others.argmax(axis=1)  # (n,) what is decided unless the class is
    needed = others[np.arange(frames), rival] - scores[:, one]  # (n,) the bias from which on it is
    order = needed.argsort(kind="stable")
    rival, labels, needed = rival[order], labels[order], needed[order]
    right = np.zeros((frames + 1, classes))  # row k: the first k frames are decided for the class
    decided = np.zeros((frames + 1, classes))
    is_rival = rival[:, None] == np.arange(classes)
    right[0] = (is_rival & (labels == rival)[:, None]).sum(axis=0)
    decided[0] = is_rival.sum(axis=0)
    right[1:] = right[0] - (is_rival & (labels == rival)[:, None]).cumsum(axis=0)
    decided[1:] = decided[0] - is_rival.cumsum(axis=0)
    right[1:, one] = (labels == one).cumsum()
    decided[:, one] = np.arange(frames + 1)
    total = decided + np.bincount(labels, minlength=classes)
    f1 = np.divide(2 * right, total, out=np.zeros_like(total), where=total > 0).mean(axis=1)  # (n + 1,)
    cut = np.concatenate([[True], needed[1:] > needed[:-1], [True]])  # between equal ones nothing can be cut
    best = int(np.flatnonzero(cut)[f1[cut].argmax()])
    return float(f1[best]), _between(needed, best)


def fit_thresholds(probabilities: npt.NDArray[Any], labels: Labels) -> Values:
    """Find for each unit the threshold with the largest F1.

    Args:
        probabilities: float (n, C) in [0, 1].
        labels: int (n, C) of 0 and 1.

    Returns:
        float64 (C,) in [0, 1]; a unit is present where its probability is at least that. 0.5 for a unit that no frame
        has.
    """
    thresholds = np.full(probabilities.shape[1], 0.5)
    for unit in range(len(thresholds)):
        present = labels[:, unit]
        if not present.any():
            continue
        order = probabilities[:, unit].argsort(kind="stable")[::-1]
        falling = probabilities[order, unit].astype(np.float64)
        right = present[order].cumsum()  # of the k most probable
        f1 = 2 * right / (np.arange(1, len(order) + 1) + present.sum())
        cut = np.append(falling[1:] < falling[:-1], True)
        last = int(np.flatnonzero(cut)[f1[cut].argmax()])
        thresholds[unit] = falling[last] if last + 1 == len(falling) else (falling[last] + falling[last + 1]) / 2
    return thresholds


def _between(rising: Values, first: int) -> float:
    """Return a bias that the first few frames reach and the others don't."""
    if first == 0:
        return float(rising[0] - 1)
    if first == len(rising):
        return float(rising[-1] + 1)
    return float((rising[first - 1] + rising[first]) / 2)


def _macro_f1(labels: Labels, decided: Labels, classes: int) -> float:
    right = np.bincount(labels[labels == decided], minlength=classes)
    total = np.bincount(labels, minlength=classes) + np.bincount(decided, minlength=classes)
    return float(np.divide(2 * right, total, out=np.zeros(classes), where=total > 0).mean())
