"""``fit --train-on all``: validation's frames train too, for the epoch or the strength that was chosen before."""

import json
from pathlib import Path
from typing import Any

import pytest

import affcache
from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import read_tensors
from affcache.prediction.card import card_of_run
from affcache.scoring.trained import TrainedHead
from affcache.store.reading import EmbeddingStore
from affcache.training.fit import FitResult, fit
from tests.conftest import Heard, MakeData

QUICK: dict[str, Any] = {"epochs": 4, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "dropout": 0.3}


def train(data: tuple[Path, Path], run: Path, **values: Any) -> FitResult:
    return fit(**{**QUICK, "store": data[0], "annotations": data[1], "run": run, **values})


def history(run: Path) -> list[dict[str, Any]]:
    lines = [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if "seconds" not in name} for line in lines]


def in_one_split(data: tuple[Path, Path], folder: Path) -> Path:
    """Return labels whose training split has the files of both, and whose validation split has its own."""
    for path in data[1].rglob("*.txt"):
        for split in {"Train_Set", path.parent.name}:
            copy = folder / path.parent.parent.name / split / path.name
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_text(path.read_text())
    return folder


@pytest.mark.parametrize("task", ["expr", "au", "va"])
@pytest.mark.parametrize("head", ["mlp", "linear"])
def test_it_is_a_run_on_one_split_with_all_frames_stopped_at_that_epoch(
    learnable: MakeData, tmp_path: Path, task: str, head: str
) -> None:
    data, how = learnable(task), {"task": task, "head": head}
    last = train(data, tmp_path / "last", **how, train_on="all", keep_epoch=3)
    whole = train((data[0], in_one_split(data, tmp_path / "one")), tmp_path / "whole", **how)
    assert (last.frames, last.best_epoch, last.epochs) == (whole.frames, 3, 3)
    assert history(tmp_path / "last") == history(tmp_path / "whole")[:3], "the cosine spans all epochs"
    ours, theirs = (read_tensors(tmp_path / name)[0] for name in ("last/head.safetensors", "last/last.safetensors"))
    assert all(ours[name].equal(theirs[f"head.{name}"]) for name in ours), "of that epoch, not of the best"
    stopped = train((data[0], tmp_path / "one"), tmp_path / "stopped", **how, keep_epoch=3)
    again = read_tensors(tmp_path / "stopped" / "head.safetensors")[0]
    assert stopped.value == last.value
    assert all(ours[name].equal(again[name]) for name in ours), "to the bit"


