"""Settings: ranges, choices, every problem at once, where a store lies unless said otherwise; affcache.toml: flag over
file over default, found above, paths from the file."""

import dataclasses
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from affcache.commands import SETTINGS, store_of
from affcache.config import SHARED_KEYS, ConfigFile, find_config, resolve
from affcache.demonstration import DemoSettings
from affcache.errors import ConfigError
from affcache.extraction.settings import ExtractSettings
from affcache.progress import Listener
from affcache.scoring.settings import ScoreSettings
from affcache.settings import Settings, build, default_store, flag
from affcache.training.settings import FitSettings

# settings classes


@pytest.mark.parametrize(
    ("kind", "name", "value", "expected"),
    [
        (FitSettings, "epochs", 0, "at least 1"),
        (FitSettings, "hidden_width", 0, "at least 1"),
        (FitSettings, "batch_size", 1, "at least 2"),
        (FitSettings, "lr", 0, "more than 0"),
        (FitSettings, "lr", math.nan, "more than 0"),
        (FitSettings, "lr_half_period", 0.0, "more than 0"),
        (FitSettings, "lr_minimum", -1e-9, "at least 0"),
        (FitSettings, "lr", 1e-6, "at least that"),
        (FitSettings, "weight_decay", -1, "at least 0"),
        (FitSettings, "weight_decay", math.inf, "at least 0 and less than inf"),
        (FitSettings, "hidden_width", 10**9, "at most 16384"),
        (FitSettings, "batch_size", 10**20, "at most 2147483648"),
        (FitSettings, "stride", 10**20, "at most 2147483648"),
        (FitSettings, "seed", 10**20, "at least 0 and less than"),
        (FitSettings, "rho", -0.1, "at least 0"),
        (FitSettings, "hidden_layers", -1, "at least 0"),
        (FitSettings, "seed", -1, "at least 0"),
        (FitSettings, "alpha", 0, "more than 0 and at most 1"),
        (FitSettings, "alpha", 1.1, "more than 0 and at most 1"),
        (FitSettings, "alpha", math.nan, "more than 0 and at most 1"),
        (FitSettings, "dropout", 1, "at least 0 and less than 1"),
        (FitSettings, "dropout", -0.1, "at least 0 and less than 1"),
        (FitSettings, "normalize", "L2", "one of none, l2"),
        (ScoreSettings, "split", "test", "one of validation, train"),
        (ExtractSettings, "precision", "fp64", "one of auto, fp32, bf16, fp16"),
        (ExtractSettings, "activation", "relu", "one of auto, quick_gelu, gelu"),
        (ExtractSettings, "batch_size", 0, "at least 1"),
        (ExtractSettings, "workers", 0, "at least 1"),
        (ExtractSettings, "crops", (), "at least one folder"),
    ],
)
def test_values_out_of_range_are_refused_by_flag(kind: type[Settings], name: str, value: Any, expected: str) -> None:
    with pytest.raises(ConfigError) as caught:
        kind(**{name: value})
    message = str(caught.value)
    assert message.startswith(f"{flag(name)} is ")
    assert f"expected {expected}" in message
    assert "\n" not in message


@pytest.mark.parametrize(
    "values",
    [{"alpha": 1}, {"alpha": 1e-6}, {"rho": 0}, {"dropout": 0}, {"hidden_layers": 0}, {"lr_minimum": 0}, {"epochs": 1},
     {"batch_size": 2}, {"weight_decay": 0}],
)  # fmt: skip
def test_the_ends_of_the_ranges_are_fine(values: dict[str, Any]) -> None:
    settings = FitSettings(**values)
    assert {name: getattr(settings, name) for name in values} == values


def test_every_problem_is_reported_at_once() -> None:
    with pytest.raises(ConfigError) as caught:
        FitSettings(epochs=0, alpha=2, dropout=1.5, normalize="max", resume=True)
    lines = str(caught.value).splitlines()
    assert [line.split()[0] for line in lines] == ["--normalize", "--epochs", "--alpha", "--dropout", "--resume"]


@pytest.mark.parametrize("kind", SETTINGS.values())
def test_every_field_has_a_sentence_and_a_default_that_holds(kind: type[Settings]) -> None:
    settings = kind()
    for declared in dataclasses.fields(settings):
        sentence = declared.metadata["help"]
        assert sentence.endswith((".", "..."))
        if declared.default is None:
            assert declared.metadata["default_text"], f"{declared.name}: None needs words"
    with pytest.raises(dataclasses.FrozenInstanceError):
        settings.seed = 3
    assert (kind.__doc__ or "").strip()


