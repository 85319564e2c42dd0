"""What a report says, that it fetches nothing, and that names with markup in them are shown and not run."""

import base64
import json
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from affcache.errors import ConfigError, StoreError
from affcache.reporting.frames import PER_CLASS, ReportContext, hardest, suspicious, tail_positions
from affcache.reporting.panels import PANELS
from affcache.reporting.report import report
from affcache.scoring.score import score
from affcache.tasks.kinds import Classes, Units, Values
from affcache.tasks.tasks import TASKS
from affcache.training.fit import fit
from tests.conftest import Heard, MakeData, spoil_features, write_crops, write_labels, write_store

QUICK: dict[str, Any] = {"epochs": 2, "hidden_layers": 1, "hidden_width": 8, "batch_size": 16, "rho": 0.05}


class Elements(HTMLParser):
    """Collects the elements of a page, and its text outside of scripts and styles."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.open = "", [""]
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        while self.open.pop() != tag:
            pass

    def handle_data(self, data: str) -> None:
        if self.open[-1] not in ("script", "style"):
            self.text += data

    def of(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag]


def frames_in(text: str) -> dict[str, Any]:
    found = re.search(r'<script type="application/json" class="frames">(.*?)</script>', text, re.DOTALL)
    assert found
    assert "<" not in found[1], "neither </script> nor <!-- can end or change what the element is"
    return dict(json.loads(found[1]))


@pytest.mark.parametrize("task", ["expr", "au", "va"])
def test_a_report_says_what_score_says(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, task: str
) -> None:
    data = learnable(task, videos=12)
    fit(task=task, store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    scored = score(run=tmp_path / "run")
    monkeypatch.setattr("affcache.reporting.panels.published.AFF_WILD2", 50)
    result = report(run=tmp_path / "run", crops=())
    assert result.out == str(tmp_path / "run" / "report.html")
    text = Path(result.out).read_text()
    page = Elements(text)
    assert f"{scored.scores.value:.3f}" in page.text
    assert scored.scores.interval is not None
    assert "95 % {:.3f} to {:.3f}".format(*scored.scores.interval) in page.text
    for one in scored.scores.classes:
        assert f"{one.values['ccc' if task == 'va' else 'f1']:.3f}" in page.text
    assert (result.frames, result.bytes) == (scored.frames, len(text.encode()))
    assert len(page.of("button")) == 4 + result.hardest + result.suspicious
    assert ("EmotiEffNet-B0" in page.text) == (task != "va"), "there are no published figures of va here"
    assert ("say nothing about a run on other data" in page.text) == (task != "va")
    assert frames_in(text)["tasks"][0]["kind"] == {"expr": "classes", "au": "units", "va": "values"}[task]
    assert {one["href"] for one in page.of("a")} <= {f"#{one.get('id')}" for one in page.of("section")}
    assert '"alpha": 0.5' in page.text, "the settings"
    figures = {"expr": 5, "au": 4, "va": 2}[task]
    assert len(page.of("svg")) == len(page.of("figcaption")) == figures
    ids = [attributes["id"] for _, attributes in page.found if "id" in attributes]
    assert len(ids) == len(set(ids))


def test_a_panel_is_a_function_and_a_line(learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def toy(context: ReportContext) -> str:
        return f"<p>{context.task.outputs} outputs, {len(context.joined)} frames</p>"

    monkeypatch.setitem(PANELS, "A toy", toy)
    monkeypatch.setitem(PANELS, "Nothing here", lambda context: None)
    data = learnable()
    fit(store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    page = Elements(Path(report(run=tmp_path / "run", crops=()).out).read_text())
    assert "8 outputs, 80 frames" in page.text
    assert [one["href"] for one in page.of("a")][-1] == "#a-toy-section", "the last, and what says nothing is left out"


OWN = {
    "seven": Classes("own", tuple(f"<{number}> $emotion$" for number in range(7))),
    "unit": Units("own", ("smile",)),
    "value": Values("own", ("intensity",), low=0, high=5),
}


@pytest.mark.parametrize(("kind", "figures"), [("seven", 5), ("unit", 4), ("value", 2)])
def test_a_task_more_needs_nothing_here(
    learnable: MakeData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, figures: int
) -> None:
    task = replace(OWN[kind], folders=TASKS["expr"].folders)
    monkeypatch.setitem(TASKS, "own", task)
    store, annotations = learnable()
    for path in annotations.rglob("*.txt"):
        lines = [str(int(line) % int(task.valid_range[1] + 1)) for line in path.read_text().splitlines()[1:]]
        path.write_text("\n".join([task.header, *lines]) + "\n")
    fit(task="own", store=store, annotations=annotations, run=tmp_path / "run", **QUICK)
    text = Path(report(run=tmp_path / "run", crops=()).out).read_text()
    page = Elements(text)
    assert len(page.of("svg")) == figures
    assert all(page.text.count(name) >= 2 for name in task.classes), "in the table and in the figures"
    assert frames_in(text)["tasks"][0]["range"] == list(task.valid_range)


def test_nothing_is_fetched_and_the_page_forbids_it(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    fit(store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    text = Path(report(run=tmp_path / "run", crops=()).out).read_text()
    page = Elements(text)
    assert not page.of("link")
    assert all("src" not in script for script in page.of("script"))
    assert all(str(image["src"]).startswith("data:") for image in page.of("img"))
    (policy,) = (meta["content"] for meta in page.of("meta") if meta.get("http-equiv") == "Content-Security-Policy")
    assert str(policy).startswith("default-src 'none'")
    assert "http://" not in text
    assert "https://" not in text


EVIL = "<img src=x onerror=alert(1)>"


def test_markup_in_names_is_shown_and_not_run(tmp_path: Path) -> None:
    random, names = np.random.default_rng(0), ["a</script><script>alert(1)", f"b{EVIL}", 'c"onclick="alert(1)']
    names = [name.replace("/", "\u2215") if "/" in name else name for name in names]
    features = random.normal(size=(60, 16)).astype(np.float16)
    store = write_store(tmp_path / "s.h5", {name: range(1, 21) for name in names}, features)
    for index, name in enumerate(names):
        split = "validation" if index else "train"
        write_labels(tmp_path / "labels", "expr", split, {name: random.integers(0, 8, 20).tolist()})
    run = tmp_path / f"run {EVIL.replace('/', '')}"
    fit(store=store.path, annotations=tmp_path / "labels", run=run, **QUICK)
    text = Path(report(run=run, crops=()).out).read_text()
    page = Elements(text)
    assert not [image for image in page.of("img") if "onerror" in image]
    assert len(page.of("script")) == 2
    assert all(attributes.keys().isdisjoint({"onclick", "onerror"}) for _, attributes in page.found)
    assert names[1] in page.text
    assert [video["name"] for video in frames_in(text)["videos"]] == names[1:]


def test_crops_are_shown_where_they_are_found(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable()
    fit(store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    crops = write_crops(tmp_path / "crops", {"2-30-640x360": range(1, 41)}, size=(300, 200))
    (crops / "2-30-640x360" / "00001.jpg").write_bytes(b"no picture")
    result = report(run=tmp_path / "run", crops=(crops, tmp_path / "not there"), out=tmp_path / "r.html")
    page = Elements((tmp_path / "r.html").read_text())
    assert 0 < result.pictures < result.hardest + result.suspicious, "of one video of two"
    images = [str(image["src"]) for image in page.of("img")]
    assert len(set(images)) == result.pictures
    assert all(len(base64.b64decode(image.partition(",")[2])) < 20_000 for image in images)


def test_the_timelines_hold_every_frame(learnable: MakeData, tmp_path: Path) -> None:
    data = learnable("au")
    fit(task="au", store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    scored = score(run=tmp_path / "run")
    frames = frames_in(Path(report(run=tmp_path / "run", crops=()).out).read_text())
    probabilities = np.frombuffer(base64.b64decode(frames["tasks"][0]["probabilities"]), np.uint8).reshape(-1, 12)
    labels = np.frombuffer(base64.b64decode(frames["tasks"][0]["labels"]), np.uint8).reshape(-1, 12)
    numbers = np.frombuffer(base64.b64decode(frames["numbers"]), "<i4")
    assert len(numbers) == len(labels) == len(probabilities) == scored.frames
    assert [(video["start"], video["count"]) for video in frames["videos"]] == [(0, 40), (40, 40)]
    assert numbers.tolist() == [*range(1, 41)] * 2
    import h5py

    with h5py.File(scored.predictions_file) as file:
        np.testing.assert_allclose(probabilities / 255, file["probabilities"][:], atol=0.5 / 255 + 1e-6)
        assert (labels == file["labels"][:]).all()


def test_the_hardest_come_first_and_every_class_has_its_share() -> None:
    random = np.random.default_rng(0)
    labels, losses = random.choice(8, 2000, p=[0.8, 0.1, 0.05, 0.02, 0.01, 0.01, 0.01, 0]), random.random(2000)
    tail = tail_positions(losses, 0.25)
    assert len(tail) == 500
    assert losses[tail].min() >= np.sort(losses)[-500]
    shown = hardest(TASKS["expr"], labels, tail)
    assert list(losses[shown]) == sorted(losses[shown], reverse=True)
    in_tail, of_shown = (np.bincount(labels[of], minlength=8) for of in (tail, shown))
    assert of_shown.tolist() == np.minimum(in_tail, PER_CLASS).tolist()


def test_doubtful_labels_are_those_that_a_sure_head_contradicts() -> None:
    labels, decided = np.array([0, 1, 2, 3]), np.array([0, 2, 3, 3])
    probabilities = np.full((4, 8), 0.01)
    probabilities[[0, 1, 2, 3], decided] = [0.99, 0.7, 0.9, 0.6]
    assert suspicious(TASKS["expr"], labels, decided, probabilities) == [2, 1]
    probabilities[1, 2] = 0.4
    assert suspicious(TASKS["expr"], labels, decided, probabilities) == [2], "not sure"


def test_rules_and_splits_are_said(learnable: MakeData, tmp_path: Path) -> None:
    data, heard = learnable(videos=9), Heard()
    fit(store=data[0], annotations=data[1], run=tmp_path / "run", **QUICK)
    result = report(run=tmp_path / "run", crops=(), decide="fitted", fit_on="validation", listener=heard)
    page = Elements(Path(result.out).read_text())
    assert "fitted on validation optimistic: the frames that are scored are among them" in page.text
    assert any("No crops were found to show beside the frames; looked in no folder." in text for text in heard.warnings)
    report(run=tmp_path / "run", crops=(tmp_path / "none", tmp_path), listener=heard)
    assert f"looked in {tmp_path / 'none'} (not there), {tmp_path}. Say where" in heard.warnings[-1]
    assert "EmotiEffNet" not in page.text, "published figures are not shown beside other data"
    on_train = report(run=tmp_path / "run", crops=(), split="train", out=tmp_path / "t.html")
    page = Elements(Path(on_train.out).read_text())
    assert "EmotiEffNet" not in page.text
    with pytest.raises(ConfigError, match="trained on all training videos"):
        report(run=tmp_path / "run", crops=(), decide="fitted")


def test_damaged_embeddings_are_not_reported(learnable: MakeData, tmp_path: Path) -> None:
    store, annotations = learnable()
    fit(task="expr", store=store, annotations=annotations, run=tmp_path / "run", **QUICK)
    spoil_features(store)
    with pytest.raises(StoreError, match="its features don't match their checksum"):
        report(run=tmp_path / "run", crops=())
    assert not (tmp_path / "run" / "report.html").exists()
