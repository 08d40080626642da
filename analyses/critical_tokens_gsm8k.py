"""Critical tokens on grade-school mathematics: where wrong answers are lost, and what replacing tokens helps.

python analyses/critical_tokens_gsm8k.py gsm8k.jsonl                                   # SmolLM2; half an hour on 2 cores
python analyses/critical_tokens_gsm8k.py gsm8k.jsonl --model path/to/model --n 64 --samples 16 --max-tokens 256
python analyses/critical_tokens_gsm8k.py gsm8k.jsonl --model path/to/chat-model --chat --max-tokens 400

The file has a JSON object per line, with "question" and "answer"; the right result stands after "####", as in GSM8K. A
few answers to each question are sampled; those that are sometimes right and sometimes wrong are looked at. Whatever was
sampled is kept beside the report: the same command goes on where it broke off, and one with more samples adds to them.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import probekit as pk

NAME = "critical-tokens"
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


def questions(path: Path, most: int, *, chat: bool) -> list[dict[str, str]]:
    """Prompts with what a right answer says."""
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
        text = question if chat else f"{WORKED}Question: {question}\nAnswer:"
        found.append({"text": text, "answer": result.strip().replace(",", "")})
    if not found:
        raise SystemExit(f"{path} holds no questions.")
    return found[:most]


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
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("file", type=Path, help="questions with answers, .jsonl")
    parser.add_argument("--model", default="smollm2-135m-instruct", help="what open_model takes")
    parser.add_argument("--questions", type=int, default=200, help="how many of the file, from its beginning")
    parser.add_argument("--samples", type=int, default=8, help="answers sampled per question, by which it is chosen")
    parser.add_argument("--n", type=int, default=32, help="continuations of each prefix, and of each token replaced")
    parser.add_argument("--controls", type=int, default=2, help="random tokens of each kind, per answer")
    parser.add_argument("--temperature", type=float, default=0.5, help="at which tokens are drawn")
    parser.add_argument("--max-tokens", type=int, default=80, help="longest answer")
    parser.add_argument("--seed", type=int, default=0, help="of the draws")
    parser.add_argument("--chat", action="store_true", help="questions as chat turns without worked examples")
    parser.add_argument("--out", type=Path, default=Path("reports/critical-tokens-gsm8k"))
    options = parser.parse_args()
    texts = questions(options.file, options.questions, chat=options.chat)
    how: dict[str, Any] = {"chat": options.chat, "journal": options.out / "continuations.jsonl"}
    result = pk.run(NAME, pk.open_model(options.model), texts, **how, **parameters(options))
    print(*(f"{f.claim} [{f.evidence}]" for f in result.findings), sep="\n")
    print("Report:", pk.report(result, options.out))


if __name__ == "__main__":
    main()
