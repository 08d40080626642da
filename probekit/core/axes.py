"""The closed list of axes that any array in probekit may have."""

from __future__ import annotations

AXES: dict[str, str] = {
    "text": "index of the text",
    "token": "position in the texts laid end to end; coordinates text, pos, token_id, token_str (and domain)",
    "layer": "block, counted from 0",
    "head": "attention head, counted from 0",
    "query": "position of the query token within its text",
    "key": "position of the key token within its text",
    "d_model": "residual stream dimension",
    "d_head": "dimension within one head",
    "d_mlp": "hidden dimension of the MLP",
    "expert": "expert of a mixture, counted from 0",
    "vocab": "token id",
    "rank": "place in a descending order, counted from 0",
    "branch": "alternative continuation",
    "sample": "repeated draw",
    "case": "setting of a comparison",
    "bin": "interval of a binned quantity; the coordinate is its middle",
    "threshold": "value of a parameter that was swept",
    "unit": "what is resampled: texts, or blocks of 32 tokens",
    "moment": "sum over units that an estimate is made of: n, Σw, Σs, Σw², Σsw, Σs²",
    "dose": "strength of an intervention, signed, in the unit that the analysis states",
}


def check_axes(dims: tuple[str, ...], where: str) -> None:
    """Raise ValueError if `dims` has a name outside the list; `where` names the array."""
    strange = [d for d in dims if d not in AXES]
    if strange:
        raise ValueError(f"{where} has the axes {strange}, which are not in probekit.core.axes.AXES: {list(AXES)}")