def test_the_defaults_are_the_recipe_paper() -> None:
    recipe = FitSettings()
    assert (recipe.hidden_layers, recipe.hidden_width, recipe.dropout) == (3, 768, 0.6)
    assert (recipe.lr, recipe.weight_decay, recipe.rho) == (1e-3, 1e-4, 0.5)
    assert (recipe.lr_minimum, recipe.lr_half_period) == (1e-5, 0.25)
    assert (recipe.batch_size, recipe.epochs, recipe.alpha) == (32, 32, 0.5)
    assert recipe.normalize == "none"


@pytest.mark.parametrize(
    ("model", "pretrained", "name"),
    [
        ("ViT-L-14", "openai", "ViT-L-14-openai.h5"),
        ("ViT-B-32", "laion2b_s34b_b79k", "ViT-B-32-laion2b_s34b_b79k.h5"),
        ("ViT-B-32", "weights/my-clip.pt", "ViT-B-32-my-clip.h5"),
        ("ViT-B-32", "", "ViT-B-32.h5"),
        ("ViT-B-32", "random:0", "ViT-B-32-random-0.h5"),
        ("hf-hub:owner/some-model", "openai", "some-model.h5"),
        ("local-dir:../shared/real/encoder", "openai", "encoder.h5"),
        ("local-dir:models/tiny/", "", "tiny.h5"),
        ("local-dir:models/tiny", "random:3", "tiny-random-3.h5"),
        ("ViT/weird:name", "a/b", "ViT-weird-name-a-b.h5"),
        ("timm:vit_small_patch14_dinov2.lvd142m", "openai", "timm-vit_small_patch14_dinov2.lvd142m.h5"),
        ("timm:convnext_atto", "random:0", "timm-convnext_atto-random-0.h5"),
        ("timm:convnext_atto.d2_in1k", "weights/own.pth", "timm-convnext_atto.d2_in1k-own.h5"),
        ("onnx:models/enc.onnx", "openai", "onnx-enc.h5"),
        ("onnx:models/enc.onnx#pooled", "", "onnx-enc-pooled.h5"),
        ("python:my.encoder:build", "openai", "python-my.encoder-build.h5"),
    ],
)
def test_the_default_store_is_named_after_the_encoder(model: str, pretrained: str, name: str) -> None:
    assert default_store(model, pretrained) == Path("data/features") / name


def test_the_bare_default_store_is_clips() -> None:
    assert default_store() == Path("data/features/ViT-L-14-openai.h5")
    assert default_store(image_size=336, every=5) == Path("data/features/ViT-L-14-openai-336px-every-5.h5")


# affcache.toml

Toml = Callable[[str], ConfigFile]


@pytest.fixture
def toml(tmp_path: Path) -> Toml:
    """Write an affcache.toml and read it."""

    def read(text: str) -> ConfigFile:
        (tmp_path / "affcache.toml").write_text(text, encoding="utf-8")
        return find_config(tmp_path, SETTINGS)

    return read


def refused(toml: Toml, text: str) -> str:
    with pytest.raises(ConfigError) as caught:
        toml(text)
    return str(caught.value)


def test_flag_over_file_over_default(toml: Toml) -> None:
    config = toml("[fit]\nepochs = 5\nalpha = 0.3\nresume = false\n")
    settings = resolve(FitSettings, "fit", {"alpha": 0.7, "rho": None}, config)
    assert (settings.alpha, settings.epochs, settings.rho) == (0.7, 5, 0.5)


@given(st.sets(st.sampled_from(["epochs", "batch_size", "seed"])), st.sets(st.sampled_from(["epochs", "seed"])))
def test_any_mixture_of_sources_resolves_by_rank(in_file: set[str], as_flag: set[str]) -> None:
    config = ConfigFile(None, {"fit": dict.fromkeys(in_file, 11)})
    settings = resolve(FitSettings, "fit", dict.fromkeys(as_flag, 22), config)
    default = FitSettings()
    for name in ("epochs", "batch_size", "seed"):
        expected = 22 if name in as_flag else 11 if name in in_file else getattr(default, name)
        assert getattr(settings, name) == expected


def test_the_nearest_file_above_is_read(tmp_path: Path) -> None:
    below = tmp_path / "a" / "b"
    below.mkdir(parents=True)
    (tmp_path / "affcache.toml").write_text("seed = 1\n")
    assert find_config(below, SETTINGS).path == tmp_path / "affcache.toml"
    (tmp_path / "a" / "affcache.toml").write_text("seed = 2\n")
    config = find_config(below, SETTINGS)
    assert config.path == tmp_path / "a" / "affcache.toml"
    assert config.of("fit")["seed"] == 2


