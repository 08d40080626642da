"""Reading outcomes that others drew: the numbers of a small planted file, and files that are none."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from probekit.core import InputError
from probekit.sampling import read_released


def branch(t: int, token: int, prob: float, answers: str, *, own: bool = False) -> dict[str, Any]:
    return {"t": t, "tok_id": token, "tok_p": prob, "is_base": own, "answers": list(answers)}


def planted() -> dict[str, Any]:
    """Two positions; at the first, a token with a third of the probability turns A into B."""
    return {
        "meta": {"question": "Which?", "answer_letter": "A"},
        "categories": ["B", "A", "Other"],
        "base": {"token_texts": ["So", " A"]},
        "o_t_full": [[0.325, 0.675, 0.0], [0.1, 0.9, 0.0]],
        "branches": [
            branch(1, 9, 0.8, "AAAAAAAAAB", own=True),
            branch(0, 7, 0.25, "BBBBBBBBBB"),
            branch(0, 8, 0.75, "AAAAAAAAAB", own=True),
        ],
    }


def write(path: Path, data: Any) -> Path:
    content = json.dumps(data).encode()
    path.write_bytes(gzip.compress(content) if path.suffix == ".gz" else content)
    return path


@pytest.mark.parametrize("name", ["row000.json.gz", "row000.json"])
def test_a_planted_file(tmp_path: Path, name: str) -> None:
    (one,) = read_released(write(tmp_path / name, planted()))
    assert (one.name, one.question, one.right, one.tokens) == ("row000", "Which?", "A", ("So", " A"))
    assert [p.index for p in one.forks.positions] == [0, 1], "in order, however they lie in the file"
    assert [a.token for a in one.forks.positions[0].alternatives] == [8, 7], "the answer's own token first"
    assert one.forks.categories == ("A", "B")
    assert one.forks.distributions == pytest.approx(np.array([[0.675, 0.325], [0.9, 0.1]]))
    assert one.difference() == pytest.approx(0, abs=1e-12)
    assert one.forks.drift() == pytest.approx([0, 0.225 * np.sqrt(2)])
    assert one.forks.survival(0.6) == pytest.approx([0.75, 0.75])
    assert one.forks.survival(1.3) == pytest.approx([1, 1]), "the two outcomes lie 0.9 * sqrt(2) = 1.27 apart"


def test_another_o_t_is_told_apart(tmp_path: Path) -> None:
    data = planted()
    data["o_t_full"][0] = [0.425, 0.575, 0.0]
    assert read_released(write(tmp_path / "a.json", data))[0].difference() == pytest.approx(0.1)
    del data["o_t_full"]
    assert np.isnan(read_released(write(tmp_path / "a.json", data))[0].difference())
    data = planted() | {"categories": ["A", "C", "Other"]}
    assert read_released(write(tmp_path / "a.json", data))[0].difference() >= 0.325


def test_answers_outside_the_choices_and_silent_ones_are_other(tmp_path: Path) -> None:
    data = planted()
    data["branches"][0]["answers"][9] = "Other"
    data["branches"][1]["answers"][0] = None
    (one,) = read_released(write(tmp_path / "a.json", data))
    assert one.forks.distributions.sum(axis=1) == pytest.approx([1, 1])


def test_a_folder_is_read_in_order(tmp_path: Path) -> None:
    for name in ("row002.json.gz", "row000.json.gz", "row001.json"):
        write(tmp_path / name, planted())
    (tmp_path / "notes.txt").write_text("mine")
    assert [q.name for q in read_released(tmp_path)] == ["row000", "row001", "row002"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda d: d.pop("branches"), "expected `base.token_texts` and `branches`.*KeyError: 'branches'"),
        (lambda d: d["branches"][0].pop("tok_p"), "KeyError: 'tok_p'"),
        (lambda d: d["branches"][2].update(is_base=False), "position 0 has not exactly one branch"),
        (lambda d: d.update(base=[]), "TypeError"),
    ],
)
def test_files_of_another_form_are_named(tmp_path: Path, spoil: Any, message: str) -> None:
    data = planted()
    spoil(data)
    with pytest.raises(InputError, match=rf"bad\.json.*{message}"):
        read_released(write(tmp_path / "bad.json", data))


def test_what_cannot_be_read_is_named(tmp_path: Path) -> None:
    whole = write(tmp_path / "a.json.gz", planted()).read_bytes()
    (tmp_path / "a.json.gz").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(InputError, match=r"a\.json\.gz cannot be read"):
        read_released(tmp_path)
    (tmp_path / "a.json.gz").unlink()
    with pytest.raises(InputError, match="holds no"):
        read_released(tmp_path)
