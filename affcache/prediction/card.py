"""The model card: what a head is, how well it does, and what it is not for, in Markdown for the Hugging Face hub."""

import json
import textwrap
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from affcache.encoders.open_clip import licence_of_tag
from affcache.progress import counted, metric_name
from affcache.scoring.trained import TrainedHead, encoder_name, no_scores
from affcache.store.description import SIDE_BY_SIDE, encoders_of, is_table
from affcache.tasks.task import Task
from affcache.tasks.tasks import is_own
from affcache.training.run_folder import fit_command
from affcache.training.settings import CHOSEN_ON, FitSettings, chosen_on

UNKNOWN = "unknown"
UNNAMED = "not named by who published this head"
OF_MACHINE = {"run", "runs", "predictions", "figures", "store", "against", "labels"}  # in scores.json
NOT_FOR = (
    "**It reads faces, not feelings.** Its labels are what annotators saw: apparent expression. What somebody feels, "
    "intends, is or has, no face says, and neither does this head.",
    "Not for inferring emotions of people who have not consented, nor for watching them. At work and in schools the "
    "European Union forbids it (Regulation 2024/1689, article 5).",
    "Not for decisions on people: hiring, lending, insurance, policing, grading, access to anything.",
    "Not for medical or psychological use: nothing here was validated for it.",
    "Of other data it knows little. Ages, skin tones, cultures, poses, light and cameras that are rare in the training "
    "data are where it errs most, and its errors may differ between groups of people. Measure it on labels of your own "
    "before you use it.",
    "Other crops give other embeddings: see below what faces it expects.",
)
TRAINED_ON = "**These validation frames were trained on**: the figures say nothing of how well it does on others."
INTERVALS = (
    "Intervals are of 95 %, over videos; there is none where a class is in fewer than three. On other data expect less."
)
PRIVATE_KINDS = ("local-dir:", "onnx:", "python:")
PRIVATE = (
    "It has no public name: who published this head has its weights. Say where they lie on your machine, with "
    '`affcache.load(..., model="local-dir:FOLDER")`, `"onnx:FILE"`, `"python:module:function"` or `pretrained="FILE"`, '
    "or pass embeddings."
)
FACES = '["face1.jpg", "face2.jpg"])  # float32 (n, C); or PIL images, uint8 arrays'
SEVERAL = ' Of several encoders give lists, an entry for each in this order, "" for one that is where its name says.'
HUB_WORDS = (
    "`hf upload OWNER/NAME FOLDER` puts this folder there. A file that is edited there isn't as it was published any "
    "more, and affcache then refuses the folder: publish it again instead."
)


@dataclass(frozen=True)
class CardWords:
    """What only the user can say of a head."""

    data: str = UNNAMED  # the training data
    license: str = UNKNOWN  # the hub's name of it, such as cc-by-nc-4.0
    own: str = ""  # Markdown


def metrics_of(trained: TrainedHead, rule: str = "") -> dict[str, Any] | None:
    """Return the scores of a head on validation without names of this machine; None where it wasn't scored.

    Args:
        trained: the head.
        rule: "" for those by the task's own rule, "fitted" for those by the fitted one.

    Raises:
        StoreError: scores.json is damaged.
    """
    if trained.published:
        found: dict[str, Any] | None = trained.config.get("metrics_fitted" if rule else "metrics")
        return found
    scores = trained.scores(rule)
    if scores is None:
        return None
    try:
        if not _on_own_store(scores, trained):
            return None
        _table(scores, trained.task)
        return _without_machine(scores)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise no_scores(trained.scores_file(rule), error) from None


def _without_machine(scores: Mapping[str, Any]) -> dict[str, Any]:
    found = {name: value for name, value in scores.items() if name not in OF_MACHINE}
    if "parts" in found:  # of several tasks at once
        found["parts"] = {name: _without_machine(of) for name, of in found["parts"].items()}
    return found


def _on_own_store(scores: Mapping[str, Any], trained: TrainedHead) -> bool:
    """Say whether a run was scored on what it was trained on, wherever that lies now, and not on other faces."""
    own = trained.config["store"]
    if "store_fingerprint" in scores:
        return bool(scores["store_fingerprint"] == own["fingerprint"])
    return Path(scores["store"]).absolute() == Path(own["path"])  # of an affcache that wrote the path alone


def licence_of(encoder: Mapping[str, Any]) -> tuple[str, str]:
    """Return the licence of an encoder's weights and where it is said, as far as that is known; of several, of each."""
    if len(every := encoders_of(encoder)) > 1:
        licences, sources = zip(*map(licence_of, every), strict=True)
        return " + ".join(licences), "; ".join(dict.fromkeys(sources))
    if encoder.get("licence"):
        return str(encoder["licence"]), "the encoder's own description"
    licence, source = licence_of_tag(str(encoder.get("pretrained") or ""))
    return (licence, source) if licence else (UNKNOWN, "its weights don't say it, and affcache doesn't know")