def test_relative_paths_are_relative_to_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    absolute = tmp_path / "elsewhere" / "x.h5"
    (tmp_path / "affcache.toml").write_text(
        f"annotations = 'labels'\ncrops = ['a', 'b']\n[fit]\nrun = 'runs/x'\nstore = '{absolute.as_posix()}'\n"
    )
    below = tmp_path / "below"
    below.mkdir()
    monkeypatch.chdir(below)
    config = find_config(Path.cwd(), SETTINGS)
    settings = resolve(FitSettings, "fit", {}, config)
    assert settings.annotations == tmp_path / "labels"
    assert settings.run == tmp_path / "runs" / "x"
    assert settings.store == (absolute,)
    assert resolve(ExtractSettings, "extract", {}, config).crops == (tmp_path / "a", tmp_path / "b")


@pytest.mark.parametrize(
    ("name", "text", "expected"),
    [
        ("model", "local-dir:enc", "local-dir:{folder}/enc"),
        ("model", "local-dir:~/enc", "local-dir:{home}/enc"),
        ("model", "hf-hub:a/b", "hf-hub:a/b"),
        ("model", "onnx:enc.onnx#pooled", "onnx:{folder}/enc.onnx#pooled"),
        ("model", "timm:convnext_atto.d2_in1k", "timm:convnext_atto.d2_in1k"),
        ("model", "python:my.encoder:build", "python:my.encoder:build"),
        ("model", "ViT-B-32", "ViT-B-32"),
        ("pretrained", "weights.pt", "{folder}/weights.pt"),
        ("pretrained", "~/in/weights", "{home}/in/weights"),
        ("pretrained", "openai:a/weights.pt", "openai:{folder}/a/weights.pt"),
        ("pretrained", "laion2b_s34b_b79k", "laion2b_s34b_b79k"),
        ("pretrained", "random:0", "random:0"),
    ],
)
def test_paths_in_model_and_pretrained_are_taken_as_paths_are(
    toml: Toml, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, text: str, expected: str
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = resolve(ExtractSettings, "extract", {}, toml(f"{name} = '{text}'"))
    assert getattr(found, name) == expected.format(folder=tmp_path, home=tmp_path / "home")
    given = build(ExtractSettings, {name: text})
    assert getattr(given, name) == expected.format(folder=".", home=tmp_path / "home").replace("./", "")


@pytest.mark.parametrize("text", ["crops = ['~nosuchuser/x']", "model = 'local-dir:~nosuchuser/x'"])
def test_a_home_folder_that_is_not_there_is_a_named_error(toml: Toml, text: str) -> None:
    assert "expected a path; ~ names the home folder of a user who isn't there" in refused(toml, text)


def test_shared_keys_count_for_every_command_that_has_them(toml: Toml, tmp_path: Path) -> None:
    config = toml(
        "crops = 'c'\nannotations = 'l'\nstore = 's.h5'\nmodel = 'ViT-B-32'\npretrained = 'openai'\n"
        "device = 'cpu'\nseed = 9\n"
    )
    extract = resolve(ExtractSettings, "extract", {}, config)
    assert extract.crops == (tmp_path / "c",), "one folder needs no list"
    assert (extract.store, extract.model, extract.device) == (tmp_path / "s.h5", "ViT-B-32", "cpu")
    fit = resolve(FitSettings, "fit", {}, config)
    assert (fit.store, fit.annotations, fit.seed) == ((tmp_path / "s.h5",), tmp_path / "l", 9)
    score = resolve(ScoreSettings, "score", {}, config)
    assert (score.device, score.store, score.annotations) == ("cpu", (), None), "the run says what it is scored on"
    assert resolve(DemoSettings, "demo", {}, config) == DemoSettings(), "the demo brings its own data"
    known = {f.name for kind in SETTINGS.values() for f in dataclasses.fields(kind)}
    assert known >= set(SHARED_KEYS)


def test_a_commands_table_wins_over_shared_keys(toml: Toml, tmp_path: Path) -> None:
    config = toml("store = 'shared.h5'\nseed = 1\n[fit]\nstore = 'mine.h5'\nseed = 2\n")
    assert resolve(FitSettings, "fit", {}, config).store == (tmp_path / "mine.h5",)
    assert resolve(FitSettings, "fit", {}, config).seed == 2
    assert resolve(ExtractSettings, "extract", {}, config).store == tmp_path / "shared.h5"


@pytest.mark.parametrize(
    ("text", "store"),
    [
        ("", "data/features/ViT-L-14-openai.h5"),
        ("model = 'ViT-B-32'", "data/features/ViT-B-32-openai.h5"),
        ("model = 'ViT-B-32'\n[extract]\npretrained = 'laion400m_e32'", "data/features/ViT-B-32-laion400m_e32.h5"),
    ],
)
def test_the_store_is_the_one_that_extract_would_write(toml: Toml, text: str, store: str) -> None:
    assert store_of(toml(text), Listener()) == Path(store)


def test_a_named_store_of_extract_is_taken(toml: Toml, tmp_path: Path) -> None:
    assert store_of(toml("[extract]\nstore = 'x.h5'"), Listener()) == tmp_path / "x.h5"


def test_no_file_is_no_settings(tmp_path: Path) -> None:
    config = ConfigFile()
    assert config.of("fit") == {}
    assert store_of(config, Listener()) == Path("data/features/ViT-L-14-openai.h5")
    assert resolve(FitSettings, "fit", {}, config) == FitSettings()


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("stor = 'x'", "unknown key 'stor' (did you mean 'store'?)"),
        ("[fit]\nepoch = 3", "unknown key 'epoch' in [fit] (did you mean 'epochs'?)"),
        ("[fits]\nepochs = 3", "unknown table [fits] (did you mean 'fit'?)"),
        ("[fit]\nxyzzy = 3", "unknown key 'xyzzy' in [fit]"),
        ("epochs = 3", "unknown key 'epochs'"),
        ("[fit]\nepochs = '3'", "epochs is '3', expected a whole number"),
        ("[fit]\nepochs = 3.0", "epochs is 3.0, expected a whole number"),
        ("[fit]\nepochs = true", "epochs is True, expected a whole number"),
        ("[fit]\nlr = 'fast'", "lr is 'fast', expected a number"),
        ("[fit]\nlr = false", "lr is False, expected a number"),
        ("[fit]\nresume = 1", "resume is 1, expected true or false"),
        ("[fit]\ntask = 3", "task is 3, expected a text"),
        ("annotations = 7", "annotations is 7, expected a path"),
        ("crops = ['a', 7]", "crops is ['a', 7], expected a path"),
        ("[extract]\nbatch_size = 'x'", "batch_size is 'x', expected a whole number"),
    ],
)
def test_unknown_keys_and_wrong_types_are_refused(toml: Toml, tmp_path: Path, text: str, problem: str) -> None:
    message = refused(toml, text)
    assert message.startswith(f"{tmp_path / 'affcache.toml'}: {problem}")
    assert message.count(problem) == 1, "a shared key is complained of once"
    assert "Expected tables [faces], [extract], [fit], [score]" in message
    assert "'affcache COMMAND --help'" in message


