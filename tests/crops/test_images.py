"""Decoding: pixels or a reason, never anything else. Resizing: open_clip's own transform is the peer."""

import io
import random
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import ExifTags, Image, ImageOps

from affcache.crops import images as images_module
from affcache.crops.archives import UnreadableCropError
from affcache.crops.images import LARGEST_SIDE, Normalise, Preprocessing, decode_crop

MEAN, STD = (0.48, 0.46, 0.41), (0.27, 0.26, 0.28)
GREY_RAMP = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64) * 16  # 0 to 65520


def smooth_pixels(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    """An image that is soft like a face: noise of an eighth of the size, scaled up."""
    small = np.random.default_rng(seed).integers(0, 256, (height // 8 + 2, width // 8 + 2, 3), dtype=np.uint8)
    return np.array(Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC))


def noise_pixels(height: int, width: int, seed: int = 0) -> npt.NDArray[np.uint8]:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_a_jpeg_gives_pillows_pixels() -> None:
    data = encoded(Image.fromarray(smooth_pixels(40, 56)), "JPEG", quality=92)
    crop = decode_crop(data)
    assert (crop.pixels.shape, crop.pixels.dtype, crop.mode) == ((40, 56, 3), np.uint8, "RGB")
    np.testing.assert_array_equal(crop.pixels, np.array(Image.open(io.BytesIO(data))))


def test_a_png_is_exact() -> None:
    pixels = noise_pixels(9, 20)
    np.testing.assert_array_equal(decode_crop(encoded(Image.fromarray(pixels), "PNG")).pixels, pixels)


def test_grey_becomes_three_equal_channels() -> None:
    grey = smooth_pixels(30, 30)[:, :, 0]
    crop = decode_crop(encoded(Image.fromarray(grey), "PNG"))
    assert crop.mode == "L"
    np.testing.assert_array_equal(crop.pixels, np.repeat(grey[:, :, None], 3, axis=2))


def test_cmyk_jpeg_shows_the_colours_it_was_made_of() -> None:
    pixels = np.empty((32, 32, 3), dtype=np.uint8)
    pixels[:, :16], pixels[:, 16:] = (200, 40, 90), (20, 180, 60)
    crop = decode_crop(encoded(Image.fromarray(pixels).convert("CMYK"), "JPEG", quality=100))
    assert crop.mode == "CMYK"
    assert np.abs(crop.pixels[:, :12].astype(int) - (200, 40, 90)).max() <= 6
    assert np.abs(crop.pixels[:, 20:].astype(int) - (20, 180, 60)).max() <= 6


@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled_and_not_clipped(kind: str) -> None:
    crop = decode_crop(encoded(Image.fromarray(GREY_RAMP), kind))
    assert crop.mode.startswith("I;16")
    expected = np.rint(GREY_RAMP / 65535 * 255)
    np.testing.assert_array_equal(crop.pixels, np.repeat(expected[:, :, None], 3, axis=2))


def test_palette() -> None:
    pixels = np.zeros((16, 16, 3), dtype=np.uint8)
    pixels[::2], pixels[1::2] = (250, 10, 30), (10, 200, 90)
    crop = decode_crop(encoded(Image.fromarray(pixels).quantize(4), "PNG"))
    assert crop.mode == "P"
    np.testing.assert_array_equal(crop.pixels, pixels)


FACE = Image.fromarray(smooth_pixels(40, 56))
KINDS = [
    ("JPEG", "RGB", {}), ("JPEG", "L", {}), ("JPEG", "CMYK", {}), ("PNG", "RGB", {}), ("PNG", "P", {}),
    ("WEBP", "RGB", {}), ("TIFF", "RGB", {}), ("TIFF", "L", {"compression": "tiff_lzw"}),
]  # fmt: skip


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "mode", "options"), KINDS)
def test_an_orientation_gives_the_pixels_of_exif_transpose(
    kind: str, mode: str, options: dict[str, Any], orientation: int
) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    data = encoded(FACE.convert(mode), kind, exif=exif, **options)
    expected = np.array(ImageOps.exif_transpose(Image.open(io.BytesIO(data))).convert("RGB"))
    assert expected.shape == ((40, 56, 3) if orientation < 5 else (56, 40, 3))
    np.testing.assert_array_equal(decode_crop(data).pixels, expected)