def card_of_run(trained: TrainedHead, words: CardWords | None = None, graphs: Mapping[str, str] | None = None) -> str:
    """Return the card of a head, Markdown.

    Args:
        trained: the head.
        words: what the user says of it.
        graphs: a sentence for each ONNX file that is published with it.

    Raises:
        StoreError: scores.json is damaged.
    """
    words = words or CardWords()
    sections = {
        "Use": _use(trained),
        "What it is not for": "\n".join(_wrapped(f"- {sentence}", "  ") for sentence in NOT_FOR),
        "Faces it expects": _crops(trained.encoder),
        "How well it does": _scores(trained),
        "How it was trained": _recipe(trained, words),
        "Encoder": _encoder(trained),
        "Files for ONNX": "\n".join(_wrapped(f"- `{name}`: {says}", "  ") for name, says in (graphs or {}).items()),
        "From who published it": words.own,
        "On the hub": _wrapped(HUB_WORDS),
    }
    head = f"# {trained.task.name}: a facial affect head\n\n{_what_it_is(trained, words)}"
    parts = [f"## {name}\n\n{section}" for name, section in sections.items() if section]
    return "\n\n".join([_front_matter(trained, words), head, *parts]) + "\n"


def _front_matter(trained: TrainedHead, words: CardWords) -> str:
    tags = ["facial-expression", "facial-affect", trained.task.name, "safetensors"]
    lines = [f"license: {words.license}", "library_name: affcache", "pipeline_tag: image-classification", "tags:"]
    return "\n".join(["---", *lines, *(f"- {json.dumps(tag)}" for tag in tags), "---"])


def _what_it_is(trained: TrainedHead, words: CardWords) -> str:
    task = trained.task
    says = f"{task.description}. " if task.description else ""
    if task.level == "video":
        taken = "the mean of its frames'" if trained.pool == "none" else f"the {trained.pool} of its embeddings"
        says += f"It says one thing of a whole video, by {taken}. "
    tables = sum(map(is_table, trained.encoders))
    inputs = ["embeddings of a frozen image encoder"] * (len(trained.encoders) > tables)
    inputs += ["features of frames from a table"] * bool(tables)
    return _wrapped(
        f"A light head on {' and '.join(inputs)}, {encoder_name(without_folders(trained.encoder))}. "
        f"{says}Outputs, in their order: {', '.join(task.classes)}. Trained with affcache on: {words.data}."
    )


def _use(trained: TrainedHead) -> str:
    shown = "p.argmax(axis=1)" if trained.task.exclusive else "p.round(2)"
    given, remark = FACES, "Embeddings that are there already go without the encoder: "
    if any(map(is_table, trained.encoders)):  # no encoder makes them
        given, remark = f"embeddings=array)  # (n, {trained.width}); float32 (n, C)", "It takes no images: "
    if trained.task.level == "video":
        remark = f"All images are the faces of one video. {remark}"
    return f"""```python
import affcache

model = affcache.load("hf-hub:OWNER/NAME")  # or this folder
p = model.predict_proba({given}
print(model.classes, {shown})
```

""" + _wrapped(
        f"{remark}`model.predict_proba(embeddings=array)`. Every file "
        "of this folder is checked against its sha256 in config.json when it is loaded."
    )


def _crops(encoder: Mapping[str, Any]) -> str:
    if all(map(is_table, encoders_of(encoder))):
        return ""
    sizes = [" x ".join(map(str, one["image_size"])) for one in encoders_of(encoder) if one.get("image_size")]
    resized = f" affcache resizes them to the encoder's {' and '.join(sizes)}." if sizes else ""
    return _wrapped(
        "One face an image, upright, aligned and cropped as the training data's. Aff-Wild2's crops are 112 x 112 "
        f"pixels, with eyes and mouth at fixed places.{resized} A whole photo or a loose crop is no such face."
    )


def _scores(trained: TrainedHead) -> str:
    found = [scores for rule in ("", "fitted") if (scores := metrics_of(trained, rule)) is not None]
    if not found:
        return "Not measured: the run was not scored. `affcache score RUN` does it; then publish it again."
    worth = f"**{trained.worth}**" if trained.worth else ""
    words = f"{TRAINED_ON if trained.settings.train_on == 'all' else worth} {INTERVALS}".strip()
    return "\n\n".join([*(_table(scores, trained.task) for scores in found), _wrapped(words)])


