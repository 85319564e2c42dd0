"""A stand-in for the training loop of the published code of arXiv 2403.09915: the peer to measure ``fit`` against.

Written from the paper's mathematics; nothing is copied, and affcache's own head, losses and optimiser stay out. Each
row opens the HDF5 file anew, CVaR's threshold is searched for, and every part is torch's or scipy's own.
"""

import itertools
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import h5py
import numpy as np
import numpy.typing as npt
import torch
from scipy import optimize
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

DATASET = "train_features"
SET_BY_AFFCACHE = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")  # environment of the command line, cli/app.py
# runs this file alone: benchmarks/__init__.py would set it
RUN = "import runpy, sys; runpy.run_path(sys.argv.pop(1), run_name='__main__')"
SEARCH_MARGIN = 1000.0  # beyond the losses, on either side; a search is 15 to 46 evaluations


def write_reference_file(path: Path, features: npt.NDArray[np.float16] | npt.NDArray[np.float32]) -> None:
    """Write features (n, D), float16 or float32, as the loop reads them: one contiguous dataset in an HDF5 file."""
    with h5py.File(path, "w") as file:
        file.create_dataset(DATASET, data=features)


class RowFile(Dataset[tuple[Tensor, Tensor]]):
    """Rows of an HDF5 file with their labels; the file is opened for every single row."""

    def __init__(self, path: Path, labels: Tensor) -> None:
        self.path = path
        self.labels = labels  # (n,) int64

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        """Return one row, a float32 tensor (D,), and its label, an int64 scalar."""
        with h5py.File(self.path, "r") as file:
            row = file[DATASET][index]
        return torch.from_numpy(row).float(), self.labels[index]


class ReferenceHead(nn.Module):
    """Three hidden layers of (Linear, BatchNorm, ReLU, Dropout), 768 wide, and a Linear to C logits."""

    def __init__(self, inputs: int, outputs: int, dropout: float) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for width in (inputs, 768, 768):
            modules += [nn.Linear(width, 768), nn.BatchNorm1d(768), nn.ReLU(), nn.Dropout(dropout)]
        self.layers = nn.Sequential(*modules)
        self.output_layer = nn.Linear(768, outputs)
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.kaiming_uniform_(module.weight, nonlinearity="relu")

    def forward(self, embeddings: Tensor) -> Tensor:
        """Return logits (B, C) for float32 embeddings (B, D)."""
        return self.output_layer(self.layers(embeddings))


def objective(losses: Tensor, threshold: float, alpha: float) -> Tensor:
    """Return ``t + mean(relu(losses - t)) / alpha``, a scalar; its minimum over t is the CVaR of losses (n,)."""
    return threshold + torch.relu(losses - threshold).mean() / alpha


def find_threshold(losses: Tensor, alpha: float) -> float:
    """Return the threshold of CVaR for losses (n,), found by bounded scalar minimisation; correct to about 1e-5."""
    values = losses.detach()
    low, high = values.min().item() - SEARCH_MARGIN, values.max().item() + SEARCH_MARGIN
    return float(optimize.fminbound(lambda threshold: objective(values, float(threshold), alpha).item(), low, high))


