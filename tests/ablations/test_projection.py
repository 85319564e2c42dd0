"""How long a grid will take: in words, and in the right order of magnitude."""

from dataclasses import replace

import pytest
import torch

from affcache.ablations.projection import duration, project, require_asked_for
from affcache.ablations.sources import Source
from affcache.errors import ConfigError
from affcache.listener import Listener
from affcache.settings import AblateSettings, FitSettings
from affcache.tasks import TASKS
from tests.conftest import MakeData


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.4, "0 seconds"), (119, "119 seconds"), (120, "2 minutes"), (7199, "120 minutes"), (9000, "2.5 hours"),
     (86400 * 1.9, "45.6 hours"), (86400 * 1234, "1,234 days")],
)  # fmt: skip
def test_durations_read_well(seconds: float, words: str) -> None:
    assert duration(seconds) == words


def test_a_day_is_the_limit() -> None:
    require_asked_for(10, 86_400, asked=False)
    require_asked_for(10, 1e9, asked=True)
    with pytest.raises(ConfigError, match=r"10 heads to train: about 24.0 hours\. Expected at most a day unless --yes"):
        require_asked_for(10, 86_401, asked=False)


def test_more_epochs_and_frames_take_longer_in_proportion(learnable: MakeData) -> None:
    store, labels = learnable()
    settings = AblateSettings(annotations=labels, preset="paper")
    source = Source.open(store, TASKS["expr"], settings, Listener()).load(torch.device("cpu"), 1.0, Listener())
    recipe = FitSettings(hidden_layers=1, hidden_width=16, batch_size=16, epochs=10)
    one = project([recipe] * 5, source, torch.device("cpu"))
    many = project([replace(recipe, epochs=1000)] * 5, source, torch.device("cpu"))
    assert 20 < many / one < 500, "about a hundred times"
    assert project([replace(recipe, head="ridge")], source, torch.device("cpu")) == 1.0
