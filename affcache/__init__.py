"""affcache: encode face crops once with a frozen CLIP, then train and score facial affect heads in minutes.

    affcache.extract(crops=(folder,), store="faces.h5")        # crops -> embedding store, once
    affcache.fit(task="expr", store="faces.h5", run="runs/a")  # store + labels -> a run folder
    affcache.ablate(task="expr", store="faces.h5", vary={"alpha": [0.5, 1]})  # a grid off one read of the store
    affcache.score(run="runs/a")                               # run -> metrics and files

Names load on first use, so that ``import affcache`` and ``affcache --help`` don't wait for torch.
"""

import lazy_loader

__version__ = "0.1.0"
__getattr__, _names, __all__ = lazy_loader.attach_stub(__name__, __file__)  # the stub lists the names, once


def __dir__() -> list[str]:
    return sorted([*__all__, "__version__"])
