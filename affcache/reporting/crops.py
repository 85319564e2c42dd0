"""The pictures of frames that a report shows, found in the crops' folders or archives, as small data URIs."""

import base64
import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from affcache.crops.folders import find_crops
from affcache.crops.images import UnreadableCropError, decode_crop
from affcache.errors import InputError
from affcache.scoring.predictions import Predictions

SIDE = 112  # pixels at most
QUALITY = 75


def find_pictures(roots: Sequence[Path], given: Predictions, chosen: Sequence[int]) -> dict[int, str]:
    """Return data URIs of the chosen frames' crops, by their positions; those that aren't found are left out.

    Args:
        roots: folders or archives of crops, as ``extract`` takes them; those that aren't there are passed over.
        given: which frames there are.
        chosen: positions among them.
    """
    there = [root for root in roots if root.exists()]
    if not there or not len(chosen):
        return {}
    try:
        crops = find_crops(there)
    except InputError:  # nothing in it
        return {}
    video_of = {name: video for video, name in enumerate(crops.video_names)}
    names, videos, numbers = given.store.video_names, given.videos, given.frame_numbers
    pictures = {}
    for position in chosen:
        video = video_of.get(names[videos[position]])
        if video is None:
            continue
        first, last = int(crops.video_start[video]), int(crops.video_start[video + 1])
        row = first + int(np.searchsorted(crops.frame_number[first:last], numbers[position]))
        if row == last or crops.frame_number[row] != numbers[position]:
            continue
        try:
            pictures[position] = data_uri(crops.read(row))
        except (OSError, UnreadableCropError):
            continue
    return pictures


def data_uri(data: bytes) -> str:
    """Return a picture as a JPEG data URI, no larger than it has to be.

    Raises:
        UnreadableCropError: it is none.
    """
    image = Image.fromarray(decode_crop(data).pixels)
    image.thumbnail((SIDE, SIDE))
    small = io.BytesIO()
    image.save(small, "JPEG", quality=QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(small.getvalue()).decode()
