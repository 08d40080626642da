"""Where weights come from: embedded packages, local folders, GGUF files, the Hugging Face hub."""

from .cache import cache_dir, materialise, model_folder, read_manifest, sha256_of
from .entries import CAPABILITIES, CATALOGUE, DEFAULT_MODEL, Entry, Kind
from .hub import fetch_lens
from .listing import Listed, listing
from .progress import say, size_text
from .source import Source, fetch, folder_kind, resolve

__all__ = [
    "CAPABILITIES",
    "CATALOGUE",
    "DEFAULT_MODEL",
    "Entry",
    "Kind",
    "Listed",
    "Source",
    "cache_dir",
    "fetch",
    "fetch_lens",
    "folder_kind",
    "listing",
    "materialise",
    "model_folder",
    "read_manifest",
    "resolve",
    "say",
    "sha256_of",
    "size_text",
]