def test_a_jpeg_of_more_pixels_than_pillow_opens_is_turned_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    data = encoded(FACE.convert("RGB"), "JPEG", exif=exif)
    expected = decode_crop(data).pixels
    assert expected.shape[:2] != np.array(FACE).shape[:2]
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 10)  # 200-megapixel cameras write more than Pillow's limit
    np.testing.assert_array_equal(decode_crop(data).pixels, expected)


def test_an_orientation_in_xmp_counts_and_damaged_exif_data_do_not() -> None:
    plain = encoded(FACE, "JPEG")
    upright = decode_crop(plain).pixels
    xmp = encoded(FACE, "JPEG", xmp=b'<x:xmpmeta><rdf:Description tiff:Orientation="3"/></x:xmpmeta>')
    np.testing.assert_array_equal(decode_crop(xmp).pixels, upright[::-1, ::-1])
    exif = b"Exif\0\0no TIFF header"
    segment = b"\xff\xe1" + (len(exif) + 2).to_bytes(2, "big") + exif
    np.testing.assert_array_equal(decode_crop(plain[:2] + segment + plain[2:]).pixels, upright)


@pytest.mark.parametrize("mode", ["RGB", "L", "CMYK"])
@pytest.mark.parametrize("options", [{}, {"restart_marker_blocks": 2}], ids=["plain", "restarts"])
def test_a_jpeg_that_is_closed_too_early_is_damaged(mode: str, options: dict[str, Any]) -> None:
    """Pillow alone gives a picture that is grey below."""
    data = encoded(FACE.convert(mode), "JPEG", **options)
    start = data.index(b"\xff\xda") + 20
    for length in range(start, len(data) - 8, 5):
        with pytest.raises(UnreadableCropError, match=r"^damaged: image data is cut short"):
            decode_crop(data[:length] + b"\xff\xd9")


@pytest.mark.parametrize(
    ("samples", "reason"),
    [
        (GREY_RAMP.astype(np.float32) / 65_535, "float samples"),
        (GREY_RAMP.astype(np.int32) * 2, "samples of more than 16 bits"),
        (GREY_RAMP.astype(np.int32) - 1, "samples of more than 16 bits"),
    ],
    ids=["float", "18 bits", "signed"],
)
def test_samples_of_unknown_range_are_refused(samples: npt.NDArray[Any], reason: str) -> None:
    with pytest.raises(UnreadableCropError, match=f"^{reason}.*; expected 8 or 16 bits a sample$"):
        decode_crop(encoded(Image.fromarray(samples), "TIFF"))


def test_alpha_is_dropped_and_colours_stay() -> None:
    pixels = noise_pixels(16, 16)
    alpha = np.random.default_rng(1).integers(0, 256, (16, 16, 1), dtype=np.uint8)
    crop = decode_crop(encoded(Image.fromarray(np.concatenate([pixels, alpha], axis=2)), "PNG"))
    assert crop.mode == "RGBA"
    np.testing.assert_array_equal(crop.pixels, pixels)


def test_one_bit() -> None:
    pixels = np.random.default_rng(0).integers(0, 2, (16, 16)).astype(bool)
    crop = decode_crop(encoded(Image.fromarray(pixels), "PNG"))
    np.testing.assert_array_equal(crop.pixels[:, :, 1], pixels * 255)


def test_pixels_can_be_written_to() -> None:
    """torch.from_numpy warns of arrays that can't be."""
    assert decode_crop(encoded(Image.fromarray(noise_pixels(8, 8)), "PNG")).pixels.flags.writeable


