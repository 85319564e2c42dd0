"""The head: its parts and their names, its initial weights, its batches."""

import math

import pytest
import torch
from torch import nn

from affcache.training.heads import MLPHead


def test_the_default_is_the_published_head() -> None:
    head = MLPHead(640, 8)
    kinds = [nn.Linear, nn.BatchNorm1d, nn.ReLU, nn.Dropout] * 3
    assert [type(module) for module in head.layers] == kinds
    shapes = [tuple(head.layers[i].weight.shape) for i in (0, 4, 8)]
    assert shapes == [(768, 640), (768, 768), (768, 768)]
    assert {head.layers[i].p for i in (3, 7, 11)} == {0.6}
    assert tuple(head.output_layer.weight.shape) == (8, 768)
    assert [name for name, _ in head.named_children()] == ["layers", "output_layer"]


def test_initial_weights_are_kaiming_uniform_and_biases_as_linear() -> None:
    torch.manual_seed(0)
    head = MLPHead(300, 12, hidden_layers=2, hidden_width=200)
    for linear in (m for m in head.modules() if isinstance(m, nn.Linear)):
        weight, bias = linear.weight.detach(), linear.bias.detach()
        bound = math.sqrt(6 / linear.in_features)
        assert 0.95 * bound < float(weight.abs().max()) <= bound
        assert float(weight.std()) == pytest.approx(bound / math.sqrt(3), rel=0.05)
        assert 0 < float(bias.abs().max()) <= 1 / math.sqrt(linear.in_features)


def test_sizes_follow_the_arguments() -> None:
    head = MLPHead(5, 3, hidden_layers=1, hidden_width=7, dropout=0)
    assert head(torch.zeros(4, 5)).shape == (4, 3)
    assert len(head.layers) == 4
    assert head.layers[3].p == 0


def test_no_hidden_layers_make_a_linear_head() -> None:
    head = MLPHead(5, 3, hidden_layers=0)
    embeddings = torch.randn(4, 5, generator=torch.Generator().manual_seed(0))
    expected = embeddings @ head.output_layer.weight.T + head.output_layer.bias
    torch.testing.assert_close(head(embeddings), expected)
    assert [name for name, _ in head.named_parameters()] == ["output_layer.weight", "output_layer.bias"]


def test_torchs_seed_decides_the_weights() -> None:
    def weights(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return MLPHead(6, 2, hidden_width=4).output_layer.weight.detach()

    assert weights(3).equal(weights(3))
    assert not weights(3).equal(weights(4))


def test_in_evaluation_a_frame_does_not_depend_on_its_batch() -> None:
    head = MLPHead(6, 2, hidden_width=8).eval()
    embeddings = torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(head(embeddings)[2:3], head(embeddings[2:3]))
    head.train()
    assert not head(embeddings)[2:3].allclose(head(embeddings[1:4])[1:2]), "in training it does: BatchNorm, dropout"
