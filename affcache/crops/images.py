"""Bytes to pixels: decoding one crop, and resizing a batch exactly as open_clip's own transform would."""

import io
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import simplejpeg
import torch
import torchvision.transforms.functional as torchvision_functional
from PIL import ExifTags, Image, JpegImagePlugin, UnidentifiedImageError
from torchvision.transforms import InterpolationMode

from affcache.crops.archives import UnreadableCropError
from affcache.errors import InputError

SMALLEST_SIDE = 8  # pixels; below this a file is damage or a placeholder, not a face
LARGEST_SIDE = 8_000  # pixels; no face crop is larger, and a damaged header must not ask for gigabytes
LARGE_PIXELS = 4_000_000
JPEG_START = b"\xff\xd8\xff"
JPEG_MODES = {"YCbCr": "RGB", "Gray": "L"}  # colours in the file -> Pillow's name for what it decodes to
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF")  # not all of Pillow's: some run other programs
# what libjpeg says where a scan ends before the picture does, without or with restart markers
CUT_SHORT = ("premature end of data segment", "found marker 0xd9")
MARKS_OF_ORIENTATION = (b"Exif\0", b"tiff:Orientation")  # a JPEG has one of these, or is upright
LARGEST_SAMPLE = 65_535  # of 16-bit pictures
PILLOW_BITS = 22  # behind the point of a weight in Pillow's resizing (Resample.c, PRECISION_BITS)


@dataclass(frozen=True)
class DecodedCrop:
    """The pixels of one crop: a uint8 array of shape (height, width, 3) in RGB, and the mode the file had."""

    pixels: npt.NDArray[np.uint8]
    mode: str  # Pillow's name: RGB, L, CMYK, I;16, ...
    large: bool = False  # whether it may be a whole photo, where that was asked


def decode_crop(
    data: bytes, large: AbstractContextManager[Any] | None = None, largest: int = LARGEST_SIDE
) -> DecodedCrop:
    """Decode one image file's bytes as RGB, upright. Grey, CMYK, palette, alpha and 16-bit images are converted.

    An image is turned as its EXIF orientation says, to the pixels of Pillow's ``exif_transpose``.

    Args:
        data: the file.
        large: held while an image of more than 4 million pixels is decoded. Threads that share a lock here decode such
            images one at a time, since each takes hundreds of megabytes.
        largest: pixels on a side, at most.

    Raises:
        UnreadableCropError: empty, truncated, not an image, or of a size that no face crop has; says which.
    """
    if not data:
        raise UnreadableCropError("the file is empty (0 bytes)")
    if data.startswith(JPEG_START):
        crop = _decode_plain_jpeg(data, large, largest)
        if crop is not None:
            return crop
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            width, height = image.size
            if min(width, height) < SMALLEST_SIDE or max(width, height) > largest:
                what = "a face crop" if largest == LARGEST_SIDE else "a photo"
                raise UnreadableCropError(f"{width}x{height} pixels; {what} has {SMALLEST_SIDE} to {largest} on a side")
            with _held(large, width * height):
                mode, pixels = image.mode, np.array(_to_rgb(image))
                return DecodedCrop(_turned(pixels, _orientation(image)), mode)
    except (UnreadableCropError, MemoryError):  # want of memory is no fault of the crop
        raise
    except UnidentifiedImageError:
        raise UnreadableCropError("not an image") from None
    except Exception as error:  # damaged bytes make Pillow's plugins raise nearly anything
        raise UnreadableCropError(f"damaged: {error}") from None


def as_pixels(crop: Any) -> npt.NDArray[np.uint8]:
    """Return a crop as a uint8 array (height, width, 3): an array, a PIL image or the path of a file.

    Raises:
        InputError: it is none of these, or a file that can't be read.
    """
    if isinstance(crop, np.ndarray) and crop.dtype == np.uint8 and crop.ndim == 3 and crop.shape[2] == 3 and crop.size:
        return crop
    try:
        if isinstance(crop, Image.Image):
            return _turned(np.array(_to_rgb(crop)), _orientation(crop))
        if isinstance(crop, (str, Path)):
            return decode_crop(Path(crop).read_bytes()).pixels
    except (OSError, ValueError, UnreadableCropError) as error:
        reason = getattr(error, "strerror", None) or error
        raise InputError(f"{crop} can't be read: {reason}. Expected an image of a face.") from None
    found = f"{crop.dtype} of shape {crop.shape}" if isinstance(crop, np.ndarray) else type(crop).__name__
    raise InputError(f"A crop is {found}. Expected a uint8 array (height, width, 3) of RGB, a PIL image, or a path.")


