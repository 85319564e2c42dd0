"""How far a batch's CVaR, and its gradient, lie from those of the whole set the batch is drawn from.

    python -m benchmarks.cvar_bias                           # exponential and log-normal losses
    python -m benchmarks.cvar_bias --losses mine.npy --json  # losses of your own, drawn with replacement

A loss is drawn by its upper quantile u, the share of the whole that is worse. A line for each batch size and alpha:

    bias %    of the true CVaR, with its standard error, and beside it the first-order value -(1 - alpha) / (2 B f(t))
    leak %    of the gradient: what falls on losses outside the true tail
    weight    sum of a batch's gradient over its losses, and its standard deviation from batch to batch
    by u      mean gradient of losses by u / alpha, in units of 1 / (alpha B): ideal is 1 below u = alpha and 0 above

Level "set" is ``--cvar-level set``: the threshold of a full window of 32 batches, the batch at hand the newest of them.
With ``--drift`` each batch's losses are by so much smaller than those of the batch before.
"""

import itertools
import json
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from affcache.training.objective import WINDOW
from affcache.training.risk import TailThreshold, cvar, rank_weights, tail_size
from benchmarks.shared import script_parser

EDGES = (0.0, 0.5, 0.9, 1.1, 1.5, 2.0, math.inf)  # of u / alpha: a column from each to the next
CHUNK = 1 << 21  # losses at a time


@dataclass(frozen=True)
class Population:
    """All the losses there are: how to draw one, and what is known of their tail."""

    name: str
    loss_at: Callable[[torch.Tensor], torch.Tensor]  # upper quantiles in (0, 1) -> losses
    cvar: Callable[[float], float]  # alpha -> the true CVaR
    density: Callable[[float], float] | None  # alpha -> the density at the threshold


def exponential() -> Population:
    """Losses with density exp(-l): threshold -log(alpha), CVaR 1 - log(alpha)."""
    return Population("exponential", lambda u: -u.log(), lambda alpha: 1 - math.log(alpha), lambda alpha: alpha)


def log_normal() -> Population:
    """The exponential of a standard normal z: CVaR exp(1/2) * P(z > z_alpha - 1) / alpha."""

    def quantile(alpha: float) -> float:
        return -float(torch.special.ndtri(torch.tensor(alpha, dtype=torch.float64)))

    def density(alpha: float) -> float:
        z = quantile(alpha)
        return math.exp(-z * z / 2 - z) / math.sqrt(2 * math.pi)

    def risk(alpha: float) -> float:
        return math.exp(0.5) * 0.5 * math.erfc((quantile(alpha) - 1) / math.sqrt(2)) / alpha

    return Population("log-normal", lambda u: (-torch.special.ndtri(u)).exp(), risk, density)


def from_file(path: Path) -> Population:
    """The losses in a .npy file, which are then the whole set."""
    worst_first = torch.from_numpy(np.load(path).ravel().astype(np.float64)).sort(descending=True).values
    count = len(worst_first)

    def loss_at(upper: torch.Tensor) -> torch.Tensor:
        return worst_first[(upper * count).long().clamp(max=count - 1)]

    return Population(path.stem, loss_at, lambda alpha: float(cvar(worst_first, alpha)), None)


class Tally:
    """Sums over batches: the bias, and where the gradient falls."""

    def __init__(self, population: Population, alpha: float) -> None:
        self.alpha = alpha
        self.true = population.cvar(alpha)
        self.threshold = float(population.loss_at(torch.tensor([alpha * (1 - 1e-9)], dtype=torch.float64)))
        self.errors: list[torch.Tensor] = []
        self.weight, self.drawn = torch.zeros(2, len(EDGES) - 1, dtype=torch.float64)
        self.leaked = 0.0
        self.totals: list[torch.Tensor] = []

    def add(self, values: torch.Tensor, losses: torch.Tensor, upper: torch.Tensor, weights: torch.Tensor) -> None:
        """Take in estimates (n,) from losses (n, B) of upper quantiles (n, B), and the gradient (n, B).

        The form at the true threshold has the true CVaR as its mean and varies with the batch as the estimates do: the
        mean of the difference is the bias, with far less noise than the mean of the estimates.
        """
        form = self.threshold + (losses - self.threshold).clamp(min=0).mean(1) / self.alpha
        self.errors.append(values - form)
        place = torch.bucketize(upper / self.alpha, torch.tensor(EDGES[1:-1], dtype=torch.float64)).flatten()
        scaled = (weights * self.alpha * losses.shape[1]).flatten()
        self.weight += torch.bincount(place, scaled, minlength=len(self.weight))
        self.drawn += torch.bincount(place, minlength=len(self.drawn))
        self.leaked += float(weights[upper > self.alpha].sum())
        self.totals.append(weights.sum(1))

    def row(self) -> dict[str, Any]:
        """Return the figures as one line of the table."""
        errors, totals = torch.cat(self.errors), torch.cat(self.totals)
        means = [float(w / n) if n else None for w, n in zip(self.weight, self.drawn, strict=True)]
        return {
            "cvar": self.true,
            "bias_percent": 100 * float(errors.mean()) / self.true,
            "error_percent": 100 * float(errors.std()) / len(errors) ** 0.5 / self.true,
            "leak_percent": 100 * self.leaked / float(totals.sum()),
            "weight": float(totals.mean()),
            "weight_deviation": float(totals.std()),
            "by_u": means,
        }


