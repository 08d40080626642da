"""Running a request for continuations: what is known is not written again, what is new is kept at once."""

from __future__ import annotations

from probekit.core import Branch, Branches, CapabilityError, Continuation, Fork, Model

from .journal import Journal
from .plan import HEADROOM, available_memory
from .progress import Progress


def run_branch(
    model: Model,
    request: Branch,
    journal: Journal,
    *,
    memory_limit: int | None = None,
    progress: Progress | None = None,
) -> Branches:
    """Every continuation of a request, in order.

    Args:
        model: writes them.
        request: where to write on, and how often.
        journal: holds what was written before, and is told what is written now.
        memory_limit: bytes that may be used above the loaded model.
        progress: the bar of the run.

    Raises:
        CapabilityError: the model does not write on from shared prefixes.
        PlanError: not even one continuation at a time fits in memory.
    """
    write = getattr(model, "branch", None)
    if write is None:
        raise CapabilityError(
            f"{model.info.name!r} ({type(model).__name__}) does not write on from shared prefixes; open a decoder with "
            "the native backend, such as 'smollm2-135m-instruct'."
        )
    limit = int(available_memory() * HEADROOM) if memory_limit is None else memory_limit
    there = {fork: frozenset(journal.known(request, fork)) for fork in request.forks}
    n_open = request.n * len(there) - sum(map(len, there.values()))
    if progress is not None:
        progress.begin_writing(n_open)

    def keep(fork: Fork, one: Continuation) -> None:
        journal.add(request, fork, one)
        if progress is not None:
            progress.written(1)

    if n_open:
        write(request, keep, memory_limit=limit, there=there)
    found = []
    for fork in request.forks:
        known = journal.known(request, fork)
        found.append(tuple(known[i] for i in range(request.first, request.first + request.n)))
    return Branches(request, tuple(found))
