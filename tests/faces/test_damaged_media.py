"""What is no photo or video, or a damaged one: a message that says which file, why, and what to do."""

import os
import shutil
import struct
import zlib
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image

from affcache.errors import InputError
from affcache.faces import media as media_module
from affcache.faces.media import DamagedMediaError, Frame, Media, read_frames
from tests.faces.clips import frames_of, moving, noisy, picture, write_clip, write_photo, write_sound

Make = Callable[[Path], Path]
NO_VIDEO = r"holds no video \(only audio\)\. Expected a photo or a video\."


def spoilt(path: Path, *, keep: float = 1.0, damage: float | None = None) -> Path:
    """Cut a file short, or overwrite bytes at a place of it; places are shares of its length."""
    content = bytearray(path.read_bytes())
    if damage is not None:
        place = int(len(content) * damage)
        content[place : place + 200] = np.random.default_rng(0).integers(0, 256, 200, np.uint8).tobytes()
    path.write_bytes(content[: int(len(content) * keep)])
    return path


def empty(folder: Path) -> Path:
    (folder / "empty.mp4").touch()
    return folder / "empty.mp4"


def text(folder: Path) -> Path:
    (folder / "text.mp4").write_text("no video at all\n" * 50)
    return folder / "text.mp4"


def index_at_the_end(folder: Path) -> Path:
    return spoilt(write_clip(folder / "end.mp4", noisy(10)), keep=0.7)


def frameless(path: Path) -> Path:
    """Write the header and the index of a video, and no frame."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 128, 96, "yuv420p"
        container.start_encoding()
    return path


def unknown_codec(folder: Path) -> Path:
    path = write_clip(folder / "codec.mp4", moving(3))
    path.write_bytes(path.read_bytes().replace(b"avc1", b"zzzz"))
    return path


def too_wide(folder: Path) -> Path:
    """Write a video whose container asks for pixels 200 times as wide as they are high."""
    path = write_clip(folder / "wide.mp4", moving(3), aspect=Fraction(2))
    content = path.read_bytes()
    place = content.index(b"pasp") + 4
    path.write_bytes(content[:place] + struct.pack(">II", 200, 1) + content[place + 8 :])
    return path


def album(folder: Path) -> Path:
    """Write a sound file with a picture of its cover, as FLAC keeps it."""
    sound = write_sound(folder / "sound.flac", "flac").read_bytes()
    cover = write_photo(folder / "cover.jpg", picture((8, 24))).read_bytes()
    kind, name = struct.pack(">II", 3, len(b"image/jpeg")) + b"image/jpeg", struct.pack(">I", 0)
    block = kind + name + struct.pack(">IIIII", 128, 96, 24, 0, len(cover)) + cover
    header = 4 + 4 + 34  # "fLaC" and the block that describes the stream
    path = folder / "album.flac"
    path.write_bytes(sound[:header] + struct.pack(">I", 6 << 24 | len(block)) + block + sound[header:])
    return path


def png(path: Path, width: int, height: int) -> Path:
    """Write the header of a PNG file, with hardly anything after it."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        check = struct.pack(">I", zlib.crc32(kind + content))
        return struct.pack(">I", len(content)) + kind + content + check

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    path.write_bytes(b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(bytes(64))) + chunk(b"IEND", b""))
    return path


def pipe(folder: Path) -> Path:
    os.mkfifo(folder / "pipe.mp4")
    return folder / "pipe.mp4"


