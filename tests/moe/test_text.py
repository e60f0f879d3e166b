"""Streaming text: what is handed out joins to the whole text, and stop strings are found wherever tokens cut them."""

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from moe.engine.text import TextStream, decoder_of
from moe.models.load import load_tokenizer
from moe.params import SamplingParams
from moe.prompts import PromptEncoder
from tests.moe.moe_cases import TINYMOE


def byte_fallback_tokenizer():
    """Words with their space in front, and bytes for everything else, as Llama's: decoding strips the first space."""
    words = ["▁Hello", "▁world", "▁", "lo", "a", "b", "."]
    vocabulary = {token: n for n, token in enumerate(["<unk>", *words, *(f"<0x{b:02X}>" for b in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocabulary, [], unk_token="<unk>", byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {"byte level": load_tokenizer(TINYMOE), "byte fallback": byte_fallback_tokenizer()}
FIRST_BYTE = 8  # of the byte fallback tokenizer


def ids_of(name, text):
    if name == "byte level":
        return TOKENIZERS[name](text)["input_ids"]
    return [FIRST_BYTE + b for b in text.encode()]


def stream(tokenizer, ids, stop=()):
    """The stream after all tokens (or at its stop), and the deltas that were handed out."""
    text = TextStream(tokenizer, stop)
    deltas = []
    for token in ids:
        text.add(token)
        deltas.append(text.delta(False))
        if text.is_stopped:
            break
    text.finish()
    deltas.append(text.delta(True))
    return text, deltas


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
@example("héllo 你好 \U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \ufffd!")
@example(" leading and  double spaces \n\n\ttabs")
def test_any_text_comes_out_whole(name, written):
    tokenizer = TOKENIZERS[name]
    ids = ids_of(name, written)
    text, deltas = stream(tokenizer, ids)
    assert text.text == "".join(deltas) == tokenizer.decode(ids, skip_special_tokens=True)
    if name == "byte level":
        assert text.text == written


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_any_tokens_give_the_text_of_all_of_them(name, data):
    """Also those that are no valid UTF-8; there a byte fallback tokenizer's text depends on all bytes of a run."""
    tokenizer = TOKENIZERS[name]
    ids = data.draw(st.lists(st.integers(1, len(tokenizer) - 1), max_size=25))
    text, deltas = stream(tokenizer, ids)
    assert text.text == "".join(deltas)
    if name == "byte level":
        assert text.text == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.data())
def test_tokens_that_are_added_together_give_the_text_of_all_of_them(name, data):
    tokenizer, whole = TOKENIZERS[name], TextStream(TOKENIZERS[name])
    ids = data.draw(st.lists(st.integers(1, len(tokenizer) - 1), max_size=25))
    whole.add_all(ids)
    whole.finish()
    assert whole.text == whole.delta(True) == tokenizer.decode(ids, skip_special_tokens=True)


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=100, deadline=None)
@given(st.text(max_size=30))
@example("héllo 你好 \U0001f468 \ufffd!")
def test_bytes_of_tokens_are_those_of_the_text(name, written):
    encoder = PromptEncoder(TOKENIZERS[name], name)
    assert b"".join(encoder.token_bytes(token) for token in ids_of(name, written)) == written.encode()


def test_bytes_that_are_not_known_are_not_made_up():
    words = Tokenizer(models.WordLevel({"a": 0, "b\ufffd": 1}, unk_token="a"))
    encoder = PromptEncoder(PreTrainedTokenizerFast(tokenizer_object=words), "words")
    assert [encoder.token_bytes(0), encoder.token_bytes(1)] == [b"a", None]
    assert PromptEncoder(None, "none").token_bytes(5) == b""


@settings(max_examples=200, deadline=None)
@given(
    st.text(alphabet="ab \u00e9你", max_size=25),
    st.lists(st.text(alphabet="ab \u00e9你", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_stop_strings_across_tokens(written, stops):
    """Every byte is a token of its own, so that stops begin and end in the midst of what comes."""
    tokenizer = TOKENIZERS["byte fallback"]
    ids = ids_of("byte fallback", "." + written)  # the decoder takes a space off the front
    text, deltas = stream(tokenizer, ids, stops)
    ends = {s: (written.find(s), written.find(s) + len(s)) for s in stops if s in written}
    if not ends:
        assert not text.is_stopped
        assert text.text == "." + written
    else:
        first_end = min(end for _, end in ends.values())  # the stop that is complete first ends the text
        at = min(start for start, end in ends.values() if end == first_end)
        assert text.is_stopped
        assert text.text == "." + written[:at]
    assert "".join(deltas) == text.text
    assert all(s not in text.text for s in stops)


def test_a_possible_beginning_of_a_stop_is_held_back():
    tokenizer = TOKENIZERS["byte fallback"]
    text = TextStream(tokenizer, ["abab."])
    seen = []
    for token in ids_of("byte fallback", "aabab b"):
        text.add(token)
        seen.append(text.delta(False))
    assert seen == ["", "a", "", "", "", "abab ", "b"]
    assert text.delta(True) == ""


def test_half_a_character_is_held_back_and_shown_at_the_end():
    tokenizer = TOKENIZERS["byte fallback"]
    text = TextStream(tokenizer)
    for token in ids_of("byte fallback", "a你")[:-1]:
        text.add(token)
    assert text.delta(False) == "a"
    text.finish()
    assert text.delta(True) == tokenizer.decode(ids_of("byte fallback", "a你")[:-1])[1:] != ""


def word_pieces(kind, cleans_up):
    vocabulary = {token: n for n, token in enumerate(["[UNK]", "hello", "world", ",", "##s"])}
    pieces = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    pieces.pre_tokenizer, pieces.decoder = pre_tokenizers.Whitespace(), decoders.WordPiece(cleanup=False)
    return kind(tokenizer_object=pieces, clean_up_tokenization_spaces=cleans_up)


class Shouting(PreTrainedTokenizerFast):
    def _decode(self, *arguments, **options):
        return super()._decode(*arguments, **options).upper()


@pytest.mark.parametrize("kind", [PreTrainedTokenizerFast, Shouting])
@pytest.mark.parametrize("cleans_up", [False, True])
def test_what_a_tokenizer_does_of_its_own_is_not_passed_by(kind, cleans_up):
    tokenizer, ids = word_pieces(kind, cleans_up), [1, 3, 2, 4]
    assert decoder_of(tokenizer, True)(ids) == tokenizer.decode(ids, skip_special_tokens=True)
    assert tokenizer.decode(ids).casefold() == ("hello, worlds" if cleans_up else "hello , worlds")


def test_without_tokenizer_there_is_no_text():
    text, deltas = stream(None, [1, 2, 3])
    assert text.text == "".join(deltas) == ""
    assert not text.is_stopped


def begun_slowly(text, stops):
    """The twin of what is held back: every beginning of every stop string."""
    return max((n for s in stops for n in range(1, len(s)) if text.endswith(s[:n])), default=0)


@given(text=st.text("ab", max_size=40), stops=st.lists(st.text("ab", min_size=1, max_size=12), min_size=1, max_size=4))
def test_what_is_held_back_is_the_longest_beginning_of_a_stop(text, stops):
    stream = TextStream(None, stops)
    stream.text = text
    assert stream._uncertain() == begun_slowly(text, stops)


def test_long_stop_strings_cost_a_look_and_no_more():
    """Every step waits for it: looks are counted, not seconds. At each beginning of the string there is one at most."""
    looks = 0

    class Counted(str):
        __slots__ = ()

        def startswith(self, piece):
            nonlocal looks
            looks += 1
            return super().startswith(piece)

    stream = TextStream(None, [Counted("a" + "b" * 9_998 + "c")])
    stream.text = "ab" * 500 + "a" + "b" * 500
    assert stream._uncertain() == 501
    assert looks == 501
    with pytest.raises(ValueError, match="at most 10000 characters in all"):
        SamplingParams(stop=["x" * 100] * 101)
