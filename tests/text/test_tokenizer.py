import pickle

import numpy as np
import pytest

from vidsim.errors import InputError
from vidsim.text import tokenizer

CAPTIONS = [
    f"a {size} {color} ball moves {way} {speed}"
    for size in ("small", "large")
    for color in ("red", "green", "blue", "yellow")
    for way in ("left", "right", "up")
    for speed in ("fast", "slowly")
]


@pytest.fixture(scope="module")
def words() -> tokenizer.Tokenizer:
    return tokenizer.train(CAPTIONS, vocabulary=64, max_tokens=32)


def test_text_comes_back(words):
    for text in CAPTIONS:
        assert words.decode(words.encode(text)) == text


def test_a_word_that_captions_repeat_is_one_token():
    found = tokenizer.train(CAPTIONS, vocabulary=256, max_tokens=32)
    for text in CAPTIONS:
        assert len(found.encode(text)) == len(text.split())


def test_ids_fit_the_vocabulary_and_never_are_padding_or_null(words):
    ids = np.concatenate([words.encode(text) for text in CAPTIONS])
    assert words.vocabulary <= 64
    assert ids.min() > tokenizer.NULL and ids.max() < words.vocabulary


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_an_empty_prompt_is_the_one_null_token(words, text):
    assert words.encode(text) == [tokenizer.NULL]
    assert words.decode([tokenizer.NULL]) == ""


def test_no_text_can_spell_the_null_token(words):
    for text in ("<null>", "a <null> ball", "<pad>", "<unk>"):
        ids = words.encode(text)
        assert tokenizer.NULL not in ids and tokenizer.PAD not in ids


def test_unknown_letters_become_unknown(words):
    assert tokenizer.UNKNOWN in words.encode("ball 球")


def test_a_long_prompt_is_cut_to_max_tokens(words):
    text = " ".join(CAPTIONS)
    short = tokenizer.Tokenizer(words.model, 5)
    assert short.encode(text) == words.encode(text)[:5]
    assert len(words.encode(text)) == 32


def test_what_is_cut_off_a_long_prompt_is_told(words):
    text = CAPTIONS[0]
    short = tokenizer.Tokenizer(words.model, len(words.encode(text)))
    assert short.cut_off(text) == "" == short.cut_off("")
    assert short.cut_off(f"{text} right") == "right"


def test_training_is_deterministic(words):
    again = tokenizer.train(CAPTIONS, vocabulary=64, max_tokens=32)
    assert again.model == words.model


@pytest.mark.parametrize("texts", [[], [""], ["", "  "]])
def test_a_data_set_without_captions_yields_a_tokenizer_of_letters(texts):
    letters = tokenizer.train(texts, vocabulary=64, max_tokens=24)
    assert letters.decode(letters.encode("red ball 7")) == "red ball 7"


@pytest.mark.parametrize("text", ["a", "ball", "ein roter Ball, größer als die Welt"])
def test_one_caption_is_enough(text):
    found = tokenizer.train([text], vocabulary=64, max_tokens=64)
    assert found.decode(found.encode(text)) == text


def test_a_long_caption_is_enough():
    text = "a red ball moves to the left and hits the green one. " * 200
    found = tokenizer.train([text], vocabulary=64, max_tokens=24)
    assert found.decode(found.encode("a red ball")) == "a red ball"


def test_saved_loaded_and_pickled_tokenizers_are_equal(words, tmp_path):
    tokenizer.save(words, tmp_path / "tokenizer.model")
    assert [path.name for path in tmp_path.iterdir()] == ["tokenizer.model"]
    loaded = tokenizer.load(tmp_path / "tokenizer.model", max_tokens=32)
    for other in (loaded, pickle.loads(pickle.dumps(words))):
        assert other.max_tokens == 32
        assert [other.encode(t) for t in CAPTIONS] == [words.encode(t) for t in CAPTIONS]


def test_a_missing_tokenizer_is_named_with_its_remedy(tmp_path):
    with pytest.raises(InputError, match=r"no tokenizer at .*x\.model; run `vidsim train"):
        tokenizer.load(tmp_path / "x.model", max_tokens=24)


def test_more_characters_than_the_vocabulary_has_room_for():
    text = "".join(chr(0x4E00 + i) for i in range(500))
    with pytest.raises(InputError, match=r"vocabulary=64 .*dit\.text\.vocabulary to \d+") as raised:
        tokenizer.train([text], vocabulary=64, max_tokens=512)
    enough = int(str(raised.value).split(" or more")[0].split()[-1])
    found = tokenizer.train([text], vocabulary=enough, max_tokens=512)
    assert found.decode(found.encode(text)) == text
    with pytest.raises(InputError):
        tokenizer.train([text], vocabulary=enough - 1, max_tokens=512)
