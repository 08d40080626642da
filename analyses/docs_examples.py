"""What the pages of docs/phenomena show: how each analysis is run, and the run that its figures are of."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Example:
    """How one analysis is run.

    Args:
        code: the Python that is shown and that makes `result`; `pk` and `model` are there already.
        flags: what the command line takes after the analysis' name; "" where it cannot be run from there.
        figures: names of the drawings that are shown.
        quantity: label of the quantity that colours a strip; the first one if "".
    """

    code: str
    flags: str
    figures: tuple[str, ...]
    quantity: str = ""


TEXTS = 'texts = [" ".join(text.split()[:70]) for text in pk.demo_texts()[:4]]\n'
WRONG = """\
shots = "Q: Ann has 5 pears and gets 2 more. How many pears does she have?\\nA: 5 + 2 = 7. The answer is 7.\\n"
asked = {"Tom had 15 nuts and ate 6. How many nuts are left?": 9, "A bus holds 8 people. How many do 3 buses hold?": 24,
         "Eve reads 6 pages a day. How many pages does she read in 4 days?": 24,
         "A box has 20 nails. Jim uses 7. How many nails are left?": 13}
records = [{"text": f"{shots}Q: {question}\\nA:", "answer": right} for question, right in asked.items()]
"""
QUESTIONS = """\
shots = "Q: Ann has 5 pears and gets 2 more. How many pears does she have?\\nA: 5 + 2 = 7. The answer is 7.\\n"
prompt = shots + "Q: A farmer has 12 cows, buys 5 more and sells 3. How many cows are there?\\nA:"
"""
ANSWER = 'answer="regex", answer_regex=r"answer is (\\d+)"'
PROMPTS = "--texts questions.jsonl --answer regex --answer-regex 'answer is (\\d+)'"
SUMS = """\
sums = [{"text": f"What is {a} + {b}? Answer with the number only.", "answer": a + b}
        for a in range(11, 51, 5) for b in range(12, 32, 5)]
"""
PAIR = (
    SUMS
    + """\
pair = pk.tune_pair(model, sums, "reports/docs/pair", chat=True, samples=8, max_tokens=24, epochs=3, warmup=5)
"""
)
MOOD = """\
good = ("wonderful", "excellent", "lovely", "brilliant", "delightful", "superb", "charming", "splendid", "fantastic",
        "amazing")
bad = ("terrible", "awful", "horrible", "dreadful", "disgusting", "miserable", "hideous", "unpleasant", "boring",
       "nasty")
frames = ("The film we saw last night was {}, everyone said", "My brother thought the soup was {}, as he wrote")
records = [
    {"text": frame.format(word), "label": label, "group": word}
    for label, words in (("praise", good), ("blame", bad)) for word in words for frame in frames
]
"""
CONTRAST = """\
stems = ("I saw the new film and thought it was", "The soup at the restaurant was", "We stayed in that hotel and it was",
         "Her speech at the wedding was", "The service in this shop is", "My first day at the new job was")
praise = ("wonderful", "delicious", "lovely", "beautiful", "excellent", "great")
blame = ("terrible", "disgusting", "horrible", "awful", "poor", "bad")
texts = [f"{s} {word}" for s, *pair in zip(stems, praise, blame) for word in pair]  # positive, negative, in turn
texts += ["The train leaves from platform four at ten past nine.", "Water boils at one hundred degrees at sea level."]
"""
DOMAINS = """\
import heapq, inspect, json, shlex, statistics, textwrap

