"""What stands around every page: model and text in the sidebar, the token spine above."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import streamlit as st

import probekit as pk
from probekit import plots

from .components import spine
from .look import plain
from .prepared import PREPARED
from .selection import Selection
from .session import CORE, awaited, computed, kept, key_of, opened, select, selection, start

LONGEST = 200_000  # characters of a text


@dataclass(frozen=True)
class Seen:
    """What the pages show: one model, one text, and what the first pass found.

    Args:
        selection: with token, layer and head inside what there is.
        model: the opened model.
        results: of the core analyses, by name.
    """

    selection: Selection
    model: Any
    results: pk.Results

    @cached_property
    def info(self) -> Any:
        """Sizes of the model."""
        return self.model.info

    @property
    def uncertainty(self) -> Any:
        """Dataset of token-uncertainty."""
        return self.results["token-uncertainty"].dataset

    @property
    def lens(self) -> Any:
        """Dataset of the logit lens."""
        return self.results["logit-lens"].dataset

    @property
    def sinks(self) -> Any:
        """Dataset of attention-sinks."""
        return self.results["attention-sinks"].dataset

    @property
    def massive(self) -> Any:
        """Dataset of massive-activations."""
        return self.results["massive-activations"].dataset

    @property
    def tokens(self) -> list[str]:
        """What the tokens show as."""
        return [str(s) for s in self.uncertainty["token_str"].values]

    @property
    def about(self) -> str:
        """Model and text in one line."""
        return self.results["token-uncertainty"].about


def before(values: np.ndarray) -> np.ndarray:
    """Values that stand where a token is predicted, moved to the token itself; the first has none."""
    return np.concatenate([[np.nan], np.asarray(values, dtype=float)[:-1]])


def quantities(seen: Seen) -> tuple[plots.Quantity, ...]:
    """What the spine can be coloured by."""
    one, lens, sinks, massive = seen.uncertainty, seen.lens, seen.sinks, seen.massive
    layer = seen.selection.layer
    return (
        plots.Quantity("surprisal", "nats", before(one["surprisal_nats"].values)),
        plots.Quantity("entropy before", "nats", before(one["entropy_nats"].values)),
        plots.Quantity("rank", "1", before(one["target_rank"].values) + 1, "log", low=1),
        plots.Quantity("settles at", "layer", before(lens["settled_layer"].values)),
        plots.Quantity("sink mass", "share", sinks["received"].mean(("layer", "head")).values, low=0),
        plots.Quantity(f"norm, block {layer}", "activation", massive["norm"].values[layer], "log"),
        plots.Quantity(f"largest entry, block {layer}", "× median", massive["times_median"].values[layer], "log"),
    )


def core_params(model: Any, text: str, lens: str = "") -> dict[str, Any]:
    """Parameters with which the core analyses fit a text that is shorter than they expect, and the lens that reads."""
    n = len(model.tokenize([text]).texts[0])
    usual = pk.get_analysis("attention-sinks").Params.specs()
    short = {"horizon": min(usual["horizon"].default, max(n, 4)), "tail": min(usual["tail"].default, max(n - 2, 0))}
    found = {"attention_sinks": {k: v for k, v in short.items() if v != usual[k].default}}
    return found | ({"logit_lens": {"lens": lens}} if lens else {})


def core_key(now: Selection) -> str:
    """Everything that the first pass depends on."""
    return key_of("core", now.model, now.text, *([now.lens] if now.lens else []))


def model_picker() -> None:
    """Choose or name a model."""
    now = selection().model
    known = [m["name"] for m in pk.list_models() if "embed" not in str(m["capabilities"])]
    names = list(dict.fromkeys([*known, now]))
    chosen = st.selectbox(
        "Model", names, index=names.index(now), accept_new_options=True, key=f"model-{now}",
        help="An embedded model, a Hugging Face id (owner/name), a folder or a .gguf file. Type to enter your own.",
    )  # fmt: skip
    if chosen and chosen != now:
        select(model=chosen, layer=-1, head=0)
        st.rerun()


def text_picker() -> None:
    """Choose a prepared text, give one, or let the model write on."""
    now = selection()
    names = [*PREPARED, ""]
    chosen = st.selectbox(
        "Text", names, index=names.index(now.prepared), key=f"text-{now.prepared}",
        format_func=lambda name: PREPARED[name].title if name else "Your own text",
    )  # fmt: skip
    if chosen != now.prepared and chosen:
        select(text=PREPARED[chosen].text, prepared=chosen, token=PREPARED[chosen].token)
        st.rerun()
    if now.prepared:
        st.caption(PREPARED[now.prepared].shows)
        if st.button("Show it", key="prepared-show", icon=":material/arrow_forward:", help="Open the page where it is seen best, "
                     "at the token that shows it", width="stretch"):  # fmt: skip
            select(token=PREPARED[now.prepared].token)
            st.session_state["go"] = PREPARED[now.prepared].page
            st.rerun()
    with st.expander("Your own text", expanded=chosen == "", icon=":material/edit:"):
        _own_text(now)
    with st.expander("Let the model write on", icon=":material/play_arrow:"):
        _write_on(now)


def _own_text(now: Selection) -> None:
    text = st.text_area("Text", now.text, height=160, key=f"own-{hash(now.text)}", label_visibility="collapsed")
    file = st.file_uploader("or a .txt file", type=["txt", "md", "py", "json", "csv", "log"], key="own-file")
    if file is not None:
        try:
            text = file.getvalue().decode("utf-8")
        except UnicodeDecodeError:
            st.error(
                f"{plain(file.name)} is no text: it is not encoded as UTF-8. Save it as plain text, and try again."
            )
            return
    if text != now.text:  # what stands above has been read
        st.caption(plain(_cost(now.model, text)))
    if st.button("Look at it", type="primary", key="own-run", width="stretch"):
        problem = _problem(text)
        if problem:
            st.error(plain(problem))
            return
        select(text=text, prepared="", token=0)
        st.rerun()


def _problem(text: str) -> str:
    if not text.strip():
        return "The text is empty. Type some words."
    if len(text) > LONGEST:
        return f"The text has {len(text):,} characters; the dashboard takes {LONGEST:,}. For more, use `probekit run`."
    return ""


def _cost(model: str, text: str) -> str:
    """Tokens, memory and time of the first pass, or why it cannot run."""
    if _problem(text):
        return _problem(text)
    try:
        plans = pk.plan(list(CORE), opened(model), text, **core_params(opened(model), text))
    except pk.ProbekitError as error:
        return str(error)
    tokens, memory = plans[0].n_tokens, max(p.peak_bytes for p in plans) / 2**20
    work = sum(p.gflop for p in plans)
    speed = kept().get(f"speed {model}")
    time = f", about {max(1, work / speed):.0f} s" if speed else f", {work:,.0f} GFLOP"
    return f"{tokens:,} tokens; {memory:,.0f} MiB above the model{time}."


def _write_on(now: Selection) -> None:
    n = st.slider("Tokens", 1, 200, 40, key="write-n")
    temperature = st.slider("Temperature (0: greedy)", 0.0, 2.0, 0.0, 0.1, key="write-t")
    seed = st.number_input("Seed", 0, 2**31 - 1, 0, key="write-seed", disabled=temperature == 0)
    key = key_of("write", now.model, now.text, n, temperature, seed)

    if st.button("Write", key="write-run", width="stretch"):
        text, spec = now.text, now.model

        def do(tell: Any) -> Any:
            done: list[pk.Written] = []

            def listen(one: pk.Written) -> None:
                done.append(one)
                said = "".join(w.shown for w in done)[-60:]
                tell(pk.Step(f"…{said!r}, entropy {one.entropy_nats:.2f} nats", len(done), n, "tokens"))

            return pk.generate(opened(spec), text, n, temperature=temperature, seed=int(seed), listen=listen)

        start("write", "writing", key, do)
        st.session_state["writing"] = key
    if st.session_state.get("writing") == key:
        written = awaited("write", key)
        if written is not None:
            st.session_state.pop("writing")
            n_prompt = written.n_prompt[0]
            select(text=now.text + written.texts[0], prepared="", token=n_prompt)
            st.rerun()


def look() -> Seen | None:
    """Run the core analyses on the selected text, or take what is kept; None while they run or where they failed."""
    now = selection()
    problem = _problem(now.text)
    if problem:
        st.warning(plain(problem))
        return None
    try:
        with st.spinner(f"Opening {plain(now.model)}", show_time=True):
            model = opened(now.model)
    except pk.ProbekitError as error:
        st.error(plain(str(error)), icon=":material/error:")
        st.caption("Choose another model in the sidebar.")
        return None
    if model.info.kind != "decoder":
        st.info(
            f"{plain(now.model)} is a text-embedding model: it predicts no tokens, so that lens, sinks and forks do not apply. "
            "Its sticky tokens are on the page Strange tokens; choose a language model for the rest.",
            icon=":material/info:",
        )
        return None

    def do(tell: Any) -> pk.Results:
        params = core_params(model, now.text, now.lens)
        results = pk.run(list(CORE), model, now.text, progress=_timed(now.model, tell), **params)
        assert isinstance(results, pk.Results)
        return results

    results = computed("core", "Reading the text", core_key(now), do, wait=True)
    if results is None:
        if now.lens:
            st.button("Back to the logit lens", on_click=lambda: select(lens=""), icon=":material/undo:")
        return None
    sizes = results["attention-sinks"].dataset.sizes
    return Seen(now.within(sizes["token"], sizes["layer"], sizes["head"]), model, results)


def _timed(model: str, tell: Any) -> Any:
    """Steps passed on; and how fast this model runs here is remembered for estimates."""
    import time

    began: list[float] = []

    def listen(step: pk.Step) -> None:
        if step.unit == "GFLOP":
            if not began:
                began.append(time.monotonic())
            elif step.done >= step.total > 0:
                kept().put(f"speed {model}", step.total / max(time.monotonic() - began[0], 1e-3))
        tell(step)

    return listen


def show_spine(seen: Seen) -> None:
    """The text, coloured, with its timelines; a click selects a token for all pages."""
    now, choices = seen.selection, quantities(seen)
    names = [q.label for q in choices]
    # A quantity of a layer keeps its choice when another layer is selected.
    picked = next((i for i, name in enumerate(names) if name.split(",")[0] == now.by.split(",")[0]), 0)
    strip = plots.TokenStrip(
        title="The text", tokens=tuple(seen.tokens), texts=np.zeros(len(seen.tokens), dtype=int), quantities=choices,
        caption="", alt="The text as tokens; arrow keys move, Enter selects.",
    )  # fmt: skip
    spine(
        strip, key="spine", selected=now.token, picked=picked, lines=choices[:2],
        on_token=lambda i: select(token=int(i)), on_by=lambda by: select(by=by),
    )  # fmt: skip
    shown = plots.visible(seen.tokens[now.token])
    st.caption(
        f"Selected: token {now.token} of {len(seen.tokens)}, `{shown.replace('`', 'ˋ')}` · block {now.layer} of "
        f"{seen.info.n_layers} · head {now.head} of {seen.info.n_heads}"
        + (
            ""
            if now.link_holds_text
            else " · too long a text for a link: it reopens only as long as this dashboard holds it"
        )
    )