def _held(large: AbstractContextManager[Any] | None, pixels: int) -> AbstractContextManager[Any]:
    return large if large is not None and pixels > LARGE_PIXELS else nullcontext()


def _decode_plain_jpeg(data: bytes, large: AbstractContextManager[Any] | None, largest: int) -> DecodedCrop | None:
    """Decode a flawless grey or colour JPEG: to Pillow's pixels in half its time, and beside other threads.

    Anything else, and nearly anything that libjpeg warns of, is Pillow's to judge.

    Raises:
        UnreadableCropError: the file is closed before the picture is whole, of which Pillow doesn't speak.
    """
    try:
        height, width, colours, _ = simplejpeg.decode_jpeg_header(data)
        if min(width, height) < SMALLEST_SIDE or max(width, height) > largest:
            return None
        with _held(large, width * height):
            pixels = simplejpeg.decode_jpeg(data, "RGB")
    except ValueError as error:
        if any(words in str(error) for words in CUT_SHORT):
            raise UnreadableCropError(f"damaged: image data is cut short ({error})") from None
        return None
    if colours not in JPEG_MODES:
        return None
    if any(mark in data for mark in MARKS_OF_ORIENTATION):
        orientation = 1  # which damaged EXIF data stand for, too; Image.open would refuse 180 megapixels
        with suppress(Exception), JpegImagePlugin.JpegImageFile(io.BytesIO(data)) as image:
            orientation = _orientation(image)
        pixels = _turned(pixels, orientation)
    return DecodedCrop(pixels, JPEG_MODES[colours])


def _orientation(image: Image.Image) -> int:
    """Return an image's EXIF orientation, 1 to 8; 1 is upright, and stands for none and for damaged EXIF data too."""
    try:
        return int(image.getexif().get(ExifTags.Base.Orientation, 1))
    except Exception:  # damaged bytes make Pillow raise nearly anything
        return 1


def _turned(pixels: npt.NDArray[np.uint8], orientation: int) -> npt.NDArray[np.uint8]:
    """Return an image (height, width, 3), stored in an EXIF orientation, upright."""
    if orientation in (5, 6, 7, 8):
        pixels = pixels.swapaxes(0, 1)
    if orientation in (2, 3, 6, 7):
        pixels = pixels[:, ::-1]
    if orientation in (3, 4, 7, 8):
        pixels = pixels[::-1]
    return np.ascontiguousarray(pixels)


