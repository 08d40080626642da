"""Training a tuned lens on any text."""

from __future__ import annotations

import importlib.metadata
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from probekit._version import __version__
from probekit.core import Batch, BosPolicy, CapabilityError, Capture, Forward, PlanError
from probekit.engine import Listener, Step, human, run_pass
from probekit.engine.plan import HEADROOM, available_memory
from probekit.reduce import Keep, LensRef, Readout

from .data import LensTraining, Parts, split, windows_of

if TYPE_CHECKING:
    import torch

    from .fitting import Apart, Translators

TOGETHER = 8  # windows that run together
KEPT_EVERY = 60.0  # seconds between checkpoints
_ROWS = Capture("resid_post", Keep())


@dataclass(frozen=True)
class TrainedLens:
    """A trained lens on disk.

    Args:
        folder: holds lens.json and lens.safetensors; `run("logit-lens", …, lens=folder)` reads with it.
        manifest: what lens.json says.
    """

    folder: Path
    manifest: dict[str, Any]

    @property
    def ref(self) -> LensRef:
        """The lens as data."""
        from probekit.reduce import open_lens

        return open_lens(self.folder)

    @property
    def kl_nats(self) -> dict[str, list[float]]:
        """Mean KL(final ‖ layer) on held-out tokens by block, of the "tuned" and of the "logit" lens."""
        found: dict[str, list[float]] = self.manifest["training"]["held_out"]["kl_nats"]
        return found


def train_lens(
    model: Any,
    texts: Any,
    folder: str | Path,
    *,
    bos: BosPolicy = "model",
    memory_limit: int | None = None,
    progress: bool | Listener = True,
    **params: Any,
) -> TrainedLens:
    """Train a tuned lens: for every block but the last, A and b such that h + A h + b reads like the final stream.

    What is minimised is KL(model ‖ lens), averaged over tokens, of each layer by itself, at the same position (token
    shift 0), over the whole vocabulary and exact; tokens are drawn at random. Three recipes:

    * regression: A and b begin as the ridge regression of the final stream on the layer's, each token weighing
      1 / mean square of its final row, because the final norm takes the length away. A constant along the direction
      that the unembedding reads least makes readings as sharp as they should be. Then come `steps` updates of Adam
      (betas 0.9 and 0.99) in coordinates in which the layer's rows are white. Ridge and constant are chosen on tokens
      kept apart, and a layer keeps the best of zero, regression and trained translator there.
    * sgd: from zero, Nesterov momentum 0.9, rate 0.1, weight decay 1e-3, gradients clipped to 1 over all layers, linear
      decay, as in the code released with arXiv 2303.08112, whose runs take 250 steps of 262,144 tokens.
    * adam: from zero, rate 1e-3, betas 0.9 and 0.999, amsgrad, decay and clipping as above; a warm-up of a fifth of the
      steps, at most 1,000 (the released code means to have it).

    Texts are cut into windows. Of 20 texts or more, whole texts are held out for the report; of fewer, stretches, of
    which every text has its share of 20. The model stays as it is. A call that broke off goes on where it was and ends
    with the same lens as one that did not.

    Args:
        model: an opened model, or anything that `open_model` takes.
        texts: as in `run`; or the path of a .txt or .jsonl file.
        folder: gets lens.safetensors and lens.json; appears when everything is done.
        bos: as in `run`.
        memory_limit: as in `run`.
        progress: a bar where standard error is a terminal; or a function that is told of every `Step`. What it raises
            (such as `Cancelled`) ends the call, which goes on from there when it is made again.
        params: parameters of `LensTraining`, such as `steps=200`.

    Raises:
        InputError: there is too little text, or an unfinished lens of other settings lies beside the folder.
        CapabilityError: the model does not show its unembedding.
        PlanError: the matrices do not fit in memory; says what would be needed.
        StoreError: the folder holds something else, or cannot be written.

    Example:
        >>> lens = train_lens("smollm2-135m-instruct", "corpus.txt", "lenses/smollm2")  # doctest: +SKIP
        >>> run("logit-lens", "smollm2-135m-instruct", "One two three", lens=lens.folder)  # doctest: +SKIP
    """
    settings = LensTraining.parse(params, "train-lens")
    assert isinstance(settings, LensTraining)
    opened = _opened(model)
    _check_memory(opened, settings, memory_limit)
    parts = split(windows_of(opened, texts, bos, settings), settings)
    if hasattr(opened, "load"):
        opened.load()
    from .folder import read_manifest

    with _Teller(progress) as tell:
        _Training(opened, parts, settings, Path(folder), memory_limit, tell).run()
    return TrainedLens(Path(folder), read_manifest(folder))


