"""DATA in every form gives the same images; what cannot be opened gives one sentence."""

import io
import os
import pickle
import tarfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from omnilatent.data import (
    EvaluationImages, SkippedLog, UnreadableImage, demo_photos, open_images, resize_and_crop, split, structured_image,
    subset,
)
from omnilatent.data.names import Names
from omnilatent.data.overlap import repeated
from omnilatent.data.patterns import paths_of
from omnilatent.errors import UserError

SHARED = Path(__file__).parents[1].parent / "shared" / "data"


def picture(seed: int, size: tuple[int, int] = (7, 5)) -> Image.Image:
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8))


def make_folder(folder: Path, names: Sequence[str]) -> Path:
    for seed, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        picture(seed).save(folder / name, "PNG")
    return folder


def make_tar(path: Path, names: Sequence[str], first: int = 0, form: int = tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, "w", format=form) as tar:
        for seed, name in enumerate(names, first):
            file = io.BytesIO()
            picture(seed).save(file, "PNG")
            for member, content in ((name, file.getvalue()), (name + ".cls", b"7")):
                info = tarfile.TarInfo(member)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def keys(source: object) -> list[str]:
    return [source.key(i) for i in range(len(source))]


def mistake(data: str | Path) -> str:
    with pytest.raises(UserError) as caught:
        open_images(data)
    return str(caught.value)


# ---- folders ----------------------------------------------------------------------------------------------------


def test_a_folder_of_any_depth_is_sorted_and_hidden_files_are_left_out(tmp_path: Path) -> None:
    make_folder(tmp_path, ["b/c/2.png", "a.PNG", "b/1.png", ".hidden.png", ".thumbs/3.png", "z.png"])
    (tmp_path / "notes.txt").write_text("no image")
    source = open_images(tmp_path)
    assert source.name == tmp_path.name and keys(source) == ["a.PNG", "b/1.png", "b/c/2.png", "z.png"]
    np.testing.assert_array_equal(source.read(2), np.asarray(picture(0)))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="needs links and pipes")
def test_loops_of_links_pipes_and_broken_links(tmp_path: Path) -> None:
    make_folder(tmp_path, ["sub/a.png", "b.png"])
    (tmp_path / "sub" / "loop").symlink_to(tmp_path)
    (tmp_path / "again").symlink_to(tmp_path / "sub")
    (tmp_path / "broken.png").symlink_to(tmp_path / "nowhere")
    os.mkfifo(tmp_path / "pipe.png")  # reading it would wait for ever
    source = open_images(tmp_path)
    assert sorted(key.split("/")[-1] for key in keys(source)) == ["a.png", "b.png", "broken.png"]
    with pytest.raises(UnreadableImage, match="does not exist"):
        source.read(keys(source).index("broken.png"))


def test_odd_file_names_survive(tmp_path: Path) -> None:
    names = ["größe.png", "日本.png", "a b,{c}.png", os.fsdecode(b"\xff.png")]
    try:
        source = open_images(make_folder(tmp_path, names))
    except (OSError, UnicodeEncodeError):
        pytest.skip("this file system does not take the name")
    assert set(keys(source)) == set(names) and all(source.read(i).shape == (5, 7, 3) for i in range(4))
    assert list(Names(names)) == names


def test_one_image_and_a_pattern_of_images(tmp_path: Path) -> None:
    make_folder(tmp_path, ["x/a.png", "x/b.png", "y/a.png"])
    one = open_images(tmp_path / "x" / "a.png")
    assert (one.name, keys(one)) == ("a.png", ["a.png"])
    assert keys(open_images(f"{tmp_path}/*/a.png")) == ["x/a.png", "y/a.png"]