JPEG = encoded(Image.fromarray(noise_pixels(64, 64)), "JPEG", quality=90)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", r"the file is empty \(0 bytes\)"),
        (JPEG[: len(JPEG) // 2], "damaged: image file is truncated"),
        (JPEG[:2], "not an image"),
        (b"GIF89a", "not an image"),
        (b"#EXTM3U\nno image at all\n" * 40, "not an image"),
        (bytes(4096), "not an image"),
        (encoded(Image.new("RGB", (1, 1)), "PNG"), "1x1 pixels; a face crop has 8 to 8000 on a side"),
        (encoded(Image.new("RGB", (7, 400)), "PNG"), "7x400 pixels; a face crop has 8 to 8000 on a side"),
        (encoded(Image.new("1", (9000, 8000)), "PNG"), "9000x8000 pixels; a face crop has 8 to 8000 on a side"),
        (encoded(Image.new("1", (20000, 20000)), "PNG"), "damaged: Image size .* exceeds limit"),
    ],
    ids=["empty", "half", "two bytes", "gif header", "text", "zeros", "1x1", "7x400", "too large", "bomb"],
)
def test_what_is_no_crop_has_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(UnreadableCropError, match=f"^{reason}"):
        decode_crop(data)


def test_the_smallest_size_is_read() -> None:
    assert decode_crop(encoded(Image.new("RGB", (8, 8)), "PNG")).pixels.shape == (8, 8, 3)


def whole_files() -> Iterator[bytes]:
    face = Image.fromarray(smooth_pixels(48, 40))
    for mode in ("RGB", "L", "CMYK"):
        yield encoded(face.convert(mode), "JPEG", quality=80)
    yield encoded(face, "JPEG", progressive=True)
    exif = Image.Exif()
    exif[0x010E] = "a description"
    yield encoded(face, "JPEG", exif=exif)
    exif[ExifTags.Base.Orientation] = 6
    yield encoded(face, "JPEG", exif=exif)
    yield encoded(face, "PNG")
    yield encoded(Image.fromarray(GREY_RAMP), "PNG")
    yield encoded(face.quantize(16), "PNG", transparency=b"\x00\x80\xff")
    for kind in ("WEBP", "BMP", "TIFF"):
        yield encoded(face, kind)


FILES = tuple(whole_files())


@settings(max_examples=300, deadline=None)
@given(
    which=st.integers(0, len(FILES) - 1),
    flips=st.lists(st.tuples(st.floats(0, 1, exclude_max=True), st.integers(1, 255)), max_size=12),
    kept=st.just(1.0) | st.floats(0, 1),
)
@pytest.mark.filterwarnings(r"ignore:::PIL\.")  # as the pipeline does
def test_any_damage_gives_pixels_or_a_reason(which: int, flips: list[tuple[float, int]], kept: float) -> None:
    damaged = bytearray(FILES[which])
    for position, difference in flips:
        damaged[int(position * len(damaged))] ^= difference
    try:
        crop = decode_crop(bytes(damaged[: int(kept * len(damaged))]))
    except UnreadableCropError as error:
        reason = str(error)
        assert reason
        assert len(reason.splitlines()) == 1  # it becomes one line of the list of unreadable crops
    else:
        assert crop.pixels.dtype == np.uint8
        assert crop.pixels.ndim == 3
        assert crop.pixels.shape[2] == 3
        assert min(crop.pixels.shape[:2]) >= 8


def verdict(data: bytes) -> tuple[object, ...] | None:
    """Mode, shape and pixels of a crop, or None where it can't be read."""
    try:
        crop = decode_crop(data)
    except UnreadableCropError:
        return None
    return crop.mode, crop.pixels.shape, crop.pixels.tobytes()


@pytest.mark.filterwarnings(r"ignore:::PIL\.")
def test_both_decoders_of_jpegs_judge_damage_alike(monkeypatch: pytest.MonkeyPatch) -> None:
    """The fast one takes what it can; Pillow alone must come to the same verdicts and pixels."""
    generator = random.Random(0)
    jpegs = [data for data in FILES if data.startswith(b"\xff\xd8")]
    damaged = []
    for _ in range(3000):
        data = bytearray(generator.choice(jpegs))
        if generator.random() < 0.3:
            del data[generator.randrange(len(data)) :]
        else:
            reach = generator.choice((40, len(data)))
            for _ in range(generator.choice((0, 1, 2, 20))):
                data[generator.randrange(reach)] ^= generator.randrange(1, 256)
        damaged.append(bytes(data))
    taken = 0
    for data in damaged:
        with suppress(UnreadableCropError):
            taken += images_module._decode_plain_jpeg(data, None, LARGEST_SIDE) is not None
    together = [verdict(data) for data in damaged]
    monkeypatch.setattr(images_module, "JPEG_MODES", {})
    assert together == [verdict(data) for data in damaged]
    assert 300 < taken < 2700
    assert 300 < sum(found is None for found in together) < 2700


