import html.parser
import re

import numpy as np
import pytest

from vidsim.data import funnel, prepare, video
from vidsim.files import read_json


def bar(shift: int, frames: int = 16) -> np.ndarray:
    rng = np.random.default_rng(shift)
    clip = np.zeros((frames, 32, 48, 3), np.uint8)
    clip[:] = rng.integers(40, 160, (4, 6, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    for t in range(frames):
        clip[t, :, (shift + 2 * t) % 48 :] = 220
    return clip


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    folder, out = tmp_path_factory.mktemp("in"), tmp_path_factory.mktemp("out") / "shards"
    for i in range(40):
        video.write_video(folder / f"bar_{i:02d}.mp4", bar(i), 8)
    for i in range(12):
        video.write_video(folder / f"still_{i:02d}.mp4", bar(i)[:1].repeat(16, 0), 8)
    video.write_video(folder / "black.mp4", np.zeros((16, 32, 48, 3), np.uint8), 8)
    video.write_video(folder / "short.mp4", bar(50, 2), 8)
    video.write_video(folder / "long.mp4", bar(60, 40), 8)
    (folder / "zz_copy.mp4").write_bytes((folder / "bar_07.mp4").read_bytes())
    (folder / "<script>&.mp4").write_text("no video")
    prepare.prepare(prepare.Config(str(folder), str(out), max_seconds=2.5))
    return out


def test_every_clip_that_is_dropped_names_its_filter_value_and_bound(prepared):
    files = read_json(prepared / "manifest.json")["files"]
    assert files["bar_00.mp4"] == {
        "fate": "kept", "kind": "video", "clips": ["bar_00.mp4#0000"],
    }  # fmt: skip
    assert files["long.mp4"]["fate"] == "split" and len(files["long.mp4"]["clips"]) == 2
    assert [row["id"] for row in files["long.mp4"]["filtered"]] == ["long.mp4#0002"]
    fates = {name: row["fate"] for name, row in files.items()}
    assert fates["still_03.mp4"] == fates["black.mp4"] == fates["short.mp4"] == "filtered"
    assert files["short.mp4"]["filtered"] == [
        {"id": "short.mp4#0000", "filter": "min_seconds", "value": 0.25, "bound": 0.5}
    ]
    assert files["black.mp4"]["filtered"][0]["filter"] == "max_black"
    (still,) = files["still_03.mp4"]["filtered"]
    assert still["filter"] == "min_change" and still["value"] < still["bound"] == 2.0
    (copy,) = files["zz_copy.mp4"]["filtered"]
    assert (copy["filter"], copy["value"]) == ("duplicate_bits", 0)
    assert copy["of"] == "bar_07.mp4#0000"


class Balance(html.parser.HTMLParser):
    """Checks that tags close in order; collects what the page would load."""

    def __init__(self):
        super().__init__()
        self.open, self.loads = [], []

    def handle_starttag(self, tag, attributes):
        self.loads += [value for name, value in attributes if name in ("src", "href")]
        if tag not in ("meta", "link", "img", "br"):
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        pass

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_whole_and_loads_nothing(prepared):
    page = (prepared / "funnel.html").read_text()
    parser = Balance()
    parser.feed(page)
    assert parser.open == []
    assert len(parser.loads) > 30
    assert all(address.startswith("data:") for address in parser.loads)
    assert "url(" not in page and "&lt;script&gt;&amp;.mp4" in page and "<script>" not in page


def test_the_page_shows_the_counts_of_the_manifest(prepared):
    page, manifest = (prepared / "funnel.html").read_text(), read_json(prepared / "manifest.json")
    tiles = {name: value for value, name in re.findall(r"<b>([^<]*)</b><span>([^<]*)<", page)}
    assert tiles["clips of video kept"] == str(manifest["clips"]) == "42"
    assert tiles["clips and images filtered"] == str(manifest["filtered"]) == "16"
    assert tiles["files in quarantine"] == str(manifest["quarantined"]) == "1"
    (label,) = re.findall(r'aria-label="(Files that decode[^"]*)"', page)
    assert "not static (min_change): 43 stay, 12 go" in label
    assert "no near-duplicates (duplicate_bits): 42 stay, 1 go" in label


def test_the_page_shows_some_of_each_fate_and_is_bounded(prepared):
    page = (prepared / "funnel.html").read_text()
    assert page.count("still_") == 8
    assert page.count("<figure>") == 24 + 8 + 1 + 2 + 2
    assert "zz_copy.mp4#0000" in page and "came before and stays" in page


def test_spread_out_choices_are_in_order_and_not_repeated():
    assert funnel._some(range(5), 8) == [0, 1, 2, 3, 4]
    assert funnel._some(range(10), 4) == [0, 2, 5, 7]