def test_all_problems_are_reported_at_once(toml: Toml) -> None:
    message = refused(toml, "stor = 'x'\nseed = 'y'\n[fit]\nepoch = 3\nlr = 'z'\n[nothing]\na = 1\n")
    for problem in ("'stor'", "seed is 'y'", "'epoch' in [fit]", "lr is 'z'", "[nothing]"):
        assert problem in message


def test_values_out_of_range_in_the_file_are_refused_when_used(toml: Toml) -> None:
    config = toml("[fit]\nepochs = 0\nalpha = 2\n")
    with pytest.raises(ConfigError, match=r"--epochs is 0; expected at least 1\.\n--alpha is 2\.0"):
        resolve(FitSettings, "fit", {}, config)
    assert resolve(FitSettings, "fit", {"epochs": 1, "alpha": 1.0}, config).epochs == 1


@pytest.mark.parametrize("text", ["[fit", "epochs = ", "a = 1\na = 2"])
def test_no_toml_is_a_named_error(toml: Toml, text: str) -> None:
    assert "is not valid TOML" in refused(toml, text)


def test_a_file_in_another_encoding_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "affcache.toml").write_bytes("task = 'é'".encode("latin-1"))
    with pytest.raises(ConfigError, match="is not valid TOML"):
        find_config(tmp_path, SETTINGS)


def test_whole_numbers_are_fine_where_a_fraction_may_stand(toml: Toml) -> None:
    config = toml("[fit]\nlr = 1\n")
    lr: Any = resolve(FitSettings, "fit", {}, config).lr
    assert (lr, type(lr)) == (1.0, float)


