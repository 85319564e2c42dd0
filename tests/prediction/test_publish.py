"""A published head: it loads anywhere, to the bit, and no byte of it may change."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import affcache
from affcache.errors import AffcacheError, ConfigError, InputError, StoreError
from affcache.prediction.card import licence_of, without_folders
from affcache.scoring.published import read_published
from affcache.scoring.trained import TrainedHead
from affcache.store.reading import EmbeddingStore
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.own import task_to_json
from affcache.tasks.task import Task
from affcache.tasks.tasks import TASKS, task_from_json
from tests.conftest import Heard, MakeData, make_learnable

QUICK: dict[str, Any] = {"epochs": 2, "hidden_layers": 1, "hidden_width": 16, "batch_size": 16, "device": "cpu"}
HEADS = [("expr", "mlp"), ("au", "mlp"), ("va", "mlp"), ("expr", "linear"), ("au", "ridge"), ("va", "ridge")]
FILES = ["README.md", "config.json", "head.safetensors"]
LOAD = """
import sys
import numpy as np
import affcache

embeddings = np.load(sys.argv[1])
found = {}
for folder in sys.argv[3:]:
    model = affcache.load(folder, device="cpu")
    found[folder] = model.predict_proba(embeddings=embeddings)
    print(model, model.card[:12], model.rule)
