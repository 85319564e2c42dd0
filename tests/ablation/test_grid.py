"""What a grid is: axes, presets and lists read, points in order, the base found, and every mistake named."""

from pathlib import Path

import pytest

from affcache.ablation.grid import build_grid, parse_axis
from affcache.ablation.settings import AblateSettings
from affcache.errors import ConfigError
from affcache.settings import as_text


def names(**values: object) -> list[str]:
    return [variant.name for variant in build_grid(AblateSettings(**values))]  # type: ignore[arg-type]


def test_axes_span_a_grid_the_last_one_changing_fastest() -> None:
    grid = build_grid(AblateSettings(vary=("alpha=0.3,1", "rho=0,0.05,0.5"), seeds=4))
    assert [variant.values for variant in grid] == [
        {"alpha": alpha, "rho": rho} for alpha in (0.3, 1.0) for rho in (0.0, 0.05, 0.5)
    ]
    assert grid[4].name == "alpha=1, rho=0.05"
    assert (len(grid), grid.trials, grid.varied) == (6, 24, ["alpha", "rho"])
    fitted = grid.fit_settings(grid[4], seed=2)
    assert (fitted.alpha, fitted.rho, fitted.seed, fitted.dropout) == (1.0, 0.05, 2, 0.6)


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("alpha=0.3, 1", [0.3, 1.0]),
        ("hidden-layers=0,3", [0, 3]),
        ("frames_per_epoch=none,64", [None, 64]),
        ("adaptive=true,FALSE", [True, False]),
        ("head=mlp,linear", ["mlp", "linear"]),
    ],
)
def test_values_take_the_type_of_their_setting(text: str, values: list[object]) -> None:
    name, found = parse_axis(text)
    assert name == text.partition("=")[0].replace("-", "_")
    assert found == values
    assert [type(value) for value in found] == [type(value) for value in values]
    assert parse_axis(f"{name}={','.join(map(as_text, found))}") == (name, values), "as_text is read back"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("alpa=1", r"'alpa' is no setting of fit \(did you mean 'alpha'\?\)"),
        ("alpha", "can't be read. Expected NAME=VALUE"),
        ("alpha=", "can't be read"),
        ("alpha=0.5,half", "alpha is 'half'; expected a number"),
        ("epochs=1.5", "epochs is '1.5'; expected a whole number"),
        ("adaptive=yes", "adaptive is 'yes'; expected true or false"),
        ("alpha=0.5,0.50", "names a value twice"),
        ("seed=1,2", "seeds are varied by --seeds K"),
        ("device=cpu,cuda", "--device is the same for a whole grid"),
    ],
)
def test_an_axis_that_cannot_be_is_named(text: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        parse_axis(text)


def test_a_setting_varied_twice_is_refused() -> None:
    with pytest.raises(ConfigError, match="alpha is varied twice"):
        build_grid(AblateSettings(vary=("alpha=1", "alpha=0.5")))
    with pytest.raises(ConfigError, match="rho is varied twice"):
        build_grid(AblateSettings(preset="rho", vary=("rho=1",)))


def test_nothing_varied_is_refused_and_so_are_preset_and_list_together() -> None:
    with pytest.raises(ConfigError, match="Nothing is varied"):
        build_grid(AblateSettings())
    with pytest.raises(ConfigError, match="both given"):
        AblateSettings(preset="paper", list=Path("x.toml"))


def test_a_value_out_of_range_names_the_setting() -> None:
    grid = build_grid(AblateSettings(vary=("alpha=0.5,2",)))
    with pytest.raises(ConfigError, match=r"Setting alpha=2 of the grid can't be trained: --alpha is 2.0; expected"):
        grid.fit_settings(grid[1], 0)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"task": "va", "vary": ("focal_gamma=0,2",)},
            "focal_gamma=2 of the grid can't be trained: --focal-gamma",
        ),
        ({"task": "expr", "vary": ("auc_weight=0,0.2",)}, "expr has no AUC term, only units have"),
        (
            {"task": "au", "head": "ridge", "vary": ("class_weights=none,balanced",)},
            "one ridge solves for all 12 units",
        ),
        ({"vary": ("loss=cross_entropy,hinge",)}, "loss=hinge of .*: --loss 'hinge' is no loss of task expr"),
        ({"vary": ("task=expr,aus",)}, "task=aus of the grid can't be trained: --task 'aus' is unknown"),
        ({"vary": ("head=mlp,tree",)}, "head=tree of the grid can't be trained: --head 'tree' is unknown"),
    ],
)
def test_a_value_that_task_loss_or_head_have_no_use_for_names_the_setting(
    values: dict[str, object], message: str
) -> None:
    grid = build_grid(AblateSettings(**values))  # type: ignore[arg-type]
    grid.fit_settings(grid[0], 0)
    with pytest.raises(ConfigError, match=message):
        grid.fit_settings(grid[1], 0)


def test_the_paper_preset_crosses_losses_with_sharpness() -> None:
    assert names(preset="paper") == ["erm", "erm+sam", "cvar", "cvar+sam"]
    grid = build_grid(AblateSettings(preset="paper", task="au"))
    assert [variant.name for variant in grid][4:] == ["cvar+auc", "cvar+auc+sam"]
    assert grid[5].values == {"alpha": 0.5, "rho": 0.5, "auc_weight": 0.2}
    assert grid[2].values == {"alpha": 0.5, "rho": 0.0, "auc_weight": 0.0}
    assert grid.base_index() == 0
    for variant in grid:
        grid.fit_settings(variant, 0)


