"""Ready-made grids: the questions that everyone asks first."""

from collections.abc import Sequence
from typing import Any

from affcache.training.settings import TrainingSettings

Point = tuple[str, dict[str, Any]]  # a name and settings of fit; the name is "" where the settings say it

PUBLISHED = TrainingSettings()
AUC_WEIGHT = 0.2  # of the published variant for action units
ALPHAS = (0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0)
RHOS = (0.0, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0)


def preset_points(preset: str, recipe: TrainingSettings) -> Sequence[Point]:
    """Return the points of a preset; the one that others are compared with comes first.

    Where the recipe has CVaR, SAM or the AUC term on, the preset's points with them use its values.
    """
    if preset == "alpha":
        return [("", {"alpha": alpha}) for alpha in reversed(ALPHAS)]
    if preset == "rho":
        return [("", {"rho": rho}) for rho in RHOS]
    alpha = recipe.alpha if recipe.alpha < 1 else PUBLISHED.alpha
    losses = {"erm": {"alpha": 1.0}, "cvar": {"alpha": alpha}}
    if recipe.task == "au":
        losses["erm"]["auc_weight"] = losses["cvar"]["auc_weight"] = 0.0
        losses["cvar+auc"] = {"alpha": alpha, "auc_weight": recipe.auc_weight or AUC_WEIGHT}
    sharpness = {"": {"rho": 0.0}, "+sam": {"rho": recipe.rho or PUBLISHED.rho}}
    return [(loss + sam, {**of, **rho}) for loss, of in losses.items() for sam, rho in sharpness.items()]
