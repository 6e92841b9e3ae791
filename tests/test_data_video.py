"""Videos as images: every frame is the right one in any order, held out is a stretch of time, bad files say so."""

import pickle
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from clips import write_clip

from omnilatent.data import open_images, split
from omnilatent.data.video import VideoFrames
from omnilatent.errors import UserError

FRAMES = 60


def write_video(path: Path, frames: int = FRAMES, rate: int = 10) -> Path:
    """A clip of random blocks, no two frames alike, with keyframes every 12 frames."""
    rng = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=rate)
        stream.width, stream.height, stream.pix_fmt, stream.gop_size = 48, 32, "yuv420p", 12
        blocks = np.ones((8, 8, 1), np.uint8)
        for _ in range(frames):
            frame = av.VideoFrame.from_ndarray(np.kron(rng.integers(0, 256, (4, 6, 3), np.uint8), blocks), format="rgb24")
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path


@pytest.fixture(scope="module")
def clip(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_video(tmp_path_factory.mktemp("video") / "clip.mp4")


def test_every_frame_is_itself_in_any_order(clip: Path) -> None:
    with av.open(str(clip)) as container:
        frames = [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]
    assert len({frame.tobytes() for frame in frames}) == FRAMES  # no two alike, so an order can be told
    video = open_images(clip)
    assert len(video) == FRAMES and video.key(7) == "clip.mp4/000007"
    rng = np.random.default_rng(0)
    for i in [*range(FRAMES), *range(FRAMES - 1, -1, -1), *rng.integers(0, FRAMES, 40).tolist()]:
        assert (video.read(i) == frames[i]).all(), i


def test_it_travels_to_other_processes(clip: Path) -> None:
    video = VideoFrames(clip)
    video.read(10)
    again = pickle.loads(pickle.dumps(video))
    assert (again.read(20) == video.read(20)).all()


def test_held_out_is_the_end_of_each_video_after_a_gap(clip: Path, tmp_path: Path) -> None:
    train, held = split(open_images(clip), 0.2)
    assert [held.key(i) for i in range(len(held))] == [f"clip.mp4/{i:06}" for i in range(48, 60)]
    assert train.key(len(train) - 1) == "clip.mp4/000037"  # a second of ten frames is on neither side
    write_video(tmp_path / "a.mp4", 40)
    write_video(tmp_path / "b.mkv", 30)
    both = open_images(tmp_path)
    assert len(both) == 70
    train, held = split(both, 0.1)
    assert {held.key(i).split("/")[0] for i in range(len(held))} == {"a.mp4", "b.mkv"}
    assert not {train.key(i) for i in range(len(train))} & {held.key(i) for i in range(len(held))}


def test_bad_videos_are_one_sentence(tmp_path: Path, clip: Path) -> None:
    (tmp_path / "broken.mp4").write_bytes(b"no video" * 100)
    with pytest.raises(UserError, match=r"broken.mp4 is no video that can be read \(.*\): convert it to MP4"):
        open_images(tmp_path / "broken.mp4")
    (tmp_path / "broken.mp4").unlink()
    write_clip(tmp_path / "heard.mkv", frames=0, sound=torch.zeros(8_000))
    with pytest.raises(UserError, match=r"heard.mkv has no picture track \(its tracks: audio\): give a video"):
        open_images(tmp_path / "heard.mkv")
    (tmp_path / "heard.mkv").unlink()
    with pytest.raises(UserError, match="above the limit of 100: raise --max-pixels"):
        open_images(clip, max_pixels=100)
    np_picture = np.zeros((8, 8, 3), np.uint8)
    from PIL import Image

    Image.fromarray(np_picture).save(tmp_path / "a.png")
    mixed = open_images(f"{clip},{tmp_path / 'a.png'}")
    with pytest.raises(UserError, match="mixes videos and pictures"):
        split(mixed)


def test_a_far_jump_seeks_and_a_single_frame_is_on_one_side(tmp_path: Path) -> None:
    video = VideoFrames(write_video(tmp_path / "long.mp4", 300, rate=5))
    decoded = []
    video.read(0)
    frames = video._decoder
    assert frames is not None
    whole = frames._container.decode
    frames._container = type("Counted", (), {
        "decode": lambda self, stream: (decoded.append(1) or frame for frame in whole(stream)),
        "seek": lambda self, *place, **how: container.seek(*place, **how), "name": "long.mp4"})()
    container = whole.__self__
    video.read(299)
    assert len(decoded) <= 13  # from the last keyframe on, not 299
    train, held = VideoFrames(write_video(tmp_path / "one.mp4", 1)).stretches(0.1)
    assert len(train) == 1 and len(held) == 0


def test_a_store_refuses_a_video(clip: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from omnilatent.cli.main import main

    assert main(["encode", "kl-f8-small", str(clip), "--out", str(tmp_path / "store")]) == 2
    assert "holds a video" in capsys.readouterr().err and not (tmp_path / "store").exists()
