"""Videos: which frames, what is pooled, and a real clip through Dense Connector."""

import dataclasses
from pathlib import Path

import av
import jax
import numpy as np
import pytest
import torch
from PIL import Image

import converters
from vfjax import InputError, Video, open_video
from vfjax.architectures.base import bucket
from vfjax.model import Model
from vfjax.text.prompts import IMAGE_ID
from vfjax.vision.tiling import frame_indices

COUNT = 20
embed = jax.jit(Model.embed)


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    """A film whose k-th frame is grey of 12 k."""
    path = tmp_path_factory.mktemp("video") / "clip.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width, stream.height, stream.pix_fmt = 64, 48, "yuv420p"
        for k in range(COUNT):
            grey = np.full((48, 64, 3), 12 * k, np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(grey, format="rgb24")))
        container.mux(stream.encode(None))
    return path


@pytest.mark.parametrize("frames", [1, 8, 20, 30])
def test_frames_of_a_file(clip: Path, frames: int):
    video = open_video(clip, frames=frames)
    greys = [np.asarray(frame).mean() for frame in video.frames]
    np.testing.assert_allclose(greys, 12 * frame_indices(COUNT, frames), atol=5)
    assert {frame.size for frame in video.frames} == {(64, 48)}


def test_frames_of_pictures():
    pictures = [np.full((8, 8, 3), (k % 256, k // 256, 0), np.uint8) for k in range(300)]
    corners = [np.asarray(frame)[0, 0] for frame in open_video(pictures, frames=8).frames]
    found = [int(red) + 256 * int(green) for red, green, _ in corners]
    assert found == [18, 56, 93, 131, 168, 205, 243, 280]


def test_times_of_frames(clip: Path):
    """By the file's rate or one that is given; of pictures without, none."""
    video = open_video(clip, choose=lambda total, rate: [0, int(rate) + 1, total - 1])
    assert video.times == (0.0, 1.1, 1.9) and video.duration == 2.0
    pictures = [np.full((8, 8, 3), k, np.uint8) for k in range(6)]
    assert open_video(pictures, frames=2).times is None
    assert open_video(pictures, frames=2, rate=2).times == (0.5, 1.5)  # frames 1 and 3
    with pytest.raises(InputError, match="found frames without their rate"):
        open_video(pictures, choose=lambda total, rate: [0])
    with pytest.raises(InputError, match="found 1 time of 2 frames"):
        Video((Image.new("RGB", (4, 4)),) * 2, times=(0.0,))


@pytest.mark.parametrize("frames", [8, 32])
def test_a_real_clip_through_dense_connector(shared: Path, frames: int):
    """The LLM reads, of each frame, torch's MaxPool1d over its projected tokens."""
    model, processor = converters.load(shared / "golden" / "dc_dci")
    longer = dataclasses.replace(model.config.llm, context=16384)
    processor.config = dataclasses.replace(model.config, llm=longer)
    video = open_video(shared / "data" / "video" / "sample_demo_3.mp4", frames=frames)
    assert len(video.frames) == frames
    ids = [[1, 5, IMAGE_ID, 7, 8]]
    pooled = processor([video], input_ids=ids)
    tokens, mask = embed(model, pooled)
    assert mask.sum() == frames * 18 + 4

    ((_, inputs),) = pooled.images.items()
    assert len(inputs.given.pixels) == frames
    memory = jax.jit(Model.visual_tokens)(model, pooled.images)
    features = np.array(memory.values)[: frames * 36].reshape(frames, 36, -1)
    each = torch.from_numpy(features).permute(0, 2, 1)
    expected = torch.nn.functional.max_pool1d(each, 2).permute(0, 2, 1).flatten(0, 1).numpy()
    np.testing.assert_array_equal(np.asarray(tokens)[0, 2 : 2 + len(expected)], expected)

    all_of_them = processor([dataclasses.replace(video, pool=1)], input_ids=ids)
    whole, mask = embed(model, all_of_them)
    assert mask.sum() == frames * 36 + 4
    np.testing.assert_array_equal(
        np.asarray(whole)[0, 2 : 2 + frames * 36],
        features.reshape(frames * 36, -1),
    )


def test_rows_with_a_video_a_picture_and_none(shared: Path):
    """A batch reads what its rows read alone; an odd token is dropped from each frame."""
    model, processor = converters.load(shared / "golden" / "dc_anyres")
    rng = np.random.default_rng(0)
    frames = tuple(
        Image.fromarray(rng.integers(0, 256, (40, 60, 3), np.uint8), "RGB") for _ in range(3)
    )
    video, picture = Video(frames, pool=5), rng.integers(0, 256, (90, 30, 3), np.uint8)
    images: list = [[video], [picture, Video(frames[:1], pool=2)], []]
    rows = [[1, IMAGE_ID, 9], [1, IMAGE_ID, 4, IMAGE_ID], [1, 7]]
    batch = processor(images, input_ids=rows)
    ((_, inputs),) = batch.images.items()
    tokens = model.config.branches[0].architecture.side ** 2
    count = 3 * (tokens // 5) + tokens // 2
    assert inputs.gather.indices.shape == (bucket(count), 5)
    together, mask = embed(model, batch)
    assert mask.sum(axis=1).tolist()[2] == 2
    alone, own = embed(model, processor([video], input_ids=rows[:1]))
    found, expected = (
        np.asarray(together)[0][np.asarray(mask)[0]],
        np.asarray(alone)[np.asarray(own)],
    )
    np.testing.assert_allclose(found, expected, atol=1e-5 * np.abs(expected).max(), rtol=0)


def test_frames_are_padded_wholes_where_pictures_are_tiled(shared: Path):
    model, processor = converters.load(shared / "golden" / "dc_anyres")
    (branch,) = model.config.branches
    picture = Image.new("RGB", (60, 20), (200, 10, 10))
    path = branch.architecture
    ready = path.show([picture, picture], {1})
    tiles = len(ready.indices[0])
    assert tiles > path.side**2 == len(ready.indices[1])
    corner = ready.inputs.pixels[ready.indices[1][0] // path.side**2, 0, 0]
    assert np.abs(corner).max() < 0.02  # the mean colour


def test_models_that_read_the_prompt(shared: Path):
    """SliME sees whole frames; the prompt is there once a frame."""
    model, processor = converters.load(shared / "golden" / "slime_vicuna")
    frames = tuple(Image.new("RGB", (30, 40), (60 * k, 0, 0)) for k in range(2))
    batch = processor([Video(frames, pool=1)], input_ids=[[1, IMAGE_ID, 9, 8]])
    ((_, inputs),) = batch.images.items()
    assert not inputs.given.tile_mask.any()
    assert inputs.prompt.ids[:, :3].tolist() == [[1, 9, 8]] * 2
    tokens, mask = embed(model, batch)
    assert mask.sum() == 2 * 576 + 3
    assert np.isfinite(np.asarray(tokens)).all()


@pytest.mark.parametrize("kind", ["missing", "empty", "text", "cut", "sound"])
def test_bad_files(clip: Path, tmp_path: Path, kind: str):
    path = tmp_path / "film.mp4"
    if kind == "sound":
        path = tmp_path / "film.wav"
        with av.open(str(path), "w") as container:
            stream = container.add_stream("pcm_s16le", rate=8000)
            frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), np.int16), layout="mono")
            frame.sample_rate = 8000
            container.mux(stream.encode(frame))
            container.mux(stream.encode(None))
    elif kind != "missing":
        data = clip.read_bytes()
        path.write_bytes(
            {"empty": b"", "text": b"no film" * 50, "cut": data[: len(data) // 2]}[kind]
        )
    with pytest.raises(InputError, match=r"film\.\w+: found .*, expected ") as error:
        open_video(path)
    assert "\n" not in str(error.value)


def test_metadata_that_is_no_text(tmp_path: Path):
    """Tags of a film that are no UTF-8 do not matter."""
    path = tmp_path / "film.avi"
    with av.open(str(path), "w") as container:
        container.metadata["title"] = "QQQQ"
        stream = container.add_stream("mpeg4", rate=5)
        stream.width = stream.height = 16
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((16, 16, 3), np.uint8))))
        container.mux(stream.encode(None))
    assert path.read_bytes().count(b"QQQQ") == 1
    path.write_bytes(path.read_bytes().replace(b"QQQQ", b"\xff\xfe\xff\x96"))
    assert len(open_video(path, frames=1).frames) == 1


def test_times_that_are_none():
    frame = Image.new("RGB", (8, 8))
    for rate in (0, -1, float("nan")):
        with pytest.raises(InputError, match=f"found rate {rate}, expected a positive number"):
            open_video([frame], rate=rate)
        with pytest.raises(InputError, match=f"found a duration of {rate} seconds, expected"):
            Video((frame,), duration=rate)


def test_no_frames():
    with pytest.raises(InputError, match="found 0 frames"):
        open_video([])
    with pytest.raises(InputError, match="found 0 frames, pool 2"):
        Video(())
    for frames in (0, 10**12):
        with pytest.raises(InputError, match=f"{frames} wanted"):
            open_video([np.zeros((8, 8, 3), np.uint8)], frames=frames)
