"""A corpus streamed without a break, and the same one killed on the way: memory, speed, and whether both end alike.

    python analyses/streaming_kills.py --out reports/streaming                       # 20,000 short texts, a tiny random model
    python analyses/streaming_kills.py --out reports/streaming --model smollm2-135m-instruct --texts 200 --chunk 16

Each run is `probekit run all --stream` in a process of its own, whose resident memory is read every second. The broken
run gets SIGKILL each time a further part of the texts is committed, and a moment later, at a moment that is random.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

import probekit as pk

WORDS = 128
SHORTEST, LONGEST = 8, 40  # words of a text


def make_model(folder: Path) -> Path:
    """A tiny random llama with a token for each word."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, set_seed

    set_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = LlamaConfig(
        vocab_size=WORDS, **sizes, num_key_value_heads=2, max_position_embeddings=256, initializer_range=0.3
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, "</s>": 2} | {f"w{i}": i for i in range(3, WORDS)}
    own = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    own.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>"}
    PreTrainedTokenizerFast(tokenizer_object=own, **special).save_pretrained(folder)
    return folder


def make_corpus(path: Path, n: int, seed: int) -> Path:
    """Texts of random words, one a line."""
    rng = random.Random(seed)
    with path.open("w", encoding="utf-8") as file:
        for _ in range(n):
            words = [f"w{rng.randrange(3, WORDS)}" for _ in range(rng.randint(SHORTEST, LONGEST))]
            file.write(json.dumps({"text": " ".join(words)}) + "\n")
    return path


def committed(out: Path) -> int:
    """Texts that are committed."""
    commit = out / "stream.zarr" / "commit.json"
    return int(json.loads(commit.read_text())["state"]["texts"]) if commit.exists() else 0


def watched(command: list[str], out: Path, kill_at: int | None = None) -> dict[str, Any]:
    """Run a command, reading its memory every second; with `kill_at`, kill it once so many texts are committed."""
    begin = time.monotonic()
    with (out.parent / f"{out.name}.log").open("a") as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
    of_it, seconds, rss, texts = psutil.Process(process.pid), [], [], []
    while process.poll() is None:
        try:
            rss.append(of_it.memory_info().rss)
        except psutil.NoSuchProcess:
            break
        seconds.append(round(time.monotonic() - begin, 2))
        texts.append(committed(out))
        if kill_at is not None and texts[-1] >= kill_at:
            time.sleep(random.random())
            process.kill()
        try:
            process.wait(1.0)
        except subprocess.TimeoutExpired:
            continue
    if process.wait() and kill_at is None:
        raise SystemExit(f"{' '.join(command)} failed; see {out.parent / f'{out.name}.log'}")
    return {"seconds": seconds, "rss_bytes": rss, "texts": texts, "committed": committed(out)}


def differences(one: Path, other: Path) -> list[str]:
    """What differs between two runs, in findings, statistics and rows; nothing if they end alike to the last bit."""
    found = []
    first, second = pk.load_results(one), pk.load_results(other)
    for name in first:
        if first[name].findings != second[name].findings:
            found.append(f"findings of {name}")
        for variable, array in first[name].summary.data_vars.items():
            same = _equal(array.values, second[name].summary[variable].values)
            found += [] if same else [f"{variable} of {name}"]
    rows = [pk.load_rows(folder / "stream.zarr", "texts") for folder in (one, other)]
    found += [f"row {v}" for v in rows[0].data_vars if not _equal(rows[0][v].values, rows[1][v].values)]
    return found


def _equal(one: np.ndarray, other: np.ndarray) -> bool:
    if one.dtype == object:
        return bool(one.item() == other.item())
    return np.array_equal(one, other, equal_nan=one.dtype.kind == "f")


def main() -> None:
    """Both runs, and what they took."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--texts", type=int, default=20_000)
    parser.add_argument("--kills", type=int, default=2)
    parser.add_argument("--chunk", type=int, default=256)
    parser.add_argument("--model", help="a model of your own; a tiny random llama if left out")
    parser.add_argument("--corpus", type=Path, help="a .jsonl file of your own; random words if left out")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    random.seed(args.seed)
    model = args.model or str(make_model(args.out / "model"))
    corpus = args.corpus or make_corpus(args.out / "corpus.jsonl", args.texts, args.seed)
    own = ["--horizon", "8", "--tail", "2", "--top-k", "5", "--chunk", str(args.chunk)]
    command = [
        sys.executable,
        "-m",
        "probekit",
        "run",
        "all",
        "--stream",
        "--model",
        model,
        "--texts",
        str(corpus),
        *own,
    ]
    whole, broken = args.out / "whole", args.out / "broken"
    runs = [watched([*command, "--out", str(whole)], whole)]
    for i in range(args.kills):
        at = args.texts * (i + 1) // (args.kills + 1)
        runs.append(watched([*command, "--out", str(broken)], broken, at))
    runs.append(watched([*command, "--out", str(broken)], broken))
    wrong = differences(whole, broken)
    (args.out / "memory.json").write_text(json.dumps({"runs": runs, "differences": wrong}))
    print("\n".join(_told(runs, wrong)))


def _told(runs: list[dict[str, Any]], wrong: list[str]) -> list[str]:
    lines = []
    for i, run in enumerate(runs):
        what = "unbroken" if i == 0 else ("killed" if i < len(runs) - 1 else "resumed to the end")
        rss, texts = np.array(run["rss_bytes"]) / 2**20, np.array(run["texts"])
        streaming = (texts > texts.min()) & (texts < texts.max())
        some = rss[streaming] if streaming.sum() > 20 else rss
        early, late = np.median(some[: len(some) // 5 + 1]), np.median(some[-(len(some) // 5 + 1) :])
        lines.append(
            f"{what}: {run['committed']:,} texts committed after {run['seconds'][-1]:,.0f} s; resident memory "
            f"{early:,.0f} MiB in the first fifth, {late:,.0f} MiB in the last, at most {rss.max():,.0f} MiB"
        )
    return [
        *lines,
        f"unbroken and resumed run: {'equal to the last bit' if not wrong else 'DIFFER in ' + ', '.join(wrong)}",
    ]


if __name__ == "__main__":
    main()
