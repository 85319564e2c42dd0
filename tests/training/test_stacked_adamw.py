"""AdamW over rows of one buffer is torch's AdamW over heads apart."""

import torch

from affcache.training.stacked.parts import StackedAdamW, load_moments, moments_of


def test_each_row_follows_its_own_rate_and_decay() -> None:
    generator = torch.Generator().manual_seed(0)
    together = torch.randn(3, 21, generator=generator, dtype=torch.float64)
    gradients = torch.empty_like(together)
    rates, decays = [0.1, 0.01, 0.0], [0.0, 0.5, 0.1]
    apart = [torch.nn.Parameter(row.clone()) for row in together]
    alone = [
        torch.optim.AdamW([p], lr=lr, weight_decay=decay) for p, lr, decay in zip(apart, rates, decays, strict=True)
    ]
    optimiser = StackedAdamW(together, gradients, rates, decays)
    for step in range(20):
        gradients.copy_(torch.randn(3, 21, generator=generator, dtype=torch.float64))
        if step == 10:
            rates = [0.02, 0.03, 0.04]
            optimiser.set_rates(rates)
        for parameter, gradient, each, rate in zip(apart, gradients, alone, rates, strict=True):
            parameter.grad = gradient.clone()
            each.param_groups[0]["lr"] = rate
            each.step()
        optimiser.step()
    torch.testing.assert_close(together, torch.stack([p.detach() for p in apart]), rtol=0, atol=1e-12)


def test_its_state_goes_on_to_the_bit() -> None:
    generator = torch.Generator().manual_seed(1)
    start, steps = torch.randn(2, 33, generator=generator), torch.randn(6, 2, 33, generator=generator)
    whole, gradients = start.clone(), torch.empty_like(start)
    optimiser = StackedAdamW(whole, gradients, [0.1, 0.2], [0.0, 0.1])
    for step in steps:
        gradients.copy_(step)
        optimiser.step()
    half, other_gradients = start.clone(), torch.empty_like(start)
    first = StackedAdamW(half, other_gradients, [0.1, 0.2], [0.0, 0.1])
    for step in steps[:3]:
        other_gradients.copy_(step)
        first.step()
    second = StackedAdamW(half, other_gradients, [0.1, 0.2], [0.0, 0.1])
    load_moments(second.adamw, {name: tensor.clone() for name, tensor in moments_of(first.adamw).items()})
    for step in steps[3:]:
        other_gradients.copy_(step)
        second.step()
    assert half.equal(whole)
    names = ("step", "exp_avg", "exp_avg_sq")
    assert set(moments_of(second.adamw)) == {f"{head}.{name}" for head in (0, 1) for name in names}
