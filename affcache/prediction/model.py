"""A trained head as a model of images: what made its embeddings comes with it, by its description."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from affcache.crops.images import as_pixels
from affcache.encoders.encoder import Crop, Encoder
from affcache.encoders.loading import load_described
from affcache.encoders.side_by_side import AnyEncoder, side_by_side
from affcache.errors import ConfigError, InputError, StoreError
from affcache.files import read_bytes
from affcache.prediction.card import card_of_run
from affcache.prediction.whole_videos import frame_values, logits_of_persons
from affcache.progress import Listener
from affcache.scoring.rule import DecisionRule
from affcache.scoring.trained import TrainedHead, encoder_name
from affcache.store.description import differing_fields, fingerprint, is_table
from affcache.tasks.multitask import MultiTask
from affcache.tasks.task import Labels, Task

BATCH = 64  # images of one call of the encoder
LARGEST_CARD = 2**24  # bytes
Images = Crop | Sequence[Crop]
Embeddings = npt.ArrayLike | torch.Tensor
Place = str | Sequence[str | None] | None  # of an encoder, or of several; None where it was


def load(
    run: Path | str,
    *,
    device: str = "auto",
    model: Place = None,
    pretrained: Place = None,
    listener: Listener | None = None,
) -> "Model":
    """Open a trained head, to use it on faces that nobody labelled.

    Args:
        run: a run folder, a folder that ``affcache publish`` wrote, or ``hf-hub:OWNER/NAME`` (``@REVISION`` after it
            takes that one). Of a published head every file is checked first.
        device: where head and encoder compute: auto, cpu, cuda, cuda:1, ...
        model: where the encoder is now, as for ``load_encoder``, if it isn't where it was when the store was made.
            That it is the same one is checked, by its weights. Of a head on several encoders, of each in their order,
            "" for one that is where it was.
        pretrained: likewise.
        listener: is told where a run is unfinished.

    Raises:
        InputError: this is neither, or it can't be fetched.
        StoreError: a file is damaged, missing or was changed since it was published.
        ConfigError: the device isn't there, another affcache wrote it, or ``model`` is of another number of encoders.
    """
    return Model(TrainedHead.open(run, device, listener), model, pretrained)


class Model:
    """A trained head with the encoder of its embeddings. ``affcache.load`` opens one.

    Args:
        trained: the head.
        model: where the encoder is, as of ``load``.
        pretrained: likewise.
    """

    def __init__(self, trained: TrainedHead, model: Place = None, pretrained: Place = None) -> None:
        self.trained = trained
        said = {"model": model, "pretrained": pretrained}
        self._elsewhere = {name: self._of_each(name, place) for name, place in said.items()}

    def _of_each(self, name: str, said: Place) -> Sequence[str | None]:
        count = len(self.trained.encoders)
        each: Sequence[str | None] = [said] if isinstance(said, str) else said or [None] * count
        if len(each) != count:
            raise ConfigError(
                f"{name}= says where {len(each)} encoders are, and {self.trained.source} is on {count}: "
                f"{encoder_name(self.trained.encoder)}. Expected one for each, in this order."
            )
        return each

    def __repr__(self) -> str:
        """Say what it predicts, and by what."""
        of = self.trained
        encoder = f"{encoder_name(of.encoder)} (D = {of.width})"
        return f"<Model {of.task.name} of {of.source}: {', '.join(self.classes)}; {of.settings.head} head on {encoder}>"

    @property
    def task(self) -> Task:
        """What is predicted."""
        return self.trained.task

    @property
    def by_task(self) -> "list[Model]":
        """The model as that of each of its tasks, with its own outputs and rule; of one task, itself."""
        return [Model(one, **self._elsewhere) for one in self.trained.by_task] if self.task.parts else [self]

    @property
    def classes(self) -> tuple[str, ...]:
        """The names (C,) of the classes, units or values: the columns of ``predict_proba``."""
        return self.trained.task.classes

    @property
    def rule(self) -> DecisionRule | None:
        """The rule that ``affcache score --decide fitted`` fitted; None without one. StoreError: it is damaged.

        Of several tasks each has its own, ``by_task[0].rule``; all together have none.
        """
        return self.trained.rule

    @cached_property
    def card(self) -> str:
        """The model card, Markdown: as it was published, or of a run as it would be."""
        if self.trained.published:
            path = self.trained.folder.path / "README.md"
            return read_bytes(path, LARGEST_CARD).decode()
        return card_of_run(self.trained)

    @property
    def encoder_is_known(self) -> bool:
        """Whether it is known what made the embeddings, as it isn't of a store that was imported."""
        return all(map(_is_known, self.trained.encoders))

    @cached_property
    def encoder(self) -> AnyEncoder:
        """What makes the embeddings, on the model's device; loaded when it is first used.

        Raises:
            StoreError: it can't be known, or what is there now is another one.
            InputError: its weights aren't where they were; or two stores are by one encoder, of crops that differ.
        """
        self.require_one_crop_a_frame()
        return side_by_side([self.encoder_of(number) for number in range(len(self.trained.encoders))])

    def require_one_crop_a_frame(self) -> None:
        """Refuse to encode pictures for a head on two stores by one encoder; raises InputError."""
        if len(set(self.trained.encoder_fingerprints)) < len(self.trained.encoders):
            raise InputError(
                f"{self.trained.source} was trained on two stores by one encoder, so on two kinds of crops of each "
                "frame, and pictures are of one kind. Expected stores. Extract both kinds, and name both stores."
            )

    def encoder_of(self, number: int, precision: str = "") -> Encoder:
        """Load one of the encoders, counted from 0, in its store's number format or another; raises as ``encoder``."""
        said, sha256 = self.trained.encoders[number], self.trained.encoder_fingerprints[number]
        elsewhere = {part: of_each[number] for part, of_each in self._elsewhere.items()}
        if is_table(said):
            raise StoreError(
                f"{self.trained.source} was trained on features of frames that stood in a table, {encoder_name(said)}: "
                "no encoder makes them of an image. Expected stores. Import the same features of these frames with "
                "'affcache import', or pass embeddings=ARRAY."
            )
        if not _is_known(said):
            raise StoreError(
                f"{self.trained.source} was trained on embeddings that were imported, and what made them isn't known "
                f"(said to be: {encoder_name(said)}). Expected an encoder whose weights are known, to encode images. "
                "Encode them with what made the others, and pass embeddings=ARRAY."
            )
        name = elsewhere["model"] or str(said["model"])
        as_stored = precision or str(said["precision"])
        try:
            encoder = load_described(said, **elsewhere, precision=as_stored, device=str(self.trained.device))
        except (InputError, ConfigError) as error:
            kind = name.partition(":")[0]
            place = {"local-dir": "local-dir:FOLDER", "onnx": "onnx:FILE", "python": name}.get(kind, "")
            where = f'model="{place}"' if place else f'model="{name}", pretrained="FILE"'
            if len(self.trained.encoders) > 1:
                where = f"model=[...], pretrained=[...], one of each for {encoder_name(self.trained.encoder)}"
            raise InputError(
                f"The encoder of {self.trained.source} can't be loaded: {error}\nIf it lies elsewhere, say where: "
                f'affcache.load("{self.trained.source}", {where}). Without it, pass embeddings=ARRAY. '
                f"On the command line: affcache predict ... --model {place or 'local-dir:FOLDER'}, or a store instead "
                "of pictures."
            ) from None
        found = {**encoder.description, "precision": said["precision"]}
        if fingerprint(found) != sha256:
            lines = "\n  ".join(differing_fields(said, found))
            now = encoder_name(found)
            raise StoreError(
                f"{self.trained.source} was trained on embeddings of another encoder than {now}. Expected the "
                f"same one; these differ (the head's against this one's):\n  {lines}\nName the encoder that made the "
                "head's store with model= and pretrained=, or pass embeddings=ARRAY of it."
            )
        return encoder

    def embed(self, images: Images, *, batch_size: int = BATCH) -> npt.NDArray[np.float16]:
        """Encode images as a store would hold them.

        Args:
            images: one or several, of any sizes: paths of files, PIL images, or uint8 arrays (height, width, 3), RGB.
                They should be cropped as those that the head was trained on.
            batch_size: images of one call of the encoder.

        Returns:
            float16 (n, D), not normalised.

        Raises:
            InputError: one is none of these or can't be read; or the encoder can't be loaded.
            StoreError: the encoder can't be known, or is another one.
        """
        if isinstance(images, (str, Path, Image.Image)) or (isinstance(images, np.ndarray) and images.ndim == 3):
            images = [images]
        try:
            images = list(images)
        except TypeError:
            raise InputError(
                f"Images are {type(images).__name__}. Expected paths, PIL images or uint8 arrays."
            ) from None
        encoder = self.encoder
        found = [np.empty((0, self.trained.width), np.float16)]
        for start in range(0, len(images), batch_size):
            batch = [as_pixels(image) for image in images[start : start + batch_size]]
            resized = [encoder.resize_large(pixels) for pixels in batch]  # as extract does it
            with np.errstate(over="ignore"):  # beyond float16 is inf, which the head refuses
                found.append(encoder.encode(resized).numpy().astype(np.float16))
        return np.concatenate(found)

    def logits(self, embeddings: Embeddings) -> torch.Tensor:
        """Return the head's logits, float32 (n, C) on the CPU, of embeddings, float (n, D).

        Of a task whose labels are of whole videos, the embeddings are those of one video, and n is 1 in what is
        returned: the head's of the pooled video, or what stands for the mean of its frames' probabilities.

        Raises:
            InputError: they have another shape, or hold nan or inf; or a video has none.
        """
        if not isinstance(embeddings, torch.Tensor):
            try:
                array = np.asarray(embeddings)
            except ValueError as error:
                raise InputError(f"Embeddings can't be read ({error}). Expected an array (n, D).") from None
            if array.dtype.kind != "f":
                raise InputError(
                    f"Embeddings are {array.dtype} of shape {array.shape}. Expected floating-point numbers of shape "
                    f"(n, {self.trained.width}): images go without the name, predict_proba(images)."
                )
            exact = np.float16 if array.dtype.itemsize == 2 else np.float32 if array.dtype.itemsize == 4 else np.float64
            embeddings = torch.from_numpy(
                array.astype(exact)
            )  # in this machine's order, and writable: torch wants both
        if self.task.level == "frame":
            return self.trained.logits(embeddings)
        self.trained.require_embeddings(embeddings, self.trained.width)
        if not len(embeddings):
            raise InputError(f"There is no frame of a video, of which task {self.task.name} is. Expected at least one.")
        one = np.zeros(len(embeddings), np.int64)
        values = frame_values(self.trained, embeddings)
        return logits_of_persons(self.trained, values, one, np.arange(len(one)))[:1].float()

    def predict_proba(
        self, images: Images | None = None, *, embeddings: Embeddings | None = None, batch_size: int = BATCH
    ) -> npt.NDArray[np.float32]:
        """Return probabilities as the head says them, without a fitted rule.

        Args:
            images: as of ``embed``. Where labels are of whole videos, the faces of one video, in the order of their
                frames; so with embeddings, and n is 1 in what is returned.
            embeddings: instead of images: float (n, D), of the head's encoder, not normalised. Images' are rounded to
                float16 as a store's; these are taken as they are.
            batch_size: images of one call of the encoder.

        Returns:
            float32 (n, C): of classes, which sum to 1; of units, each its own; or values, clipped to their range. Of
            several tasks theirs side by side, (n, 22) for mtl: valence, arousal, 8 classes, 12 units.

        Raises:
            InputError: both or neither are given, or one of them isn't as it should be.
            StoreError: the encoder can't be known, or is another one.
        """
        logits = self._logits(images, embeddings, batch_size)
        return np.asarray(self.task.probabilities(logits).numpy())

    def predict(
        self, images: Images | None = None, *, embeddings: Embeddings | None = None, batch_size: int = BATCH
    ) -> npt.NDArray[Any]:
        """Return what is decided, in the form of label files: by the fitted rule where there is one.

        Images have no order, so that nothing is smoothed: of a fitted rule count its temperature, and its biases or
        thresholds. Arguments and errors are those of ``predict_proba``.

        Returns:
            int64 (n,) indices into ``classes``; int64 (n, C) of 0 and 1 for units; or float32 (n, C) for values. Of
            several tasks float32 with theirs side by side, each by its own rule: (n, 15) for mtl, a line of the
            challenge's file, valence, arousal, the index among the 8 classes, 12 units.
        """
        logits, task = self._logits(images, embeddings, batch_size), self.task
        if not isinstance(task, MultiTask):
            return _decided(logits, task, self.rule)
        each = zip(task.outputs_of(logits), self.trained.by_task, strict=True)
        return task.joined([_decided(of, one.task, one.rule) for of, one in each])

    def _logits(self, images: Images | None, embeddings: Embeddings | None, batch_size: int) -> torch.Tensor:
        if not isinstance(batch_size, int) or batch_size < 1:
            raise ConfigError(f"batch_size is {batch_size}. Expected at least 1.")
        if images is not None and embeddings is None:
            return self.logits(self.embed(images, batch_size=batch_size))
        if embeddings is None or images is not None:
            found = "Neither images nor embeddings were" if images is None else "Both images and embeddings were"
            raise InputError(f"{found} given. Expected one of them: predict_proba(images), or with embeddings=ARRAY.")
        return self.logits(embeddings)


def _decided(logits: torch.Tensor, task: Task, rule: DecisionRule | None) -> Labels:
    """Return what is decided of one task's logits (n, C) of images, which have no order."""
    rule = replace(rule or DecisionRule(), smooth="none", width=1)
    said = _Said(np.asarray(task.probabilities(logits).numpy()), logits)
    return rule.decide(rule.apply(said, task).probabilities, task)


def _is_known(encoder: Mapping[str, Any]) -> bool:
    return bool(encoder.get("weights_sha256")) and {"model", "image_size", "precision"} <= encoder.keys()


@dataclass(frozen=True)
class _Said:
    """What is said of n images, which have no order."""

    probabilities: npt.NDArray[Any]
    logits: torch.Tensor

    @property
    def videos(self) -> npt.NDArray[np.int64]:
        return np.arange(len(self.probabilities))

    frame_numbers = videos
