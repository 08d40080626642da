"""What a run will cost, worked out before anything runs; a run that does not fit is refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from probekit.core import SITES, Batch, CapabilityError, Forward, InputError, ModelInfo, PlanError, check_patch
from probekit.reduce import AtPosition, Reducer
from probekit.reduce.sizes import BLOCK, ROWS, TOKENS

BATCH_TOKENS = 1024  # padded tokens that run together; more gain nothing on a CPU
ALIKE = 0.8  # texts run together if the shortest has at least this share of the longest's tokens
HEADROOM = 0.9  # share of the free memory that a plan may use
# What a reducer may look at, by what it reads; everything else reads rows.
READABLE = {"attention": {"pattern"}, "vocab": {"resid_post", "logits"}, "block": {"resid_post"}, "values": {"v"}}


@dataclass(frozen=True)
class Plan:
    """One pass over the texts: how it is cut, and what it needs.

    Args:
        model: name of the model.
        captures: what is captured, in short spellings.
        n_texts: number of texts.
        n_tokens: tokens in all texts.
        batches: indices of the texts that run together, longest first.
        peak_bytes: most memory needed above the loaded model.
        result_bytes: the part of it that the results take.
        available_bytes: the memory that the plan was held against.
        gflop_forward: arithmetic of the model's own pass.
        gflop_readout: arithmetic of the readouts (logit lens).
        passes: how many passes there are in all; in a result, how many were alike.
        why: what the pass is for; "" for the one that all analyses share.
        later: in a plan that was made beforehand, about how many more passes each analysis will ask for.
    """

    model: str
    captures: tuple[str, ...]
    n_texts: int
    n_tokens: int
    batches: tuple[tuple[int, ...], ...]
    peak_bytes: int
    result_bytes: int
    available_bytes: int
    gflop_forward: float
    gflop_readout: float
    passes: int = 1
    why: str = ""
    later: tuple[tuple[str, int], ...] = ()

    @property
    def gflop(self) -> float:
        """All arithmetic."""
        return self.gflop_forward + self.gflop_readout

    def as_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        passes = "one pass" if self.passes == 1 else f"the first of about {self.passes:,} passes"
        rest = "" if self.passes == 1 else " in this pass; later ones may run more rows"
        lines = [
            f"model     {self.model}",
            f"texts     {self.n_texts} with {self.n_tokens:,} tokens, in {len(self.batches)} batches, {passes}",
            f"memory    {human(self.peak_bytes)} above the loaded model, "
            f"{human(self.result_bytes)} of it results; {human(self.available_bytes)} available",
            f"work      {self.gflop_forward:,.0f} GFLOP model + {self.gflop_readout:,.0f} GFLOP readout{rest}",
            "captures  " + "\n          ".join(self.captures),
        ]
        if self.later:
            lines.insert(2, "later     " + ", ".join(f"about {n:,} for {name}" for name, n in self.later))
        return "\n".join(lines)


def human(n_bytes: float) -> str:
    """Bytes as a reader wants them."""
    for unit in ("B", "KiB", "MiB"):
        if n_bytes < 1024:
            return f"{n_bytes:.0f} {unit}"
        n_bytes /= 1024
    return f"{n_bytes:.1f} GiB"


def make_plan(request: Forward, batch: Batch, info: ModelInfo, memory_limit: int | None = None) -> Plan:
    """Cut a pass into micro-batches and estimate its cost.

    Args:
        request: everything that is wanted of this pass.
        batch: all texts.
        info: the model.
        memory_limit: bytes that may be used above the loaded model; most of the free memory if None.

    Raises:
        CapabilityError: the model lacks a point, or a reducer cannot read it.
        PlanError: even one text at a time does not fit; says what would be needed.
    """
    for capture in request.captures:
        info.require(capture.point)
        _check_readable(capture.point.site, _reducer(capture))
        if len(batch) > 1 and any("query" in field.dims for field in _reducer(capture).fields().values()):
            raise InputError(f"{capture.key} keeps whole maps, of one text at a time; found {len(batch)} texts.")
    for patch in request.patches:
        info.require(patch.point)
        check_patch(patch, info, batch)
        if patch.texts is not None and not set(patch.texts) & set(batch.index):
            raise InputError(
                f"The patch at {patch.point} is for the texts {list(patch.texts)}, and none of them runs; "
                f"there are {len(batch)} texts, numbered {min(batch.index)} to {max(batch.index)}."
            )
    available = memory_limit if memory_limit is not None else int(available_memory() * HEADROOM)
    results = _result_bytes(request, batch.n_tokens, len(batch), info)
    budget = BATCH_TOKENS
    while True:
        batches = _cut(batch, budget)
        peak = results + max(_pass_bytes(request, [batch.lengths[i] for i in b], info) for b in batches)
        if peak <= available or all(len(b) == 1 for b in batches):
            break
        budget //= 2
    if peak > available:
        longest = max(batch.lengths)
        raise PlanError(
            f"This run needs about {human(peak)} above the loaded model and {human(available)} are available. "
            f"The longest text has {longest:,} tokens, the results take {human(results)}. Cut the texts into windows "
            "(window=…), run fewer texts or fewer analyses at once, stream the corpus (--stream, pk.stream), or raise the "
            "memory limit."
        )
    forward, readout = _work(request, batch, info)
    keys = tuple(c.key for c in request.captures)
    n = (len(batch), batch.n_tokens)
    return Plan(info.name, keys, *n, batches, peak, results, available, forward, readout, why=request.why)


def _reducer(capture: Any) -> Reducer:
    if not isinstance(capture.reducer, Reducer):
        raise CapabilityError(f"{capture.reducer!r} is no reducer of probekit.reduce.")
    return capture.reducer


def _check_readable(site: str, reducer: Reducer) -> None:
    allowed = READABLE.get(reducer.reads, set(SITES) - {"pattern"})
    if site not in allowed:
        raise CapabilityError(
            f"The reducer {reducer.key} reads {reducer.reads} and cannot look at {site!r}; "
            f"it can look at {', '.join(sorted(allowed))}."
        )


def _cut(batch: Batch, budget: int) -> tuple[tuple[int, ...], ...]:
    """Texts of similar length together, longest first, at most `budget` padded tokens each."""
    order = sorted(range(len(batch)), key=lambda i: -batch.lengths[i])
    batches: list[list[int]] = []
    for i in order:
        if batches:
            longest = batch.lengths[batches[-1][0]]
            if longest * (len(batches[-1]) + 1) <= budget and batch.lengths[i] >= ALIKE * longest:
                batches[-1].append(i)
                continue
        batches.append([i])
    return tuple(map(tuple, batches))


def _result_bytes(request: Forward, n_tokens: int, n_texts: int, info: ModelInfo) -> int:
    total = 0
    for capture in request.captures:
        width = _width(capture.point.site, info)
        one = _reducer(capture).memory_bytes(n_tokens, info.n_heads, width)
        if isinstance(capture.reducer, AtPosition):
            one *= n_texts
        total += one * len(info.require(capture.point))
    return 2 * total  # once as recorded and once as merged


def _width(site: str, info: ModelInfo) -> int:
    """Numbers per token at a site."""
    per_head = {"q": info.n_heads, "k": info.n_kv_heads, "v": info.n_kv_heads, "z": info.n_heads}
    if site in per_head:
        return per_head[site] * info.d_head
    return {"logits": info.d_vocab, "mlp_act": info.d_mlp}.get(site, info.d_model)


def _pass_bytes(request: Forward, lengths: Sequence[int], info: ModelInfo) -> int:
    """Most memory that one micro-batch needs beside the results."""
    longest, n_texts = max(lengths), len(lengths)
    n = longest * n_texts
    width = 2 if info.dtype in ("float16", "bfloat16") else 4
    qkv = info.d_head * (2 * info.n_heads + 4 * info.n_kv_heads)
    need = n * width * (6 * info.d_model + 3 * info.d_mlp + qkv)
    need += _result_bytes(request, n, n_texts, info) // 2
    reads = {_reducer(c).reads for c in request.captures}
    if "attention" in reads:
        need += 2 * 4 * n_texts * info.n_heads * min(longest, BLOCK) * longest + 8 * n * qkv
    direct = {c.point: len(info.require(c.point)) for c in request.captures if _reducer(c).reads == "direct"}
    if direct:
        need += n * width * info.d_model * sum(direct.values()) + 4 * 8 * n * info.d_model
    if "block" in reads:
        need += n * info.d_model * (3 * width + 3 * 4)
    if "values" in reads:
        need += 4 * info.n_heads * info.d_head * (3 * n + info.d_head + info.d_model)
    if any(getattr(c.reducer, "wants_scores", False) for c in request.captures):
        need += 3 * 4 * n_texts * info.n_heads * min(longest, BLOCK) * longest
    if "vocab" in reads or direct:
        held = {layer for c in request.captures if _reducer(c).reads == "vocab" for layer in info.require(c.point)}
        need += n * width * info.d_model * len(held | {0})
        rows = min(ROWS, min(n, TOKENS) * len(held | {0})) + min(n, TOKENS)
        need += 4 * info.d_vocab * (rows + 64)
        need += sum(lens.memory_bytes for lens in {getattr(c.reducer, "lens", None) for c in request.captures} if lens)
    at_logits = [c.reducer for c in request.captures if c.point.site == "logits" and _reducer(c).reads == "rows"]
    if at_logits:
        need += 4 * (n_texts if all(isinstance(r, AtPosition) for r in at_logits) else n) * info.d_vocab
    return int(need)


def _work(request: Forward, batch: Batch, info: ModelInfo) -> tuple[float, float]:
    """GFLOP of the model's pass and of the readouts."""
    n = batch.n_tokens
    attention = sum(2 * t * t for t in batch.lengths) * info.n_layers * info.n_heads * info.d_head
    embedding = info.d_vocab * info.d_model
    forward = 2e-9 * (n * max(info.n_params - embedding, 0) + attention)
    rows = {c.point.site: len(info.require(c.point)) for c in request.captures if _reducer(c).reads == "vocab"}
    readouts = max(rows.values(), default=int(any(_reducer(c).reads == "direct" for c in request.captures)))
    return forward, 2e-9 * n * readouts * embedding


def available_memory() -> int:
    """Bytes that a new allocation can count on: free memory, or what the control group leaves."""
    import psutil

    free = psutil.virtual_memory().available
    try:
        limit = int(Path("/sys/fs/cgroup/memory.max").read_text())
        used = int(Path("/sys/fs/cgroup/memory.current").read_text())
        stat = dict(line.split() for line in Path("/sys/fs/cgroup/memory.stat").read_text().splitlines())
        free = min(free, limit - used + int(stat.get("inactive_file", 0)))
    except (OSError, ValueError):
        pass  # no control group, or one without a limit ("max")
    return int(free)
