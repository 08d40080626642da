"""Traces on disk, for replaying a pass without its model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from probekit.core import Batch, ModelInfo, StoreError, TokenText, Trace
from probekit.core.storage import groups, read_group, replacing, write_group


def save_trace(trace: Trace, path: str | Path) -> Path:
    """Write a trace to a Zarr store, replacing a trace that is there.

    Raises:
        StoreError: the path holds something else, or cannot be written.
    """
    texts = [{"ids": t.ids, "strings": t.strings, "domain": t.domain, "answer": t.answer} for t in trace.batch]
    head = json.dumps(
        {
            "batch": {"texts": texts, "bos": trace.batch.bos, "index": trace.batch.index},
            "info": trace.info.as_dict(),
            "vocab": list(trace.vocab.items()),
        }
    )
    with replacing(Path(path)) as folder:
        for i, (key, dataset) in enumerate(trace.data.items()):
            write_group(dataset, folder, f"capture{i:03d}", {"capture": key, "trace": head if i == 0 else ""})
    return Path(path)


def load_trace(path: str | Path) -> Trace:
    """The trace that `save_trace` wrote.

    Raises:
        StoreError: there is no trace at this path.
    """
    store, data, head = Path(path), {}, ""
    for group in groups(store):
        dataset, attrs = read_group(store, group)
        if "capture" not in attrs:
            continue
        data[attrs["capture"]] = dataset
        head = attrs["trace"] or head
    if not head:
        raise StoreError(f"No trace at {path}; expected what probekit.engine.save_trace wrote.")
    parts: dict[str, Any] = json.loads(head)
    texts = tuple(
        TokenText(tuple(t["ids"]), tuple(t["strings"]), t.get("domain", ""), t.get("answer", ""))
        for t in parts["batch"]["texts"]
    )
    batch = Batch(texts, parts["batch"]["bos"], tuple(parts["batch"]["index"]))
    info = ModelInfo(**(parts["info"] | {"sites": frozenset(parts["info"]["sites"])}))
    return Trace(batch, info, data, dict(map(tuple, parts["vocab"])))
