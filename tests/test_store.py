"""The store: what goes in comes out, whoever wrote it, however it was begun again."""

import errno
import hashlib
import io
import json
import os
import pickle
import shutil
import tarfile
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors import safe_open
from store_codecs import TinyCodes, TinyGaussian
from torch.utils.data import DataLoader

import omnilatent
import omnilatent.store.reading as reading_module
import omnilatent.store.shards as shards_module
from omnilatent.cli.export import export_store
from omnilatent.data import EvaluationImages, open_images
from omnilatent.data.folders import ImageFiles
from omnilatent.data.structured import StructuredImages
from omnilatent.errors import UserError
from omnilatent.latent import Codes, DiagonalGaussian, Point
from omnilatent.store import Description, EncodeConfig, EncodeReport, Encoding, LatentStore, Store, StoreWriter
from omnilatent.store.files import temporary_name
from omnilatent.store.moments import ChannelMoments
from omnilatent.store.packing import bits_for, pack, packed_bytes, unpack
from omnilatent.store.planning import shares
from omnilatent.store.shards import index_file, shard_file, shard_numbers
from omnilatent.store.webdataset import export_webdataset

DESCRIBED = Description("features", {"network": "n", "tensors": {"mean": "float32"}})


def picture(path: Path, seed: int, size: tuple[int, int] = (24, 20)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (*size, 3), dtype=np.uint8)).save(path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    for i in range(11):
        picture(tmp_path / "photos" / f"{i:02}.png", i, (24, 20 + i))
    return tmp_path / "photos"


def encode(data: Path | str, store: Path, codec: omnilatent.Codec | None = None, **more: object) -> EncodeReport:
    config = EncodeConfig(**{"size": 16, "batch_size": 4, "rows_per_shard": 4, **more})
    return Encoding(codec or TinyGaussian(), open_images(data), store, config).run()


def lines(store: Path) -> list[dict]:
    """All rows of all indexes, without their heads."""
    return [json.loads(line) for number in shard_numbers(store)
            for line in index_file(store, number).read_text().splitlines()[1:]]


def same_rows(a: Path, b: Path) -> None:
    """Equal keys, tensors to the bit, and fields."""
    left, right = LatentStore(a), LatentStore(b)
    assert list(left.keys) == list(right.keys) and len(left)
    for row in range(len(left)):
        assert left.fields(row) == right.fields(row)
        assert left.shapes(row) == right.shapes(row)
        for name in left.description.about["tensors"]:
            np.testing.assert_array_equal(left.array(row, name), right.array(row, name))


# ---- the codec's latents ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("workers", [0, 2])
def test_rows_are_the_codecs_latents(photos: Path, tmp_path: Path, workers: int) -> None:
    codec = TinyGaussian()
    report = encode(photos, tmp_path / "store", codec, logvar=True, store_dtype="float32", workers=workers)
    assert (report.new, report.rows, report.copies, report.skipped) == (11, 11, 0, 0)
    store = LatentStore(tmp_path / "store")
    for row, (key, image) in enumerate(EvaluationImages(open_images(photos), 16)):
        expected, found = codec.encode(image[None]), store.latent(row)
        assert store.keys[row] == key and isinstance(found, DiagonalGaussian) and found.size == (16, 16)
        torch.testing.assert_close(store[row][None], expected.mode(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.mode(), expected.mode(), rtol=0, atol=1e-6)
        torch.testing.assert_close(found.logvar, expected.logvar, rtol=0, atol=1e-6)
        torch.testing.assert_close(codec.decode(found), codec.decode(expected), rtol=0, atol=1e-6)
    assert all(seconds > 0 for stage, seconds in report.stages.items() if stage != "wait" or not workers)
    assert report.limit in report.rates


def test_statistics_are_those_of_the_rows(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "00.png", photos / "copy.png")  # counts once
    encode(photos, tmp_path / "store")
    store = LatentStore(tmp_path / "store")
    rows = store.batch([row for row in range(len(store)) if store.keys[row] != "copy.png"]).double()
    torch.testing.assert_close(store.mean, rows.mean((0, 2, 3)).float())
    torch.testing.assert_close(store.std, rows.std((0, 2, 3), correction=0).float())
    said = json.loads((tmp_path / "store" / "store.json").read_text())["summary"]
    assert said["rows"] == 12 and said["contents"] == 11
    torch.testing.assert_close(torch.tensor(said["moments"]["mean"]["std"]), store.std)


def test_the_summary_follows_a_shard_that_was_replaced(photos: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    encode(photos, store)
    before = (store / "store.json").read_text()
    encode(photos, store)
    assert (store / "store.json").read_text() == before  # nothing to do
    last = shard_numbers(store)[-1]
    index_file(store, last).unlink()
    shard_file(store, last).unlink()
    for path in photos.iterdir():  # three rows, as before
        if path.name in ("08.png", "09.png", "10.png"):
            picture(path, int(path.stem) + 50)
    assert encode(photos, store).new == 3 and shard_numbers(store)[-1] == last
    summary = json.loads((store / "store.json").read_text())["summary"]
    found = torch.tensor(summary["moments"]["mean"]["mean"])
    torch.testing.assert_close(found, LatentStore(store).mean)
    assert not torch.allclose(found, torch.tensor(json.loads(before)["summary"]["moments"]["mean"]["mean"]), atol=1e-6)


def test_images_in_their_own_sizes(tmp_path: Path) -> None:
    sizes = [(24, 20), (24, 20), (17, 31), (24, 20), (40, 9), (17, 31), (24, 20)]
    for i, size in enumerate(sizes):
        picture(tmp_path / "photos" / f"{i}.png", i, size)
    codec = TinyGaussian()
    encode(tmp_path / "photos", tmp_path / "store", codec, size=None, batch_size=2, store_dtype="float32")
    store = LatentStore(tmp_path / "store")
    for row, (_, image) in enumerate(EvaluationImages(open_images(tmp_path / "photos"), None)):
        assert store.size(row) == sizes[row]
        torch.testing.assert_close(codec.decode(store.latent(row)), codec.reconstruct(image[None]), rtol=0, atol=1e-6)
    assert store.batch([0, 3, 6]).shape == (3, 4, 6, 5)
    with pytest.raises(ValueError, match=r"rows of the shapes \(4, 5, 8\), \(4, 6, 5\) make no batch"):
        store.batch([0, 2])
    with pytest.raises(ValueError, match="one latent object has one size"):
        store.latent([0, 4])


@pytest.mark.parametrize("workers", [0, 2])
def test_large_pictures_wait_in_small_numbers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, workers: int
) -> None:
    sizes = [(24, 20)] * 9 + [(200, 300), (10, 10), (24, 20)] + [(100, 90)] * 3
    for i, size in enumerate(sizes):
        picture(tmp_path / "photos" / f"{i:02}.png", i, size)
    encode(tmp_path / "photos", tmp_path / "whole", size=None, store_dtype="float32")
    held: list[int] = []
    batches: list[int] = []

    def noted(real: Callable, pixels: list[int], measure: Callable[..., int]) -> Callable:
        def call(self: object, *given: object) -> object:
            pixels.append(measure(*given))
            return real(self, *given)
        return call

    monkeypatch.setattr(reading_module, "READY", 2_000 * 2 * max(1, workers))
    monkeypatch.setattr("omnilatent.store.encoding.WAITING", 2_000)
    monkeypatch.setattr(Encoding, "_sort", noted(
        Encoding._sort, held, lambda handful, *_: sum(p[..., 0].numel() for p in handful.pixels.values())))
    monkeypatch.setattr(Encoding, "_start", noted(
        Encoding._start, batches, lambda batch, _: batch.pixels[..., 0].numel()))
    encode(tmp_path / "photos", tmp_path / "store", size=None, store_dtype="float32", workers=workers, batch_size=8)
    assert sum(held) == sum(height * width for height, width in sizes)
    for pixels in (held, batches):  # below the limit, and one more picture
        assert max(pixels) <= 2_000 + 200 * 300 and sum(count > 2_000 + 24 * 20 for count in pixels) == 4
    few, many = LatentStore(tmp_path / "store"), LatentStore(tmp_path / "whole")
    assert list(few.keys) == list(many.keys)
    for row in range(len(sizes)):
        torch.testing.assert_close(few[row], many[row], rtol=0, atol=1e-6)


@pytest.mark.parametrize(("size", "books"), [(2, 0), (100, 0), (1000, 3)])
def test_codes_are_packed_and_come_back(photos: Path, tmp_path: Path, size: int, books: int) -> None:
    codec = TinyCodes(size, books)
    encode(photos, tmp_path / "store", codec)
    store = LatentStore(tmp_path / "store")
    images = torch.stack([image for _, image in EvaluationImages(open_images(photos), 16)])
    expected = codec.encode(images)
    assert torch.equal(store.batch(range(11)), expected.indices)
    assert store.array(0, "codes").nbytes == -(-16 * max(1, books) * bits_for(size) // 8)
    found = store.latent([3, 1], codec)
    assert isinstance(found, Codes) and torch.equal(found.quantized, expected.quantized[[3, 1]])
    with pytest.raises(UserError, match=r"holds codes, which only their tokenizer turns into a latent"):
        store.latent(0)
    with pytest.raises(UserError, match="there are no channel statistics"):
        _ = store.mean


def test_codes_export_as_small_integers(photos: Path, tmp_path: Path) -> None:
    encode(photos, tmp_path / "store", TinyCodes(1000))
    store = LatentStore(tmp_path / "store")
    assert export_webdataset(store, tmp_path / "tars", 100) == 1
    with tarfile.open(tmp_path / "tars" / "000000.tar") as tar:
        codes = np.load(io.BytesIO(tar.extractfile("07.codes.npy").read()))
    assert codes.dtype == np.uint16
    with pytest.raises(UserError, match="holds codes, which are integers: leave out --dtype"):
        export_store(tmp_path / "store", tmp_path / "more", 100, "float16")
    np.testing.assert_array_equal(codes, store[store.find("07.png")].numpy())


def test_synthetic_images_are_rows_too(tmp_path: Path) -> None:
    source = StructuredImages(length=5, size=16)
    for expected in (5, 0):
        config = EncodeConfig(size=16, batch_size=4)
        assert Encoding(TinyGaussian(), source, tmp_path / "store", config).run().new == expected


def test_what_is_not_finite_is_refused_with_its_key(photos: Path, tmp_path: Path) -> None:
    codec = TinyGaussian()
    codec.module[0].bias.data[0] = 1e6
    with pytest.raises(UserError, match=r"The mean of 00\.png is not finite in float16: store it as float32"):
        encode(photos, tmp_path / "store", codec)
    assert encode(photos, tmp_path / "wide", codec, store_dtype="float32").new == 11


def test_float16_waits_for_the_device_once_a_batch(monkeypatch: pytest.MonkeyPatch) -> None:
    codec, real, waits = TinyGaussian().to(dtype=torch.float16), torch.Tensor.__bool__, []

    def counted(tensor: torch.Tensor) -> bool:
        waits.append(tensor.shape)
        return real(tensor)

    monkeypatch.setattr(torch.Tensor, "__bool__", counted)
    images = torch.rand(2, 3, 16, 16)
    codec.encode(images)
    assert len(waits) == 1
    codec.to(dtype=torch.bfloat16).encode(images)
    assert len(waits) == 1


@pytest.mark.parametrize(("enough", "more", "expected"), [
    (11, {}, 1), (12, {}, 0), (11, {"compile": False}, 0), (11, {"size": None}, 0)])
def test_a_codec_is_compiled_for_many_images_only(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, enough: int, more: dict, expected: int
) -> None:
    monkeypatch.setattr("omnilatent.store.encoding.WORTH_COMPILING", enough)
    codec, calls = TinyGaussian(), []
    monkeypatch.setattr(codec, "compile", lambda: calls.append(codec))
    for times in (expected, expected):  # the second time there is nothing left to do
        report = encode(photos, tmp_path / "store", codec, **{"compile": True, **more})
        assert len(calls) == times
    assert not report.compiled and report.unchanged == 11


def test_no_posterior_no_logvar(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="pixels makes no posterior, so there is no log-variance to store: leave out"):
        encode(photos, tmp_path / "store", omnilatent.load("pixels"), logvar=True)


# ---- going on ------------------------------------------------------------------------------------------------------


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The files that are opened."""
    opened: list[str] = []
    real = ImageFiles.stored_bytes

    def counted(self: ImageFiles, i: int) -> bytes:
        opened.append(self.key(i))
        return real(self, i)

    monkeypatch.setattr(ImageFiles, "stored_bytes", counted)
    return opened


def test_a_grown_folder_costs_its_new_files(photos: Path, tmp_path: Path, reads: list[str]) -> None:
    encode(photos, tmp_path / "store")
    reads.clear()
    picture(photos / "deeper" / "new.png", 99)
    picture(photos / "0.png", 98)
    report = encode(photos, tmp_path / "store")
    assert sorted(reads) == ["0.png", "deeper/new.png"] and (report.new, report.unchanged, report.rows) == (2, 11, 13)
    encode(photos, tmp_path / "whole")
    same_rows(tmp_path / "store", tmp_path / "whole")
    reads.clear()
    before = shard_numbers(tmp_path / "store")
    assert encode(photos, tmp_path / "store").new == 0
    assert reads == [] and shard_numbers(tmp_path / "store") == before


@pytest.mark.parametrize("batch_size", [1, 4])
def test_equal_contents_are_encoded_once(photos: Path, tmp_path: Path, batch_size: int) -> None:
    for i in range(4):  # two of them beside each other, one in an earlier shard, one far behind
        shutil.copy(photos / "03.png", photos / f"{i * 3:02}-copy.png")
    report = encode(photos, tmp_path / "store", batch_size=batch_size)
    assert (report.new, report.copies, report.rows) == (11, 4, 15)
    store = LatentStore(tmp_path / "store")
    original = store.find("03.png")
    for i in range(4):
        row = store.find(f"{i * 3:02}-copy.png")
        assert store.index.place[row].tolist() == store.index.place[original].tolist()
        assert store.size(row) == (16, 16) and torch.equal(store[row], store[original])


def test_a_copy_of_what_an_earlier_run_encoded_is_not_decoded(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode(photos, tmp_path / "store")
    shutil.copy(photos / "05.png", photos / "again.png")
    os.utime(photos / "06.png")  # touched, not changed
    monkeypatch.setattr(ImageFiles, "decode", lambda *_: pytest.fail("decoded"))
    report = encode(photos, tmp_path / "store")
    assert (report.new, report.copies, report.unchanged, report.rows) == (0, 2, 10, 12)
    store = LatentStore(tmp_path / "store")
    assert torch.equal(store[store.find("again.png")], store[store.find("05.png")])
    assert encode(photos, tmp_path / "store").unchanged == 12


def test_a_changed_file_has_a_new_row_and_one_only(photos: Path, tmp_path: Path) -> None:
    encode(photos, tmp_path / "store")
    old = LatentStore(tmp_path / "store").batch(range(11))
    picture(photos / "04.png", 77)
    report = encode(photos, tmp_path / "store")
    assert (report.new, report.unchanged, report.rows) == (1, 10, 11)
    store = LatentStore(tmp_path / "store")
    assert not torch.equal(store[4], old[4]) and store.keys[4] == "04.png" and len(store) == 11
    encode(photos, tmp_path / "whole")
    same_rows(tmp_path / "store", tmp_path / "whole")


def test_unreadable_files_are_skipped_until_they_change(photos: Path, tmp_path: Path, reads: list[str]) -> None:
    (photos / "bad.png").write_text("no picture")
    (photos / "gone.png").symlink_to(tmp_path / "nowhere.png")
    store = tmp_path / "store"
    report = encode(photos, store)
    assert (report.new, report.skipped, report.rows) == (11, 2, 11)
    listed = [json.loads(line) for line in (store / "skipped.jsonl").read_text().splitlines()]
    assert [row["file"] for row in listed] == ["bad.png", "gone.png"]
    assert "is not an image that Pillow" in listed[0]["reason"] and "does not exist (any more)" in listed[1]["reason"]
    reads.clear()
    before = shard_numbers(store)
    report = encode(photos, store)
    assert (report.skipped, report.given_up, reads) == (1, 1, ["gone.png"])  # what could not be opened is tried again
    assert shard_numbers(store) == before  # and says nothing new
    assert encode(photos, store, max_pixels=2**29).skipped == 2  # another reader
    picture(photos / "bad.png", 50)
    picture(tmp_path / "nowhere.png", 51)
    assert encode(photos, store).new == 2 and not (store / "skipped.jsonl").exists()
    (photos / "bad.png").write_text("spoilt again, with another length")
    assert encode(photos, store).rows == 12 and "bad.png" not in LatentStore(store).keys


def test_a_tar_that_grew_costs_no_encoding(tmp_path: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def pack_up(names: list[str]) -> None:
        with tarfile.open(tmp_path / "all.tar", "w") as tar:
            for name in names:
                tar.add(photos / name, name)

    names = sorted(os.listdir(photos))
    pack_up(names[:6])
    assert encode(tmp_path / "all.tar", tmp_path / "store").new == 6
    pack_up(names)
    report = encode(tmp_path / "all.tar", tmp_path / "store")
    assert (report.new, report.copies, report.rows) == (5, 6, 11)
    assert encode(tmp_path / "all.tar", tmp_path / "store").unchanged == 11
    assert LatentStore(tmp_path / "store").keys[0] == "all.tar/00.png"


def test_asked_to_stop_it_keeps_what_is_done(photos: Path, tmp_path: Path) -> None:
    stop: list[int] = []
    config = EncodeConfig(size=16, batch_size=4, rows_per_shard=100)
    encoding = Encoding(TinyGaussian(), open_images(photos), tmp_path / "store", config)
    report = encoding.run(stop, progress=lambda count: stop.append(count) if not stop else None)
    assert report.stopped and 4 <= report.new == len(LatentStore(tmp_path / "store")) <= 8
    assert encode(photos, tmp_path / "store").rows == 11
    encode(photos, tmp_path / "whole")
    same_rows(tmp_path / "store", tmp_path / "whole")


# ---- refusals ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("change", "sentence"), [
    ({"codec": TinyGaussian(1)}, r"holds rows with weights 0000000000000000, and this run would add rows with weights "
                                 r"0000000000000001, which are not mixed: give the same as before, or another folder"),
    ({"codec": TinyGaussian().to(dtype=torch.bfloat16)}, "rows with dtype float32, and .* with dtype bfloat16"),
    ({"size": 20}, "rows with preprocessing size 16, and .* with preprocessing size 20"),
    ({"size": None}, "preprocessing resize .* and this run would add rows with preprocessing resize none"),
    ({"store_dtype": "float32"}, "rows with tensors mean float16, and .* with tensors mean float32"),
    ({"logvar": True}, "rows with tensors logvar none, and .* with tensors logvar float16"),
])
def test_what_differs_is_not_mixed_in(photos: Path, tmp_path: Path, change: dict, sentence: str) -> None:
    encode(photos, tmp_path / "store")
    before = shard_numbers(tmp_path / "store")
    picture(photos / "new.png", 42)
    with pytest.raises(UserError, match=sentence):
        encode(photos, tmp_path / "store", **change)
    assert shard_numbers(tmp_path / "store") == before


def same_size(path: Path, seed: int) -> None:
    """A bitmap of 20 × 24 pixels: all of them have one size in bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 255, (20, 24, 3), dtype=np.uint8)).save(path, "BMP")


@pytest.mark.parametrize("make", [picture, same_size])
@pytest.mark.parametrize("name", ["other", "elsewhere/photos"])  # a folder of the same name is another folder too
def test_another_folders_files_of_the_same_names_are_refused(
    tmp_path: Path, make: Callable[[Path, int], None], name: str
) -> None:
    data, other, store = tmp_path / "photos", tmp_path / name, tmp_path / "store"
    for i in range(3):
        make(data / f"{i}.png", i)
    encode(data, store)
    make(other / "new.png", 8)
    assert encode(other, store).new == 1  # names that differ go together
    make(other / "1.png", 7)
    with pytest.raises(UserError, match=rf"row 1\.png was made of a file in {data}, and the file of that name in "
                                        rf"{other} is another: encode the folder .* new place, add --moved\."):
        encode(other, store)
    assert LatentStore(store).fields(1)["sha256"] == hashlib.sha256((data / "1.png").read_bytes()).hexdigest()


@pytest.mark.parametrize("keep_times", [True, False])
def test_a_folder_that_moved_goes_on(photos: Path, tmp_path: Path, keep_times: bool) -> None:
    store, moved = tmp_path / "store", tmp_path / "moved"
    encode(photos, store)
    shutil.copytree(photos, moved, copy_function=shutil.copy2 if keep_times else shutil.copy)
    if not keep_times:
        os.utime(moved / "03.png", (1, 1))
    report = encode(moved, store)
    assert report.new == 0 and report.unchanged + report.copies == 11
    shutil.rmtree(photos)
    picture(moved / "04.png", 77)
    if keep_times:  # else every row was written anew, from the new place
        with pytest.raises(UserError, match=r"row 04\.png was made of a file in .*photos, .* add --moved"):
            encode(moved, store)
    assert encode(moved, store, moved=True).new == 1
    picture(moved / "05.png", 78)
    assert encode(moved, store).new == 1  # the new place is known now
    assert len(LatentStore(store)) == 11


def test_a_folder_of_other_things_is_left_alone(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds other things than a store \(\d\d\.png\): give a new folder"):
        encode(photos, photos)
    with pytest.raises(UserError, match="is no store: it has no store.json"):
        Store(photos)
    with pytest.raises(UserError, match="does not exist; make one with 'omnilatent encode NAME DATA --out"):
        LatentStore(tmp_path / "nowhere")


def test_damage_is_named(photos: Path, tmp_path: Path) -> None:
    encode(photos, tmp_path / "store")
    shutil.copytree(tmp_path / "store", tmp_path / "cut")
    index = index_file(tmp_path / "cut", 1)
    index.write_text(index.read_text()[:-20])
    with pytest.raises(UserError, match=r"00001\.jsonl is not a whole index"):
        len(LatentStore(tmp_path / "cut"))
    os.truncate(shard_file(tmp_path / "store", 0), 100)
    with pytest.raises(UserError, match=r"00000\.safetensors is not a whole shard"):
        LatentStore(tmp_path / "store").batch(range(11))
    shard_file(tmp_path / "store", 0).unlink()
    with pytest.raises(UserError, match=r"00000\.safetensors is missing"):
        LatentStore(tmp_path / "store").batch(range(11))
    encode(photos, tmp_path / "other", TinyGaussian(1))
    shutil.copy(index_file(tmp_path / "other", 0), index_file(tmp_path / "store", 7))
    with pytest.raises(UserError, match=r"00007\.jsonl belongs to another store"):
        len(LatentStore(tmp_path / "store"))


def test_a_newer_format_is_refused(photos: Path, tmp_path: Path) -> None:
    encode(photos, tmp_path / "store")
    file = tmp_path / "store" / "store.json"
    fields = json.loads(file.read_text())
    fields["omnilatent"]["format"] = 99
    file.write_text(json.dumps(fields))
    with pytest.raises(UserError, match=r"format 99; this version reads up to 1\): upgrade"):
        LatentStore(tmp_path / "store")


def test_a_full_disk_keeps_the_committed_shards(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = shards_module.write_tensors, []

    def full(path: Path, tensors: dict) -> int:
        calls.append(path)
        if len(calls) == 2:
            path.write_bytes(b"half")
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(path, tensors)

    monkeypatch.setattr(shards_module, "write_tensors", full)
    with pytest.raises(UserError, match=r"The disk is full .* free space and repeat the command, which goes on after "
                                        "the 1 shards that are there"):
        encode(photos, tmp_path / "store")
    assert len(LatentStore(tmp_path / "store")) == 4
    assert not list((tmp_path / "store").rglob(".writing-*"))
    assert encode(photos, tmp_path / "store").new == 7


# ---- several writers -----------------------------------------------------------------------------------------------


def test_two_parts_are_one_store(photos: Path, tmp_path: Path) -> None:
    shutil.copy(photos / "00.png", photos / "copy.png")
    encode(photos, tmp_path / "whole")
    threads = [threading.Thread(target=encode, args=(photos, tmp_path / "store", TinyGaussian()),
                                kwargs={"part": part, "parts": 2}) for part in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    same_rows(tmp_path / "store", tmp_path / "whole")
    assert len(lines(tmp_path / "store")) == 12  # none twice
    said = json.loads((tmp_path / "store" / "store.json").read_text())["summary"]
    assert said["rows"] == 12 and said["contents"] == 11  # copies were in one part


def test_shares_are_even_and_keep_equal_sizes_together() -> None:
    rng = np.random.default_rng(0)
    sizes = rng.integers(10_000, 40_000, 20_000)
    share = shares(sizes, [str(i) for i in range(len(sizes))], 4)
    assert np.abs(np.bincount(share, minlength=4) - 5_000).max() < 300
    assert all(len(set(share[sizes == size])) == 1 for size in np.unique(sizes)[:500])


def test_files_of_one_size_are_shared_out() -> None:
    share = shares(np.full(4_000, 196_662), [f"{i}.bmp" for i in range(4_000)], 4)
    assert np.abs(np.bincount(share, minlength=4) - 1_000).max() < 150


def test_processes_that_see_different_stages_of_a_growing_folder_agree() -> None:
    sizes = np.random.default_rng(0).integers(10_000, 10**6, 5_001)
    keys = [f"{i}.jpg" for i in range(len(sizes))]
    before, after = shares(sizes[:-1], keys[:-1], 3), shares(sizes, keys, 3)
    assert np.array_equal(before, after[:-1])


# ---- the generic core ----------------------------------------------------------------------------------------------


def test_any_named_tensors_and_fields(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    features = rng.normal(size=(6, 3, 2)).astype(np.float32)
    tokens = rng.integers(0, 9, (6, 5)).astype(np.int64)
    with StoreWriter(tmp_path / "store", DESCRIBED, "test", rows_per_shard=4) as writer:
        for at in range(0, 6, 2):
            rows = [{"key": f"k{i}", "caption": f"no. {i}"} for i in (at, at + 1)]
            writer.add(rows, {"mean": features[at : at + 2], "tokens": tokens[at : at + 2]})
        writer.add([{"key": "other"}], {"mean": np.zeros((1, 3, 7), np.float32), "tokens": tokens[:1]})
    store = Store(tmp_path / "store")
    np.testing.assert_array_equal(store.arrays([4, 0, 5], "mean"), features[[4, 0, 5]])
    np.testing.assert_array_equal(store.arrays([-2], "tokens"), tokens[5:])
    assert store.fields(3) == {"key": "k3", "caption": "no. 3"} and store.shapes(6)["mean"] == (3, 7)
    with pytest.raises(UserError, match="have no logvar: they have mean, tokens"):
        store.array(0, "logvar")
    with pytest.raises(UserError, match="is a store of features, not of latents"):
        LatentStore(tmp_path / "store")
    with safe_open(shard_file(tmp_path / "store", 0), "np") as file:  # the format is safetensors' own
        assert set(file.keys()) == {"mean.0", "tokens.0"}
        np.testing.assert_array_equal(file.get_tensor("mean.0"), features[:4])


def test_readers_pass_over_what_was_not_committed_and_writers_sweep_it_up(tmp_path: Path) -> None:
    folder = tmp_path / "store"
    with StoreWriter(folder, DESCRIBED) as writer:
        writer.add([{"key": "a"}], {"mean": np.ones((1, 2), np.float32)})
    shard_file(folder, 1).write_bytes(b"")  # claimed, long ago
    os.utime(shard_file(folder, 1), (0, 0))
    shard_file(folder, 2).write_bytes(b"")  # claimed just now: perhaps by another machine
    fresh, *old = [temporary_name(path) for path in (folder / "shards" / "shard", folder / "shards" / "shard",
                                                     folder / "store.json")]
    for half in (fresh, *old):
        half.write_bytes(b"half")
    for half in old:
        os.utime(half, (0, 0))
    with StoreWriter(folder, DESCRIBED) as other:
        assert not any(half.exists() for half in old) and not shard_file(folder, 1).exists()
        assert fresh.exists() and shard_file(folder, 2).exists()
        os.utime(fresh, (0, 0))
        with StoreWriter(folder, DESCRIBED):  # not alone
            assert fresh.exists()
        other.add([{"key": "b"}], {"mean": np.ones((1, 2), np.float32)})
    assert shard_numbers(folder) == [0, 3] and list(Store(folder).keys) == ["a", "b"]


def test_moments_merge_to_those_of_the_whole() -> None:
    rows = np.random.default_rng(0).normal(3, 2, (50, 4, 5)).astype(np.float32)
    whole, parts = ChannelMoments(), ChannelMoments()
    whole.update(rows)
    for at in range(0, 50, 7):
        part = ChannelMoments()
        part.update(rows[at : at + 7])
        parts.merge(ChannelMoments.from_json(json.loads(json.dumps(part.to_json()))))
    for moments in (whole, parts):
        np.testing.assert_allclose(moments.mean, rows.mean((0, 2)), rtol=1e-6)
        np.testing.assert_allclose(moments.std, rows.std((0, 2)), rtol=1e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), bits=st.integers(1, 18), near=st.integers(-1, 1), count=st.integers(0, 40), n=st.integers(1, 3))
def test_packing_is_exact_for_every_codebook(data: st.DataObject, bits: int, near: int, count: int, n: int) -> None:
    size = max(2, 2**bits + near)
    seed = data.draw(st.integers(0, 2**32 - 1))
    codes = np.random.default_rng(seed).integers(0, size, (n, count))
    codes[:, :1], codes[:, 1:2] = size - 1, 0
    rows = pack(codes, size)
    assert rows.shape == (n, packed_bytes(count, bits_for(size))) and 2 ** bits_for(size) >= size
    assert size == 2 or 2 ** (bits_for(size) - 1) < size
    np.testing.assert_array_equal(unpack(rows, count, size), codes)


def test_packed_codes_lie_as_documented() -> None:
    assert pack(np.array([[1, 2, 3, 4]]), 8).tolist() == [[0b11_010_001, 0b0000_100_0]]
    with pytest.raises(ValueError, match="codes from 0 to 8; the codebook has 0 to 7"):
        pack(np.array([[0, 8]]), 8)


# ---- reading -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, np.ndarray]:
    """300 rows in shards of 7 and of 40."""
    folder = tmp_path_factory.mktemp("large") / "store"
    rows = np.random.default_rng(0).normal(size=(300, 2, 3)).astype(np.float16)
    for begin, end, each in ((0, 100, 7), (100, 300, 40)):
        with StoreWriter(folder, DESCRIBED, rows_per_shard=each) as writer:
            for i in range(begin, end):
                writer.add([{"key": f"{i:03}"}], {"mean": rows[i : i + 1]})
    return folder, rows


@settings(max_examples=40, deadline=None)
@given(indices=st.lists(st.integers(-300, 299), min_size=1, max_size=80))
def test_a_batch_is_its_rows(large: tuple[Path, np.ndarray], indices: list[int]) -> None:
    np.testing.assert_array_equal(Store(large[0]).arrays(indices, "mean"), large[1][indices])


def test_rows_outside_are_refused(large: tuple[Path, np.ndarray]) -> None:
    store = Store(large[0])
    for outside in ([0, 300], [-301]):
        with pytest.raises(IndexError, match=r"row -?30\d of 300"):
            store.arrays(outside, "mean")
    with pytest.raises(IndexError):
        store.fields(300)
    with pytest.raises(ValueError, match="a batch of no rows"):
        store.arrays([], "mean")


def test_a_store_is_a_data_set_for_workers_and_pickles(photos: Path, tmp_path: Path) -> None:
    encode(photos, tmp_path / "store")
    store = omnilatent.LatentStore(tmp_path / "store")
    whole = store.batch(range(11))
    loader = DataLoader(store, batch_size=4, num_workers=1, multiprocessing_context="fork")
    assert torch.equal(torch.cat(list(loader)), whole)
    again = pickle.loads(pickle.dumps(store))
    assert torch.equal(again.batch(range(11)), whole) and torch.equal(torch.stack(list(again)), whole)
    first = store[0]
    first += 1  # a copy of its own: the file is not written to
    assert torch.equal(store[0], whole[0]) and isinstance(store.latent(0), Point)


def test_more_shards_than_file_descriptors(large: tuple[Path, np.ndarray]) -> None:
    resource = pytest.importorskip("resource")
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    store = Store(large[0])
    opened = os.open(os.devnull, os.O_RDONLY)  # the lowest free number
    os.close(opened)
    assert len(shard_numbers(large[0])) == 20
    resource.setrlimit(resource.RLIMIT_NOFILE, (opened + 6, before[1]))
    try:
        rows = store.arrays(range(300), "mean")
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    np.testing.assert_array_equal(rows, large[1])
    with pytest.raises(ValueError, match="read-only"):
        store.array(0, "mean")[0] = 1


def test_in_place_order_reads_every_row_once_front_to_back(large: tuple[Path, np.ndarray]) -> None:
    store = Store(large[0])
    order = store.in_place_order()
    assert sorted(order.tolist()) == list(range(300))
    assert store.index.place[order].tolist() == sorted(store.index.place.tolist())
