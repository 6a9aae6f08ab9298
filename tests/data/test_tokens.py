"""Sentences to token ids."""

import json
import zlib

import numpy as np
import pytest

from motif_jax.config import TextConfig
from motif_jax.data.tokens import make_tokenizer
from motif_jax.errors import UserError

WORDS = TextConfig(kind="words", vocab_size=1000, context_length=6)


def test_words_are_stable_numbers():
    tokens = make_tokenizer(WORDS)(["A red square, moving LEFT!", "", "red"])
    assert tokens.dtype == np.int32 and tokens.shape == (3, 6)
    word = {w: 2 + zlib.crc32(w.encode()) % 998 for w in ("a", "red", "square", "moving", "left")}
    np.testing.assert_array_equal(tokens[0], [1, word["a"], word["red"], word["square"], word["moving"], word["left"]])
    np.testing.assert_array_equal(tokens[1], [1, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(tokens[2], [1, word["red"], 0, 0, 0, 0])


def test_long_sentences_are_cut():
    tokens = make_tokenizer(WORDS)(["one two three four five six seven"])
    np.testing.assert_array_equal(tokens, make_tokenizer(WORDS)(["one two three four five"]))
    assert make_tokenizer(WORDS)([]).shape == (0, 6)


@pytest.fixture(scope="module")
def clip_folder(tmp_path_factory):
    """A vocabulary in CLIP's format: bytes, bytes that end a word, two merges, start and end."""
    folder = tmp_path_factory.mktemp("clip")
    letters = [chr(c) for c in range(33, 127)]
    entries = [*letters, *(c + "</w>" for c in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    (folder / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(entries)}))
    (folder / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
    return folder, {token: i for i, token in enumerate(entries)}


def test_openclip_start_end_and_zeros(clip_folder):
    folder, ids = clip_folder
    tokens = make_tokenizer(TextConfig(tokenizer=str(folder), context_length=8))(["  A  CAT &amp; b\n", "", "abcdefghijk"])
    start, end = ids["<|startoftext|>"], ids["<|endoftext|>"]
    np.testing.assert_array_equal(tokens[0], [start, ids["a</w>"], ids["cat</w>"], ids["&</w>"], ids["b</w>"], end, 0, 0])
    np.testing.assert_array_equal(tokens[1], [start, end, 0, 0, 0, 0, 0, 0])
    np.testing.assert_array_equal(tokens[2], [start, *(ids[c] for c in "abcdef"), end])  # cut, but closed
    assert tokens.dtype == np.int32


def test_openclip_cleans_what_is_typed(clip_folder):
    """As ftfy does for OpenCLIP: curly quotes, ligatures and full-width letters become plain ones; half a surrogate pair is no error."""
    tokenize = make_tokenizer(TextConfig(tokenizer=str(clip_folder[0]), context_length=8))
    for typed, plain in (("“cat’s”", '"cat\'s"'), ("ﬁ", "fi"), ("ｃａｔ", "cat"), ("a \ud83d", "a \ufffd")):
        np.testing.assert_array_equal(tokenize([typed]), tokenize([plain]), err_msg=ascii(typed))


def test_a_missing_vocabulary_is_named(tmp_path):
    for folder in (tmp_path, tmp_path / "nothing"):
        with pytest.raises(UserError, match=r"text\.tokenizer=.*vocab\.json and merges\.txt"):
            make_tokenizer(TextConfig(tokenizer=str(folder)))


def test_a_hub_that_cannot_be_reached_is_named_at_once(monkeypatch):
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "ENDPOINT", "http://127.0.0.1:1")
    for name in ("http_proxy", "HTTP_PROXY"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(UserError, match=r"text.tokenizer='nobody/nothing': no CLIP vocabulary there \(127\.0\.0\.1 cannot be reached"):
        make_tokenizer(TextConfig(kind="openclip", tokenizer="nobody/nothing"))
