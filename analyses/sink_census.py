"""How often position 0 is a sink: models and domains, random and repeated tokens, beside what was published.

python analyses/sink_census.py --plan
python analyses/sink_census.py                                         # SmolLM2 and texts that Python carries
python analyses/sink_census.py --models gpt2 path/to/model --corpus code=FILE.jsonl --corpus news=OTHER.txt
"""

from __future__ import annotations

import numpy as np
from corpora import python_texts
from sink_census_tables import EPSILON, T, table_of
from study_command import arguments, conduct, write

import probekit as pk
from probekit.studies import StudyRun


def census(models: list[str], domains: dict[str, list[str]], n: int) -> pk.Study:
    """One run for each model, over the first T + 1 tokens of up to `n` texts of each domain.

    One more than T, so that T are left where a beginning-of-sequence token is taken away.
    """
    return pk.Study(
        name="Attention sinks across models and texts",
        analyses=["attention-sinks"],
        models=models,
        corpora={"all domains": {domain: texts[:n] for domain, texts in domains.items()}},
        params={"horizon": T, "epsilon": EPSILON, "n_made": n},
        how={"opening": T + 1},
    )


def rates(model: str, result: pk.Result) -> dict[str, np.ndarray]:
    """Rates of each text, in percent, by model and domain and by model and made case."""
    of_text = result["domain"].values[np.unique(result["text"].values, return_index=True)[1]]
    found = 100 * result["sink_rate"].mean(("layer", "head")).values
    rows = {f"{model}, {domain}": found[of_text == domain] for domain in dict.fromkeys(of_text.tolist())}
    made = result["made_rate"]
    for case in made["case"].values[:-1].tolist():  # the last is uniform attention
        rows[f"{model}, {case}"] = made.sel(case=case).dropna("sample").values
    return rows


def table(found: StudyRun) -> pk.Result:
    """The census of all models, with the published rows below."""
    runs = {cell.model: results["attention-sinks"] for cell, results in found.results.items()}
    rows = {case: values for model, result in runs.items() for case, values in rates(model, result).items()}
    return pk.result_of("sink-census", table_of(rows), next(iter(runs.values())).provenance)


def main() -> None:
    """Run the models in turn and write one report."""
    parser = arguments(__doc__, "sink-census")
    parser.add_argument("--n", type=int, default=40, help="texts of each domain, and made texts of each kind")
    options = parser.parse_args()
    domains = dict(options.corpus or python_texts(options.n, n_chars=400))
    found = conduct(census(options.models, domains, options.n), options)
    write(found, table(found))


if __name__ == "__main__":
    main()
