"""A pair of models tuned on a model's own right and wrong answers; the model itself stays as it is."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from click.testing import CliRunner
from helpers import tiny_model, words_tokenizer

import probekit as pk
from probekit.backends.transformers.adapters import lora_twin
from probekit.cli import cli
from probekit.core import Base, CapabilityError, Continuation, InputError, ModelError, StoreError
from probekit.models import open_model
from probekit.sampling import LastNumber, Pattern
from probekit.tuning import TuneParams, pair, training, tune_pair
from probekit.tuning.answers import Example, choose
from probekit.tuning.folder import JOURNAL, MANIFEST, partial_of
from probekit.tuning.training import Schedule, fit, mean_loss, response_loss

# Answers say the first digit of their first word.
HOW: dict[str, Any] = {"answer_regex": r"w(\d)", "samples": 12, "max_tokens": 5, "top_p": 1.0, "progress": False}
PROMPTS = [{"text": f"w{i} w{i + 7} w{3 * i}", "answer": 1} for i in range(4, 12)]


def said(*texts: str) -> list[Continuation]:
    """Continuations of one token each; an answer in brackets was cut off."""
    ends = ["length" if t.startswith("(") else "end" for t in texts]
    return [Continuation(i, (i,), (0.0,), None, e) for i, e in enumerate(ends)]  # type: ignore[arg-type]


def chosen(texts: list[str], right: str = "7", outcome: Any = None, share: float = 0.5) -> Any:
    decode = dict(enumerate(t.strip("()") for t in texts))
    found = choose(
        [Base((100, 101), 2)],
        [said(*texts)],
        [right],
        outcome=outcome or LastNumber(),
        decode=lambda ids: decode[ids[0]],
        wrong_share=share,
    )
    return found.questions[0], found


def test_first_right_answer_and_commonest_wrong_ones_are_learnt() -> None:
    """Of 8 wrong answers, 3 say 4 and 2 say 5: together more than half; 9, said once, would be one too many."""
    texts = ["is 4", "is 9", "is 7", "is 5", "4", "so 7", "5", "4 it is", "none", "is 8", "11"]
    question, found = chosen(texts)
    assert question.counts == {"right": 2, "wrong": 8, "unread": 1, "unfinished": 0}
    assert (question.positive, question.negative) == (2, (0, 3))
    assert found.positive == (Example((100, 101, 2), 2),)
    assert [e.ids[-1] for e in found.negative] == [0, 3]


@pytest.mark.parametrize(
    ("share", "expected"),
    [(0.01, (0,)), (0.375, (0,)), (0.5, (0, 3)), (0.625, (0, 3)), (0.7, (0, 3)), (1.0, (0, 3))],
)
def test_share_of_the_wrong_answers(share: float, expected: tuple[int, ...]) -> None:
    """Answers that were given once follow only where there is nothing commoner."""
    assert chosen(["4", "9", "7", "5", "4", "5", "4", "8", "11"], share=share)[0].negative == expected


def test_a_wrong_answer_that_was_given_once_is_taken_if_it_is_the_first() -> None:
    assert chosen(["7", "3", "4"])[0].negative == (1,)


def test_right_answers_are_read_like_the_others() -> None:
    assert chosen(["1,200", "4"], right="so #### 1200")[0].positive == 0
    assert chosen(["yes.", "no."], right="yes", outcome=Pattern("yes|no"))[0].positive == 0


def test_unfinished_answers_count_if_more_would_change_nothing() -> None:
    question, _ = chosen(["7", "(is 4)", "3", "(7)"])
    assert question.counts == {"right": 1, "wrong": 1, "unread": 0, "unfinished": 2}
    settled, _ = chosen(["A7 ", "(A4 and)", "(A4)"], outcome=Pattern(r"A(\d)"))
    assert settled.counts == {"right": 1, "wrong": 1, "unread": 0, "unfinished": 1}


@pytest.mark.parametrize(("texts", "what"), [(["4", "(7)", "no"], "right"), (["7", "7", "no"], "wrong")])
def test_nothing_to_learn_is_refused_with_numbers(texts: list[str], what: str) -> None:
    with pytest.raises(InputError) as error:
        chosen(texts)
    n = {"right": (0, 1, 1, 1), "wrong": (2, 0, 1, 0)}[what]
    assert f"No sampled answer is {what}: of 3 answers to each of 1 questions" in str(error.value)
    assert "{} are right, {} are wrong, {} are unread, {} are unfinished".format(*n) in str(error.value)
    assert ("raise it" in str(error.value)) == (what == "right")


def test_learning_rate_rises_and_falls() -> None:
    schedule = Schedule(learning_rate=2.0, warmup=4, epochs=2, batch_size=6)
    assert schedule.steps(13) == 6 and schedule.steps(12) == 4
    rates = [schedule.rate(i, 12) for i in range(12)]
    assert rates[:4] == pytest.approx([0.5, 1.0, 1.5, 2.0]) and rates[4] == 2.0
    assert rates[8] == pytest.approx(1.0) and rates[11] == pytest.approx(1 + np.cos(np.pi * 7 / 8))
    assert [Schedule(1.0, 100).rate(i, 4) for i in range(4)] == pytest.approx([0.5, 1, 1, 0.5]), "at most half"
    assert Schedule(1.0, 100).rate(0, 1) == 1.0


class Fixed(torch.nn.Module):
    """Says the same whatever it reads, so that token ids matter as targets only."""

    def __init__(self, n: int, d_vocab: int = 12) -> None:
        super().__init__()
        table = torch.randn(n, d_vocab, generator=torch.Generator().manual_seed(0))
        self.table = torch.nn.Parameter(table)

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        return SimpleNamespace(logits=self.table[: input_ids.shape[1]].expand(len(input_ids), -1, -1))


def test_only_tokens_of_answers_enter_the_loss() -> None:
    """Other prompts change nothing; padding neither; the value is the mean surprisal of the answers' tokens."""
    module = Fixed(7)
    long, short = Example((1, 2, 3, 4, 5, 6, 7), 4), Example((8, 9, 10), 2)
    loss = response_loss(module, [long, short])
    rows = torch.log_softmax(module.table.detach(), -1)
    expected = -(rows[3, 5] + rows[4, 6] + rows[5, 7] + rows[1, 10]) / 4
    assert loss.item() == pytest.approx(float(expected), rel=1e-6)
    loss.backward()
    learnt = module.table.grad.abs().sum(1) > 0
    assert learnt.tolist() == [False, True, False, True, True, True, False]
    other = [Example((5, 5, 5, 5, 5, 6, 7), 4), Example((1, 1, 10), 2)]
    assert response_loss(module, other).item() == loss.item()
    changed = [Example((1, 2, 3, 4, 5, 6, 8), 4), short]
    assert response_loss(module, changed).item() != loss.item()


