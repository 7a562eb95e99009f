"""SentencePiece tokenizer, trained on the captions (arXiv:1808.06226)."""

import io
import os
import pathlib
import re
from collections.abc import Iterable

import sentencepiece

from vidsim import files
from vidsim.errors import InputError

PAD, UNKNOWN, NULL = 0, 1, 2  # NULL stands for a dropped or an empty prompt


class Tokenizer:
    """Text to ids and back. Ids are at most `max_tokens`; an empty text is the one NULL token."""

    def __init__(self, model: bytes, max_tokens: int):
        self.model = model
        self.max_tokens = max_tokens
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)

    @property
    def vocabulary(self) -> int:
        return self._processor.vocab_size()

    def encode(self, text: str) -> list[int]:
        ids = self._processor.encode(text)[: self.max_tokens]
        return ids or [NULL]

    def cut_off(self, text: str) -> str:
        """What `encode` leaves out of a text that is too long, from its end."""
        return self._processor.decode(self._processor.encode(text)[self.max_tokens :])

    def decode(self, ids: Iterable[int]) -> str:
        return self._processor.decode([int(i) for i in ids if i > NULL])


def train(texts: Iterable[str], *, vocabulary: int, max_tokens: int) -> Tokenizer:
    """Trains merges of pairs (BPE); a small corpus may yield fewer than `vocabulary` pieces.

    Videos without captions are a valid data set: it gets a tokenizer of letters.

    Raises:
      InputError: the captions have more distinct characters than `vocabulary` has room for.
    """
    texts = [text for text in texts if text.strip()]
    if not texts:
        # A vocabulary is needed to run without captions too, so that prompts still encode.
        texts = ["abcdefghijklmnopqrstuvwxyz 0123456789"]
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(texts),
            model_writer=model,
            vocab_size=vocabulary,
            hard_vocab_limit=False,
            # Unigrams know only what is part of two words: hardly a whole word, if these are few.
            model_type="bpe",
            # Longer captions (in bytes) would be left out, by default those from 4192 on.
            max_sentence_length=max(4192, *(len(text.encode()) for text in texts)),
            pad_id=PAD,
            unk_id=UNKNOWN,
            control_symbols=["<null>"],
            bos_id=-1,
            eos_id=-1,
            minloglevel=2,
        )
    except RuntimeError as error:
        # It wants a piece for each character, and tells how many that makes.
        found = re.search(r"required_chars\. \d+ vs (\d+)", str(error))
        if not found:
            raise
        raise InputError(
            f"vocabulary={vocabulary} is under {found[1]}, the distinct characters of the captions "
            f"and the control tokens; raise dit.text.vocabulary to {found[1]} or more"
        ) from error
    return Tokenizer(model.getvalue(), max_tokens)


def save(tokenizer: Tokenizer, path: str | os.PathLike) -> None:
    with files.atomic_path(path) as temporary:
        temporary.write_bytes(tokenizer.model)


def load(path: str | os.PathLike, *, max_tokens: int) -> Tokenizer:
    path = pathlib.Path(path)
    if not path.is_file():
        raise InputError(f"no tokenizer at {path}; run `vidsim train --model=tokenizer` first")
    return Tokenizer(path.read_bytes(), max_tokens)
