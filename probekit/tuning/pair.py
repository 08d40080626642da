"""A positive and a negative model for contrastive estimation, tuned on a model's own right and wrong answers."""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from probekit._version import __version__
from probekit.analysis import param
from probekit.core import Base, Batch, BosPolicy, Branch, CapabilityError, Chat, Fork, InputError
from probekit.engine.branches import run_branch
from probekit.engine.journal import Journal
from probekit.engine.progress import Progress
from probekit.sampling import WritingParams

from .answers import Chosen, Example, choose
from .folder import JOURNAL, MANIFEST, MARK, appearing

if TYPE_CHECKING:
    from probekit.backends.transformers import TransformersModel

    from .training import Fitted, Schedule

SIDES = ("positive", "negative")


@dataclass(frozen=True)
class TuneParams(WritingParams):
    """How a pair is made; the defaults are those of arXiv 2411.19943 where its released code has them."""

    samples: int = param(64, low=1, high=10000, unit="answers", help="Answers that are sampled for each question")
    max_tokens: int = param(256, low=1, high=4096, unit="tokens", help="Longest answer")
    top_p: float = param(0.95, low=0.01, high=1.0, unit="share", help="Nucleus that answers are drawn from")
    wrong_share: float = param(
        0.5, low=0.01, high=1.0, unit="share", help="Share of a question's wrong answers that the chosen ones stand for"
    )
    rank: int = param(8, low=1, high=1024, help="Rank of the matrices that are added to the MLPs")
    alpha: float = param(16.0, low=0.01, high=4096.0, help="What they add is multiplied by alpha / rank")
    dropout: float = param(0.1, low=0.0, high=0.9, unit="share", help="Share of their inputs dropped in training")
    learning_rate: float = param(3e-4, low=1e-7, high=0.1, help="Peak of the learning rate")
    warmup: int = param(100, low=0, high=100000, unit="updates", help="Updates until the peak, at most half of all")
    epochs: int = param(1, low=1, high=1000, help="Passes over the chosen answers")
    batch_size: int = param(6, low=1, high=1024, unit="answers", help="Answers of one update")
    longest: int = param(1024, low=2, high=131072, unit="tokens", help="Prompts with answers are cut to this length")

    @property
    def schedule(self) -> Schedule:
        """How the matrices are trained."""
        from .training import Schedule

        return Schedule(self.learning_rate, self.warmup, self.epochs, self.batch_size, self.seed)


