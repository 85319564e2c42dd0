"""How long a grid will take: in words, and in the right order of magnitude."""

from dataclasses import replace

import pytest
import torch

from affcache.ablation.settings import AblateSettings
from affcache.ablation.train import project, require_asked_for
from affcache.ablation.trials import JoinedSplits
from affcache.errors import ConfigError
from affcache.progress import Listener
from affcache.tasks.tasks import TASKS
from affcache.training.settings import FitSettings
from tests.conftest import MakeData


def test_a_day_is_the_limit() -> None:
    require_asked_for(10, 86_400, asked=False)
    require_asked_for(10, 1e9, asked=True)
    with pytest.raises(ConfigError, match=r"10 heads to train: about 24.0 h\. Expected at most a day unless --yes"):
        require_asked_for(10, 86_401, asked=False)


def test_more_epochs_and_frames_take_longer_in_proportion(learnable: MakeData) -> None:
    store, labels = learnable()
    settings = AblateSettings(annotations=labels, preset="paper")
    splits = JoinedSplits.open(store, TASKS["expr"], settings, Listener()).load(torch.device("cpu"), 1.0, Listener())
    recipe = FitSettings(hidden_layers=1, hidden_width=16, batch_size=16, epochs=10)
    one = project([recipe] * 5, splits, torch.device("cpu"))
    many = project([replace(recipe, epochs=1000)] * 5, splits, torch.device("cpu"))
    assert 20 < many / one < 500, "about a hundred times"
    before = torch.get_rng_state()
    project([recipe], splits, torch.device("cpu"))
    assert torch.get_rng_state().equal(before), "the caller's random numbers stay his own"
    assert project([replace(recipe, head="ridge")], splits, torch.device("cpu")) == 1.0
