from vidsim.data import listing
from vidsim.files import write_jsonl


def test_a_caption_may_hold_every_character(tmp_path):
    """A row ends at a newline only, although Unicode knows more ends of lines."""
    text = "one\u2028two\u2029three\x85four"
    write_jsonl(tmp_path / "captions.jsonl", [{"file": "a.mp4", "caption": text}] * 2)
    captions = listing.read_captions(tmp_path, ["a.mp4"], ["captions.jsonl"])
    assert captions.of == {"a.mp4": ((text, "given"),) * 2}


def test_folders_that_link_to_each_other_are_walked_once(tmp_path):
    (tmp_path / "in").mkdir()
    (tmp_path / "in" / "a.mp4").write_bytes(b"not looked at")
    (tmp_path / "in" / "loop").symlink_to(tmp_path / "in")
    media, _ = listing.list_files(tmp_path / "in")
    assert media == ["a.mp4"]