@dataclass(frozen=True)
class Pair:
    """A pair of tuned models, as adapters on disk.

    Args:
        folder: holds both and what they are made of.
        manifest: what was sampled, chosen and learnt.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def models(self) -> dict[str, str]:
        """The adapters by role, for `probekit.run(…, models=pair.models)`."""
        return {side: str(self.folder / side) for side in SIDES}


def tune_pair(
    model: Any,
    prompts: Any,
    folder: str | Path,
    *,
    bos: BosPolicy = "model",
    chat: Chat = False,
    memory_limit: int | None = None,
    progress: bool = True,
    **params: Any,
) -> Pair:
    """Tune one adapter on a model's right answers and one on its wrong answers, for contrastive-estimation.

    The model answers each prompt `samples` times. The positive adapter learns one right answer to each question, the
    negative one the commonest wrong answers, until they stand for half of the wrong ones; only the answers' tokens are
    learnt. Both are LoRA on the matrices of the MLPs. The model itself stays exactly as it is. Answers are kept as
    they are written, beside the folder; a call that broke off goes on from there.

    Args:
        model: an opened model, or anything that `open_model` takes; one that can be opened again by its name.
        prompts: records {"text": …, "answer": …} that say what a right answer to each prompt is.
        folder: gets the folders `positive` and `negative`, each of which `open_model` opens, and manifest.json. It
            appears when everything is done; a pair that is there already is replaced then.
        bos: as in `run`.
        chat: as in `run`.
        memory_limit: as in `run`, for sampling.
        progress: show progress bars where standard error is a terminal.
        params: parameters of `TuneParams`, such as `samples=16`.

    Raises:
        InputError: no prompt says what is right, or no answer is right, or none is wrong.
        ModelError: peft is missing, or the model cannot be tuned in this way.
        StoreError: the folder holds something else, or cannot be written.

    Example:
        >>> pair = tune_pair("smollm2-135m-instruct", [{"text": "2 + 2 =", "answer": 4}], "pair")  # doctest: +SKIP
        >>> run("contrastive-estimation", "smollm2-135m-instruct", "2 + 3 =", models=pair.models)  # doctest: +SKIP
    """
    settings = TuneParams.parse(params, "tune-pair")
    assert isinstance(settings, TuneParams)
    outcome, opened = settings.outcome, _opened(model)
    batch = _asked(opened, prompts, bos, chat)
    base = reopened_by(opened)
    with appearing(Path(folder)) as part:
        opened.load()
        bases = [Base(text.ids, len(text)) for text in batch]
        forks = tuple(Fork(i, len(b.ids)) for i, b in enumerate(bases))
        asked = Branch(tuple(bases), forks, settings.samples, sampling=settings.sampling(), why="answers to learn from")
        with Journal(part / JOURNAL, opened.weights_hash()) as journal, Progress(shown=progress) as bar:
            answers = run_branch(opened, asked, journal, memory_limit=memory_limit, progress=bar).continuations
        decode = partial(opened.tokenizer.decode, skip_special_tokens=True)
        chosen = choose(
            bases,
            answers,
            [t.answer for t in batch],
            outcome=outcome,
            decode=lambda ids: decode(list(ids)),
            wrong_share=settings.wrong_share,
        )
        fitted = {}
        for side, examples in zip(SIDES, (chosen.positive, chosen.negative), strict=True):
            fitted[side] = _tuned(opened, _cut(examples, settings.longest, side), settings, base, part / side, progress)
        manifest = _manifest(opened, base, batch, settings, chosen, fitted)
        (part / MANIFEST).write_text(json.dumps(manifest, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return Pair(Path(folder), manifest)


def _opened(model: Any) -> TransformersModel:
    """The native model, once it is clear that it can be tuned."""
    from probekit.backends.transformers import TransformersModel
    from probekit.backends.transformers.adapters import require_peft
    from probekit.models import open_model

    require_peft()
    opened = open_model(model, lazy=True)
    native = getattr(opened, "native", opened)
    if not isinstance(native, TransformersModel):
        raise CapabilityError(
            f"{opened.info.name!r} ({type(opened).__name__}) cannot be tuned; open a decoder with the native backend."
        )
    return native


def _asked(model: Any, prompts: Any, bos: BosPolicy, chat: Chat) -> Batch:
    from probekit.batches import make_batch

    batch = make_batch(model, (), prompts, bos, None, chat)
    silent = [i for i, text in enumerate(batch) if not text.answer]
    if silent:
        raise InputError(
            f"{len(silent)} of {len(batch)} prompts do not say what a right answer is, such as prompt {silent[0]}. Give "
            'records {"text": …, "answer": …}, or a .jsonl file with "answer" on every line.'
        )
    return batch


def reopened_by(model: TransformersModel) -> tuple[str, str]:
    """Name and hub revision by which `open_model` and peft find a model again.

    Raises:
        InputError: it was handed over as a pair of model and tokenizer that came from nowhere.
    """
    from probekit import catalog

    name = model.info.name
    if name.lower() in catalog.CATALOGUE:
        return name, ""
    if (path := Path(name).expanduser()).exists():
        return str(path.resolve()), ""
    if "/" not in name:
        raise InputError(
            f"{name!r} was handed over as a loaded model, and there is no name under which an adapter could find it "
            "again. Save it with model.save_pretrained(folder) and tokenizer.save_pretrained(folder), and open the folder."
        )
    hub_id, _, revision = name.partition("@")
    return hub_id, model.info.revision or revision


def _cut(examples: Sequence[Example], longest: int, side: str) -> list[Example]:
    """Examples cut to a length; those whose answer begins beyond it are left out."""
    kept = [replace(e, ids=e.ids[:longest]) for e in examples if e.n_prompt < longest]
    if not kept:
        shortest = min(e.n_prompt for e in examples)
        raise InputError(
            f"No answer for the {side} model begins within {longest} tokens (longest); the shortest prompt has {shortest}."
        )
    return kept


def _tuned(
    model: TransformersModel,
    examples: list[Example],
    settings: TuneParams,
    base: tuple[str, str],
    folder: Path,
    shown: bool,
) -> Fitted:
    """Train one adapter and write it."""
    from tqdm import tqdm

    from probekit.backends.transformers.adapters import lora_twin, save_adapter

    from .training import fit

    make = partial(lora_twin, model, rank=settings.rank, alpha=settings.alpha, dropout=settings.dropout, base=base)
    steps = settings.schedule.steps(len(examples))
    with tqdm(total=steps, desc=f"tuning the {folder.name} model", disable=None if shown else True) as bar:
        trained, fitted = fit(make, examples, settings.schedule, bar.update)
    save_adapter(trained, folder)
    return fitted


def _manifest(
    model: TransformersModel,
    base: tuple[str, str],
    batch: Batch,
    settings: TuneParams,
    chosen: Chosen,
    fitted: dict[str, Fitted],
) -> dict[str, Any]:
    """What was sampled, chosen and learnt, and by what."""
    total = {k: sum(q.counts[k] for q in chosen.questions) for k in chosen.questions[0].counts}
    learnt = {"positive": chosen.positive, "negative": chosen.negative}
    versions = {p: importlib.metadata.version(p) for p in ("peft", "torch", "transformers")}
    return {
        **MARK,
        "probekit": __version__,
        "versions": versions,
        "base": {"name": base[0], "revision": base[1], "weights_hash": model.weights_hash()},
        "prompts": {
            "n": len(batch),
            "digest": f"sha256:{batch.digest}",
            "beginning_of_sequence": batch.begins,
            "chat_template": batch.template,
        },
        "parameters": settings.as_dict(),
        "sampled": {"answers": sum(total.values()), **total},
        **{
            side: {
                "examples": len(learnt[side]),
                "updates": len(run.losses),
                "loss_before_nats": run.before,
                "loss_after_nats": run.after,
                "losses_nats": list(run.losses),
            }
            for side, run in fitted.items()
        },
        "questions": [
            {"answer": q.right_answer, **q.counts, "positive": q.positive, "negative": list(q.negative)}
            for q in chosen.questions
        ],
    }
