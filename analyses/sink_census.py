"""How often position 0 is a sink: models and domains, random and repeated tokens, beside what was published.

python analyses/sink_census.py                                         # SmolLM2 and texts that Python carries
python analyses/sink_census.py --models gpt2 path/to/model --domain code=FILE.jsonl --domain news=OTHER.txt
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from corpora import python_texts
from sink_census_tables import EPSILON, T, table_of

import probekit as pk
from probekit.texts import read_texts


def domain_of(option: str) -> tuple[str, list[str]]:
    """Name and texts of NAME=FILE."""
    name, _, path = option.partition("=")
    if not name or not path:
        raise argparse.ArgumentTypeError(f"expected NAME=FILE, found {option!r}")
    texts: Any = read_texts(path)
    listed = [t for some in texts.values() for t in some] if isinstance(texts, dict) else texts
    return name, [t["text"] if isinstance(t, dict) else t for t in listed]  # lines with answers are records


def openings(model: Any, domains: dict[str, list[str]], n: int) -> Any:
    """The first T + 1 tokens of up to `n` texts of each domain; shorter texts are left out.

    One more than T, so that T are left where a beginning-of-sequence token is taken away.
    """
    kept = []
    for domain, texts in domains.items():
        long = [t for t in model.tokenize(texts) if len(t) > T][:n]
        if not long:
            raise SystemExit(f"No text of {domain!r} has more than {T} tokens of {model.info.name}.")
        kept += [replace(t, ids=t.ids[: T + 1], strings=t.strings[: T + 1], domain=domain) for t in long]
    return replace(model.tokenize([texts[0]]), texts=tuple(kept), index=())


def census(model: Any, domains: dict[str, list[str]], n: int) -> tuple[dict[str, np.ndarray], pk.Result]:
    """Rates of each text, in percent, by model and domain and by model and made case; and the result they are from."""
    batch = openings(model, domains, n)
    result = pk.run("attention-sinks", model, batch, horizon=T, epsilon=EPSILON, n_made=n)
    rates, kinds = 100 * result["sink_rate"].mean(("layer", "head")).values, np.array(batch.domains)
    rows = {f"{model.info.name}, {domain}": rates[kinds == domain] for domain in domains}
    made = result["made_rate"]
    for case in made["case"].values[:-1].tolist():  # the last is uniform attention
        rows[f"{model.info.name}, {case}"] = made.sel(case=case).dropna("sample").values
    return rows, result


def main() -> None:
    """Run the models in turn and write one report."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["smollm2-135m-instruct"], help="names, hub ids or folders")
    parser.add_argument("--domain", action="append", type=domain_of, help="NAME=FILE, .txt or .jsonl; repeat for more")
    parser.add_argument("--n", type=int, default=40, help="texts of each domain, and made texts of each kind")
    parser.add_argument("--out", type=Path, default=Path("reports/sink-census"))
    options = parser.parse_args()
    domains = dict(options.domain or python_texts(options.n, n_chars=400))
    found = [census(pk.open_model(name), domains, options.n) for name in options.models]
    study = pk.result_of("sink-census", table_of({k: v for rows, _ in found for k, v in rows.items()}), _origin(found))
    print(*(f.claim for f in study.findings), sep="\n")
    print("Report:", pk.report([study, *[result for _, result in found][:1]], options.out))


def _origin(found: list[tuple[dict[str, np.ndarray], pk.Result]]) -> dict[str, Any]:
    """What fixes the numbers: that of the first model, and the others beside it."""
    first, *others = (dict(result.provenance) for _, result in found)
    return {**first, "other_models": others} if others else first


if __name__ == "__main__":
    main()
