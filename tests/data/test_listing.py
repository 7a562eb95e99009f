import pytest

from vidsim.data import listing
from vidsim.errors import InputError
from vidsim.files import write_jsonl


def test_a_caption_may_hold_every_character(tmp_path):
    """A row ends at a newline only, although Unicode knows more ends of lines."""
    text = "one\u2028two\u2029three\x85four"
    write_jsonl(tmp_path / "captions.jsonl", [{"file": "a.mp4", "caption": text}] * 2)
    captions = listing.read_captions(tmp_path, ["a.mp4"], ["captions.jsonl"])
    assert captions.of == {"a.mp4": ((text, "given"),) * 2}


def test_captions_are_of_the_origin_that_their_row_names(tmp_path):
    rows = [
        {"file": "a.mp4", "caption": "a ball"},
        {
            "file": "a.mp4",
            "captions": ["a red ball rolls", "a ball rolls"],
            "origin": "descriptive",
        },
    ]
    write_jsonl(tmp_path / "captions.jsonl", rows)
    captions = listing.read_captions(tmp_path, ["a.mp4"], ["captions.jsonl"])
    texts = [("a red ball rolls", "descriptive"), ("a ball rolls", "descriptive")]
    assert captions.of == {"a.mp4": (("a ball", "given"), *texts)}


@pytest.mark.parametrize("origin", ["", " ", 3, None])
def test_an_origin_that_is_no_name_is_refused(tmp_path, origin):
    row = {"file": "a.mp4", "caption": "a ball", "origin": origin}
    write_jsonl(tmp_path / "captions.jsonl", [row])
    with pytest.raises(InputError, match=r"captions.jsonl line 1 has the origin .* no name"):
        listing.read_captions(tmp_path, ["a.mp4"], ["captions.jsonl"])


def test_folders_that_link_to_each_other_are_walked_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"not looked at")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    media, _ = listing.list_files(tmp_path / "in")
    assert media == ["a.mp4"]