class ReferenceLoop:
    """Steps of SAM over AdamW on the CVaR of cross-entropies, as the published code takes them.

    Args:
        path: a file that ``write_reference_file`` wrote, of features (n, D).
        labels: int64 tensor (n,), each in [0, outputs).
        outputs: C, the number of classes.
        batch_size: rows of a step; what remains at the end of an epoch is left out, so that all steps cost the same.
        alpha: of CVaR, in (0, 1].
        rho: the radius of SAM's perturbation.
        dropout: after each hidden layer, in [0, 1).
        order: int tensor (m,) of rows to take instead of shuffling; when it is used up, it begins again.
        start: parameters and buffers to begin with, under the names of ``ReferenceHead``; otherwise random ones.
        seed: of the initial parameters and of shuffling. Dropout draws from torch's global generator.
        device: where the head lies; batches are copied to it.

    Raises:
        ValueError: fewer rows than one batch.
    """

    def __init__(
        self,
        path: Path,
        labels: Tensor,
        outputs: int,
        *,
        batch_size: int = 32,
        alpha: float = 0.5,
        rho: float = 0.5,
        dropout: float = 0.6,
        order: Tensor | None = None,
        start: Mapping[str, Tensor] | None = None,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ) -> None:
        rows = len(labels) if order is None else len(order)
        if rows < batch_size:
            raise ValueError(f"{rows} rows; expected at least one batch of {batch_size}")
        self.alpha, self.rho, self.device = alpha, rho, torch.device(device)
        self.loader = DataLoader(
            RowFile(path, labels),
            batch_size,
            shuffle=order is None,
            sampler=None if order is None else order.tolist(),
            num_workers=0,
            drop_last=True,
            generator=torch.Generator().manual_seed(seed),
        )
        with h5py.File(path, "r") as file:
            width = file[DATASET].shape[1]
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self.head = ReferenceHead(width, outputs, dropout)
        if start is not None:
            self.head.load_state_dict(start)
        self.head.to(self.device)
        self.parameters = list(self.head.parameters())
        self.base = torch.optim.AdamW(self.parameters, lr=1e-3, weight_decay=1e-4)
        self.total_loss = 0.0  # as such loops keep it, for an epoch's mean
        self._batches = (batch for _ in itertools.count() for batch in self.loader)

    def steps(self, count: int) -> list[float]:
        """Take so many steps on the following batches; return the CVaR loss of each one's first pass."""
        self.head.train()
        return [self.step(*next(self._batches)) for _ in range(count)]

    def step(self, embeddings: Tensor, labels: Tensor) -> float:
        """Take one step on embeddings (B, D) float32 and labels (B,) int64; return the loss of the first pass."""
        embeddings, labels = embeddings.to(self.device), labels.to(self.device)
        loss = self._cvar(embeddings, labels)
        loss.backward()
        originals = self._perturb()
        momenta = self._freeze_batch_norm()
        self._cvar(embeddings, labels).backward()
        for layer, momentum in momenta.items():
            layer.momentum = momentum
        for parameter, original in zip(self.parameters, originals, strict=True):
            parameter.data.copy_(original)
        self.base.step()
        self.base.zero_grad()
        self.total_loss += (value := loss.item())
        return value

    def _cvar(self, embeddings: Tensor, labels: Tensor) -> Tensor:
        losses = nn.functional.cross_entropy(self.head(embeddings), labels, reduction="none")  # (B,)
        return objective(losses, find_threshold(losses, self.alpha), self.alpha)

    @torch.no_grad()
    def _perturb(self) -> list[Tensor]:
        """Move the parameters by ``rho`` along the gradient, drop the gradient, and return where they were."""
        gradients = [parameter.grad for parameter in self.parameters if parameter.grad is not None]  # of all of them
        norm = torch.stack([gradient.norm() for gradient in gradients]).norm()
        originals = [parameter.clone() for parameter in self.parameters]
        for parameter, gradient in zip(self.parameters, gradients, strict=True):
            parameter.add_(self.rho * gradient / (norm + 1e-12))
        self.base.zero_grad()
        return originals

    def _freeze_batch_norm(self) -> dict[nn.BatchNorm1d, float | None]:
        """Set BatchNorm's momentum to 0, so that running statistics stay as they are, and return what it was."""
        momenta = {layer: layer.momentum for layer in self.head.modules() if isinstance(layer, nn.BatchNorm1d)}
        for layer in momenta:
            layer.momentum = 0.0
        return momenta


class ReferenceProcess:
    """The loop in a process of its own, as people run it: with torch's own threading, not as ``affcache`` sets it.

    Args:
        path: as ``ReferenceLoop``'s; labels lie beside it, in ``<path>.labels.npy``.
        outputs, batch_size, device: as ``ReferenceLoop``'s.
    """

    def __init__(self, path: Path, outputs: int, batch_size: int, device: torch.device) -> None:
        environment = {name: value for name, value in os.environ.items() if name not in SET_BY_AFFCACHE}
        words = [str(path), str(outputs), str(batch_size), str(device)]
        self._process = subprocess.Popen(
            [sys.executable, "-c", RUN, __file__, *words],
            env={**environment, "PYTHONPATH": os.pathsep.join(sys.path)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def steps(self, count: int) -> None:
        """Take so many steps and wait for them."""
        assert self._process.stdin is not None  # for the type checker
        assert self._process.stdout is not None
        print(count, file=self._process.stdin, flush=True)
        if self._process.stdout.readline().strip() != str(count):
            raise RuntimeError("the published loop's process ended before its steps")

    def close(self) -> None:
        """End the process."""
        self._process.communicate()


def serve() -> None:
    """Take as many steps as each line of standard input says, and say so on standard output."""
    path, outputs, batch_size, device = sys.argv[1:]
    labels = torch.from_numpy(np.load(f"{path}.labels.npy"))
    loop = ReferenceLoop(Path(path), labels, int(outputs), batch_size=int(batch_size), device=device)
    for line in sys.stdin:
        loop.steps(int(line))
        print(int(line), flush=True)


if __name__ == "__main__":
    serve()