def _opened(model: Any) -> Any:
    from probekit.models import open_model

    opened: Any = open_model(model, lazy=True)
    if opened.info.kind != "decoder" or opened.info.n_layers < 2 or not hasattr(type(opened), "unembed"):
        raise CapabilityError(
            f"{opened.info.name!r} ({type(opened).__name__}, {opened.info.n_layers} blocks) cannot have a tuned lens; open "
            "a decoder of two blocks or more."
        )
    return opened


def _check_memory(model: Any, settings: LensTraining, limit: int | None) -> None:
    """Sums in float64, and matrices with gradients and the optimiser's means in float32; on a CPU."""
    info, numbers = model.info, {"regression": 10, "sgd": 3, "adam": 5}[settings.recipe]
    need = 4 * numbers * (info.n_layers - 1) * info.d_model**2
    available = limit if limit is not None else int(available_memory() * HEADROOM)
    if need > available and info.device == "cpu":
        raise PlanError(
            f"Training a lens of {info.name!r} by the recipe {settings.recipe!r} needs about {human(need)} above the loaded "
            f"model, and {human(available)} are available. Raise the memory limit, or take recipe='sgd', which needs least."
        )


class _Teller:
    """Tells of steps on a bar, or whoever listens."""

    def __init__(self, progress: bool | Listener) -> None:
        self._listener: Any = progress if callable(progress) else None
        self._shown, self._what = progress is True, ""
        self._bar: Any = None

    def __enter__(self) -> _Teller:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()

    def __call__(self, step: Step) -> None:
        if self._listener is not None:
            self._listener(step)
            return
        if self._bar is None or self._what != step.what:
            from tqdm import tqdm

            if self._bar is not None:
                self._bar.close()
            self._what, disable = step.what, None if self._shown else True
            self._bar = tqdm(total=step.total, desc=step.what, unit=f" {step.unit}", disable=disable)
        self._bar.update(step.done - self._bar.n)