functions = (heapq.merge, json.dump, shlex.split, statistics.median_grouped, textwrap.indent, inspect.getfile)
texts = {
    "prose": [" ".join(text.split()[:70]) for text in pk.demo_texts()],
    "code": [inspect.getsource(function)[-260:] for function in functions],
}
"""

EXAMPLES: dict[str, Example] = {
    "token-uncertainty": Example(
        f'{TEXTS}result = pk.run("token-uncertainty", model, texts)', "--texts essay.txt", ("strip", "calibration")
    ),
    "logit-lens": Example(
        f'{TEXTS}result = pk.run("logit-lens", model, texts)', "--texts essay.txt", ("logprob", "strip")
    ),
    "attention-sinks": Example(
        f'{TEXTS}result = pk.run("attention-sinks", model, texts)', "--texts essay.txt", ("depth", "heads")
    ),
    "secondary-sinks": Example(
        f'{TEXTS}result = pk.run("secondary-sinks", model, texts)', "--texts essay.txt", ("cosines", "norm")
    ),
    "value-drain": Example(
        f'{TEXTS}result = pk.run("value-drain", model, texts)', "--texts essay.txt", ("heads", "gap")
    ),
    "residual-peaks": Example(
        f'{TEXTS}result = pk.run("residual-peaks", model, texts)', "--texts essay.txt", ("norms", "writer")
    ),
    "massive-activations": Example(
        f'{TEXTS}result = pk.run("massive-activations", model, texts, intervene=True)',
        "--texts essay.txt --intervene true",
        ("magnitudes", "removal"),
    ),
    "sink-anatomy": Example(
        f'{TEXTS}result = pk.run("sink-anatomy", model, texts)', "--texts essay.txt", ("sinks", "ratios")
    ),
    "dormant-heads": Example(
        f'{DOMAINS}result = pk.run("dormant-heads", model, texts, n_heads=4)',
        "--texts corpus.jsonl --n-heads 4",
        ("difference",),
    ),
    "direct-logit-attribution": Example(
        'text = "The capital of France is Paris. The capital of Italy is Rome."\n'
        'result = pk.run("direct-logit-attribution", model, text)',
        '--text "The capital of France is Paris. The capital of Italy is Rome."',
        ("components", "strip"),
    ),
    "layer-ablation": Example(
        f'{TEXTS}result = pk.run("layer-ablation", model, texts[:2])', "--texts essay.txt", ("agreement", "kl")
    ),
    "activation-patching": Example(
        'texts = [f"The capital of {pair}" for pair in ("France is Paris", "Italy is Rome", '
        '"Germany is Berlin", "England is London")]\n'
        'result = pk.run("activation-patching", model, texts, direction="denoising")',
        '--text "The capital of France is Paris" --text "The capital of Italy is Rome" --direction denoising',
        ("resid_pre", "z"),
    ),
    "steering": Example(
        f'{CONTRAST}result = pk.run("steering", model, texts, layers="5,15,25", n_neutral=2)',
        "--texts pairs.jsonl --layers 5,15,25 --n-neutral 2",
        ("dose_response", "cost"),
    ),
    "forking-paths": Example(
        f'{QUESTIONS}result = pk.run("forking-paths", model, prompt, {ANSWER}, max_tokens=48,\n'
        "                temperature=0.7)",
        f"{PROMPTS} --max-tokens 48 --temperature 0.7",
        ("stream", "alternatives"),
    ),
    "critical-tokens": Example(
        f'{WRONG}result = pk.run("critical-tokens", model, records, {ANSWER}, max_tokens=32,\n'
        "                n=12, tries=12)",
        f"{PROMPTS} --max-tokens 32 --n 12 --tries 12",
        ("rate", "strip"),
    ),
    "forking-tokens": Example(
        f'{QUESTIONS}result = pk.run("forking-tokens", model, prompt, {ANSWER}, max_tokens=40,\n'
        "                answers=2, n=4, most=8, n_sampled=10)",
        f"{PROMPTS} --max-tokens 40 --answers 2 --n 4 --most 8 --n-sampled 10",
        ("minority", "strip"),
    ),
    "branching-factor": Example(
        'prompts = ["Once upon a time", "The capital of France is"]\n'
        'result = pk.run("branching-factor", model, prompts, n_samples=8, max_tokens=48)',
        '--prompt "Once upon a time" --prompt "The capital of France is" --n-samples 8 --max-tokens 48',
        ("along", "prompts"),
    ),
    "contrastive-estimation": Example(
        f'{PAIR}result = pk.run("contrastive-estimation", model, sums[:6], models=pair.models, chat=True, max_tokens=24)',
        "--texts sums.jsonl --chat --role positive=reports/pair/positive --role negative=reports/pair/negative "
        "--max-tokens 24",
        ("along", "lowest"),
    ),
    "model-shift": Example(
        f"{SUMS}"
        'texts = [record["text"] for record in sums[:6]]\n'
        'tuned = "reports/docs/pair/negative"  # the pair of the page on contrastive estimation\n'
        'result = pk.run("model-shift", tuned, texts, models={"base": model}, chat=True, answers=2, max_tokens=24)',
        "--model reports/pair/negative --role base=smollm2-135m-instruct --texts sums.jsonl --chat --answers 2 "
        "--max-tokens 24",
        ("strip",),
    ),
    "undertrained-tokens": Example(
        'result = pk.run("undertrained-tokens", model, n_verify=8, n_controls=6)',
        "--n-verify 8 --n-controls 6",
        ("top", "behaviour"),
    ),
    "glitch-tokens": Example(
        'result = pk.run("glitch-tokens", model, n_suspects=16, n_random=16, n_probe=3, n_mining=3, n_tried=4)',
        "--n-suspects 16 --n-random 16 --n-probe 3 --n-mining 3 --n-tried 4",
        ("map", "tasks"),
    ),
    "sticky-tokens": Example(
        'result = pk.run("sticky-tokens", "all-minilm-l6-v2", n_scored=80, n_scoring=3, n_candidates=12,\n'
        "                n_validation=20, n_random=6, n_above=6)",
        "--model all-minilm-l6-v2 --preset quick",
        ("pairs", "retrieval"),
    ),
    "linear-probes": Example(
        f'{MOOD}rows = pk.collect(model, records, "resid_post", positions="last")\n'
        "result = pk.probing.sweep(rows, n_permutations=200)",
        "",
        ("layers", "codelength"),
    ),
    "linear-probes-of-numbers": Example(
        'records = [{"text": f"In the year {year} the town", "label": float(year), "group": str(year)}\n'
        "           for year in range(1700, 2000, 6)]\n"
        'rows = pk.collect(model, records, "resid_post", positions="last")\n'
        "result = pk.probing.sweep(rows, n_permutations=200)",
        "",
        ("layers",),
    ),
    "concept-erasure": Example(
        f'{MOOD}rows = pk.collect(model, records, "resid_post", positions="last")\nresult = pk.probing.erase(rows)',
        "",
        ("erasure",),
    ),
    "probe-steering": Example(
        f'{MOOD}rows = pk.collect(model, records, "resid_post.16", positions="last")\n'
        'probe = pk.probing.DifferenceOfMeans().fit(rows.matrix("resid_post.16"), rows.labels)\n'
        'prompts = ["The new restaurant in town is", "Our holiday by the lake was", "The book that you lent me is"]\n'
        'result = pk.probing.steer(model, probe, "resid_post.16", prompts, (" great", " terrible"), fitted_on=rows)',
        "",
        ("dose_response",),
    ),
}