def test_far_too_large_crops_are_made_small_as_open_clip_would() -> None:
    for mode, shape in (("shortest", (700, 500)), ("squash", (500, 700)), ("shortest", (500, 700))):
        preprocessing = Preprocessing((64, 64), mode, "bicubic", MEAN, STD)
        pixels = smooth_pixels(*shape)
        small = preprocessing.resize_large(pixels)
        assert small.shape == (64, 64, 3)
        peer = image_transform(64, is_train=False, mean=MEAN, std=STD, resize_mode=mode, interpolation="bicubic")
        expected = peer(Image.fromarray(pixels))
        images = torch.from_numpy(small).permute(2, 0, 1)[None]
        torch.testing.assert_close(preprocessing.resize(images), images, rtol=0, atol=0)
        torch.testing.assert_close(Normalise(MEAN, STD, torch.float32)(images)[0], expected, rtol=1e-5, atol=1e-5)
    pixels = smooth_pixels(100, 100)
    assert preprocessing.resize_large(pixels) is pixels


@pytest.mark.parametrize("kind", ["JPEG", "PNG"])
def test_large_images_are_decoded_one_at_a_time(kind: str) -> None:
    class Held:
        entered = 0

        def __enter__(self) -> None:
            self.entered += 1

        def __exit__(self, *error: object) -> None:
            pass

    held = Held()
    decode_crop(encoded(Image.new("RGB", (2000, 1999)), kind), held)
    assert held.entered == 0
    crop = decode_crop(encoded(Image.new("RGB", (2001, 2000)), kind), held)
    assert (held.entered, crop.pixels.shape) == (1, (2000, 2001, 3))


class ElsewhereTensor(torch.Tensor):
    """A CPU tensor that says it lies elsewhere, so that the arithmetic for other devices runs without one."""

    device = property(lambda self: torch.device("meta"))  # type: ignore[assignment]


def on_the_cpu(images: torch.Tensor) -> torch.Tensor:
    return images


def as_elsewhere(images: torch.Tensor) -> torch.Tensor:
    return images.as_subclass(ElsewhereTensor)


def difference_to_open_clip(
    pixels: npt.NDArray[np.uint8], preprocessing: Preprocessing, place: Callable[[torch.Tensor], torch.Tensor]
) -> torch.Tensor:
    """Absolute difference to open_clip's transform, in grey levels, after normalising."""
    peer = image_transform(
        preprocessing.size[0],
        is_train=False,
        mean=preprocessing.mean,
        std=preprocessing.std,
        resize_mode=preprocessing.resize_mode,
        interpolation=preprocessing.interpolation,
    )
    images = torch.from_numpy(pixels).permute(2, 0, 1)[None]
    resized = preprocessing.resize(place(images)).as_subclass(torch.Tensor).cpu()
    ours = Normalise(preprocessing.mean, preprocessing.std, torch.float32)(resized)[0]
    theirs = peer(Image.fromarray(pixels))
    assert ours.shape == theirs.shape
    return (ours - theirs).abs() * torch.tensor(preprocessing.std).view(3, 1, 1) * 255