class _Training:
    """One run, from where its checkpoint left it."""

    def __init__(
        self, model: Any, parts: Parts, settings: LensTraining, folder: Path, limit: int | None, tell: _Teller
    ) -> None:
        from .fitting import LeastSquares, Reading
        from .folder import Checkpoint

        self.model, self.parts, self.settings, self.limit, self.tell = model, parts, settings, limit, tell
        self.folder, self.began, self.seconds = folder, time.monotonic(), 0.0
        self.reading = Reading(model.unembed)
        self.device: torch.device = self.reading.weight.device
        info = model.info
        about = {
            "texts": parts.digest,
            "weights_hash": model.provenance().get("weights_hash", ""),
            **settings.as_dict(),
        }
        self.checkpoint = Checkpoint(folder, about)
        if settings.recipe == "regression":
            self.sums = LeastSquares(info.n_layers, info.d_model, self.device)
        self.fitted_windows, self.losses = 0, list[list[float]]()
        self.translators: Translators | None = None
        self._kept = time.monotonic()

    def run(self) -> None:
        """Fit, train, choose, save, and read held-out tokens."""
        state = self.checkpoint.read()
        if state is not None:
            self._restore(state)
        apart = self._apart()
        if self.translators is None:
            if self.settings.recipe == "regression":
                self._fit()
                self._keep()
            self.translators = self._begin(apart)
            self._keep()
        if self.translators.done < self.settings.steps:
            self._train(self.translators)
            self._keep()
        matrices, biases, chosen = self._choose(self.translators, apart)
        self._save(matrices, biases, chosen)
        self.checkpoint.remove()

    def _rows(self, windows: Sequence[Any]) -> torch.Tensor:
        """What leaves every block; axes layer, token, d_model; float32."""
        import torch

        trace, _ = run_pass(
            self.model,
            Forward((_ROWS,), why="rows that a lens is trained on"),
            Batch(tuple(windows)),
            memory_limit=self.limit,
        )
        values = trace[_ROWS]["value"].transpose("layer", "token", "d_model").values
        return torch.as_tensor(np.ascontiguousarray(values)).to(self.device)

    def _apart(self) -> Apart:
        import torch

        from .fitting import Apart

        rng = np.random.default_rng([self.settings.seed, 1])
        windows = [self.parts.apart[i] for i in rng.permutation(len(self.parts.apart))[:TOGETHER]]
        rows = self._rows(windows)
        drawn = np.sort(rng.permutation(rows.shape[1])[: self.settings.apart_tokens])
        rows = rows[:, torch.as_tensor(drawn)]
        return Apart(rows, self.reading.final(rows[-1]))

    def _fit(self) -> None:
        """Take training windows into the sums, in a random order."""
        order = np.random.default_rng([self.settings.seed, 2]).permutation(len(self.parts.train))
        n = min(len(order), max(1, self.settings.fit_tokens // self.settings.window))
        while self.fitted_windows < n:
            some = order[self.fitted_windows : min(n, self.fitted_windows + TOGETHER)]
            self.sums.add(self._rows([self.parts.train[i] for i in some]))
            self.fitted_windows += len(some)
            self._said("least squares", self.fitted_windows * self.settings.window, n * self.settings.window, "tokens")

    def _begin(self, apart: Apart) -> Translators:
        from .fitting import Translators, fitted_coordinates, zero_coordinates

        n = self.model.info.n_layers - 1
        if self.settings.recipe == "regression":
            quiet, coordinates = self.reading.quiet_direction(), []
            for layer in range(n):
                coordinates.append(fitted_coordinates(layer, self.sums, self.reading, apart, quiet)[0])
                self._said("regression", layer + 1, n, "layers", keep=False)
        else:
            coordinates = [zero_coordinates(self.model.info.d_model, self.device)] * n
        return Translators(
            self.settings.recipe, coordinates, self.settings.steps, self.settings.rate, self.settings.decay
        )

    def _train(self, translators: Translators) -> None:
        import torch

        s = self.settings
        while translators.done < s.steps:
            rng = np.random.default_rng([s.seed, 3, translators.done])
            windows = rng.permutation(len(self.parts.train))[: s.windows_per_step]
            rows = self._rows([self.parts.train[i] for i in windows])
            drawn = np.sort(rng.permutation(rows.shape[1])[: s.tokens_per_step])
            self.losses.append(translators.step(rows[:, torch.as_tensor(drawn)], self.reading))
            self._said("training", translators.done, s.steps, "updates")

    def _choose(self, translators: Translators, apart: Apart) -> tuple[dict[int, Any], dict[int, Any], list[str]]:
        """For each layer, the best of zero, where training began, and where it ended, on the tokens kept apart."""
        import torch

        matrices, biases, chosen = {}, {}, []
        for layer, start in enumerate(translators.coordinates):
            rows = apart.rows[layer]
            zero = torch.zeros_like(start.matrix), torch.zeros_like(start.bias)
            found = {"regression": (start.matrix, start.bias), "zero": zero}
            if translators.done or self.settings.recipe != "regression":
                found = {"trained": translators.plain(layer), **found}
            kl = {k: self.reading.divergence(rows + rows @ a.T + b, apart.final) for k, (a, b) in found.items()}
            best = min(kl, key=lambda k: kl[k]) if self.settings.recipe == "regression" else "trained"
            matrices[layer], biases[layer] = (t.cpu().numpy() for t in found[best])
            chosen.append(best)
            self._said("choosing", layer + 1, len(translators.coordinates), "layers", keep=False)
        return matrices, biases, chosen

    def _save(self, matrices: dict[int, Any], biases: dict[int, Any], chosen: list[str]) -> None:
        from .folder import save_lens

        s = self.settings
        training: dict[str, Any] = {
            "probekit": __version__,
            "versions": {p: importlib.metadata.version(p) for p in ("torch", "numpy")},
            "parameters": {**s.as_dict(), "learning_rate": s.rate, "weight_decay": s.decay},
            "texts": {
                "digest": f"sha256:{self.parts.digest}",
                "split_by": self.parts.by,
                **{f"{k}_windows": len(getattr(self.parts, k)) for k in ("train", "apart", "held")},
            },
            "chosen": chosen,
            "loss_nats": [float(np.mean(step)) for step in self.losses],
        }
        made = self.checkpoint.part / "lens"
        self.checkpoint.part.mkdir(parents=True, exist_ok=True)
        lens = save_lens(made, "tuned", matrices, biases, model=self.model)
        training["held_out"] = self._held_out(lens)
        training["seconds"] = round(self.seconds + time.monotonic() - self.began, 1)
        save_lens(self.folder, "tuned", matrices, biases, model=self.model, training=training)

    def _held_out(self, lens: LensRef) -> dict[str, Any]:
        """KL(final ‖ layer) of both lenses on held-out tokens, read as everybody reads them."""
        n = max(1, self.settings.held_tokens // self.settings.window)
        order = np.random.default_rng([self.settings.seed, 4]).permutation(len(self.parts.held))[:n]
        captures = {"logit": Capture("resid_post", Readout(1)), "tuned": Capture("resid_post", Readout(1, lens))}
        sums: dict[str, Any] = dict.fromkeys(captures, 0.0)
        for done, i in enumerate(order, start=1):
            batch = Batch((self.parts.held[i],))
            trace, _ = run_pass(self.model, Forward(tuple(captures.values())), batch, memory_limit=self.limit)
            for name, capture in captures.items():
                sums[name] = sums[name] + trace[capture]["kl_nats"].mean("token").values.astype(float)
            self._said("held-out text", done, len(order), "windows", keep=False)
        means = {name: (total / len(order)).tolist() for name, total in sums.items()}
        return {"n_tokens": len(order) * self.settings.window, "n_windows": len(order), "kl_nats": means}

    def _said(self, what: str, done: int, total: int, unit: str, *, keep: bool = True) -> None:
        """Tell how far it is; keep the state now and then, and where whoever listens ends the run."""
        if keep and time.monotonic() - self._kept >= KEPT_EVERY:
            self._keep()
        try:
            self.tell(Step(what, done, total, unit))
        except BaseException:
            if keep:
                self._keep()
            raise

    def _keep(self) -> None:
        state: dict[str, Any] = {
            "fitted_windows": self.fitted_windows,
            "losses": self.losses,
            "seconds": self.seconds + time.monotonic() - self.began,
        }
        if self.translators is None and self.settings.recipe == "regression":
            state["sums"] = self.sums.state()
        elif self.translators is not None:
            state["translators"] = self.translators.state()
        self.checkpoint.write(state)
        self._kept = time.monotonic()

    def _restore(self, state: dict[str, Any]) -> None:
        from .fitting import Coordinates, Translators

        self.fitted_windows, self.losses, self.seconds = state["fitted_windows"], state["losses"], state["seconds"]
        if "sums" in state:
            self.sums.restore(state["sums"])
        if "translators" not in state:
            return
        kept, s = state["translators"], self.settings
        coordinates = [
            Coordinates(**{k: v.to(self.device) if hasattr(v, "to") else v for k, v in c.items()})
            for c in kept["coordinates"]
        ]
        self.translators = Translators(s.recipe, coordinates, s.steps, s.rate, s.decay)
        self.translators.restore(kept)
