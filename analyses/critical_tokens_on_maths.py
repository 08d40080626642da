"""Critical tokens in answers to maths questions: where wrong answers are lost, and what replacing tokens helps.

python analyses/critical_tokens_on_maths.py --plan
python analyses/critical_tokens_on_maths.py                             # SmolLM2 on made questions; ten minutes on 2 cores
python analyses/critical_tokens_on_maths.py --questions-file gsm8k.jsonl --models path/to/model --n 64 --samples 16
python analyses/critical_tokens_on_maths.py --questions-file gsm8k.jsonl --models path/to/chat-model --chat --max-tokens 400

A file has a JSON object per line, with "question" and "answer"; the right result stands after "####", as in GSM8K.
Without a file, questions of one or two steps are made from a few forms. A few answers to each question are sampled; those that
are sometimes right and sometimes wrong are looked at. Whatever was sampled is kept beside the report: the same command
goes on where it broke off, and one with more samples adds to them.
"""

from __future__ import annotations

import argparse
import json
import random
from pathlib import Path
from typing import Any

from study_command import arguments, conduct, write

import probekit as pk

# Made up for this study. They show the form; a small model otherwise rambles and hardly ever states a result.
EXAMPLES = (
    (
        "Tom has 3 boxes with 4 pens each. He gives 5 pens away. How many pens does he have left?",
        "3 * 4 = 12 pens. 12 - 5 = 7 pens are left. The answer is 7.",
    ),
    (
        "A book costs $6 and a pen costs $2. How much do 4 books and 3 pens cost together?",
        "4 * 6 = 24 dollars for books. 3 * 2 = 6 dollars for pens. 24 + 6 = 30 dollars. The answer is 30.",
    ),
    (
        "Anna reads 10 pages a day and Ben reads half as many. How many pages do they read together in 7 days?",
        "Ben reads 10 / 2 = 5 pages a day. 10 + 5 = 15 pages a day. 15 * 7 = 105 pages. The answer is 105.",
    ),
)
WORKED = "".join(f"Question: {question}\nAnswer: {answer}\n\n" for question, answer in EXAMPLES)
RESULT = r"[Tt]he answer is:? \$?(-?\d+)(?![\d,.]*\d)"  # whole numbers, written without separators


# Forms of questions with a, b, c drawn below, and how their answer comes about; a is the largest.
FORMS = (
    ("Mia has {a} coins. She finds {b} more. How many coins does she have?", lambda a, b, c: a + b),
    ("A shop has {a} books. It sells {b} of them. How many books are left?", lambda a, b, c: a - b),
    ("Leo has {a} pens. He buys {b} and loses {c}. How many pens does he have?", lambda a, b, c: a + b - c),
    ("Ida buys {b} cakes for ${c} each. How much does she pay?", lambda a, b, c: b * c),
)


def made_questions(n: int, seed: int) -> list[tuple[str, str]]:
    """Questions of one or two steps with their results; the numbers are drawn."""
    draw, found = random.Random(seed), []
    for i in range(n):
        form, result = FORMS[i % len(FORMS)]
        a, b, c = draw.randint(8, 15), draw.randint(3, 7), draw.randint(2, 5)
        found.append((form.format(a=a, b=b, c=c), str(result(a, b, c))))
    return found


def read_questions(path: Path) -> list[tuple[str, str]]:
    """Questions of a file in the form of GSM8K, with their results."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
            question, (_, result) = record["question"], record["answer"].split("####")
        except (ValueError, KeyError, TypeError, AttributeError):
            raise SystemExit(
                f'{path}, line {number}: expected an object with "question", and with "answer" that ends in "#### 18".'
            ) from None
        found.append((question, result.strip().replace(",", "")))
    if not found:
        raise SystemExit(f"{path} holds no questions.")
    return found


def prompts(options: argparse.Namespace) -> list[dict[str, str]]:
    """Prompts with what a right answer says."""
    own = options.questions_file
    pairs = read_questions(own) if own else made_questions(options.questions, options.seed)
    return [
        {"text": question if options.chat else f"{WORKED}Question: {question}\nAnswer:", "answer": result}
        for question, result in pairs[: options.questions]
    ]


def parameters(options: argparse.Namespace) -> dict[str, Any]:
    """Parameters of critical-tokens."""
    reading = {"answer": "number"} if options.chat else {"answer_regex": RESULT}
    return reading | {
        "tries": options.samples,
        "least_success": 0.5 / options.samples,  # one of them is right
        "n": options.n,
        "controls": options.controls,
        "temperature": options.temperature,
        "max_tokens": options.max_tokens,
        "seed": options.seed,
    }


def main() -> None:
    """Sample, scan, replace, write one report."""
    parser = arguments(__doc__, "critical-tokens-on-maths", corpora=False)
    parser.add_argument("--questions-file", type=Path, help=".jsonl in the form of GSM8K; made questions if left out")
    parser.add_argument("--questions", type=int, default=24, help="how many are asked")
    parser.add_argument("--samples", type=int, default=8, help="answers sampled per question, by which it is chosen")
    parser.add_argument("--n", type=int, default=16, help="continuations of each prefix, and of each token replaced")
    parser.add_argument("--controls", type=int, default=2, help="random tokens of each kind, per answer")
    parser.add_argument("--temperature", type=float, default=0.7, help="at which tokens are drawn")
    parser.add_argument("--max-tokens", type=int, default=64, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="of the questions and draws")
    parser.add_argument("--chat", action="store_true", help="questions as chat turns without worked examples")
    options = parser.parse_args()
    study = pk.Study(
        name="Critical tokens in answers to maths questions",
        analyses=["critical-tokens"],
        models=options.models,
        corpora={"questions": prompts(options)},
        params=parameters(options),
        how={"chat": options.chat},
    )
    found = conduct(study, options)
    write(found, next(iter(found.results.values()))["critical-tokens"])


if __name__ == "__main__":
    main()