def _table(scores: Mapping[str, Any], task: Task) -> str:
    """Return a sentence on the metric, and a table of the classes; of several tasks at once both of each too."""
    how = scores["rule"]
    by = f" by a rule fitted on {how['fitted_on']}" if how.get("fitted_on") else ""
    of_videos = f" of {counted(scores['videos'], 'video')}" if task.level == "frame" else ""
    lead = (
        f"{metric_name(scores['metric'])} **{scores['value']:.3f}**{_span(scores)} on the validation split{by}: "
        f"{counted(scores['frames'], task.level)}{of_videos}."
    )
    if task.parts:
        each = [f"Of {part.name}: {_table(scores['parts'][part.name], part)}" for part in task.parts]
        return "\n\n".join([lead, *each])
    headings, rows = _metric_rows(scores, task)
    lines = [headings, ["---"] * len(headings), *rows]
    return "\n".join([lead, "", *(f"| {' | '.join(line)} |" for line in lines)])


def _metric_rows(scores: Mapping[str, Any], task: Task) -> tuple[list[str], list[list[str]]]:
    """Return the headings and a row for each class, as ``score`` prints them."""
    columns = [name for name in scores["classes"][0] if name not in ("name", "support", "low", "high")]
    rows = [
        [str(one["name"]), *(f"{one[name]:.3f}" for name in columns), _span(one, "").strip(), f"{one['support']:,}"]
        for one in scores["classes"]
    ]
    return ["class" if task.has_classes else "output", *columns, "95 %", f"{task.level}s"], rows


def _span(scores: Mapping[str, Any], before: str = "95 % ") -> str:
    return f" ({before}{scores['low']:.3f} to {scores['high']:.3f})".replace("()", "") if "low" in scores else ""


def _recipe(trained: TrainedHead, words: CardWords) -> str:
    where = CHOSEN_ON[chosen_on(trained.config)]
    defaults = FitSettings()
    stores = tuple(Path(f"{number}.h5") for number in range(1, len(trained.encoders) + 1))  # one of each encoder
    recipe = replace(
        trained.settings, task=defaults.task, annotations=defaults.annotations, store=stores if len(stores) > 1 else ()
    )
    why = f"the best by {metric_name(trained.task.metric)} {where}"
    if trained.settings.chosen_before:
        why = f"chosen before {where}".rstrip()
        why += ", and trained on the validation split too" * (trained.settings.train_on == "all")
    number = trained.epoch if trained.settings.strength is None else f"{trained.settings.strength:g}"
    text = _wrapped(
        f"Data: {words.data}. The {trained.settings.tried} is number {number}, {why}. All settings stand in "
        "config.json; these make such a head:"
    )
    name = f"{trained.task.name}.toml" if is_own(trained.task) else trained.task.name
    command = fit_command(recipe).replace("affcache fit", f"affcache fit --task {name}", 1)
    return f"{text}\n\n```sh\n{command}\n```"


def _encoder(trained: TrainedHead) -> str:
    encoder, (licence, source) = without_folders(trained.encoder), licence_of(trained.encoder)
    formats = " + ".join(str(one.get("precision", "an unknown number format")) for one in encoders_of(encoder))
    side_by_side = " (embeddings side by side, in this order)" if len(trained.encoders) > 1 else ""
    tables = [str(one["model"]) for one in trained.encoders if is_table(one)]
    from_tables = f" {' and '.join(tables)}: features that no encoder makes of an image." if tables else ""
    text = _wrapped(
        f"{encoder_name(encoder)}{side_by_side}, D = {trained.width}, in {formats}. It "
        "isn't in this folder: affcache loads it by its name, and checks its weights. "
        f"Its licence: {licence} ({source}). Its terms, and those of the training data, may reach this head."
        f"{from_tables}"
    )
    named = zip(encoders_of(encoder), trained.encoders, strict=True)
    if any(
        str(one.get("model")).startswith(PRIVATE_KINDS) or one.get("pretrained") != own.get("pretrained")
        for one, own in named
    ):
        text += "\n\n" + _wrapped(PRIVATE + SEVERAL * (len(trained.encoders) > 1))
    return f"{text}\n\nFingerprint: `{trained.encoder_fingerprint}`"


def without_folders(encoder: Mapping[str, Any]) -> dict[str, Any]:
    """Return an encoder's description without the folders of this machine: of a path the last part stays."""
    found = dict(encoder)
    if SIDE_BY_SIDE in found:
        return {**found, SIDE_BY_SIDE: [without_folders(one) for one in encoders_of(found)]}
    for name in ("model", "pretrained"):
        kind, colon, path = str(found.get(name) or "").replace("\\", "/").rpartition(":")
        if "/" in path and kind != "hf-hub":
            found[name] = f"{kind}{colon}{path.rstrip('/').rpartition('/')[2]}"
    return found


def _wrapped(text: str, indent: str = "") -> str:
    lines = textwrap.wrap(text, 120, subsequent_indent=indent, break_long_words=False, break_on_hyphens=False)
    return "\n".join(lines)