def batch_level(population: Population, size: int, alpha: float, losses: int) -> dict[str, Any]:
    """Measure CVaR of each batch by itself."""
    tally = Tally(population, alpha)
    for _ in range(max(1, losses // CHUNK)):
        upper = torch.rand(max(1, CHUNK // size), size, dtype=torch.float64).sort(1).values  # the worst loss first
        drawn = population.loss_at(upper)
        weights = rank_weights(size, tail_size(size, alpha), drawn)  # (B,)
        tally.add((drawn * weights).sum(1), drawn, upper, weights.expand_as(drawn))
    assert torch.isclose((drawn[0] * weights).sum(), cvar(drawn[0], alpha))
    return tally.row()


def set_level(population: Population, size: int, alpha: float, losses: int, drift: float) -> dict[str, Any]:
    """Measure the form at the threshold of the last 32 batches, for a batch that is the newest of them."""
    tally = Tally(population, alpha)
    windows = max(1, CHUNK // (WINDOW * size))
    levels = torch.full((windows,), alpha, dtype=torch.float64)
    age = torch.arange(1, WINDOW + 1, dtype=torch.float64).repeat_interleave(size)  # in batches
    for _ in range(max(1, losses // CHUNK)):
        before = population.loss_at(torch.rand(windows, WINDOW * size, dtype=torch.float64)) * (1 - drift) ** -age
        tracked = TailThreshold(windows, WINDOW * size, before)
        tracked.update(before, levels, torch.ones_like(before))
        upper = torch.rand(windows, size, dtype=torch.float64)
        drawn = population.loss_at(upper).requires_grad_()
        tracked.update(drawn.detach(), levels, torch.ones_like(drawn))
        values = tracked.cvar(drawn, levels, torch.ones_like(drawn))
        (weights,) = torch.autograd.grad(values.sum(), drawn)
        tally.add(values.detach(), drawn.detach(), upper, weights)
    return tally.row()


def print_row(row: dict[str, Any]) -> None:
    """Print one line of the table."""
    first = row["first_order_percent"]
    print(
        f"{row['population']:12} {row['level']:5} {row['batch_size']:5} {row['alpha']:5} {row['cvar']:8.4f}"
        f" {row['bias_percent']:8.3f} ±{row['error_percent']:5.3f} {'' if first is None else f'{first:.3f}':>8}"
        f" {row['leak_percent']:7.2f} {row['weight']:7.3f} ±{row['weight_deviation']:5.3f}  "
        + " ".join("    -" if mean is None else f"{mean:5.3f}" for mean in row["by_u"]),
        flush=True,
    )


def main() -> None:
    """Measure, and print a table or one JSON object."""
    parser = script_parser(__doc__)
    parser.add_argument("--losses", type=Path, help="a .npy file of losses, in place of the two distributions")
    parser.add_argument("--batch-sizes", type=int, nargs="+", default=[8, 16, 32, 64, 256, 1024])
    parser.add_argument("--alphas", type=float, nargs="+", default=[0.1, 0.3, 0.5])
    parser.add_argument("--draws", type=int, default=1 << 23, help="losses drawn for each line, whole windows of them")
    parser.add_argument("--drift", type=float, default=0.0, help="share by which losses shrink from batch to batch")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    torch.manual_seed(arguments.seed)
    populations = [from_file(arguments.losses)] if arguments.losses else [exponential(), log_normal()]
    if not arguments.json:
        print(
            "population   level     B alpha     CVaR   bias %        first order  leak %  weight",
            " " * 14 + "by u / alpha",
        )
        print(" " * 83 + " ".join(f"{edge:5}" for edge in EDGES[:-1]))
    table = []
    cells = itertools.product(populations, arguments.batch_sizes, arguments.alphas, ("batch", "set"))
    for population, size, alpha, level in cells:
        if level == "batch":
            drawn, measured = size, batch_level(population, size, alpha, arguments.draws)
        else:
            drawn, measured = WINDOW * size, set_level(population, size, alpha, arguments.draws, arguments.drift)
        slope = population.density(alpha) if population.density else None
        first = -100 * (1 - alpha) / (2 * drawn * slope) / measured["cvar"] if slope else None
        row = {"population": population.name, "level": level, "batch_size": size, "alpha": alpha}
        table.append({**row, **measured, "first_order_percent": first})
        if not arguments.json:
            print_row(table[-1])
    if arguments.json:
        print(json.dumps({"draws": arguments.draws, "drift": arguments.drift, "window": WINDOW, "table": table}))


if __name__ == "__main__":
    main()