def examples(n: int = 8, seed: int = 0) -> list[Example]:
    rng = np.random.default_rng(seed)
    return [Example(tuple(map(int, rng.integers(3, 128, 5 + i % 4))), 3) for i in range(n)]


def test_padding_and_batches_change_nothing() -> None:
    module, some = tiny_model("llama-grouped").module, examples()
    alone = [float(response_loss(module, [e]).detach()) for e in some]
    n_tokens = [len(e.ids) - 3 for e in some]
    expected = np.average(alone, weights=n_tokens)
    for size in (1, 3, 8):
        assert mean_loss(module, some, size) == pytest.approx(expected, rel=1e-5)


def twin() -> Any:
    model = tiny_model("llama-grouped").model
    return lora_twin(model, rank=4, alpha=8, dropout=0.1, base=("somewhere/else", ""))


def test_loss_falls_on_what_is_learnt_and_on_nothing_else() -> None:
    schedule, told = Schedule(learning_rate=0.02, epochs=15, batch_size=4), []
    module, fitted = fit(twin, examples(), schedule, lambda: told.append(1))
    assert len(fitted.losses) == len(told) == 30 and not module.training
    assert fitted.before == pytest.approx(mean_loss(tiny_model("llama-grouped").module, examples(), 4), rel=1e-5)
    assert fitted.after < 0.6 * fitted.before and np.mean(fitted.losses[-5:]) < np.mean(fitted.losses[:5])
    others = [mean_loss(m, examples(seed=1), 4) for m in (tiny_model("llama-grouped").module, module)]
    assert others[1] > 0.9 * others[0], "other texts are not learnt"


def test_the_seed_fixes_a_run_and_leaves_the_callers_random_numbers() -> None:
    runs = []
    for caller, seed in enumerate((1, 1, 2)):
        torch.manual_seed(caller)
        expected = torch.rand(3)
        torch.manual_seed(caller)
        runs.append(fit(twin, examples(), Schedule(seed=seed, warmup=0, epochs=2))[1])
        assert torch.equal(torch.rand(3), expected)
    assert runs[0] == runs[1] and runs[0].losses != runs[2].losses


def state(module: Any) -> Any:
    kinds = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks")
    return (
        {n: (t.data_ptr(), t.detach().numpy().tobytes()) for n, t in module.state_dict().items()},
        {n: (p.requires_grad, p.grad is None) for n, p in module.named_parameters()},
        {n: (m.training, type(m), [list(getattr(m, k)) for k in kinds]) for n, m in module.named_modules()},
        module.config.to_dict(),
    )


