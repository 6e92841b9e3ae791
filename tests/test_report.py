"""The report: self-contained, escaped, within its size, and true to the figures."""

import base64
import errno
import io
import json
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from omnilatent.errors import UserError
from omnilatent.metrics.protocol import Picture
from omnilatent.metrics.results import Evaluation, Figure
from omnilatent.report import record
from omnilatent.report.cells import MISSING, format_value, null_rows, results_grid
from omnilatent.report.health import health_section
from omnilatent.report.html import MAX_BYTES, write_report
from omnilatent.report.labels import place_labels, shorten
from omnilatent.report.pictures import embed, psnr
from omnilatent.report.plots import psnr_strip, rate_distortion, speed
from omnilatent.report.published import PUBLISHED, benchmark_rows
from omnilatent.report.record import read_report, replace_file
from omnilatent.report.tables import benchmark_table, markdown_table, terminal_table

REASON = "LPIPS needs vgg16-397923af.pth, which is not here: fetch https://example.org/vgg16.pth into a folder."


def evaluation(
    label: str, psnr: float = 27.0, kind: str = "kl", name: str | None = None, **figures: float
) -> Evaluation:
    values = {"psnr": psnr, "ssim": 0.8, "bits_per_pixel": 1.0, "decode_ips": 40.0, "parameters": 3413333.0, **figures}
    return Evaluation(
        label,
        {"name": name or label, "kind": kind, "licence": "MIT", "weights_hash": f"hash-of-{psnr}", "latent": "gaussian",
         "latent_channels": 4, "downsampling": 8},
        {**{key: Figure(value, 2) for key, value in values.items()}, "lpips_vgg": Figure(None, 2, REASON)},
        {"psnr": [psnr - 1, psnr + 1]}, ["a.png", "b.png"],
        {"data": "photos", "n": 2, "size": 256, "seed": 7, "dtype": "float32", "device": "cpu",
         "versions": {"torch": "2.13.0"}, "protocol": "Posterior mode, rounded to 8 bits."},
        {"n": 2, "notes": ["One picture is odd."], "kl": 1234.5, "novel_figure": 3.25,
         "channels": {"mean": [0.5, -0.25, 0.0, 1.0], "active": [True, False, True, True]},
         "cycle": {"real": 0.0123, "prior": None}},
    )


def picture(key: str, size: tuple[int, int] = (12, 20), seed: int = 0, error: int = 5) -> Picture:
    original = np.random.default_rng(seed).integers(0, 200, (*size, 3), dtype=np.uint8)
    return Picture(key, original, original + np.uint8(error))