def test_presets_take_the_recipes_own_values() -> None:
    grid = build_grid(AblateSettings(preset="paper", alpha=0.2, rho=0.1, epochs=3))
    assert grid[3].values == {"alpha": 0.2, "rho": 0.1}
    assert grid.fit_settings(grid[3], 0).epochs == 3
    off = build_grid(AblateSettings(preset="paper", alpha=1.0, rho=0.0))
    assert off[3].values == {"alpha": 0.5, "rho": 0.5}


@pytest.mark.parametrize(("preset", "base", "count"), [("alpha", "alpha=1", 10), ("rho", "rho=0", 9)])
def test_presets_of_one_setting_compare_with_its_absence(preset: str, base: str, count: int) -> None:
    grid = build_grid(AblateSettings(preset=preset))
    assert len(grid) == count
    assert grid[grid.base_index()].name == base


def test_a_list_names_its_settings(tmp_path: Path) -> None:
    file = tmp_path / "settings.toml"
    file.write_text('[plain]\nalpha = 1\nrho = 0\n["focal loss"]\nfocal_gamma = 2\nadaptive = true\n')
    grid = build_grid(AblateSettings(list=file, vary=("lr=0.001,0.01",)))
    assert [variant.name for variant in grid] == [
        "plain, lr=0.001", "plain, lr=0.01", "focal loss, lr=0.001", "focal loss, lr=0.01",
    ]  # fmt: skip
    assert grid.varied == ["alpha", "rho", "focal_gamma", "adaptive", "lr"]
    assert grid[3].values == {"alpha": 0.5, "rho": 0.5, "focal_gamma": 2.0, "adaptive": True, "lr": 0.01}, (
        "what a table leaves out is the recipe's"
    )


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[a]\nalpa = 1", r"\[a\]: 'alpa' is no setting of fit"),
        ("[a]\nalpha = 'much'", r"\[a\]: alpha is 'much'; expected a number"),
        ("alpha = 1", "alpha outside of any table"),
        ("", "no table"),
        ("[a", "can't be read"),
    ],
)
def test_a_list_with_a_mistake_says_where(tmp_path: Path, content: str, message: str) -> None:
    file = tmp_path / "settings.toml"
    file.write_text(content)
    with pytest.raises(ConfigError, match=message):
        build_grid(AblateSettings(list=file))
    with pytest.raises(ConfigError, match="can't be read"):
        build_grid(AblateSettings(list=tmp_path / "missing.toml"))


def test_stores_are_an_axis() -> None:
    grid = build_grid(AblateSettings(vary=("rho=0,1", "store=a.h5, b/b.h5 ,a.h5+b/b.h5")))
    a, b = Path("a.h5"), Path("b/b.h5")
    of_name = {"a": (a,), "b": (b,), "a+b": (a, b)}
    assert [(variant.name, variant.store) for variant in grid] == [
        (f"rho={rho}, {name}", stores) for rho in (0, 1) for name, stores in of_name.items()
    ]
    assert grid.words == ["rho", "stores"]
    assert build_grid(AblateSettings(vary=("store=x/a.h5,y/a.h5",))).store_names == ["x/a.h5", "y/a.h5"]
    side_by_side = build_grid(AblateSettings(vary=("rho=0,1",), store=(a, b)))
    assert [variant.store for variant in side_by_side] == [(a, b)] * 2
    assert [variant.name for variant in side_by_side] == ["rho=0", "rho=1"]
    for wrong in ("store=a.h5,a.h5", "store=a.h5,,b.h5", "store="):
        with pytest.raises(ConfigError, match=r"can't be read. Expected stores, each once"):
            build_grid(AblateSettings(vary=(wrong,)))
    with pytest.raises(ConfigError, match="--vary store is given twice"):
        AblateSettings(vary=("store=a.h5", "store=b.h5"))


def test_a_store_with_a_plus_in_its_name_is_one(tmp_path: Path) -> None:
    (tmp_path / "a+b.h5").touch()
    (variant,) = build_grid(AblateSettings(vary=(f"store={tmp_path}/a+b.h5",)))
    assert variant.store == (tmp_path / "a+b.h5",)


@pytest.mark.parametrize(
    ("values", "base"),
    [
        ({"vary": ("alpha=0.3,0.5,1",)}, "alpha=0.5"),  # the recipe's
        ({"vary": ("alpha=0.3,1",)}, "alpha=0.3"),  # it isn't there
        ({"vary": ("alpha=0.3,1", "rho=0,0.5"), "base": "alpha=1"}, "alpha=1, rho=0"),
        ({"vary": ("alpha=0.3,1", "rho=0,0.5"), "base": "rho=0.5, alpha=1"}, "alpha=1, rho=0.5"),
        ({"preset": "paper", "base": "cvar"}, "cvar"),
    ],
)
def test_the_base_is_named_or_the_recipe_or_the_first(values: dict[str, object], base: str) -> None:
    grid = build_grid(AblateSettings(**values))  # type: ignore[arg-type]
    assert grid[grid.base_index()].name == base


@pytest.mark.parametrize(
    ("base", "message"),
    [("cvarr", r"which no setting is called \(did you mean 'cvar'\?\)"), ("alpha=0.7", "no setting of the grid has")],
)
def test_a_base_that_is_not_there_is_named(base: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_grid(AblateSettings(preset="paper", base=base)).base_index()


def test_a_grid_of_millions_is_made_point_by_point() -> None:
    many = ",".join(str(1 + i) for i in range(1000))
    grid = build_grid(AblateSettings(vary=(f"rho={many}", f"epochs={many}")))
    assert len(grid) == 1_000_000
    assert grid[999_999].values == {"rho": 1000.0, "epochs": 1000}
    assert grid[1_001].values == {"rho": 2.0, "epochs": 2}
    with pytest.raises(IndexError):
        grid[1_000_000]