def test_mistakes_with_folders(tmp_path: Path) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    assert mistake(empty) == (
        f"{empty} holds no image (it is empty): give a folder with .jpg, .png, .webp, .tif or .bmp files, with "
        ".tar shards or with videos; other formats, HEIC for example, must be converted first.")
    (empty / "a.heic").touch()
    (empty / "b.HEIC").touch()
    assert "holds no image (files: 2 with .heic)" in mistake(empty)
    assert mistake(tmp_path / "nowhere") == (
        f"{tmp_path}/nowhere does not exist: give a folder, an image, a .tar or several, "
        "'synthetic', 'photos', 'digits' or 'mnist'.")
    assert mistake("") == (
        "An empty path does not exist: give a folder, an image, a .tar or several, "
        "'synthetic', 'photos', 'digits' or 'mnist'.")
    (tmp_path / "a.txt").touch()
    assert mistake(tmp_path / "a.txt") == (
        f"{tmp_path}/a.txt is neither a folder, an image, a video nor a .tar: give one of these, or convert it to PNG.")
    assert mistake(f"{tmp_path}/*.tar") == (
        f"The pattern {tmp_path}/*.tar matches no file: check it, and quote it if the shell expands it.")


def test_a_forbidden_subfolder_is_not_passed_over_in_silence(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a.png", "sub/b.png"])
    (tmp_path / "sub").chmod(0)
    try:
        if os.access(tmp_path / "sub", os.R_OK):
            pytest.skip("this user (root?) lists folders without the right to: cannot test a forbidden folder")
        assert "cannot be listed (Permission denied)" in mistake(tmp_path)
    finally:
        (tmp_path / "sub").chmod(0o755)


# ---- tars -------------------------------------------------------------------------------------------------------

LONG = "d" * 90 + "/" + "e" * 120 + ".png"


@pytest.mark.parametrize("form", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_a_tar_equals_the_folder(tmp_path: Path, form: int) -> None:
    names = ["000.png", "a/001.png", LONG, "größe.png"]
    folder = open_images(make_folder(tmp_path / "folder", names))
    tar = open_images(make_tar(tmp_path / "all.tar", names, form=form))
    assert keys(tar) == [f"all.tar/{name}" for name in names] and tar.name == "all.tar"
    for i, name in enumerate(names):
        np.testing.assert_array_equal(tar.read(i), folder.read(keys(folder).index(name)))


def test_shards_in_every_way_of_naming_them(tmp_path: Path) -> None:
    for shard in range(3):
        make_tar(tmp_path / f"{shard:03d}.tar", ["a.png", "b.png"], first=10 * shard)
    ways = [str(tmp_path), f"{tmp_path}/{{000..002}}.tar", f"{tmp_path}/*.tar",
            ",".join(f"{tmp_path}/{shard:03d}.tar" for shard in range(3)), f"{tmp_path}/{{000,001,002}}.tar"]
    expected = [f"{shard:03d}.tar/{name}.png" for shard in range(3) for name in "ab"]
    for way in ways:
        source = open_images(way)
        assert keys(source) == expected, way
        np.testing.assert_array_equal(source.read(3), np.asarray(picture(11)))
    with pytest.raises(IndexError):
        source.read(6)


def test_different_kinds_are_joined(tmp_path: Path) -> None:
    make_folder(tmp_path / "one" / "set", ["a.png"])
    make_folder(tmp_path / "two" / "set", ["a.png", "b.png"])
    make_tar(tmp_path / "s.tar", ["a.png"])
    source = open_images(f"{tmp_path}/one/set, {tmp_path}/s.tar,{tmp_path}/two/set")
    assert keys(source) == ["set/a.png", "s.tar/s.tar/a.png", "set-2/a.png", "set-2/b.png"]
    assert source.name == "set + 2" and pickle.loads(pickle.dumps(source)).read(3).shape == (5, 7, 3)
    assert "is given twice: name it once." in mistake(f"{tmp_path}/s.tar,{tmp_path}/s.tar")


def test_the_later_of_two_members_counts_and_links_do_not(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", ["./a.png", "b.png", "a.png"])
    with tarfile.open(path, "a") as tar:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "b.png"
        tar.addfile(link)
    source = open_images(path)
    assert keys(source) == ["t.tar/b.png", "t.tar/a.png"]
    np.testing.assert_array_equal(source.read(1), np.asarray(picture(2)))


def test_a_tar_that_changed_is_indexed_anew(tmp_path: Path) -> None:
    path = make_tar(tmp_path / "t.tar", ["a.png"])
    assert len(open_images(path)) == 1
    make_tar(path, ["a.png", "b.png", "c.png"])
    assert len(open_images(path)) == 3


def test_broken_tars(tmp_path: Path) -> None:
    whole = make_tar(tmp_path / "t.tar", [f"{i}.png" for i in range(20)]).read_bytes()
    with tarfile.open(tmp_path / "t.tar") as tar:
        members = tar.getmembers()
    middle = members[20]
    cuts = {
        "inside a header": whole[: middle.offset + 100],
        "inside contents": whole[: middle.offset_data + 10],
        "a damaged header": whole[: middle.offset] + b"\xff" * 512 + whole[middle.offset + 512 :],
        "empty": b"",
        "no tar": b"not a tar at all " * 100,
    }
    for what, content in cuts.items():
        path = tmp_path / "broken.tar"
        path.write_bytes(content)
        sentence = mistake(path)
        assert sentence.startswith(f"{path} is not a whole tar file (") and sentence.endswith(
            "): copy it again or make it anew."), (what, sentence)
    (tmp_path / "broken.tar").write_bytes(whole[: members[-1].offset_data + 512])  # only the end mark is missing
    assert len(open_images(tmp_path / "broken.tar")) == 20


@pytest.mark.parametrize("name", ["t.tar.gz", "t.tgz", "t.tar"])
def test_compressed_tars(tmp_path: Path, name: str) -> None:
    with tarfile.open(tmp_path / name, "w:gz"):
        pass
    assert mistake(tmp_path / name) == (
        f"{tmp_path}/{name} is a compressed archive, whose images cannot be read one by one: unpack it first.")


def test_a_tar_without_images(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w"):
        pass
    assert mistake(tmp_path / "t.tar") == (
        f"{tmp_path}/t.tar holds no image: give tars with .jpg, .png, .webp, .tif or .bmp members.")


def test_an_unreadable_member_names_tar_and_member(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "t.tar", "w") as tar:
        tar.addfile(tarfile.TarInfo("x/a.png"))
    with pytest.raises(UnreadableImage, match=r"t\.tar/x/a\.png is empty \(0 bytes\)"):
        open_images(tmp_path / "t.tar").read(0)


def test_the_shared_imagenet_sample() -> None:
    if not SHARED.exists():
        pytest.skip(f"the shared data sets are not beside the repository: {SHARED}")
    source = open_images(SHARED / "imagenet-1k-sample" / "val.tar")
    assert len(source) == 100 and source.key(0) == "val.tar/000018.jpg"
    assert min(source.read(0).shape[:2]) == 288 and max(source.read(99).shape[:2]) <= 384


# ---- patterns and names -----------------------------------------------------------------------------------------


def test_an_existing_path_is_taken_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    odd = tmp_path / "a,b{0..1}"
    make_folder(odd, ["x.png"])
    assert paths_of(str(odd)) == [odd]
    make_folder(tmp_path / "photos", ["mine.png"])
    monkeypatch.chdir(tmp_path)
    assert keys(open_images("photos")) == ["mine.png"] and len(demo_photos()) > 1
    assert open_images(".").name == tmp_path.name


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    make_tar(tmp_path / "08.tar", ["a.png"])
    assert mistake(f"{tmp_path}/{{08..10}}.tar").startswith(f"{tmp_path}/09.tar does not exist: ")
    backwards = f"{tmp_path}/{{3..1}}.tar"
    assert mistake(backwards) == f"{{3..1}} in {backwards} counts backwards: write {{1..3}}."


# ---- embedded and synthetic -------------------------------------------------------------------------------------


def test_embedded_photos_are_different_photos() -> None:
    source = open_images("photos")
    assert source.name == "photos" and {"astronaut.png", "chelsea.png", "china.jpg"} <= set(keys(source))
    assert len(set(keys(source))) == len(source) >= 12
    assert all(min(source.read(i).shape[:2]) >= 300 for i in range(3))


def test_structured_images_are_a_pure_function_and_all_different() -> None:
    images = [structured_image(0, i, 32).tobytes() for i in range(600)]
    assert len(set(images)) == 600 and images[7] == structured_image(0, 7, 32).tobytes()
    assert structured_image(1, 7, 32).tobytes() != images[7]
    source = open_images("synthetic")
    assert (source.name, len(source)) == ("synthetic", 10_000)
    np.testing.assert_array_equal(source.read(5), structured_image(0, 5))
    with pytest.raises(IndexError):
        source.read(10_000)


def test_structured_images_show_the_same_picture_at_other_sizes() -> None:
    for index in range(6):
        large = structured_image(0, index, 256).reshape(64, 4, 64, 4, 3).mean((1, 3))
        assert np.abs(large - structured_image(0, index, 64)).mean() < 4


# ---- parts ------------------------------------------------------------------------------------------------------


def test_a_split_is_disjoint_whole_and_stays_put(tmp_path: Path) -> None:
    names = [f"{i}.png" for i in range(60)]
    train, held = split(open_images(make_folder(tmp_path, names)), 0.3)
    assert sorted(keys(train) + keys(held)) == sorted(names) and not set(keys(train)) & set(keys(held))
    assert 8 <= len(held) <= 30 and (train.name, held.name) == (
        f"{tmp_path.name} (training)", f"{tmp_path.name} (held out)")
    for seed in range(100, 140):
        picture(seed).save(tmp_path / f"{seed}.png")
    grown_train, grown_held = split(open_images(tmp_path), 0.3)
    assert set(keys(held)) < set(keys(grown_held)) and set(keys(train)) < set(keys(grown_train))
    assert keys(split(open_images(tmp_path), 0.3, seed=1)[1]) != keys(grown_held)


def test_copies_stay_on_one_side(tmp_path: Path) -> None:
    for i in range(40):
        for copy in range(3):
            picture(i, (16, 16)).save(tmp_path / f"{copy}-{i}.bmp")  # all of one size in bytes
    train, held = split(open_images(tmp_path), 0.5)
    sides = [{key.split("-")[1] for key in keys(side)} for side in (train, held)]
    assert not sides[0] & sides[1] and len(train) + len(held) == 120 and min(map(len, sides)) >= 5
    again_train, again_held = split(train, 0.5)  # a part can be split again
    sides = [{key.split("-")[1] for key in keys(side)} for side in (again_train, again_held)]
    assert not sides[0] & sides[1]


def test_copies_in_tars_stay_on_one_side(tmp_path: Path) -> None:
    make_tar(tmp_path / "a.tar", [f"{i}.png" for i in range(20)])
    make_tar(tmp_path / "b.tar", [f"{i}.png" for i in range(20)])
    train, held = split(open_images(tmp_path), 0.4)
    assert not {key[5:] for key in keys(train)} & {key[5:] for key in keys(held)}


@pytest.mark.parametrize("held_out", [1e-9, 1 - 1e-9])
def test_small_sets_have_both_sides(tmp_path: Path, held_out: float) -> None:
    source = open_images(make_folder(tmp_path, ["a.png", "b.png", "c.png"]))
    sizes = [len(side) for side in split(source, held_out)]
    assert sizes == ([2, 1] if held_out < 0.5 else [1, 2])
    assert [len(side) for side in split(source, 1e-9, minimum=2)] == [1, 2]
    with pytest.raises(UserError, match="3 of them different, too few to hold out 3 and train on the others"):
        split(source, minimum=3)


def test_what_cannot_be_split(tmp_path: Path) -> None:
    make_folder(tmp_path, ["a.png"])
    with pytest.raises(UserError, match="holds 1 image, which cannot be split .* give at least two"):
        split(open_images(tmp_path))
    (tmp_path / "b.png").write_bytes((tmp_path / "a.png").read_bytes())
    with pytest.raises(UserError, match="holds 2 images, 1 of them different"):
        split(open_images(tmp_path))
    with pytest.raises(UserError, match="The held-out fraction is 1.5: give a number between 0 and 1."):
        split(open_images("synthetic"), 1.5)


def test_subset(tmp_path: Path) -> None:
    source = open_images(make_folder(tmp_path, ["a.png", "b.png", "c.png"]))
    part = subset(source, [2, 0])
    assert keys(part) == ["c.png", "a.png"] and part.name == source.name
    np.testing.assert_array_equal(pickle.loads(pickle.dumps(part)).read(0), source.read(2))
    with pytest.raises(IndexError, match="image 3 of 3"):
        subset(source, [3])


# ---- evaluation -------------------------------------------------------------------------------------------------


def test_evaluation_images_follow_the_protocol(tmp_path: Path) -> None:
    picture(0, (80, 50)).save(tmp_path / "a.png")
    (tmp_path / "b.png").touch()
    picture(1, (33, 90)).save(tmp_path / "c.png")
    images = EvaluationImages(open_images(tmp_path), size=32)
    rows = list(images)
    assert len(images) == 3 and [key for key, _ in rows] == ["a.png", "c.png"]
    assert images.skipped == [("b.png", "is empty (0 bytes): delete it or copy it again")]
    expected = resize_and_crop(np.asarray(picture(0, (80, 50))), 32)
    np.testing.assert_array_equal((rows[0][1] * 255).round().byte().permute(1, 2, 0).numpy(), expected)
    assert rows[0][1].dtype.is_floating_point and rows[0][1].shape == (3, 32, 32)
    list(images)
    assert len(images.skipped) == 1  # each iteration counts anew


def test_own_sizes_are_batched_where_neighbours_are_equal(tmp_path: Path) -> None:
    for i, size in enumerate([(8, 6), (8, 6), (8, 6), (5, 9), (8, 6)]):
        picture(i, size).save(tmp_path / f"{i}.png")
    images = EvaluationImages(open_images(tmp_path), size=None)
    found = [(keys, tuple(batch.shape)) for keys, batch in images.batches(2)]
    assert found == [(["0.png", "1.png"], (2, 3, 6, 8)), (["2.png"], (1, 3, 6, 8)), (["3.png"], (1, 3, 9, 5)),
                     (["4.png"], (1, 3, 6, 8))]


def test_a_limit_spreads_over_the_source() -> None:
    images = EvaluationImages(open_images("synthetic"), size=16, limit=4)
    assert len(images) == 4
    assert [key for key, _ in images] == [f"synthetic-0-{i:06d}" for i in (0, 2500, 5000, 7500)]


def test_nothing_readable_to_evaluate(tmp_path: Path) -> None:
    (tmp_path / "a.png").touch()
    with pytest.raises(UserError) as caught:
        list(EvaluationImages(open_images(tmp_path)))
    assert str(caught.value) == (f"None of the 1 images of {tmp_path.name} can be read; the first: "
                                 "a.png is empty (0 bytes): delete it or copy it again.")


# ---- skipped.jsonl ----------------------------------------------------------------------------------------------


def test_the_log_lists_each_file_once_over_resumes(tmp_path: Path) -> None:
    path = tmp_path / "run" / "skipped.jsonl"
    log = SkippedLog(path)
    assert log.count == 0 and not path.exists()
    assert log.add("a.png", "is empty") and not log.add("a.png", "is empty")
    assert [log.add(file, "x") for file in ("b\udcff.png", "a.png", "ü.png")] == [True, False, True]
    with path.open("a") as file:
        file.write('{"file": "torn')  # killed while writing
    resumed = SkippedLog(path)
    assert resumed.count == 3 and not resumed.add("b\udcff.png", "x") and resumed.add("c.png", "y")
    assert [row.count('"file"') for row in path.read_text().splitlines()] == [1, 1, 1, 1]
    assert SkippedLog(path).count == 4


def test_pictures_that_are_trained_on_too_are_counted(tmp_path: Path) -> None:
    for folder, shades in (("a", (0, 60, 120)), ("b", (60, 200, 120))):
        (tmp_path / folder).mkdir()
        for shade in shades:
            Image.new("RGB", (9, 9), (shade, 1, 2)).save(tmp_path / folder / f"{folder}{shade}.png")
    a, b = (open_images(str(tmp_path / folder)) for folder in "ab")
    assert repeated(b, a) == 2 and repeated(a, a) == 3
    assert repeated(*reversed(split(a, 0.4))) == 0
    assert repeated(open_images("synthetic"), a) == 0
