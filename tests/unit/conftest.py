"""A tiny model on disk, for tests that open one the way a user does."""

from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a tiny random llama and its tokenizer."""
    from helpers import tiny_model, words_tokenizer

    folder = tmp_path_factory.mktemp("tiny-model")
    tiny_model("llama-grouped").module.save_pretrained(folder)
    words_tokenizer().save_pretrained(folder)
    return folder