np.savez(sys.argv[2], **found)
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a scored run, its store expr.h5, its labels, and the run published in head/."""
    folder = tmp_path_factory.mktemp("somewhere")
    store, annotations = make_learnable(folder, videos=9)
    affcache.fit(store=store, annotations=annotations, run=folder / "run", held_out=0.3, **QUICK)
    affcache.score(run=folder / "run", device="cpu")
    affcache.score(run=folder / "run", decide="fitted", calibrate=True, device="cpu")
    affcache.publish(run=folder / "run", out=folder / "head", data="rendered   noise", license="mit")
    return folder


@pytest.fixture
def head(made: Path, tmp_path: Path) -> Path:
    """A copy of the published head, to be damaged."""
    return Path(shutil.copytree(made / "head", tmp_path / "head"))


def test_every_head_loads_elsewhere_to_the_bit_without_run_store_or_labels(tmp_path: Path) -> None:
    """In a fresh process, in an empty working folder."""
    home, heads = tmp_path / "home", []
    expected = {}
    embeddings = np.random.default_rng(0).normal(size=(9000, 16)).astype(np.float16)
    for task, kind in HEADS:
        store, annotations = make_learnable(home / f"{task}-{kind}", task)
        run, out = home / f"{task}-{kind}" / "run", tmp_path / f"{task}-{kind}"
        normalize = "l2" if kind == "linear" else "none"
        affcache.fit(task=task, head=kind, normalize=normalize, store=store, annotations=annotations, run=run, **QUICK)
        affcache.publish(run=run, out=out)
        trained = TrainedHead.open(run, "cpu")
        expected[out.name] = trained.task.probabilities(trained.logits(torch.from_numpy(embeddings))).numpy()
        heads.append(out)
    shutil.rmtree(home)
    (tmp_path / "empty").mkdir()
    for out in heads:
        out.rename(tmp_path / "empty" / out.name)
    np.save(tmp_path / "embeddings.npy", embeddings)
    command = [sys.executable, "-c", LOAD, tmp_path / "embeddings.npy", tmp_path / "found.npz", *expected]
    environment = {**os.environ, "PYTHONPATH": str(Path(affcache.__file__).parents[1])}
    done = subprocess.run(command, cwd=tmp_path / "empty", env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found = np.load(tmp_path / "found.npz")
    for name, probabilities in expected.items():
        assert np.array_equal(found[name], probabilities), name
    assert done.stdout.count("---\nlicense: None") == len(HEADS)


def test_what_is_published_is_what_the_run_was(made: Path) -> None:
    config = json.loads((made / "head" / "config.json").read_text())
    scores = json.loads((made / "run" / "scores.json").read_text())
    own = {"run", "runs", "predictions", "figures", "store", "against", "labels"}
    assert config["metrics"] == {name: value for name, value in scores.items() if name not in own}
    rule = json.loads((made / "run" / "scores-fitted.json").read_text())["rule"]
    assert config["postprocessing"] == config["metrics_fitted"]["rule"] == rule
    assert config["task"]["classes"] == list(TASKS["expr"].classes)
    assert (config["task"]["kind"], config["width"], config["data"]) == ("classes", 16, "rendered noise")
    store = EmbeddingStore.open(made / "expr.h5")
    assert (config["encoder"], config["encoder_fingerprint"]) == (store.encoder, store.encoder_fingerprint)
    run, model = affcache.load(made / "run", device="cpu"), affcache.load(made / "head", device="cpu")
    assert run.rule is not None
    assert model.rule == run.rule
    assert np.array_equal(model.predict(embeddings=store.features), run.predict(embeddings=store.features))
    assert model.trained.epoch == run.trained.epoch
    assert model.trained.settings.hidden_width == 16


def test_the_card_says_what_a_reader_needs(made: Path) -> None:
    card, scores = (made / "head" / "README.md").read_text(), json.loads((made / "run" / "scores.json").read_text())
    assert card == affcache.load(made / "head").card
    front = card.split("---\n")[1].splitlines()
    assert front[:3] == ["license: mit", "library_name: affcache", "pipeline_tag: image-classification"]
    assert f"macro F1 **{scores['value']:.3f}** (95 % {scores['low']:.3f} to {scores['high']:.3f})" in card
    assert "by a rule fitted on held-out training videos" in card
    for one in scores["classes"]:
        assert f"| {one['name']} | {one['precision']:.3f} | {one['recall']:.3f} | {one['f1']:.3f} |" in card
    for words in (
        "Trained with affcache on: rendered noise", "The epoch was chosen on these validation frames",
        "have not consented", "Not for decisions on people", "Not for medical", "112 x 112", "made-up, D = 16",
        "hf upload OWNER/NAME FOLDER",
        'affcache.load("hf-hub:OWNER/NAME")', "licence: unknown", "affcache fit --task expr --epochs 2",
    ):  # fmt: skip
        assert words in " ".join(card.split()), words
    assert max(map(len, card.splitlines())) <= 160


def test_nothing_published_names_this_machine(made: Path) -> None:
    names = [str(made), str(Path.home()), made.name, *(EmbeddingStore.open(made / "expr.h5").video_names)]
    for path in (made / "head").iterdir():
        assert not [name for name in names if name.encode() in path.read_bytes()], path


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("where", [0, 0.3, 0.5, 0.9, 1])
def test_a_changed_byte_is_an_error_that_names_the_file(head: Path, name: str, where: float) -> None:
    assert sorted(path.name for path in head.iterdir()) == FILES
    path = head / name
    content = bytearray(path.read_bytes())
    content[int(where * (len(content) - 1))] ^= 1
    path.write_bytes(content)
    with pytest.raises(StoreError, match=rf"head/{name} is not as it was published: .*Fetch or copy the folder anew"):
        affcache.load(head)


def test_no_byte_of_config_json_may_change(head: Path) -> None:
    path = head / "config.json"
    content = path.read_bytes()
    assert read_published(head, "head")["format_version"] == 1
    for position in range(0, len(content), 5):
        for other in (content[position] ^ 1, ord(" ")):
            changed = bytearray(content)
            changed[position] = other
            if changed == content:
                continue
            path.write_bytes(changed)
            with pytest.raises(StoreError, match=r"config\.json is not as it was published"):
                TrainedHead.open(head)
    for changed in (content[:-1], content + b" ", content.replace(b"\n", b"\r\n"), content[: len(content) // 2]):
        path.write_bytes(changed)
        with pytest.raises(StoreError, match=r"config\.json is not as it was published"):
            TrainedHead.open(head)


@pytest.mark.parametrize("name", ["README.md", "head.safetensors"])
def test_a_missing_file_is_named(head: Path, name: str) -> None:
    (head / name).unlink()
    with pytest.raises(StoreError, match=rf"{name} is not as it was published: it is missing"):
        affcache.load(head)


def test_other_weights_are_refused_and_what_the_hub_adds_is_not(head: Path) -> None:
    (head / ".gitattributes").write_text("*.safetensors filter=lfs\n")
    (head / ".cache" / "huggingface").mkdir(parents=True)
    (head / ".git").mkdir()
    (head / "picture.png").write_bytes(b"")
    affcache.load(head)
    (head / "better.safetensors").write_bytes(b"")
    with pytest.raises(StoreError, match=r"better\.safetensors was not published with this head"):
        affcache.load(head)


def resealed(head: Path, **changes: Any) -> None:
    """Change config.json as somebody would who can compute a sha256."""
    from affcache.scoring.published import write_sealed

    config = {**json.loads((head / "config.json").read_text()), **changes}
    files = changes.get("files")
    write_sealed(head, config, {name: head / name for name in FILES if name != "config.json"})
    if files is not None:
        text = (head / "config.json").read_text()
        assert files in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"format_version": 2}, r"format affcache-head 2; this affcache reads affcache-head 1\. Use the affcache that"),
        ({"width": "16"}, r"config\.json is not as it was published: it lacks width"),
        ({"width": 17}, r"head\.safetensors doesn't fit"),
        ({"width": -1}, r"head\.safetensors doesn't fit"),
        ({"encoder": None}, r"it lacks encoder"),
        ({"settings": {"hidden_widht": 3}}, r"published by another affcache: Unknown setting 'hidden_widht'"),
        ({"settings": {"head": "forest"}}, r"--head 'forest' is unknown"),
        ({"task": {"name": "expr", "kind": "moods", "classes": ["a"]}}, r"has no task that this affcache knows"),
        ({"task": {"name": "expr", "kind": "values", "classes": ["a"], "low": 3}}, r"has no task that this"),
        ({"task": {"name": "expr", "kind": "classes", "classes": ["a"]}}, r"head\.safetensors doesn't fit"),
    ],
)
def test_what_another_wrote_is_refused_in_words(head: Path, changes: dict[str, Any], words: str) -> None:
    resealed(head)
    affcache.load(head)
    resealed(head, **changes)
    with pytest.raises(AffcacheError, match=words):
        affcache.load(head)


def test_a_damaged_rule_of_a_published_head_is_refused(head: Path) -> None:
    resealed(head, postprocessing={"smooth": "mean"})
    with pytest.raises(StoreError, match=r"config\.json has no rule that can be read"):
        _ = affcache.load(head).rule
    resealed(head, postprocessing=None)
    assert affcache.load(head).rule is None


def test_a_name_on_the_hub_is_fetched(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []

    def fetched(repository: str, *, revision: str | None, ignore_patterns: list[str]) -> str:
        asked.append((repository, revision))
        assert "*.onnx" in ignore_patterns
        return str(made / "head")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetched)
    embeddings = EmbeddingStore.open(made / "expr.h5").features[:9]
    expected = affcache.load(made / "run", device="cpu").predict_proba(embeddings=embeddings)
    for name in ("hf-hub:somebody/expr", Path("hf-hub:somebody/expr"), "hf-hub:somebody/expr@v1"):
        model = affcache.load(name, device="cpu")
        assert np.array_equal(model.predict_proba(embeddings=embeddings), expected)
        assert f"of {name}: Neutral" in repr(model)
    assert asked == [("somebody/expr", None), ("somebody/expr", None), ("somebody/expr", "v1")]
    monkeypatch.chdir(tmp_path)
    scored = affcache.score(run="hf-hub:somebody/expr", store=made / "expr.h5", annotations=made / "labels")
    assert scored.run == "hf-hub:somebody/expr"
    assert (tmp_path / "scores" / "expr" / "scores.json").is_file()


def test_without_a_network_it_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any, **options: Any) -> str:
        raise ConnectionError("no route to huggingface.co\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fails)
    with pytest.raises(InputError, match=r"hf-hub:a/b can't be fetched .*no route to huggingface\.co\).*hf download"):
        affcache.load("hf-hub:a/b")


def test_a_run_from_the_hub_is_no_published_head(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *args, **options: str(made / "run"))
    with pytest.raises(StoreError, match=r"config\.json is not as it was published"):
        affcache.load("hf-hub:a/b")


def test_score_and_report_need_a_store_and_labels_of_a_published_head(
    made: Path, head: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    data = {"store": made / "expr.h5", "annotations": made / "labels"}
    before = {path.name: path.read_bytes() for path in head.iterdir()}
    scored, of_run = affcache.score(run=head, **data), json.loads((made / "run" / "scores.json").read_text())
    assert scored.scores.value == of_run["value"]
    assert Path(scored.scores_file) == Path("scores/head/scores.json")
    report = affcache.report(run=head, **data)
    assert Path(report.out) == Path("scores/head/report.html")
    assert {path.name: path.read_bytes() for path in head.iterdir()} == before, "it stays as it was published"
    for given in ({}, {"store": made / "expr.h5"}, {"annotations": made / "labels"}):
        with pytest.raises(ConfigError, match=r"neither a store nor labels\. .* --store FILE, .* --annotations DIR"):
            affcache.score(run=head, **given)
    with pytest.raises(ConfigError, match="as published heads don't"):
        affcache.score(run=head, decide="fitted", **data)
    other, _ = make_learnable(tmp_path, width=17)
    with pytest.raises(StoreError, match="another encoder"):
        affcache.score(run=head, store=other, annotations=made / "labels")


def test_submit_takes_a_published_head_but_fits_no_rule_for_it(made: Path, head: Path, tmp_path: Path) -> None:
    (tmp_path / "frames.csv").write_text("2-30-640x360,40\n")
    given = {"store": made / "expr.h5", "frames": tmp_path / "frames.csv"}
    submitted = {
        name: affcache.submit(run=made / run, out=tmp_path / f"{name}.txt", **given)
        for name, run in (("run", "run"), ("head", head))
    }
    assert submitted["head"].lines == 40
    assert (tmp_path / "head.txt").read_text() == (tmp_path / "run.txt").read_text()
    with pytest.raises(ConfigError, match=r"A rule is to be fitted, but .*head is a published head"):
        affcache.submit(run=head, out=tmp_path / "c.txt", decide="fitted", **given)


def test_what_can_not_be_published_is_said_before_anything_is_written(made: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "mine").touch()
    (tmp_path / "bad.md").write_bytes(b"\xff")
    for given, words in (
        ({"out": None}, r"Expected --out FOLDER"),
        ({"out": taken}, r"taken is there already, and isn't an empty folder"),
        ({"out": taken / "mine"}, r"mine is there already"),
        ({"card": tmp_path / "none.md"}, r"none\.md can't be read: No such file"),
        ({"card": tmp_path / "bad.md"}, r"bad\.md can't be read: .*Expected Markdown"),
        ({"license": "My own!"}, r"--license is 'My own!'; expected a name as the hub has them"),
        ({"run": taken}, r"is no run folder"),
    ):
        with pytest.raises(AffcacheError, match=words):
            affcache.publish(**{"run": made / "run", "out": tmp_path / "out", **given})
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bad.md", "taken"]
    assert sorted(path.name for path in taken.iterdir()) == ["mine"]


def test_an_empty_folder_is_taken_and_what_fails_leaves_nothing(
    made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "deep" / "out"
    out.mkdir(parents=True)
    with monkeypatch.context() as patched:
        patched.setattr(
            "affcache.prediction.publish.write_sealed", lambda *args: (_ for _ in ()).throw(OSError(28, "full"))
        )
        with pytest.raises(InputError, match="out can't be written: full"):
            affcache.publish(run=made / "run", out=out)
    assert list(out.parent.rglob("*")) == [out]
    (tmp_path / "own.md").write_text("Ask **me** first.\n")
    result = affcache.publish(run=made / "run", out=out, card=tmp_path / "own.md")
    assert result.files == ("README.md", "config.json", "head.safetensors")
    assert result.bytes == sum(path.stat().st_size for path in out.iterdir())
    assert "## From who published it\n\nAsk **me** first.\n\n## " in (out / "README.md").read_text()


def test_what_the_card_lacks_is_said(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    affcache.fit(store=store, annotations=annotations, run=tmp_path / "run", **QUICK)
    listener = Heard()
    result = affcache.publish(run=tmp_path / "run", out=tmp_path / "a", listener=listener)
    assert [text.split(":")[0].split(".")[0] for text in listener.warnings] == [
        "The card doesn't name the training data", "The card names no licence", "The card has no figures",
    ]  # fmt: skip
    assert (result.value, result.rule, result.onnx) == (None, False, {})
    assert (
        "Not measured: the run was not scored. `affcache score RUN` does it" in (tmp_path / "a/README.md").read_text()
    )
    scores = {**json.loads(json.dumps(affcache.score(run=tmp_path / "run").to_json())), "epoch": 9}
    (tmp_path / "run" / "scores.json").write_text(json.dumps(scores))
    assert affcache.publish(run=tmp_path / "run", out=tmp_path / "b").value is None, "they are of another epoch"
    (tmp_path / "run" / "scores.json").write_text('{"task": "expr", "epoch": 3}')
    epoch = TrainedHead.open(tmp_path / "run").epoch
    (tmp_path / "run" / "scores.json").write_text(json.dumps({"task": "expr", "epoch": epoch}))
    with pytest.raises(StoreError, match=r"scores\.json has no scores that can be read"):
        affcache.publish(run=tmp_path / "run", out=tmp_path / "c")


def test_a_published_head_can_be_published_again(made: Path, tmp_path: Path) -> None:
    affcache.publish(run=made / "head", out=tmp_path / "again")
    before, after = (json.loads((folder / "config.json").read_text()) for folder in (made / "head", tmp_path / "again"))
    assert after == before


OWN = (Classes("seven", ("calm", "glad")), Units("smile", ("smile",), "One"), Values("pain", ("pain",), low=0, high=10))


@pytest.mark.parametrize("task", [*TASKS.values(), *OWN], ids=lambda task: task.name)
def test_a_task_comes_back_from_its_description(task: Task) -> None:
    found = task_from_json(json.loads(json.dumps(task_to_json(task))))
    assert found == task
    if task.name in TASKS:
        assert found is TASKS[task.name]


@pytest.mark.parametrize(
    ("model", "pretrained", "expected"),
    [
        ("ViT-L-14", "openai", ("ViT-L-14", "openai")),
        ("local-dir:/home/ada/enc/", "", ("local-dir:enc", "")),
        ("local-dir:../enc", None, ("local-dir:enc", None)),
        ("hf-hub:laion/CLIP", "", ("hf-hub:laion/CLIP", "")),
        ("ViT-B-32", "/home/ada/w.pt", ("ViT-B-32", "w.pt")),
        ("ViT-B-32", "openai:/home/ada/w.pt", ("ViT-B-32", "openai:w.pt")),
        ("local-dir:C:\\ada\\enc", "", ("local-dir:C:enc", "")),
        ("ViT-B-32", "random:7", ("ViT-B-32", "random:7")),
    ],
)
def test_folders_of_this_machine_are_left_out(model: str, pretrained: str | None, expected: tuple[Any, ...]) -> None:
    found = without_folders({"model": model, "pretrained": pretrained, "width": 3})
    assert (found["model"], found["pretrained"], found["width"]) == (*expected, 3)


def test_licences_are_those_that_are_known() -> None:
    assert licence_of({"model": "ViT-L-14", "pretrained": "openai"})[0] == "MIT"
    assert licence_of({"pretrained": "laion2b_s34b_b79k"})[0] == "MIT"
    assert licence_of({"pretrained": "openai:/some/file.pt"})[0] == "unknown"
    assert licence_of({"pretrained": "openaiish"})[0] == "unknown"
    assert licence_of({"pretrained": "", "licence": "Apache-2.0"})[0] == "Apache-2.0"


def test_scores_on_other_faces_are_none_of_the_card(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    affcache.fit(store=store, annotations=annotations, run=tmp_path / "run", **QUICK)
    named: dict[str, Any] = {"run": tmp_path / "run", "data": "made up", "license": "mit"}
    affcache.score(run=tmp_path / "run", device="cpu")
    own = affcache.publish(**named, out=tmp_path / "own").value
    assert own is not None
    other = make_learnable(tmp_path / "other", seed=1)
    affcache.score(run=tmp_path / "run", store=other[0], annotations=other[1], device="cpu")
    heard = Heard()
    assert affcache.publish(**named, out=tmp_path / "without", listener=heard).value is None
    assert any("not scored on the store it was trained on" in text for text in heard.warnings)
    assert "was not scored" in (tmp_path / "without" / "README.md").read_text()
    moved = store.rename(tmp_path / "moved.h5")
    affcache.score(run=tmp_path / "run", store=moved, device="cpu")
    assert affcache.publish(**named, out=tmp_path / "moved").value == own, "the same store elsewhere"
