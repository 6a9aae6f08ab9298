"""Sentences -> token ids, int32 [N, L], padded with 0, for the text tower of the same `TextConfig`."""

import functools
import html
import os
import re
import socket
import urllib.parse
import urllib.request
import zlib
from collections.abc import Callable, Mapping, Sequence

import ftfy
import numpy as np
from jaxtyping import Int

from motif_jax.config import TextConfig
from motif_jax.errors import UserError

PAD, START = 0, 1  # of `words`; ids from 2 on are words
TOKENS_PER_WORD = {"openclip": 1.3, "words": 1}  # in English

Tokenizer = Callable[[Sequence[str]], Int[np.ndarray, "N L"]]


def too_long(config: TextConfig, what: str, sentences: Mapping[str, str]) -> str:
    """What to say of sentences (by name) whose ends are likely cut off; "" for none. Their words are counted, no vocabulary is loaded."""
    limit, per_word = config.context_length, TOKENS_PER_WORD[config.kind]
    long = [name for name, sentence in sentences.items() if len(sentence.split()) * per_word >= limit]
    if not long:
        return ""
    return (
        f"{what} with more words than the text tower takes (text.context_length={limit} tokens, about {per_word:g} to a word), whose ends "
        f"may be cut off: {len(long)}; the first: {long[0]}"
    )


def make_tokenizer(config: TextConfig) -> Tokenizer:
    """The tokenizer `config.kind` names. Raises UserError when the vocabulary of `openclip` cannot be read."""
    if config.kind == "words":
        return functools.partial(_words, length=config.context_length, vocab_size=config.vocab_size)
    return functools.partial(_openclip, length=config.context_length, vocabulary=_load_vocabulary(config.tokenizer))


def word_id(word: str, vocab_size: int) -> int:
    """The stable id of a word in [2, vocab_size): its CRC-32; two words may share one in a small vocabulary."""
    return 2 + zlib.crc32(word.encode()) % (vocab_size - 2)


def _words(sentences: Sequence[str], *, length: int, vocab_size: int) -> np.ndarray:
    tokens = np.full((len(sentences), length), PAD, np.int32)
    for row, sentence in zip(tokens, sentences, strict=True):
        ids = [START] + [word_id(word, vocab_size) for word in re.findall(r"\w+", sentence.lower())]
        row[: len(ids)] = ids[:length]
    return tokens


def _load_vocabulary(name: str):
    from transformers import CLIPTokenizer  # heavy, and only this tokenizer needs it

    def load(**options: bool):
        vocabulary = CLIPTokenizer.from_pretrained(name, **options)
        if len(vocabulary) <= 2:  # of a folder without the files it makes one of the start and the end
            raise OSError("its files are missing")
        return vocabulary

    try:
        try:
            return load(local_files_only=True)
        except (OSError, ValueError):
            if os.path.isdir(name):
                raise
            _check_hub()
            return load()
    except (OSError, ValueError) as error:
        raise UserError(
            f"text.tokenizer={name!r}: no CLIP vocabulary there ({error}); give a folder with vocab.json and merges.txt, "
            "or the name of a Hugging Face repository that this machine can reach"
        ) from error


def _check_hub() -> None:
    """Raises OSError at once where its client would try for minutes; behind a proxy it says nothing."""
    from huggingface_hub.constants import ENDPOINT

    hub = urllib.parse.urlsplit(ENDPOINT)
    if hub.scheme in urllib.request.getproxies():
        return
    try:
        socket.create_connection((hub.hostname, hub.port or (443 if hub.scheme == "https" else 80)), timeout=10).close()
    except OSError as error:
        raise OSError(f"{hub.hostname} cannot be reached: {error}") from error


def _openclip(sentences: Sequence[str], *, length: int, vocabulary) -> np.ndarray:
    """As OpenCLIP: cleaned, lower case, BPE, start and end tokens, zeros after the end; a long text keeps its end token."""
    tokens = np.full((len(sentences), length), PAD, np.int32)
    for row, sentence in zip(tokens, sentences, strict=True):
        ids = vocabulary(_clean(sentence), add_special_tokens=True)["input_ids"]
        row[: len(ids)] = ids[:length]
        if len(ids) > length:
            row[-1] = ids[-1]
    return tokens


def _clean(sentence: str) -> str:
    sentence = ftfy.fix_text(sentence)
    return re.sub(r"\s+", " ", html.unescape(html.unescape(sentence))).strip().lower()
