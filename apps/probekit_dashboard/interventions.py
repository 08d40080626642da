"""What the page Intervene changes on the way through the model: as data, in words, as patches, and as Python."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pandas as pd

import probekit as pk
from probekit import plots

Action = Literal["zero", "scale", "add", "replace", "cut"]
ACTIONS: dict[Action, str] = {
    "zero": "set it to zero",
    "scale": "scale it by a factor",
    "add": "add a direction between two groups of texts",
    "replace": "put another text's activation in its place (patch)",
    "cut": "keep a head from looking at a token",
}
SITES = {
    "resid_post": "residual stream after the block",
    "attn_out": "output of attention",
    "mlp_out": "output of the MLP",
    "z": "output of one head (z)",
}
Tell = Callable[[pk.Step], None]


@dataclass(frozen=True)
class Intervention:
    """One change.

    Args:
        action: what happens.
        site: name of the point; for "cut", attention itself.
        layer: the block.
        head: the head, at `z` and for "cut".
        positions: which tokens; None for all. For "cut", those that do not look.
        factor: that activations are multiplied with, or the strength of a direction.
        toward: texts that a direction points to.
        away: texts that it points away from.
        other: the text whose activation is put in.
        other_position: of its token, negative from the end.
        keys: for "cut", the tokens that are not looked at.
    """

    action: Action
    site: str
    layer: int
    head: int | None = None
    positions: tuple[int, ...] | None = None
    factor: float = 0.0
    toward: tuple[str, ...] = ()
    away: tuple[str, ...] = ()
    other: str = ""
    other_position: int = -1
    keys: tuple[int, ...] = ()

    def words(self, tokens: Sequence[str]) -> str:
        """What it does, in one sentence of plain text.

        Args:
            tokens: of the text.
        """
        where = f"{SITES.get(self.site, self.site)}, block {self.layer}" + (
            f", head {self.head}" if self.site == "z" else ""
        )
        at = _named(self.positions, tokens)
        if self.action == "cut":
            return f"Block {self.layer}, head {self.head}: {at} cannot look at {_named(self.keys, tokens)}"
        if self.action == "zero":
            return f"Set to zero: {where}, at {at}"
        if self.action == "scale":
            return f"Scale by {self.factor:g}: {where}, at {at}"
        if self.action == "add":
            groups = f"{_short(self.toward)} minus {_short(self.away)}"
            return f"Add {self.factor:g} × the direction {groups}: {where}, at {at}"
        place = "the last token" if self.other_position == -1 else f"token {self.other_position}"
        return f"Replace by {place} of {self.other[:40]!r}: {where}, at {at}"

    def problem(self, info: Any, n_tokens: int) -> str:
        """Why it cannot be done in this model and text, in words; "" if it can.

        Args:
            info: the model's sizes.
            n_tokens: of the text.
        """
        site = "pattern" if self.action == "cut" else self.site
        if site not in info.sites:
            return f"This model has no point {site!r}. It offers: {', '.join(sorted(info.sites))}."
        if not 0 <= self.layer < info.n_layers:
            return f"Block {self.layer} does not exist: the model has the blocks 0 to {info.n_layers - 1}."
        if self.head is not None and not 0 <= self.head < info.n_heads:
            return f"Head {self.head} does not exist: each block has the heads 0 to {info.n_heads - 1}."
        outside = [p for p in (*(self.positions or ()), *self.keys) if not 0 <= p < n_tokens]
        if outside:
            return f"Token {outside[0]} does not exist: the text has the tokens 0 to {n_tokens - 1}."
        if self.positions == () or (self.action == "cut" and not self.keys):
            return "No token is left that this would act on: no later token could look at this one."
        if self.action == "add" and not (self.toward and self.away):
            return "A direction needs texts on both sides. Type at least one on each."
        if self.action == "replace" and not self.other.strip():
            return "Type the text whose activation is put in."
        return ""

    def patch(self, model: Any) -> pk.Patch:
        """The change itself; runs the model where a direction or another text's activation is needed.

        Args:
            model: an opened model.

        Raises:
            ProbekitError: the other text has no such token, or the model no such point.
        """
        heads = None if self.head is None else (self.head,)
        if self.action == "cut":
            return pk.Patch(("pattern", self.layer), pk.KnockOut(self.keys, self.positions), heads=heads)
        point = (self.site, self.layer)
        edit: Any = pk.Scale(self.factor if self.action == "scale" else 0.0)
        if self.action == "add":
            direction = pk.difference_of_means(model, point, self.toward, self.away)
            edit = pk.Add(self._of_head(direction), self.factor)
        elif self.action == "replace":
            there = pk.cache(model, self.other, point)[point]
            if not -there.sizes["token"] <= self.other_position < there.sizes["token"]:
                raise pk.ProbekitError(_no_such_token(self.other_position, there.sizes["token"]))
            edit = pk.Replace(self._of_head(there.isel(token=self.other_position)))
        return pk.Patch(point, edit, self.positions, heads=heads)

    def _of_head(self, values: Any) -> Any:
        return values if self.head is None else values.isel(head=self.head)

    def code(self) -> list[str]:
        """The Python that makes it and adds it to `patches`."""
        heads = "" if self.head is None else f", heads=({self.head},)"
        at = f", positions={self.positions!r}"
        if self.action == "cut":
            edit = f"pk.KnockOut(keys={self.keys!r}, queries={self.positions!r})"
            return [f"patches.append(pk.Patch(('pattern', {self.layer}), {edit}{heads}))"]
        point = f"({self.site!r}, {self.layer})"
        row = "" if self.head is None else f".isel(head={self.head})"
        before, edit = [], f"pk.Scale({self.factor if self.action == 'scale' else 0.0})"
        if self.action == "add":
            before = [
                f"direction = pk.difference_of_means(model, {point}, {list(self.toward)!r}, {list(self.away)!r}){row}"
            ]
            edit = f"pk.Add(direction, {self.factor!r})"
        elif self.action == "replace":
            before = [
                f"there = pk.cache(model, {self.other!r}, {point})[{point}].isel(token={self.other_position}){row}"
            ]
            edit = "pk.Replace(there)"
        return [*before, f"patches.append(pk.Patch({point}, {edit}{at}{heads}))"]


def _no_such_token(position: int, n: int) -> str:
    return f"The other text has no token {position}: it has {n}, 0 to {n - 1}. Take its last token, or a longer text."


def _named(positions: Sequence[int] | None, tokens: Sequence[str]) -> str:
    """Tokens by place and name; a long row of neighbours as a range."""
    if positions is None:
        return "all tokens"
    if len(positions) > 3 and list(positions) == list(range(positions[0], positions[-1] + 1)):
        return f"tokens {positions[0]} to {positions[-1]}"
    shown = [f"{p} ({plots.visible(tokens[p])})" if 0 <= p < len(tokens) else str(p) for p in positions]
    return f"token{'s' * (len(shown) != 1)} {', '.join(shown)}"


def _short(texts: Sequence[str]) -> str:
    first = repr(texts[0][:24]) if texts else "nothing"
    return first + (f" and {len(texts) - 1} more" if len(texts) > 1 else "")


@dataclass(frozen=True)
class Outcome:
    """What interventions do.

    Args:
        effect: on the next token and on the loss.
        before: what the model writes after the text as it is.
        after: what it writes with the interventions.
    """

    effect: pk.Effect
    before: str
    after: str

    @property
    def nbytes(self) -> int:
        """Memory that it takes."""
        return self.effect.nbytes


def run(model: Any, text: str, some: Sequence[Intervention], *, position: int, n_tokens: int, tell: Tell) -> Outcome:
    """Measure interventions on a text, and let the model write on with and without them.

    Args:
        model: an opened model.
        text: the text.
        some: what is changed, in this order.
        position: the token after which distributions are compared.
        n_tokens: that are written.
        tell: is told every step; raises `pk.Cancelled` once the reader has cancelled.
    """
    tell(pk.Step("directions and activations of other texts", 0, 0, ""))
    patches = []
    for one in some:
        patches.append(one.patch(model))
        tell(pk.Step("directions and activations of other texts", 0, 0, ""))
    effect = pk.effect(model, text, patches, position=position, progress=tell)
    texts = []
    for what, chosen in (("writing without", []), ("writing with the interventions", patches)):
        done: list[pk.Written] = []

        def listen(one: pk.Written, done: list[pk.Written] = done, what: str = what) -> None:
            done.append(one)
            tell(pk.Step(what, len(done), n_tokens, "tokens"))

        texts.append(pk.generate(model, text, n_tokens, patches=chosen, listen=listen).texts[0])
    return Outcome(effect, *texts)


def code_for(spec: str, text: str, some: Sequence[Intervention], *, position: int, n_tokens: int) -> str:
    """The Python that does what `run` does."""
    lines = ["import probekit as pk", "", f"model = pk.open_model({spec!r})", f"text = {text!r}", "patches = []"]
    for one in some:
        lines += one.code()
    lines += [
        f"effect = pk.effect(model, text, patches, position={position})",
        "effect.kl_nats, effect.loss_nats, effect.data",
        f"pk.generate(model, text, {n_tokens}).texts[0]",
        f"pk.generate(model, text, {n_tokens}, patches=patches).texts[0]",
    ]
    return "\n".join(lines)


def next_tokens(effect: pk.Effect) -> pd.DataFrame:
    """Likely next tokens with their probabilities before and after, likeliest of either first."""
    data = effect.data
    before, after = np.exp(data["logprob_nats"].values.astype(float))
    order = np.argsort(-np.maximum(before, after), kind="stable")
    return pd.DataFrame(
        {
            "token": [plots.visible(str(data["vocab_str"].values[i])) for i in order],
            "token id": data["vocab"].values[order].astype(int),
            "before": before[order],
            "after": after[order],
            "change": (after - before)[order],
        }
    )


def change_drawn(effect: pk.Effect, about: str, most: int = 12) -> plots.Figure:
    """How much the probability of the likely next tokens changes."""
    table = next_tokens(effect).head(most)
    twice = table["token"].duplicated(keep=False)
    names = [f"{t} ({i})" if d else t for t, i, d in zip(table["token"], table["token id"], twice, strict=True)]
    return plots.bars(
        dict(zip(names, table["change"].tolist(), strict=True)),
        title=f"After token {effect.position} the next-token distribution moves by {effect.kl_nats:.3g} nats (KL before ‖ after)",
        unit="1", quantity="change of probability", reference=(0.0, "as it is"), by="next token", caption=about,
        alt="Bars of the change of probability of the likely next tokens.",
    )  # fmt: skip


def losses_drawn(effect: pk.Effect, places: slice, about: str) -> plots.Figure:
    """Loss of each token before and after."""
    loss = effect.data["loss_nats"].isel(token=places)
    before, after = effect.loss_nats
    return plots.lines(
        {name: loss.sel(case=case, drop=True) for name, case in (("as it is", "before"), ("with the interventions", "after"))},
        title=f"The mean loss goes from {before:.3f} to {after:.3f} nats per token", unit="nats", quantity="loss",
        caption=f"{about} -ln p of the token that follows each token.",
        alt="Two curves along the text: the loss as it is and with the interventions.",
    )  # fmt: skip
