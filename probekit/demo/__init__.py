"""The texts of `probekit demo`: six short passages written for it, of different kinds."""

from __future__ import annotations

import json
from importlib.resources import files


def demo_texts() -> list[str]:
    """Six English passages of about 200 tokens: story, recipe, dialogue, arithmetic, science, code."""
    lines = (files(__name__) / "texts.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]