def test_build_takes_what_python_gives_and_names_what_it_cannot() -> None:
    settings = build(FitSettings, {"store": "x.h5", "annotations": Path("labels"), "run": None, "lr": 1})
    assert (settings.store, settings.annotations, settings.run) == ((Path("x.h5"),), Path("labels"), None)
    assert build(ExtractSettings, {"crops": ("a", Path("b"))}).crops == (Path("a"), Path("b"))
    assert build(ExtractSettings, {"crops": "a"}).crops == (Path("a"),)
    with pytest.raises(ConfigError) as caught:
        build(FitSettings, {"epochs": "3", "task": None, "alpha": 0.5})
    assert str(caught.value) == "epochs is '3', expected a whole number.\ntask is None, expected a text."


def test_build_names_unknown_settings() -> None:
    with pytest.raises(ConfigError) as caught:
        build(FitSettings, {"epoch": 3, "learning": 1, "rho": 0.1})
    message = str(caught.value)
    assert "Unknown setting 'epoch' (did you mean 'epochs'?)." in message
    assert "Unknown setting 'learning'" in message
    assert "Expected some of: task, annotations," in message
    assert "'rho'" not in message


def test_a_command_name_must_be_a_table(toml: Toml) -> None:
    with pytest.raises(ConfigError, match=r"fit is 3, expected a table \[fit\]"):
        toml("fit = 3\n")


def test_settings_objects_take_paths_as_text_and_nothing_else_is_taken_for_settings() -> None:
    settings = build(FitSettings, {"rho": 0.1}, over=FitSettings(task="au", store="a.h5"))  # type: ignore[arg-type]
    assert (settings.task, settings.store, settings.rho) == ("au", (Path("a.h5"),), 0.1)
    with pytest.raises(ConfigError, match=r"'my/faces' was given as settings. Expected ExtractSettings"):
        build(ExtractSettings, {}, over="my/faces")  # type: ignore[type-var]


def test_a_key_that_belongs_in_a_table_is_told_so(toml: Toml) -> None:
    with pytest.raises(ConfigError, match=r"unknown key 'epochs' \(it belongs in \[fit\] or \[ablate\]\)"):
        toml("epochs = 3\n")


def config_of(folder: Path, contents: bytes = b"seed = 7") -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "affcache.toml").write_bytes(contents)
    return folder


def test_a_byte_order_mark_is_fine(tmp_path: Path) -> None:
    assert find_config(config_of(tmp_path, b"\xef\xbb\xbfseed = 7\r\n"), SETTINGS).of("fit")["seed"] == 7


@pytest.mark.parametrize("border", [".git", "home"])
def test_the_search_ends_at_a_repository_and_at_home(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, border: str
) -> None:
    config_of(tmp_path)
    inner = tmp_path / "project" / "deep"
    inner.mkdir(parents=True)
    assert find_config(inner, SETTINGS).path == tmp_path / "affcache.toml"
    if border == "home":
        monkeypatch.setenv("HOME", str(tmp_path / "project"))
    else:
        (tmp_path / "project" / ".git").mkdir()
    assert find_config(inner, SETTINGS) == ConfigFile()
    config_of(tmp_path / "project")
    assert find_config(inner, SETTINGS).path == tmp_path / "project" / "affcache.toml", "that folder counts"


def test_a_file_that_others_could_write_is_passed_over_and_named(tmp_path: Path) -> None:
    inner = config_of(tmp_path / "inner")
    config_of(tmp_path, b"seed = 8")
    (inner / "affcache.toml").chmod(0o666)
    config = find_config(inner, SETTINGS)
    assert config.of("fit")["seed"] == 8
    assert config.foreign == (inner / "affcache.toml",)


def test_what_can_not_be_read_is_a_named_error(tmp_path: Path) -> None:
    (tmp_path / "affcache.toml").symlink_to("affcache.toml")
    with pytest.raises(ConfigError, match=r"affcache\.toml can't be read: Too many levels"):
        find_config(tmp_path, SETTINGS)
    (tmp_path / "affcache.toml").unlink()
    config_of(tmp_path, b"#" * 2**21)
    with pytest.raises(ConfigError, match="of which at most 1,048,576 are read"):
        find_config(tmp_path, SETTINGS)


def test_a_path_with_a_zero_byte_is_none(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected a path"):
        find_config(config_of(tmp_path, b'store = "a\\u0000b"'), SETTINGS)


def test_a_user_without_a_home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def nobody(user: int) -> None:
        raise KeyError(user)

    monkeypatch.delenv("HOME")
    monkeypatch.setattr("pwd.getpwuid", nobody)
    assert find_config(config_of(tmp_path), SETTINGS).of("fit")["seed"] == 7


def test_a_key_of_a_hundred_thousand_parts_is_refused_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a line with more than 200 dots"):
        find_config(config_of(tmp_path, b"a" + b".a" * 100_000 + b"=1\n"), SETTINGS)