class Page(HTMLParser):
    """Everything of a page that a test asks for."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.styles = self.scripts = ""
        self._inside = ""
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""

    def handle_data(self, data: str) -> None:
        if self._inside == "style":
            self.styles += data
        elif self._inside == "script":
            self.scripts += data
        else:
            self.text += data

    def attributes(self, name: str) -> list[str]:
        return [attrs[name] or "" for _, attrs in self.tags if name in attrs]


@pytest.fixture
def two(tmp_path: Path) -> Path:
    evaluations = [evaluation("kl-f8", 27.0, bits_per_pixel=1.0), evaluation("tiny", 24.0, bits_per_pixel=2.0)]
    pictures = {"kl-f8": [picture("a.png"), picture("b.png", (9, 9))],
                "tiny": [picture("a.png", error=20), picture("b.png", (9, 9))]}
    command = ["omnilatent", "compare", "a b"]
    return write_report(tmp_path, evaluations, pictures, "Two codecs", command, ["Rests on 2 photos."])


def test_the_page_asks_the_network_for_nothing(two: Path) -> None:
    page = Page(two)
    for reference in page.attributes("src") + page.attributes("href") + page.attributes("srcset"):
        assert reference.startswith(("data:", "#")), reference[:80]
    assert not re.search(r"url\((?!#)|@import|@font-face", page.styles)
    assert not re.search(r"fetch\(|XMLHttpRequest|import\(|WebSocket|sendBeacon|https?:", page.scripts)
    assert not re.search(r"url\((?!#)", " ".join(page.attributes("style")))
    policy = next(attrs["content"] for _, attrs in page.tags if attrs.get("http-equiv") == "Content-Security-Policy")
    assert policy and policy.startswith("default-src 'none'") and "http" not in policy
    assert "https://example.org/vgg16.pth" in page.text  # an address in a reason is text, never a reference


def test_every_label_condition_and_note_is_on_the_page(two: Path) -> None:
    text = Page(two).text
    for wanted in ("kl-f8", "tiny", "omnilatent compare 'a b'", "Rests on 2 photos.", "hash-of-27.0", "hash-of-24.0",
                   "torch 2.13.0", "float32", "256×256", "Posterior mode, rounded to 8 bits.", "novel figure", "3.25",
                   "One picture is odd.", "1234", "2 codecs on 2 images of photos"):
        assert wanted in text, wanted


def test_names_are_escaped(tmp_path: Path) -> None:
    label, key = "<script>alert(1)</script>", "\"><img src=x onerror='alert(1)'>.png"
    evaluations = [evaluation(label), evaluation("b&b", 25.0)]
    pictures = {label: [picture(key)], "b&b": [picture(key)]}
    page = Page(write_report(tmp_path, evaluations, pictures, "<b>t</b>", "cmd <x>"))
    assert [tag for tag, _ in page.tags].count("script") == 1
    assert not any("onerror" in attrs for _, attrs in page.tags)
    assert all(src.startswith("data:") for src in page.attributes("src"))
    assert label in page.text and key in page.text and "cmd <x>" in page.text and "<b>t</b>" in page.text


def test_a_missing_cell_has_its_reason_as_a_visible_footnote(two: Path) -> None:
    html = two.read_text(encoding="utf-8")
    number = re.search(rf'<li id="note-(\d+)">{re.escape(REASON)}</li>', html)
    assert number, "the reason is not in the list of footnotes"
    assert html.count(f'{MISSING}<sup><a href="#note-{number[1]}"') == 2, "one for each codec"


def test_best_cells() -> None:
    rows = [evaluation("null", 99, "pixels", decode_ips=9e3), evaluation("a", 27.004, decode_ips=40.0),
            evaluation("b", 27.001, decode_ips=50.0), evaluation("c", 20.0, decode_ips=30.0, bits_per_pixel=0.5)]
    grid = results_grid(rows)
    column = {c.key: i for i, c in enumerate(grid.columns)}
    best = {key: [row.label for row in grid.rows if row.cells[i].best] for key, i in column.items()}
    assert best["psnr"] == ["a", "b"], "both print 27.00: a tie at the printed digits"
    assert best["decode_ips"] == ["b"], "the null is faster and never marked"
    assert best["bits_per_pixel"] == ["c"], "lower is better"
    assert best["ssim"] == [], "all tie"
    assert best["lpips_vgg"] == []


@pytest.mark.parametrize(("key", "why"), [
    ("perplexity", "Only tokenizers have a codebook."), ("active_ratio", "Only tokenizers have a codebook."),
    ("compression", "Not measured for this codec."), ("unheard_of", "Not measured for this codec.")])
def test_what_a_codec_was_not_asked_for_is_said(key: str, why: str) -> None:
    a, b = evaluation("a"), evaluation("b", **{key: 100.0})
    grid = results_grid([a, b])
    cell = grid.rows[0].cells[[c.key for c in grid.columns].index(key)]
    assert (cell.text, grid.notes[cell.note - 1]) == (MISSING, why)


@pytest.mark.parametrize(("key", "value", "text"), [
    ("psnr", 27.006, "27.01"), ("parameters", 83653863, "83.65 M"), ("parameters", 9500, "9.5 k"),
    ("parameters", 0, "0"), ("decode_ips", 4344.2, "4,344"), ("psnr", math.inf, "∞"), ("unheard_of", 0.12345, "0.123")])
def test_format_value(key: str, value: float, text: str) -> None:
    assert format_value(key, value) == text


def test_nulls_are_found_by_kind_and_name() -> None:
    found = null_rows([evaluation("p", kind="pixels"), evaluation("x", name="runs/ae-f8-small"),
                       evaluation("y", name="ae-f4"), evaluation("z", name="taef2"), evaluation("w", name="vae-f8")])
    assert list(found) == ["p", "x", "y"]


def test_json_round_trip_and_conditions(two: Path, tmp_path: Path) -> None:
    again = read_report(two.with_name("report.json"))
    assert again == [evaluation("kl-f8", 27.0, bits_per_pixel=1.0), evaluation("tiny", 24.0, bits_per_pixel=2.0)]
    stored = json.loads(two.with_name("report.json").read_text(encoding="utf-8"))
    assert stored["command"] == "omnilatent compare 'a b'" and stored["time"].endswith("+00:00")
    assert stored["evaluations"][0]["conditions"]["seed"] == 7


def test_json_has_no_nan_and_takes_numpy(tmp_path: Path) -> None:
    odd = evaluation("a", psnr=np.float64(27.0), ssim=math.inf)
    odd.health["kl"] = math.nan
    odd.per_image["psnr"] = [np.float32(1.5), math.nan]
    path = record.write_record(tmp_path / "report.json", [odd])

    def refuse(name: str) -> None:
        pytest.fail(f"{name} is not JSON")

    fields = json.loads(path.read_text(encoding="utf-8"), parse_constant=refuse)["evaluations"][0]
    assert fields["figures"]["ssim"] == {"value": None, "n": 2, "note": "The value is inf."}
    assert fields["per_image"]["psnr"] == [1.5, None] and fields["health"]["kl"] is None


def test_other_json_is_refused(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text("{}")
    with pytest.raises(UserError, match=r"x\.json is not a report: give the report\.json that 'omnilatent compare'"):
        read_report(tmp_path / "x.json")
    (tmp_path / "new.json").write_text('{"format": 99, "omnilatent": "9.0", "evaluations": []}')
    with pytest.raises(UserError, match=r"written by omnilatent 9\.0, which is newer"):
        read_report(tmp_path / "new.json")


def test_pictures_are_embedded_without_loss() -> None:
    kept = picture("a.png", (33, 47), error=9)
    row = embed({"a": [kept]}, 10**6).rows[0]
    decoded = [np.asarray(Image.open(io.BytesIO(base64.b64decode(tile.uri.split(",")[1])))) for tile in row.tiles]
    np.testing.assert_array_equal(decoded[0], kept.original)
    np.testing.assert_array_equal(decoded[1], kept.reconstruction)
    assert row.tiles[1].psnr == pytest.approx(20 * math.log10(255 / 9))
    assert psnr(kept.original, kept.original) == math.inf


def test_the_page_stays_below_its_limit_and_says_what_was_cut(tmp_path: Path) -> None:
    labels = ["a", "b"]
    pictures = {label: [picture(f"{i}.png", (512, 512), seed=i, error=3) for i in range(10)] for label in labels}
    raw = 10 * 3 * 512 * 512 * 3  # noise does not compress
    assert raw * 4 / 3 > MAX_BYTES
    path = write_report(tmp_path, [evaluation(label) for label in labels], pictures, "t", "c")
    assert 10_000_000 < path.stat().st_size <= MAX_BYTES
    assert "pictures are cut to the middle 384 pixels of their sides" in Page(path).text
    small = write_report(tmp_path, [evaluation(label) for label in labels], pictures, "t", "c", max_bytes=700_000)
    assert small.stat().st_size <= 700_000
    assert re.search(r"cut to the middle 128 pixels .*; [1-9] of 10 kept pictures are shown", Page(small).text)


def test_pictures_that_fit_are_whole_and_uncommented(two: Path) -> None:
    assert "To keep this page" not in Page(two).text


def test_one_scale_for_all_error_maps() -> None:
    shown = embed({"a": [picture("x", error=5)], "b": [picture("x", error=21)], "same": [picture("x", error=0)]}, 10**6)
    assert shown.scale == 24, "21 rounded up in the list of scales; identical pictures do not count"


def test_a_report_replaces_the_old_one_and_nothing_else(two: Path, tmp_path: Path) -> None:
    (tmp_path / "keep.txt").write_text("mine")
    before = two.read_text(encoding="utf-8")
    write_report(tmp_path, [evaluation("other")], {}, "Other", "c", skipped=[("bad.jpg", "is truncated")])
    assert "tiny" in before and "other" in two.read_text(encoding="utf-8") and "tiny" not in Page(two).text
    assert (tmp_path / "skipped.jsonl").read_text() == '{"file": "bad.jpg", "reason": "is truncated"}\n'
    assert "1 file was unreadable and skipped" in Page(two).text
    write_report(tmp_path, [evaluation("other")], {}, "Other", "c")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["keep.txt", "report.html", "report.json"]
    assert (tmp_path / "keep.txt").read_text() == "mine"


def test_a_full_disk_is_one_sentence_and_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = replace_file(tmp_path / "report.json", "old")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(record.os, "fsync", full)
    with pytest.raises(UserError, match="The disk is full or a quota is reached while writing .*report.json: free"):
        replace_file(target, "new")
    assert target.read_text() == "old" and list(tmp_path.iterdir()) == [target]


def test_a_file_in_the_way_is_named(tmp_path: Path) -> None:
    (tmp_path / "out").write_text("")
    with pytest.raises(UserError, match="out is a file: give a folder to write the report into"):
        write_report(tmp_path / "out", [evaluation("a")], {}, "t", "c")


def test_labels_must_be_distinct_and_known(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="distinct labels"):
        write_report(tmp_path, [evaluation("a"), evaluation("a")], {}, "t", "c")
    with pytest.raises(ValueError, match="no evaluation"):
        write_report(tmp_path, [evaluation("a")], {"b": []}, "t", "c")


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.floats(0, 300), st.floats(0, 260), st.integers(10, 150)), min_size=1, max_size=9))
def test_labels_never_overlap(points: list[tuple[float, float, int]]) -> None:
    anchors, sizes, frame = [(x, y) for x, y, _ in points], [(w, 12.0) for *_, w in points], (0, 0, 300, 260)
    places = place_labels(anchors, sizes, frame)
    if places is None:
        return
    for i, place in enumerate(places):
        assert place.inside(frame)
        assert not any(place.overlaps(other) for other in places[i + 1 :])
        assert all(math.dist(place.nearest(anchor), anchor) > 4 for anchor in anchors)


def test_a_crowd_of_equal_points_is_still_labelled() -> None:
    places = place_labels([(150.0, 130.0)] * 6, [(90.0, 12.0)] * 6, (0, 0, 300, 260))
    assert places is not None and not any(a.overlaps(b) for i, a in enumerate(places) for b in places[:i])


def test_shorten() -> None:
    assert shorten("short", 10) == "short"
    assert shorten("a-very-long-name", 9) == "a-ve…name" and len(shorten("x" * 50, 24)) == 24


def test_plots_name_every_codec_and_follow_the_page(two: Path) -> None:
    rows = [evaluation("p", 100.0, "pixels"), evaluation("kl $x$ <f8>", 27, bits_per_pixel=1),
            evaluation("tiny", 24, bits_per_pixel=8)]
    for plot in (rate_distortion(rows), speed(rows), psnr_strip(rows[1:])):
        assert "kl $x$ &lt;f8&gt;" in plot.svg and "tiny" in plot.svg and "kl $x$ <f8>" in plot.alt
        assert "var(--ink)" in plot.svg and "var(--s" in plot.svg
        assert "#0101" not in plot.svg and "#0202" not in plot.svg, "a placeholder colour is left"
        assert "http" not in plot.svg and "DejaVu" not in plot.svg
    assert rate_distortion(rows).remarks == ["p returns every image unchanged and is left out (1 bits per pixel)."]
    assert rate_distortion(rows[:2]) is None and speed([]) is None, "a single dot is no plot"


def test_a_large_set_becomes_a_histogram() -> None:
    large = evaluation("a")
    large.per_image["psnr"] = list(np.random.default_rng(0).normal(27, 2, 50_000))
    assert len(psnr_strip([large]).svg) < 30_000


def test_health_without_figures_is_no_section() -> None:
    bare = evaluation("a")
    bare.health = {}
    assert health_section([bare]) == ""
    assert "yes" in health_section([evaluation("a")]) and "−0.25" in health_section([evaluation("a")])


def test_markdown_table_is_rectangular_and_escaped() -> None:
    text = markdown_table([evaluation("a|b <c>", 27.0), evaluation("p", 100.0, "pixels"), evaluation("t", 26.0)])
    table = [line for line in text.splitlines() if line.startswith("|")]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in table}) == 1 and len(table) == 5
    assert "**27.00**" in text and "*(null: the pixels themselves)*" in text and r"a\|b &lt;c>" in text
    assert f"LPIPS (VGG): {MISSING} {REASON}" in text and "LPIPS" not in table[0]


def test_markdown_columns_can_be_chosen() -> None:
    assert markdown_table([evaluation("a")], columns=["psnr"]).splitlines()[0] == "| codec | PSNR ↑ [dB] |"


def test_terminal_tables_hold_the_figures() -> None:
    from rich.console import Console

    console = Console(width=140, record=True, file=io.StringIO())
    console.print(terminal_table([evaluation("a [b]", 27.0), evaluation("c", 25.0)]))
    console.print(benchmark_table([evaluation("a [b]", 27.0)]))
    text = console.export_text()
    assert "a [b]" in text and "27.00" in text and REASON in text and "32×32×4" in text and "published:" in text


def test_a_narrow_terminal_gets_several_blocks_and_no_folded_figure() -> None:
    from rich.console import Console

    console = Console(width=80, record=True, file=io.StringIO())
    console.print(terminal_table([evaluation(f"codec-{i}", 20 + i) for i in range(9)], width=80))
    text = console.export_text()
    assert all(f"codec-{i}" in text and f"{20 + i}.00" in text for i in range(9)) and text.count("3.41 M") == 9
    assert text.count("vgg16-397923af.pth") == 1 and max(map(len, text.splitlines())) <= 80


def test_quoted_figures() -> None:
    """As the literature reports them: (rFID, PSNR, SSIM, LPIPS)."""
    quoted = {row.label: (row.rfid, row.psnr, row.ssim, row.lpips) for row in PUBLISHED}
    assert quoted["sd-vae-ft-mse"] == (0.69, 26.91, 0.77, 0.130)
    assert quoted["FLUX.1 VAE"] == (0.17, 32.87, 0.92, 0.045)
    assert quoted["LDM KL-f8"] == (0.90, 24.19, None, None) and quoted["LDM VQ-f8"] == (1.14, 23.07, None, None)
    assert all(row.source for row in PUBLISHED) and not any(row.source for row in benchmark_rows([evaluation("a")]))


def test_benchmark_rows_of_ours() -> None:
    tokens = evaluation("vq")
    tokens.codec["latent"] = "codes"
    rows = benchmark_rows([evaluation("a"), evaluation("n", name="ae-f8"), tokens, evaluation("p", kind="pixels")])
    assert [row.type for row in rows] == ["KL", "AE", "tokenizer", "identity"]
    assert rows[0].shape == "32×32×4" and rows[0].psnr == 27.0 and rows[0].rfid is None


PROBE = """<!doctype html><title>waiting</title>
<iframe id=f src="report.html" style="width:390px;height:900px;border:0"></iframe>
<script>document.getElementById("f").onload = async (event) => {
  const w = event.target.contentWindow, d = w.document, v = d.getElementById("viewer"), root = d.documentElement;
  v.querySelector("[data-zoom='4']").click();
  const layers = [...v.querySelectorAll(".row:not([hidden]) .layer")];
  const moved = new Set(layers.map((e) => w.getComputedStyle(e).transform.split(",")[0]));
  v.querySelector("button[data-view=error]").click();
  await new Promise((r) => setTimeout(r, 500));
  const canvases = [...v.querySelectorAll("canvas")];
  const pixel = canvases[0] && [...canvases[0].getContext("2d").getImageData(3, 3, 1, 1).data];
  document.title = JSON.stringify({ scroll: root.scrollWidth, client: root.clientWidth, moved: [...moved],
    canvases: canvases.length, legend: v.querySelector(".legend").hidden, pixel });
};</script>"""


def test_in_a_browser_at_390_pixels(two: Path, tmp_path: Path) -> None:
    """No horizontal scroll; one zoom moves every picture; the error map's colour is the error's."""
    browser = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if browser is None:
        pytest.skip("no chromium is installed: the page's layout and script were not tried in a browser")
    (two.parent / "probe.html").write_text(PROBE, encoding="utf-8")
    command = [browser, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
               "--disable-background-networking", "--disable-component-update", "--disable-sync", "--hide-scrollbars",
               "--allow-file-access-from-files", "--virtual-time-budget=5000",
               f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
               (two.parent / "probe.html").as_uri()]
    dom = subprocess.run(command, capture_output=True, text=True, timeout=120).stdout
    title = re.search(r"<title>(\{.*?\})</title>", dom)
    assert title, f"the probe did not finish: {dom[:300]}"
    seen = json.loads(title[1])
    assert seen["client"] == 390 and seen["scroll"] <= 390
    assert seen["moved"] == ["matrix(4"] and seen["canvases"] == 2 and seen["legend"] is False
    html = two.read_text(encoding="utf-8")
    scale, heat = int(re.search(r'data-scale="(\d+)"', html)[1]), re.search(r'data-heat="(\w+)"', html)[1]
    expected = heat[6 * round(5 / scale * 255) :][:6]
    assert [f"{value:02x}" for value in seen["pixel"][:3]] == [expected[i : i + 2] for i in (0, 2, 4)]