BAD: dict[str, tuple[Make, str]] = {
    "mp3": (lambda folder: write_sound(folder / "a.mp3", "libmp3lame"), NO_VIDEO),
    "m4a": (lambda folder: write_sound(folder / "a.m4a", "aac"), NO_VIDEO),
    "sound in an mp4": (lambda folder: write_sound(folder / "a.mp4", "aac"), NO_VIDEO),
    "album": (album, r"holds no video \(only a picture, audio\)"),
    "empty": (empty, r"empty\.mp4 can't be read: Invalid data found .*\. Expected a photo, or a video that FFmpeg"),
    "text": (text, r"text\.mp4 can't be read: .*\. Expected a photo, or a video that FFmpeg decodes\."),
    "index at the end": (index_at_the_end, r"end\.mp4 can't be read: Invalid data found .* Expected a photo, or a vid"),
    "no frame": (lambda folder: frameless(folder / "a.avi"), r"a\.avi has no frame\. Expected a video with at"),
    "no frame, nor stream": (lambda folder: frameless(folder / "a.mp4"), r"a\.mp4 holds no video\. Expected a"),
    "no frame, nor end": (lambda folder: frameless(folder / "a.mkv"), r"a\.mkv can't be read: End of file\. Expected"),
    "codec": (unknown_codec, r"codec\.mp4 can't be read: FFmpeg has no decoder for its pictures\. Expected"),
    "too wide": (too_wide, r"wide\.mp4 has frames of 25600x96 pixels\. Expected at most 16384 on a side\."),
    "large png": (lambda folder: png(folder / "a.png", 50_000, 50_000),
                  r"a\.png can't be read: damaged: Image size \(2500000000 pixels\) exceeds limit .*[^.]\. Expected"),
    "long png": (lambda folder: png(folder / "a.png", 50_000, 500),
                 r"a\.png can't be read: 50000x500 pixels; a photo has 8 to 16384 on a side\. Expected a photo\."),
    "half a png": (lambda folder: png(folder / "a.png", 300, 300), r"a\.png can't be read: damaged: .*trunc"),
    "half a jpeg": (lambda folder: spoilt(write_photo(folder / "a.jpg", noisy(1)[0]), keep=0.5),
                    r"a\.jpg can't be read: damaged: image file is truncated"),
    "empty jpeg": (lambda folder: spoilt(write_photo(folder / "a.jpg", picture()), keep=0),
                   r"a\.jpg can't be read: the file is empty"),
    "video called a photo": (lambda folder: shutil.move(write_clip(folder / "a.mp4", moving(2)), folder / "a.jpg"),
                             r"a\.jpg can't be read: not an image\. Expected a photo\."),
    "pipe": (pipe, r"pipe\.mp4 can't be read: not a regular file"),
    "gone": (lambda folder: folder / "gone.mp4", r"gone\.mp4 can't be read: No such file"),
    "gone photo": (lambda folder: folder / "gone.jpg", r"gone\.jpg can't be read: No such file"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_a_bad_file_is_named_with_the_reason(name: str, tmp_path: Path) -> None:
    make, message = BAD[name]
    with pytest.raises(DamagedMediaError, match=message) as caught:
        frames_of(make(tmp_path))
    assert str(tmp_path) in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1
    assert ".." not in str(caught.value)


def until_the_damage(path: Path) -> tuple[list[Frame], str]:
    """Return the frames that come before an error, and its message."""
    frames: list[Frame] = []
    with pytest.raises(DamagedMediaError) as caught:
        frames.extend(read_frames(Media(path, path.stem)))  # keeps what came before
    return frames, str(caught.value)


def test_a_video_that_is_cut_short_gives_what_is_there_and_says_how_to_have_it(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "fast.mp4", noisy(40), options={"movflags": "faststart"}, qp="20", g="10")
    whole = frames_of(path)
    frames, message = until_the_damage(spoilt(path, keep=0.6))
    assert 10 < len(frames) < 35
    for frame, expected in zip(frames, whole, strict=False):
        np.testing.assert_array_equal(frame.pixels, expected.pixels)
    last = frames[-1].timestamp
    assert f"can't be read beyond {last:.2f} s: it is cut short. Expected a whole video." in message
    assert message.endswith(f"what comes before can be had with --to {last:g}.")


def test_a_video_whose_frames_are_all_missing_advises_nothing_that_is_refused(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "fast.mp4", noisy(20), options={"movflags": "faststart"}, qp="20")
    content = path.read_bytes()
    path.write_bytes(content[: content.index(b"mdat") + 4])
    frames, message = until_the_damage(path)
    assert frames == []
    assert message.endswith("it is cut short: 0 of 20 frames are there. Expected a whole video. Mend or convert it.")


def test_frames_that_are_missing_at_the_end_are_noticed_where_the_cut_lies_between_two(tmp_path: Path) -> None:
    path = write_clip(tmp_path / "fast.mp4", noisy(20), options={"movflags": "faststart"}, qp="20")
    with av.open(str(path)) as container:
        last = max(packet.pos for packet in container.demux(video=0) if packet.size)
    path.write_bytes(path.read_bytes()[:last])
    assert "it is cut short: 19 of 20 frames are there" in until_the_damage(path)[1]


@pytest.mark.parametrize(("codec", "ending"), [("libx264", "mp4"), ("mpeg4", "mp4"), ("mpeg4", "avi")])
def test_frames_that_are_damaged_keep_their_rows_and_are_marked(codec: str, ending: str, tmp_path: Path) -> None:
    path = write_clip(tmp_path / f"clip.{ending}", noisy(30), codec=codec, g="10")
    whole = frames_of(path)
    assert not any(frame.damaged for frame in whole)
    frames = frames_of(spoilt(path, damage=0.5))
    assert [frame.timestamp for frame in frames] == [frame.timestamp for frame in whole]
    wrong = [frame.number for frame, other in zip(frames, whole, strict=True) if (frame.pixels != other.pixels).any()]
    marked = [frame.number for frame in frames if frame.damaged]
    assert marked == wrong[: len(marked)] != [], "later frames that rest on them look right to the decoder"


PLAYLIST = "#EXTM3U\n#EXT-X-TARGETDURATION:10\n#EXTINF:10,\n{}\n#EXT-X-ENDLIST\n"
SCRIPT = "ffconcat version 1.0\nfile '{}'\n"


@pytest.mark.parametrize("ending", ["mp4", "ts", "mkv"])
@pytest.mark.parametrize("words", [PLAYLIST, SCRIPT])
def test_a_playlist_opens_no_other_file(
    words: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    target = write_clip(Path("secret.ts"), moving(3))
    assert len(frames_of(target)) == 3
    listed = tmp_path / f"list.{ending}"
    listed.write_text(words.format(target))
    with pytest.raises(DamagedMediaError, match=r"can't be read: Invalid "):
        frames_of(listed)


def test_a_name_that_is_no_text_is_refused_with_its_bytes(tmp_path: Path) -> None:
    path = tmp_path / os.fsdecode(b"caf\xe9.png")
    Image.fromarray(picture()).save(os.fsencode(path).decode("latin-1").encode("latin-1"), format="PNG")
    with pytest.raises(DamagedMediaError, match=r"caf\\xe9\.png' is not valid UTF-8.* Rename it\."):
        frames_of(path)


def test_a_photo_larger_than_any_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(media_module, "LARGEST_PHOTO", 100)
    with pytest.raises(InputError, match=r"it has [\d,]+ bytes, of which at most 100 are read"):
        frames_of(write_photo(tmp_path / "a.png", picture()))
