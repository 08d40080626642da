"""Which tokens of an embedder pull the embeddings of all sentences together, and whether they do harm.

python analyses/sticky_tokens_of_an_embedder.py --plan
python analyses/sticky_tokens_of_an_embedder.py                          # all-MiniLM-L6-v2, 40 candidates: ten minutes on 2 cores
python analyses/sticky_tokens_of_an_embedder.py --preset none            # the published procedure: all candidates; hours
python analyses/sticky_tokens_of_an_embedder.py --models path/to/embedder other/embedder

The similarities of every pair of sentences are kept as they are found: the same command goes on where it broke off.
"""

from __future__ import annotations

from study_command import arguments, conduct, write

import probekit as pk


def main() -> None:
    """Score, verify, measure the harm, write one report."""
    parser = arguments(__doc__, "sticky-tokens-of-an-embedder", corpora=False)
    parser.set_defaults(models=["all-minilm-l6-v2"])
    parser.add_argument("--preset", choices=["quick", "none"], default="quick", help="quick tries 40 candidates")
    options = parser.parse_args()
    study = pk.Study(
        name="Sticky tokens of embedders",
        analyses=["sticky-tokens"],
        models=options.models,
        params={"preset": options.preset} if options.preset != "none" else {},
    )
    found = conduct(study, options)
    write(found, *[results["sticky-tokens"] for results in list(found.results.values())[:1]])


if __name__ == "__main__":
    main()