def test_a_pair_is_made_and_opened_and_the_model_is_as_it_was(tiny_folder: Path, tmp_path: Path) -> None:
    model: Any = open_model(tiny_folder)
    fired: list[int] = []
    handle = model.module.model.layers[1].mlp.register_forward_hook(lambda *_: fired.append(torch.is_grad_enabled()))
    model.module.model.layers[2].train()
    before, hashed, out = state(model.module), model.weights_hash(fresh=True), tmp_path / "new" / "pair"
    made = tune_pair(model, PROMPTS, out, epochs=8, learning_rate=0.02, **HOW)
    assert state(model.module) == before and model.weights_hash(fresh=True) == hashed
    assert not any(fired), "training does not run the user's hooks"
    handle.remove()
    assert sorted(p.name for p in out.iterdir()) == [JOURNAL, MANIFEST, "negative", "positive"]
    assert [p.name for p in out.parent.iterdir()] == ["pair"], "nothing is left beside it"
    told = json.loads((out / MANIFEST).read_text())
    assert told == made.manifest and told["base"] == {"name": str(tiny_folder), "revision": "", "weights_hash": hashed}
    sampled = told["sampled"]
    assert sampled["answers"] == 8 * 12 == sum(v for k, v in sampled.items() if k != "answers")
    assert told["positive"]["examples"] == sum(q["positive"] is not None for q in told["questions"]) > 2
    assert told["negative"]["examples"] == sum(len(q["negative"]) for q in told["questions"]) > 2
    hashes = {hashed}
    for side in ("positive", "negative"):
        assert told[side]["loss_after_nats"] < told[side]["loss_before_nats"]
        tuned: Any = open_model(out / side)
        hashes.add(tuned.weights_hash())
        changed = [n for n, t in tuned.module.state_dict().items() if not torch.equal(t, model.module.state_dict()[n])]
        assert changed and all(".mlp." in n for n in changed), "only matrices of the MLPs are tuned"
    assert len(hashes) == 3
    found = pk.run("contrastive-estimation", model, "w5 w6", models=made.models, max_tokens=4, progress=False)
    assert {m["model"]["name"] for m in found.provenance["other models"].values()} == set(made.models.values())
    assert (found["p_positive"].values != found["p_negative"].values).all()


