"""From text to ids and back to what a reader sees, for tokenizers of every kind."""

from __future__ import annotations

from typing import Any

import pytest
from helpers import words_tokenizer

from probekit.backends.transformers.tokens import token_strings, tokenize, tokenizer_hash
from probekit.core import InputError, TextError


@pytest.fixture(scope="module")
def bytes_tokenizer() -> Any:
    """A byte-level tokenizer without merges: characters beyond ASCII become several tokens."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    own = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    own.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    own.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=own)


def with_bos() -> Any:
    """A tokenizer that adds a beginning-of-sequence token by itself."""
    from tokenizers import processors

    tokenizer = words_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    return tokenizer


@pytest.mark.parametrize(
    ("bos", "plain", "adding"),
    [("model", (5, 9), (1, 5, 9)), ("always", (1, 5, 9), (1, 5, 9)), ("never", (5, 9), (5, 9))],
)
def test_bos_policy(bos: Any, plain: tuple[int, ...], adding: tuple[int, ...]) -> None:
    """The policy decides, and never adds the token twice."""
    for tokenizer, ids in ((words_tokenizer(), plain), (with_bos(), adding)):
        batch = tokenize(tokenizer, ["w5 w9"], bos)
        assert batch.texts[0].ids == ids and batch.bos == bos
    assert batch.texts[0].strings[-2:] == ("w5", "w9")


def test_bos_that_cannot_be_is_refused(bytes_tokenizer: Any) -> None:
    with pytest.raises(InputError, match="needs a beginning-of-sequence token, and this tokenizer has none"):
        tokenize(bytes_tokenizer, ["a"], "always")
    with pytest.raises(InputError, match="bos must be 'model', 'always' or 'never', found 'yes'"):
        tokenize(bytes_tokenizer, ["a"], "yes")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ([], "No text was given"),
        (["w5", " \n\t"], "Text 1 is empty"),
        (["w5", None], "Text 1 must be a string, found NoneType"),
        ([b"w5"], "Text 0 must be a string, found bytes"),
    ],
)
def test_texts_that_are_none_are_refused(texts: list[Any], message: str) -> None:
    with pytest.raises(TextError, match=message):
        tokenize(words_tokenizer(), texts, "model")


def test_pieces_of_characters_show_their_bytes(bytes_tokenizer: Any) -> None:
    """What is no whole character shows as its bytes; blanks and newlines show as themselves."""
    text = "a é\n"
    batch = tokenize(bytes_tokenizer, [text], "model")
    assert batch.strings == ("a", " ", "\\xc3", "\\xa9", "\n")
    assert bytes_tokenizer.decode(batch.ids.tolist()) == text


def test_ids_without_a_token_show_as_unused() -> None:
    assert token_strings(words_tokenizer(), [5, 100_000, 5]) == ("w5", "<unused 100000>", "w5")


def test_hash_fixes_how_a_tokenizer_cuts() -> None:
    assert tokenizer_hash(words_tokenizer()) == tokenizer_hash(words_tokenizer())
    assert len({tokenizer_hash(t) for t in (words_tokenizer(), words_tokenizer(100), with_bos())}) == 3
