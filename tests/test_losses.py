"""The losses per frame and the terms of whole batches, against torch, torchvision and their formulas written out."""

import torch

from affcache.losses import binary_cross_entropy, cross_entropy


def test_cross_entropies_equal_their_formulas() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(6, 8, generator=generator, dtype=torch.float64)
    labels = torch.tensor([0, 7, 3, 3, 1, 5])
    probabilities = logits.exp() / logits.exp().sum(dim=1, keepdim=True)
    torch.testing.assert_close(cross_entropy(logits, labels), -probabilities[range(6), labels].log())
    units = (torch.rand(6, 8, generator=generator) < 0.4).long()
    present = 1 / (1 + (-logits).exp())
    expected = -torch.where(units == 1, present, 1 - present).log()
    torch.testing.assert_close(binary_cross_entropy(logits, units), expected)
    assert torch.isfinite(binary_cross_entropy(torch.tensor([[-1e4, 1e4]]), torch.tensor([[1, 0]]))).all()
