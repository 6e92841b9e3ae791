"""`encode`, `decode` and `export --to webdataset`, through the one entry point."""

import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tarfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from store_codecs import REGISTERED, TinyGaussian

from omnilatent import hub
from omnilatent.cli.bench import Bench
from omnilatent.cli.bench import _store as bench_store
from omnilatent.cli.encode import Encode
from omnilatent.cli.encode import _config as encode_config
from omnilatent.cli.main import main
from omnilatent.cli.ranks import Ranks, joined
from omnilatent.codec import Codec
from omnilatent.data import EvaluationImages, open_images
from omnilatent.errors import UserError
from omnilatent.store import EncodeConfig, EncodeReport, Encoding, LatentStore, StoreWriter
from omnilatent.store.naming import picture_names, sample_names

DATA = Path(__file__).parents[1].parent / "shared" / "data"


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with photos/ and the codec NAME `tiny`."""
    for table, rows in REGISTERED.items():
        for name, value in rows.items():
            monkeypatch.setitem(getattr(hub, table), name, value)
    monkeypatch.chdir(tmp_path)
    for i, name in enumerate(("a.png", "a.webp", "deep.er/b.c.png", "z.png")):
        Path("photos", name).parent.mkdir(parents=True, exist_ok=True)
        pixels = np.random.default_rng(i).integers(0, 255, (20, 24, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(Path("photos", name))
    return tmp_path


def pixels_of(file: Path) -> np.ndarray:
    with Image.open(file) as image:
        return np.asarray(image)


def said(capsys: pytest.CaptureFixture[str]) -> str:
    output = capsys.readouterr()
    return " ".join((output.out + output.err).split())


ENCODE = ["encode", "tiny", "photos", "--out", "store", "--size", "16", "--workers", "0", "--device", "cpu"]


def test_encode_says_what_it_did_and_writes_it(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("photos/bad.png").write_text("no picture")
    assert main([*ENCODE, "--json", "figures/e.json"]) == 0
    text = said(capsys)
    assert "store: 4 rows (4 new)" in text and "1 unreadable image skipped, listed in store/skipped.jsonl" in text
    figures = json.loads(Path("figures/e.json").read_text())
    assert (figures["new"], figures["skipped"], figures["rows"], figures["workers"]) == (4, 1, 4, 0)
    assert f"limited by {figures['limit']}" in text and figures["pixel_bytes"] == 4 * 3 * 16 * 16
    assert set(figures["rates"]) >= {"read", "decode", "resize", "transfer", "encode", "write"}
    assert figures["weights_hash"] == TinyGaussian().provenance.weights_hash and figures["device"] == "cpu, float32"
    committed = sum(file.stat().st_size for file in Path("store/shards").iterdir())
    assert figures["stored_bytes"] == committed
    assert main(ENCODE) == 0
    assert "store: 4 rows (0 new, 4 unchanged)" in said(capsys)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_bench_measures_what_encode_does(device: str, here: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    configs: list[EncodeConfig] = []

    class Noted(Encoding):
        def __init__(self, codec: Codec, source: object, folder: Path, config: EncodeConfig) -> None:
            configs.append(config)

        def run(self) -> EncodeReport:
            return EncodeReport()

    monkeypatch.setattr("omnilatent.store.Encoding", Noted)
    encoding = Encode("tiny", "photos", Path("store"))
    benching = Bench("tiny", "photos")
    bench_store(TinyGaussian(), benching, device)
    theirs, ours = configs[0], encode_config(encoding, device, Ranks())
    assert (theirs.batch_size, theirs.workers, theirs.size) == (ours.batch_size, ours.workers, ours.size)
    assert ours.batch_size == (8 if device == "cpu" else 64)


def test_decode_gives_the_reconstructions(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENCODE, "--store-dtype", "float32"]) == 0
    assert main(["decode", "store", "--out", "out"]) == 0
    assert "out: 4 pictures written" in said(capsys)
    codec = TinyGaussian()
    names = {"a.png": "a.png.png", "a.webp": "a.webp.png", "deep.er/b.c.png": "deep.er/b.c.png", "z.png": "z.png"}
    for key, image in EvaluationImages(open_images("photos"), 16):
        expected = (codec.reconstruct(image[None])[0] * 255).round().byte().permute(1, 2, 0).numpy()
        np.testing.assert_array_equal(pixels_of(Path("out", names[key])), expected)
    Path("out/z.png").unlink()
    os.utime("out/a.png.png", (0, 0))
    assert main(["decode", "store", "--out", "out", "--codec", "tiny"]) == 0
    assert "1 picture written; 3 were there already" in said(capsys) and os.stat("out/a.png.png").st_mtime == 0
    assert main(["decode", "store", "--out", "out", "--overwrite"]) == 0 and os.stat("out/a.png.png").st_mtime > 0
    assert main(["decode", "store", "--out", "some", "--limit", "2", "--format", "jpg"]) == 0
    assert sorted(str(p.relative_to("some")) for p in Path("some").rglob("*.jpg")) == ["a.png.jpg", "deep.er/b.c.jpg"]


def test_pictures_of_another_store_do_not_pass_for_this_ones(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ENCODE) == 0
    assert main(["decode", "store", "--out", "photos"]) == 2
    assert "photos holds other things than decoded pictures (" in said(capsys)
    assert main(["decode", "store", "--out", "out"]) == 0
    before = pixels_of(Path("out/z.png"))
    assert main(["decode", "store", "--out", "out", "--dtype", "bfloat16"]) == 2
    assert f"from {here}/store in float32, and these are from {here}/store in bfloat16: give a new" in said(capsys)
    shutil.move("store", "first")
    Image.new("RGB", (20, 24)).save("photos/z.png")
    assert main(ENCODE) == 0
    assert main(["decode", "store", "--out", "out"]) == 2
    assert (f"out holds pictures that were decoded from an earlier {here}/store in float32, and these are from "
            f"{here}/store in float32: give a new folder.") in said(capsys)
    assert main(["decode", "first", "--out", "out"]) == 0  # a store may move
    assert "4 were there already" in said(capsys)
    np.testing.assert_array_equal(pixels_of(Path("out/z.png")), before)


def test_a_store_is_no_folder_of_images_but_its_pictures_are(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ENCODE) == 0
    sentence = ("omnilatent: store is a store, not a folder of images: give the images it was made from, or decode it "
                "first with 'omnilatent decode store --out PICTURES'.")
    assert main(["encode", "tiny", "store", "--out", "again", "--workers", "0"]) == 2
    assert sentence in said(capsys) and not Path("again").exists()
    assert main(["compare", "pixels", "--data", "store", "--out", "report"]) == 2
    assert sentence in said(capsys)
    assert main(["decode", "store", "--out", "PICTURES"]) == 0
    assert main(["encode", "tiny", "PICTURES", "--out", "again", "--size", "16", "--workers", "0"]) == 0
    assert len(LatentStore("again")) == 4


def test_native_sizes_and_log_variance_from_the_command_line(here: Path) -> None:
    Image.new("RGB", (31, 17)).save("photos/wide.png")
    assert main(["encode", "tiny", "photos", "--out", "store", "--size", "native", "--logvar", "--workers", "1"]) == 0
    store = LatentStore("store")
    assert store.size(store.find("wide.png")) == (17, 31) and store.size(0) == (20, 24)
    assert main(["decode", "store", "--out", "out"]) == 0
    assert pixels_of(Path("out/wide.png")).shape == (17, 31, 3)


def test_another_codec_does_not_decode(
    here: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(ENCODE) == 0
    assert main(["decode", "store", "--out", "out", "--codec", "pixels"]) == 2
    assert ("store holds latents of tiny with weights 0000000000000000, and pixels has weights none: give the codec "
            "that encoded them with --codec.") in said(capsys)
    assert not Path("out").exists()


def test_webdataset_reads_back(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENCODE, "--logvar"]) == 0
    assert main(["export", "store", "--to", "webdataset", "--out", "tars", "--rows-per-shard", "3"]) == 0
    assert "4 rows in 2 tar files" in said(capsys)
    assert sorted(p.name for p in Path("tars").iterdir()) == ["000000.tar", "000001.tar", "provenance.json"]
    store, samples = LatentStore("store"), {}
    for file in sorted(Path("tars").glob("*.tar")):
        with tarfile.open(file) as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                key, _, field = base.partition(".")  # WebDataset's rule
                samples.setdefault(f"{folder}/{key}".lstrip("/"), {})[field] = tar.extractfile(member).read()
    assert sorted(samples) == ["a_png", "a_webp", "deep.er/b_c", "z"]
    for sample in samples.values():
        fields = json.loads(sample["json"])
        row = store.find(fields["key"])
        assert fields["image"] == [16, 16] and fields["sha256"] == store.fields(row)["sha256"]
        np.testing.assert_array_equal(np.load(io.BytesIO(sample["latent.npy"])), store[row].numpy())
        np.testing.assert_array_equal(np.load(io.BytesIO(sample["logvar.npy"])), store.array(row, "logvar"))
    assert json.loads(Path("tars/provenance.json").read_text())["notes"]["name"] == "tiny"
    first = Path("tars/000000.tar").read_bytes()
    assert main(["export", "store", "--to", "webdataset", "--out", "tars", "--rows-per-shard", "3"]) == 2
    assert "is a folder with something in it" in said(capsys)
    assert main(["export", "store", "--to", "webdataset", "--out", "tars", "--rows-per-shard", "3", "--overwrite"]) == 0
    assert Path("tars/000000.tar").read_bytes() == first


def test_webdataset_in_the_type_that_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENCODE, "--store-dtype", "float32"]) == 0
    export = ["export", "store", "--to", "webdataset", "--out", "tars", "--overwrite"]
    for more, expected in ([], np.float32), (["--dtype", "float16"], np.float16):
        assert main([*export, *more]) == 0
        with tarfile.open("tars/000000.tar") as tar:
            values = np.load(io.BytesIO(tar.extractfile("z.latent.npy").read()))
        np.testing.assert_array_equal(values, LatentStore("store").array(3, "mean").astype(expected))
        assert values.dtype == expected
    assert main([*export, "--dtype", "bfloat16"]) == 2
    assert "--dtype bfloat16 is no type of NumPy's files: give float32 or float16." in said(capsys)
    with StoreWriter(Path("wide"), LatentStore("store").description) as writer:
        writer.add([{"key": "far", "image": [16, 16]}], {"mean": np.full((1, 4, 4, 4), 1e6, np.float32)})
    assert main(["export", "wide", "--to", "webdataset", "--out", "far", "--dtype", "float16"]) == 2
    assert "The mean of far is not finite in float16: leave out --dtype." in said(capsys) and not Path("far").exists()


def test_names_stay_inside_and_apart() -> None:
    keys = ["../../etc/x.png", "/abs/y.png", "a/./b//c.jpg", "a/b/c.png", "..", "a.tar/p.q.jpg", "C:\\w.png"]
    assert picture_names(keys, ".png") == ["_/_/etc/x.png", "abs/y.png", "a/b/c.jpg.png", "a/b/c.png.png", "_.png",
                                           "a.tar/p.q.png", "C_/w.png"]
    assert sample_names(keys) == ["_/_/etc/x", "abs/y", "a/b/c_jpg", "a/b/c_png", "_", "a.tar/p_q", "C_/w"]
    clash = ["c.jpg", "c.png", "c.jpg.tif", "c_jpg.png"]
    for names in (picture_names(clash, ".png"), sample_names(clash)):
        assert len(set(names)) == 4


@pytest.mark.parametrize(("argv", "sentence"), [
    ([*ENCODE, "--size", "0"], "--size 0 is no size: give a number of pixels, such as 256, or 'native'."),
    ([*ENCODE, "--shard", "2/2"], "--shard 2/2 is no part: give 0/2 for the first of two, 1/2 for the second."),
    ([*ENCODE, "--shard", "half"], "--shard half is no part: give 0/2"),
    ([*ENCODE, "--batch-size", "0"], "--batch-size 0 is too small: give at least 1."),
    ([*ENCODE, "--workers", "-2"], "--workers -2 is too small: give at least -1."),
    (["encode", "no-such", "photos", "--out", "store"], "no-such is neither an existing path, a bundled model"),
    (["encode", "tiny", "nowhere", "--out", "store"], "nowhere does not exist: give a folder"),
    (["encode", "tiny", "photos", "--out", "photos"], "photos holds other things than a store ("),
    (["encode", "tiny", "photos", "--out", "photos/a.png"], "--out photos/a.png: photos/a.png is a file: give a "),
    ([*ENCODE, "--json", "photos"], "--json photos is a folder: give a file, such as photos/encode.json."),
    (["encode", "pixels", "photos", "--out", "store", "--logvar"], "pixels makes no posterior, so there is no log"),
    (["decode", "photos", "--out", "out"], "photos is no store: it has no store.json; make one with 'omnilatent "),
    (["decode", "nowhere", "--out", "out"], "nowhere does not exist; make one with"),
    (["export", "photos", "--to", "webdataset", "--out", "out"], "photos is no store: it has no store.json"),
])
def test_mistakes_have_one_sentence(
    argv: list[str], sentence: str, here: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(argv) == 2
    assert f"omnilatent: {sentence}" in said(capsys) and not Path("store").exists() and not Path("out").exists()


def test_a_folder_without_a_readable_file_is_an_error(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    Path("none").mkdir()
    Path("none/x.png").write_text("no picture")
    for _ in range(2):  # the second time it is not even opened
        assert main(["encode", "tiny", "none", "--out", "store", "--workers", "0"]) == 2
        assert "No image of none can be read (1 tried): store/skipped.jsonl says why." in said(capsys)


def test_a_codec_that_moved_away_is_asked_for(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(ENCODE) == 0
    file = Path("store/store.json")
    fields = json.loads(file.read_text())
    fields["notes"] |= {"name": "runs/mine", "path": str(here / "runs" / "mine")}
    file.write_text(json.dumps(fields))
    assert main(["decode", "store", "--out", "out"]) == 2
    assert "which is not at" in (text := said(capsys)) and "say with --codec where it is" in text
    assert main(["decode", "store", "--out", "out", "--codec", "tiny"]) == 0


def test_auto_goes_on_in_the_stores_precision(here: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*ENCODE, "--dtype", "bfloat16"]) == 0
    Image.new("RGB", (20, 20)).save("photos/new.png")
    assert main(ENCODE) == 0
    assert LatentStore("store").description.about["dtype"] == "bfloat16" and "5 rows (1 new" in said(capsys)


def test_mistakes_need_no_torch(here: Path) -> None:
    script = ("import sys\nfrom omnilatent.cli.main import main\n"
              "for line in ('encode --help', 'decode --help', 'encode pixels nowhere --out x',\n"
              "             'decode photos --out x', 'encode pixels photos --out x --shard 3'):\n"
              "    assert main(line.split()) in (0, 2)\nassert 'torch' not in sys.modules\n")
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_real_photos_survive_the_way_there_and_back(here: Path) -> None:
    kodak = DATA / "kodak"
    if not kodak.is_dir():
        pytest.skip("the Kodak photos are not beside this checkout (../shared/data/kodak)")
    torch.set_num_threads(1)
    assert main(["encode", "pixels", str(kodak), "--out", "store", "--size", "64", "--workers", "1",
                 "--batch-size", "3", "--store-dtype", "float32"]) == 0
    assert main(["decode", "store", "--out", "out"]) == 0
    for key, image in EvaluationImages(open_images(kodak), 64):
        found = pixels_of(Path("out", key).with_suffix(".png"))
        np.testing.assert_array_equal(found, (image * 255).round().byte().permute(1, 2, 0).numpy())


def test_a_failure_stops_the_others_in_the_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        monkeypatch.setenv("MASTER_PORT", str(free.getsockname()[1]))
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setattr("omnilatent.cli.ranks._LOOK", 0.05)

    def run(rank: int) -> str:
        try:
            with joined(Ranks(rank, 3)) as others:
                if rank == 2:
                    raise UserError("The disk is full.")
                if rank == 0:  # through already
                    others.gather(EncodeReport())
                stop: list[int] = []
                with others.watched(stop):
                    deadline = time.monotonic() + 20
                    while not stop and time.monotonic() < deadline:
                        time.sleep(0.01)
                assert stop
                others.refuse_failed()
        except UserError as failure:
            return str(failure)
        return "nothing"

    with ThreadPoolExecutor(3) as pool:
        said = list(pool.map(run, range(3)))
    told = ("Another process failed, so this one stopped too (rank 2 failed: The disk is full): what is encoded is "
            "kept; mend that and repeat the command.")
    assert said == [told, told, "The disk is full."]


def test_more_processes_than_gpus_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.cuda.device_count", lambda: 2)
    monkeypatch.setattr("torch.cuda.set_device", lambda number: None)
    assert Ranks(rank=1, world=4, local=1).device("cuda") == "cuda:1"
    assert Ranks(rank=3, world=4, local=3).device("cpu") == Ranks().device("cpu") == "cpu"
    with pytest.raises(UserError, match="has 2 GPUs .* give --nproc-per-node 2"):
        Ranks(rank=3, world=4, local=3).device("cuda")