def test_a_ridge_takes_its_strength(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    chosen = train(data, tmp_path / "first", head="ridge")
    strength = history(tmp_path / "first")[chosen.best_epoch - 1]["strength"]
    last = fit(as_=tmp_path / "first", train_on="all", run=tmp_path / "last")
    assert json.loads((tmp_path / "last" / "config.json").read_text())["settings"]["strength"] == strength
    assert last.epochs == 1
    whole = (data[0], in_one_split(data, tmp_path / "one"))
    train(whole, tmp_path / "whole", head="ridge", strength=strength)
    ours, theirs = (read_tensors(tmp_path / name / "head.safetensors")[0] for name in ("last", "whole"))
    assert all(ours[name].equal(theirs[name]) for name in ours)
    assert TrainedHead.open(tmp_path / "last").epoch == 1


def test_the_choice_of_a_run_is_taken(learnable: MakeData, tmp_path: Path) -> None:
    data, heard = learnable(), Heard()
    first = train(data, tmp_path / "first", lr=0.01, held_out=0.3)
    last = fit(as_=tmp_path / "first", train_on="all", run=tmp_path / "last", seed=5, listener=heard)
    settings = json.loads((tmp_path / "last" / "config.json").read_text())["settings"]
    assert settings["keep_epoch"] == last.best_epoch == first.best_epoch
    assert (settings["lr"], settings["seed"], settings["train_on"], settings["held_out"]) == (0.01, 5, "all", 0.3)
    assert "as_" not in settings
    assert last.ridge is None, "there is nothing to beat where nothing is held out"
    assert any("both splits together: 240 frames" in text for text in heard.messages)
    with pytest.raises(ConfigError, match=r"of no use to other settings: --alpha 0\.5 then, 0\.3 now.*--keep-epoch E"):
        fit(as_=tmp_path / "first", train_on="all", run=tmp_path / "other", alpha=0.3)
    again = fit(as_=tmp_path / "last", run=tmp_path / "again")
    assert (again.best_epoch, again.train_on) == (last.best_epoch, "all")


def test_a_choice_of_one_task_among_those_of_an_ablation(learnable: MakeData, tmp_path: Path) -> None:
    data, out = learnable(), tmp_path / "grid"
    learnable("au")
    affcache.ablate(
        **QUICK, store=data[0], annotations=data[1], out=out, seeds=1, vary=("task=expr,au", "alpha=0.5,1"), keep="none"
    )
    with pytest.raises(ConfigError, match=r"has the best of expr and au\. Expected a task of these"):
        fit(as_=out, train_on="all", run=tmp_path / "none")
    assert fit(as_=out, task="au", train_on="all", run=tmp_path / "au").task == "au"
    cell = next(out.glob("cells/*"))
    epoch = json.loads((cell / "result.json").read_text())["best_epoch"]
    assert fit(as_=cell, train_on="all", run=tmp_path / "cell").best_epoch == epoch
    for damaged in (
        "{}",
        '{"best": [{"task": "au", "settings": {}, "store": []}]}',
        '{"best": [{"task": "au", "store": 1}]}',
    ):
        (out / "best.json").write_text(damaged)
        with pytest.raises(StoreError, match=r"best\.json can't be read .*is kept"):
            fit(as_=out, task="au", train_on="all", run=tmp_path / "none")
    (cell / "result.json").write_text('{"best_epoch": 0}')
    with pytest.raises(StoreError, match=r"doesn't say its best epoch \(it diverged at once\)"):
        fit(as_=cell, train_on="all", run=tmp_path / "none")


def test_what_is_no_choice_is_refused(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    with pytest.raises(ConfigError, match=r"leaves no frames to choose on\. .*--keep-epoch E, or --as RUN"):
        train(data, tmp_path / "run", train_on="all")
    with pytest.raises(ConfigError, match=r"leaves no frames to choose on\. .*--strength S"):
        train(data, tmp_path / "run", train_on="all", head="ridge")
    with pytest.raises(ConfigError, match=r"--keep-epoch is 5; expected at least 1 and at most 4"):
        train(data, tmp_path / "run", keep_epoch=5)
    with pytest.raises(ConfigError, match="--strength is given, but --head mlp has none"):
        train(data, tmp_path / "run", strength=1.0)
    with pytest.raises(ConfigError, match="--keep-epoch is given, but --head ridge has none"):
        train(data, tmp_path / "run", keep_epoch=1, head="ridge")
    with pytest.raises(InputError, match=r"no config\.json in it"):
        fit(as_=tmp_path / "nowhere", train_on="all", run=tmp_path / "run")
    assert not (tmp_path / "run").exists()


class Stop(Heard):
    """Interrupts after an epoch."""

    def progress(self, done: int, total: int, unit: str, note: str = "") -> None:
        super().progress(done, total, unit, note)
        if done == 2:
            raise KeyboardInterrupt


def test_it_continues_and_an_unfinished_run_has_chosen_nothing(learnable: MakeData, tmp_path: Path) -> None:
    data, how = learnable(), {"train_on": "all", "keep_epoch": 3}
    train(data, tmp_path / "whole", **how)
    with pytest.raises(KeyboardInterrupt):
        train(data, tmp_path / "cut", **how, listener=Stop())
    with pytest.raises(ConfigError, match=r"is unfinished: 2 of 3 epochs.*--resume', or say --keep-epoch E"):
        fit(as_=tmp_path / "cut", run=tmp_path / "none")
    result = fit(run=tmp_path / "cut", resume=True)
    assert (result.best_epoch, result.train_on) == (3, "all")
    assert history(tmp_path / "cut") == history(tmp_path / "whole")
    assert (tmp_path / "cut" / "head.safetensors").read_bytes() == (
        tmp_path / "whole" / "head.safetensors"
    ).read_bytes()
    heard = Heard()
    TrainedHead.open(tmp_path / "cut", listener=heard)
    assert heard.warnings == [], "three epochs are all"


def test_whoever_scores_reports_or_publishes_it_is_told(learnable: MakeData, tmp_path: Path) -> None:
    data, heard, run = learnable(), Heard(), tmp_path / "run"
    train(data, run, train_on="all", keep_epoch=2)
    affcache.score(run=run, listener=heard)
    assert heard.warnings[0] == f"{run}: It was trained on validation too: its score there means nothing."
    train(data, tmp_path / "apart")
    beside = Heard()
    affcache.score(run=tmp_path / "apart", against=run, listener=beside)
    assert beside.warnings == heard.warnings[:1]
    quiet = Heard()
    affcache.score(run=run, split="train", listener=quiet)
    assert not any("means nothing" in text for text in quiet.warnings)
    affcache.report(run=run, crops=(tmp_path,), listener=Heard())
    page = (run / "report.html").read_text()
    assert "its score there means nothing" in page
    assert "flatters a little" not in page
    card = " ".join(card_of_run(TrainedHead.open(run)).split())
    assert "These validation frames were trained on" in card
    assert "The epoch is number 2, chosen before, and trained on the validation split too." in card
    assert "--train-on all --keep-epoch 2" in card


def said_of(run: Path) -> tuple[str, str, str]:
    """Return where a run's choice was made, as its config.json has it, and what its report and its card say."""
    affcache.score(run=run)
    affcache.report(run=run, crops=(run,), listener=Heard())
    card = " ".join(card_of_run(TrainedHead.open(run)).split())
    return json.loads((run / "config.json").read_text())["chosen_on"], (run / "report.html").read_text(), card


def test_a_choice_made_on_validation_flatters_whoever_takes_it(learnable: MakeData, tmp_path: Path) -> None:
    data, chosen = learnable(), "The epoch was chosen on these validation frames: the score flatters a little."
    train(data, tmp_path / "first")
    for name, source in (("taken", "first"), ("again", "taken")):
        assert fit(as_=tmp_path / source, run=tmp_path / name).chosen_on == "validation"
        where, page, card = said_of(tmp_path / name)
        assert where == "validation"
        assert chosen in page
        assert f"**{chosen}**" in card
        assert "chosen before on the validation split." in card
    train(data, tmp_path / "given", keep_epoch=2)
    where, page, card = said_of(tmp_path / "given")
    assert where == ""
    assert all("The epoch was given: where it was chosen on these validation frames" in text for text in (page, card))
    config = json.loads((tmp_path / "first" / "config.json").read_text())
    assert config.pop("chosen_on") == "validation"
    (tmp_path / "first" / "config.json").write_text(json.dumps(config))  # as before there was that
    assert fit(as_=tmp_path / "first", run=tmp_path / "old").chosen_on == "validation"


def test_a_choice_of_folds_flatters_and_one_of_held_out_videos_does_not(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable(videos=12)
    how: dict[str, Any] = {**QUICK, "store": data[0], "annotations": data[1], "seeds": 1, "keep": "all"}
    for name, words in (("folds", "on folds that these validation frames were in"), ("heldout", "")):
        own = {"folds": 3} if name == "folds" else {"select": "heldout"}
        affcache.ablate(**how, **own, out=tmp_path / name, vary=("alpha=0.5,1",))
        cell = next((tmp_path / name).glob("cells/*"))
        for source, run in ((tmp_path / name, f"{name} best"), (cell, f"{name} cell")):
            fit(as_=source, train_on="train", run=tmp_path / run)
            where, page, card = said_of(tmp_path / run)
            assert where == name
            assert any((words or "score flatters") in text for text in (page, card)) == bool(words)
    assert "score flatters" not in said_of(cell)[1], "nor was its own"
    moved = (tmp_path / "labels").rename(tmp_path / "moved")
    assert fit(as_=tmp_path / "heldout", annotations=moved, run=tmp_path / "elsewhere").chosen_on == "", "other splits"


def test_it_continues_with_the_same_command(learnable: MakeData, tmp_path: Path) -> None:
    data, how = learnable(), {"as_": tmp_path / "first", "train_on": "all"}
    train(data, tmp_path / "first", keep_epoch=4)
    fit(**how, run=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        fit(**how, run=tmp_path / "cut", listener=Stop())
    (tmp_path / "begun").mkdir()  # killed before anything was written
    for name in ("cut", "begun"):
        fit(**how, run=tmp_path / name, resume=True)
        assert history(tmp_path / name) == history(tmp_path / "whole")


def test_a_table_of_train_alone_trains_and_nothing_else_is_scored(learnable: MakeData, tmp_path: Path) -> None:
    store, heard = EmbeddingStore.open(learnable()[0]), Heard()
    rows = [f"{store.video_names[video]},{frame},train,{'ab'[frame % 2]}" for video, frame in
            zip(store.video_of_rows(), store.frame_number, strict=True)]  # fmt: skip
    (tmp_path / "labels.csv").write_text("\n".join(["video,frame,split,label", *rows]) + "\n")
    (tmp_path / "mine.toml").write_text('kind = "classes"\nnames = ["a", "b"]\nlabels = "labels.csv"\n')
    own: dict[str, Any] = {**QUICK, "task": str(tmp_path / "mine.toml"), "store": store.path}
    with pytest.raises(InputError, match="has no row of the split validation"):
        fit(**own, run=tmp_path / "none")
    affcache.ablate(**own, out=tmp_path / "folds", folds=3, seeds=1, listener=heard)
    assert any(
        "no row of the split validation: all labelled frames are those of train" in one for one in heard.warnings
    )
    last = fit(as_=tmp_path / "folds", train_on="all", held_out=0.3, run=tmp_path / "last")
    assert last.frames < last.validation_frames == 240
    rules = affcache.score(run=tmp_path / "last", split="train", decide="fitted").rule
    assert rules.fitted_on == "held-out training videos"
    with pytest.raises(InputError, match="has no row of the split validation"):
        affcache.score(run=tmp_path / "last")


def test_rules_are_fitted_on_what_was_held_out_of_both_splits(learnable: MakeData, tmp_path: Path) -> None:
    data, heard = learnable(videos=12), Heard()
    train(data, tmp_path / "run", train_on="all", keep_epoch=2, held_out=0.4)
    scored = affcache.score(run=tmp_path / "run", decide="fitted", listener=heard)
    assert scored.rule.fitted_on == "held-out training videos"
    assert not any("fitted without" in text for text in heard.warnings)