def test_what_is_learnt_is_what_was_chosen(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Positive examples say the right answer, negative ones another; ids are those that were sampled, ends included."""
    learnt: list[list[Example]] = []

    def spy(make: Any, some: list[Example], schedule: Any, progress: Any) -> Any:
        learnt.append(some)
        return fit(make, some, schedule, progress)

    monkeypatch.setattr(training, "fit", spy)
    made = tune_pair(str(tiny_folder), PROMPTS, tmp_path / "pair", **HOW)
    tokenizer = words_tokenizer()
    for some, right in zip(learnt, (True, False), strict=True):
        firsts = [tokenizer.decode(e.ids[e.n_prompt :], skip_special_tokens=True)[1] for e in some]
        assert all((first == "1") == right for first in firsts), firsts
        assert all(tokenizer.decode(e.ids[: e.n_prompt]) in {p["text"] for p in PROMPTS} for e in some)
    kept = [json.loads(line) for line in (tmp_path / "pair" / JOURNAL).read_text().splitlines()[1:]]
    assert {e.ids[e.n_prompt :] for some in learnt for e in some} <= {tuple(k["ids"]) for k in kept}
    assert made.manifest["parameters"]["samples"] == 12
    short = tune_pair(str(tiny_folder), PROMPTS, tmp_path / "pair", longest=5, **HOW)
    assert all(len(e.ids) == 5 for e in learnt[2] + learnt[3]) and short.manifest["positive"]["examples"] > 0
    with pytest.raises(
        InputError, match=r"No answer for the positive model begins within 2 tokens.*shortest prompt has 3"
    ):
        tune_pair(str(tiny_folder), PROMPTS, tmp_path / "pair", longest=2, **HOW)


def test_a_call_that_broke_off_leaves_nothing_half_written_and_goes_on(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, tuned = tmp_path / "pair", pair._tuned

    def breaks(*args: Any) -> Any:
        if args[4].name == "negative":
            raise KeyboardInterrupt
        return tuned(*args)

    monkeypatch.setattr(pair, "_tuned", breaks)
    with pytest.raises(KeyboardInterrupt):
        tune_pair(str(tiny_folder), PROMPTS, out, **HOW)
    assert not out.exists() and [p.name for p in partial_of(out).iterdir()] == [JOURNAL]
    journal = (partial_of(out) / JOURNAL).read_bytes()
    monkeypatch.setattr(pair, "_tuned", tuned)
    first = tune_pair(str(tiny_folder), PROMPTS, out, **HOW)
    assert (out / JOURNAL).read_bytes() == journal, "no answer was sampled again"
    assert not partial_of(out).exists()
    more = tune_pair(str(tiny_folder), PROMPTS, out, **{**HOW, "samples": 14})
    assert (out / JOURNAL).read_bytes().startswith(journal) and more.manifest["sampled"]["answers"] == 112
    for one, two in zip(first.manifest["questions"], more.manifest["questions"], strict=True):
        assert one["positive"] in (None, two["positive"]) and one["right"] <= two["right"], "samples are nested"
    monkeypatch.setattr(pair, "_tuned", breaks)
    with pytest.raises(KeyboardInterrupt):
        tune_pair(str(tiny_folder), PROMPTS, out, **HOW)
    assert json.loads((out / MANIFEST).read_text()) == more.manifest, "the pair that was there is still there"


def test_another_folder_is_not_touched(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "mine").write_text("precious")
    with pytest.raises(StoreError, match="no pair that probekit made"):
        tune_pair(str(tiny_folder), PROMPTS, tmp_path, **HOW)
    with pytest.raises(StoreError, match="no pair that probekit made"):
        tune_pair(str(tiny_folder), PROMPTS, tmp_path / "mine", **HOW)
    with pytest.raises(StoreError, match="Cannot write"):
        tune_pair(str(tiny_folder), PROMPTS, tmp_path / "mine" / "below", **HOW)
    assert [p.name for p in tmp_path.iterdir()] == ["mine"]


def test_what_cannot_be_tuned_is_refused(tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out, folder = tmp_path / "pair", str(tiny_folder)
    with pytest.raises(InputError, match="1 of 2 prompts do not say what a right answer is, such as prompt 1"):
        tune_pair(folder, [PROMPTS[0], "w5 w6"], out, **HOW)
    with pytest.raises(InputError, match="No sampled answer is right: of 12 answers to each of 8 questions"):
        tune_pair(folder, [p | {"answer": "never"} for p in PROMPTS], out, **HOW)
    loaded = (tiny_model("llama-grouped").module, words_tokenizer())
    with pytest.raises(InputError, match="no name under which an adapter could find it again"):
        tune_pair(loaded, PROMPTS, out, **HOW)
    with pytest.raises(InputError, match="parameter 'rank' must be from 1 to 1024"):
        tune_pair(folder, PROMPTS, out, rank=0)
    from helpers import scripted

    with pytest.raises(CapabilityError, match="cannot be tuned"):
        tune_pair(scripted(), PROMPTS, out, **HOW)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ModelError, match=r"pip install 'probekit\[tune\]'"):
        tune_pair(folder, PROMPTS, out, **HOW)
    assert not out.exists()


def test_names_under_which_a_base_is_found_again(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def named(name: str, revision: str = "") -> Any:
        return SimpleNamespace(info=SimpleNamespace(name=name, revision=revision))

    assert pair.reopened_by(named("SmolLM2-135M-Instruct", "package==1.0")) == ("SmolLM2-135M-Instruct", "")
    assert pair.reopened_by(named("owner/name@main", "abc123")) == ("owner/name", "abc123")
    monkeypatch.chdir(tiny_folder.parent)
    assert pair.reopened_by(named(tiny_folder.name)) == (str(tiny_folder.resolve()), "")


def test_defaults_are_those_of_the_released_code() -> None:
    p = TuneParams()
    assert (p.samples, p.top_p, p.wrong_share, p.longest) == (64, 0.95, 0.5, 1024)
    assert (p.rank, p.alpha, p.dropout) == (8, 16, 0.1)
    assert p.schedule == Schedule(learning_rate=3e-4, warmup=100, epochs=1, batch_size=6, seed=0)


def test_the_command_line_makes_a_pair(tiny_folder: Path, tmp_path: Path) -> None:
    file, out = tmp_path / "questions.jsonl", tmp_path / "pair"
    file.write_text("\n".join(json.dumps(p) for p in PROMPTS))
    flags = ["--answer-regex", r"w(\d)", "--samples", "12", "--max-tokens", "5", "--top-p", "1"]
    args = ["tune-pair", "--model", str(tiny_folder), "--texts", str(file), "--out", str(out), *flags]
    done = CliRunner().invoke(cli, args)
    assert done.exit_code == 0, done.output
    assert "96 answers" in done.output and "nats per token" in done.output and str(out / "negative") in done.output
    roles = [f"--role={side}={out / side}" for side in ("positive", "negative")]
    common = ["--model", str(tiny_folder), "--text", "w5 w6", "--max-tokens", "4", "--out", str(tmp_path / "report")]
    report = CliRunner().invoke(cli, ["run", "contrastive-estimation", *roles, *common])
    assert report.exit_code == 0 and "lowest-scoring token" in report.output, report.output
    wrong = CliRunner().invoke(cli, [*args, "--rank", "none"])
    assert wrong.exit_code == 2 and "parameter 'rank' must be int" in wrong.output
    shown = CliRunner().invoke(cli, ["tune-pair", "--help"]).output
    assert "--wrong-share" in shown and "default 0.5 share" in shown