def mirrored(pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
    """Return an image (height, width, 3) with left and right changed over."""
    return np.ascontiguousarray(pixels[:, ::-1])


def _to_rgb(image: Image.Image) -> Image.Image:
    """Convert to 8-bit RGB. Pillow would clip 16-bit samples at 255, so those are scaled first.

    Raises:
        UnreadableCropError: samples of which the file doesn't say what black and white are.
    """
    if image.mode == "F":
        raise UnreadableCropError("float samples, whose range isn't known; expected 8 or 16 bits a sample")
    if image.mode.startswith("I"):  # 16-bit grey, which some Pillow versions open as 32-bit integers
        samples = np.asarray(image).astype(np.float64)
        if samples.min() < 0 or samples.max() > LARGEST_SAMPLE:
            raise UnreadableCropError("samples of more than 16 bits; expected 8 or 16 bits a sample")
        samples = samples / 257.0  # 65535 / 255
        return Image.fromarray(samples.round().clip(0, 255).astype(np.uint8)).convert("RGB")
    image.load()
    return image if image.mode == "RGB" else image.convert("RGB")


@dataclass(frozen=True)
class Preprocessing:
    """What open_clip does to an image before the encoder: resize, crop the centre, scale to [0, 1], normalise."""

    size: tuple[int, int]  # (height, width) in pixels that the encoder takes
    resize_mode: str  # "shortest": shortest side to size, then centre crop; "squash": both sides to size
    interpolation: str  # "bicubic" or "bilinear", with antialiasing
    mean: tuple[float, ...]  # (3,) of values in [0, 1]
    std: tuple[float, ...]  # (3,)

    def resize_large(self, pixels: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Resize one image (height, width, 3) if it is far larger than the encoder's input; else return it as it is.

        It is then done by Pillow, where the crop was decoded, so that waiting crops stay small in memory.
        """
        height, width = self.size
        if pixels.size <= 4 * 3 * height * width:
            return pixels
        image = Image.fromarray(pixels)
        size = [height, width] if self.resize_mode == "squash" else [min(height, width)]
        image = torchvision_functional.resize(image, size, InterpolationMode(self.interpolation))
        return np.array(torchvision_functional.center_crop(image, [height, width]))

    def resize(self, images: torch.Tensor) -> torch.Tensor:
        """Resize and crop a batch of equally large images, on whatever device it lies.

        Args:
            images: uint8 tensor of shape (B, 3, height, width).

        Returns:
            uint8 tensor of shape (B, 3, *size), equal to open_clip's (Pillow's) result up to rounding.
        """
        height, width = images.shape[2:]
        to_height, to_width = self.size
        if self.resize_mode == "shortest":  # by torchvision's rule: the longer side is truncated, not rounded
            if height <= width:
                to_width = int(to_height * width / height)
            else:
                to_height = int(to_width * height / width)
        resized = _resize_pixels(images, to_height, to_width, self.interpolation)
        return torchvision_functional.center_crop(resized, list(self.size))


class Normalise(torch.nn.Module):
    """Turns resized uint8 images (B, 3, H, W) into the encoder's inputs of the same shape, in its number format."""

    mean: torch.Tensor
    std: torch.Tensor

    def __init__(self, mean: tuple[float, ...], std: tuple[float, ...], dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype
        # kept on the device: making them for each batch would make the host wait for a GPU
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1))

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Scale to [0, 1], subtract the mean, divide by the standard deviation, in float32; then cast."""
        return images.float().div_(255).sub_(self.mean).div_(self.std).to(self.dtype)


def _resize_pixels(images: torch.Tensor, height: int, width: int, interpolation: str) -> torch.Tensor:
    """Resize uint8 (B, C, h, w) to (B, C, height, width) the way Pillow does: across, round, then down, round."""
    if images.shape[2:] == (height, width):
        return images
    if images.device.type == "cpu":  # torch has nearly Pillow's integer arithmetic for uint8 on the CPU alone
        return torch.nn.functional.interpolate(images, size=(height, width), mode=interpolation, antialias=True)
    pixels = images.double()  # holds the sums of fixed-point weights exactly, in whatever order a GPU adds them
    if width != images.shape[3]:
        pixels = _rounded(pixels @ _pillow_weights(images.shape[3], width, interpolation, pixels))  # (B, C, h, width)
    if height != images.shape[2]:
        pixels = _rounded(_pillow_weights(images.shape[2], height, interpolation, pixels).T @ pixels)
    return pixels.to(torch.uint8)


def _pillow_weights(size: int, to_size: int, interpolation: str, like: torch.Tensor) -> torch.Tensor:
    """Return what each of ``size`` pixels gives to each of ``to_size``, (size, to_size), rounded as Pillow does."""
    one_pixel_each = like.new_ones(size).diag()[None, None]  # (1, 1, size, size)
    weights = torch.nn.functional.interpolate(one_pixel_each, (size, to_size), mode=interpolation, antialias=True)
    return weights[0, 0].mul_(2**PILLOW_BITS).round_().div_(2**PILLOW_BITS)


def _rounded(pixels: torch.Tensor) -> torch.Tensor:
    return pixels.add_(0.5).floor_().clamp_(0, 255)