PLACES = [on_the_cpu, as_elsewhere]
SIZES = [(112, 112), (500, 333), (333, 500), (224, 224), (57, 91), (91, 57), (200, 201), (256, 256), (9, 400)]


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_resizing_equals_open_clips_transform(
    shape: tuple[int, int], interpolation: str, place: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for size in (224, 64):
        for pixels in (noise_pixels(*shape), smooth_pixels(*shape)):
            preprocessing = Preprocessing((size, size), "shortest", interpolation, MEAN, STD)
            difference = difference_to_open_clip(pixels, preprocessing, place)
            assert difference.max() < 2.01
            assert difference.mean() < 0.08


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_squashing_equals_open_clips_transform(
    shape: tuple[int, int], interpolation: str, place: Callable[[torch.Tensor], torch.Tensor]
) -> None:
    for size in (224, 64):
        preprocessing = Preprocessing((size, size), "squash", interpolation, MEAN, STD)
        difference = difference_to_open_clip(smooth_pixels(*shape), preprocessing, place)
        assert difference.max() < 2.01
        assert difference.mean() < 0.16  # Pillow 13 takes some tall images down before across, and rounds between
        if shape[0] == shape[1]:
            difference = difference_to_open_clip(noise_pixels(*shape), preprocessing, place)
            assert difference.max() < 2.01
            assert difference.mean() < 0.08


def check_bit_equal_to_open_clip(place: Callable[[torch.Tensor], torch.Tensor], shape: tuple[int, int]) -> None:
    for size in (224, 64):
        for interpolation in ("bicubic", "bilinear"):
            preprocessing = Preprocessing((size, size), "shortest", interpolation, MEAN, STD)
            difference = difference_to_open_clip(noise_pixels(*shape), preprocessing, place)
            assert difference.max() < 0.01  # grey levels: what normalising in float32 rounds


@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_resizing_elsewhere_is_open_clips_to_the_bit(shape: tuple[int, int]) -> None:
    check_bit_equal_to_open_clip(as_elsewhere, shape)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("shape", SIZES, ids=str)
def test_resizing_on_a_gpu_is_open_clips_to_the_bit(shape: tuple[int, int]) -> None:
    check_bit_equal_to_open_clip(lambda images: images.cuda(), shape)


@pytest.mark.parametrize("place", PLACES)
def test_the_usual_case_is_as_good_as_bit_equal(place: Callable[[torch.Tensor], torch.Tensor]) -> None:
    """112 pixels to 224, bicubic: Aff-Wild2's crops and CLIP's input."""
    preprocessing = Preprocessing((224, 224), "shortest", "bicubic", MEAN, STD)
    difference = difference_to_open_clip(smooth_pixels(112, 112), preprocessing, place)
    assert (difference > 0.01).float().mean() < 1e-3


@pytest.mark.parametrize("place", PLACES)
def test_a_batch_is_its_images_one_by_one(place: Callable[[torch.Tensor], torch.Tensor]) -> None:
    preprocessing = Preprocessing((32, 32), "shortest", "bicubic", MEAN, STD)
    images = torch.from_numpy(np.stack([noise_pixels(40, 50, seed) for seed in range(3)])).permute(0, 3, 1, 2)
    together = preprocessing.resize(place(images)).as_subclass(torch.Tensor).cpu()
    assert together.shape == (3, 3, 32, 32)
    assert together.dtype == torch.uint8
    for image, alone in zip(images, together, strict=True):
        torch.testing.assert_close(
            preprocessing.resize(place(image[None])).as_subclass(torch.Tensor).cpu()[0], alone, rtol=0, atol=0
        )


def test_an_image_of_the_right_size_is_untouched() -> None:
    images = torch.from_numpy(noise_pixels(64, 64)).permute(2, 0, 1)[None]
    for mode in ("shortest", "squash"):
        preprocessing = Preprocessing((64, 64), mode, "bicubic", MEAN, STD)
        torch.testing.assert_close(preprocessing.resize(images), images, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_normalise_in_the_encoders_number_format(dtype: torch.dtype) -> None:
    levels = torch.arange(192, dtype=torch.uint8).reshape(1, 3, 8, 8)
    ours = Normalise(MEAN, STD, dtype)(levels)
    expected = (levels.double() / 255 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    assert ours.dtype == dtype
    assert (ours.double() - expected).abs().max() < 4 * torch.finfo(dtype).eps
    assert levels[0, 0, 0, 1] == 1  # the caller's pixels are left alone
