"""Sinks, massive activations, entropy and the lens on several models and kinds of text, each against the first.

python analyses/phenomena_across_texts.py --plan
python analyses/phenomena_across_texts.py                       # SmolLM2; prose, code and licence that Python carries
python analyses/phenomena_across_texts.py --models gpt2 EleutherAI/pythia-160m --corpus news=NEWS.jsonl --corpus maths=MATHS.jsonl
"""

from __future__ import annotations

from corpora import python_texts
from study_command import arguments, conduct, write

import probekit as pk


def main() -> None:
    """Run every model on every corpus, and write one report."""
    parser = arguments(__doc__, "phenomena-across-texts")
    parser.add_argument("--n", type=int, default=12, help="texts of each corpus")
    parser.add_argument(
        "--tokens", type=int, default=96, help="of the beginning of each text; shorter ones are left out"
    )
    options = parser.parse_args()
    corpora = dict(options.corpus or python_texts(options.n, n_chars=800))
    study = pk.Study(
        name="Four phenomena across models and texts",
        analyses=["attention-sinks", "massive-activations", "token-uncertainty", "logit-lens"],
        models=options.models,
        corpora={name: texts[: options.n] for name, texts in corpora.items()},
        how={"opening": options.tokens},
    )
    write(conduct(study, options))


if __name__ == "__main__":
    main()
