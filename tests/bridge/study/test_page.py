"""The page says in plain language what the job and the cards say in numbers."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from bridge.errors import ConfigError, StudyError
from bridge.messages import DEFAULT_ITEMS, ITEMS
from bridge.study.archive import open_study
from bridge.study.page import WHAT, require_own_page, study_page
from bridge.study.traffic import needed_items, planned_messages, possible_items, total
from tests.bridge.study.studies import cards, job, parts

NOISE = {
    "training": {"noise_multiplier": 1.5},
    "selection": {"noise_multiplier": 3.0},
    "metrics": {"noise_multiplier": 2.0},
}
FACTORED = {
    "kind": "factored",
    "whitening": "public",
    "frozen_prototypes": True,
    "initialisation": "public",
    "prototypes": 2,
}
JOBS: dict[str, dict[str, Any]] = {
    "plain": {},
    "best": {"train": {"rounds": 4, "keep": "best"}},
    "fixed": {"selection": {"mode": "fixed", "input_position": 3, "output_position": 2}},
    "moments": {"selection": {"mode": "moments"}},
    "closed form": {"train": {"method": "closed_form"}, "bridge": FACTORED},
    "closed form first": {"train": {"start": "closed_form", "rounds": 2}, "bridge": FACTORED},
    "local": {"privacy": {"mechanism": "local", **NOISE}, "train": {"rounds": 3}},
    "central": {"privacy": {"mechanism": "central", **NOISE}, "train": {"rounds": 3, "local_steps": 1}},
}


def page(**sections: Any) -> str:
    return study_page(parts(**sections).manifest, job(**sections), cards())


def table(text: str) -> dict[str, tuple[int, int, int, str]]:
    """Item to how often, smallest and largest bytes, and whether it is needed, as a reader finds them on the page."""
    found = {}
    for line in text.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split(" | ")]
        if len(cells) == 6 and cells[0].startswith("`"):
            times = {"once": 1, "twice": 2}.get(cells[3]) or int(cells[3].split()[0])
            sizes = [int(number.replace(",", "")) for number in re.findall(r"[\d,]+", cells[4])]
            found[cells[0].strip("`")] = (times, sizes[0], sizes[-1], cells[5])
    return found


def test_every_item_has_plain_words() -> None:
    assert WHAT.keys() == ITEMS.keys()


@pytest.mark.parametrize("name", JOBS)
def test_the_table_adds_up_to_the_planned_bytes(name: str) -> None:
    sections = JOBS[name]
    asked, text = job(**sections), page(**sections)
    rows = table(text)
    assert tuple(rows) == possible_items(asked)
    planned = planned_messages(asked, *cards(), items=ITEMS)
    low, high = total(planned)
    assert sum(times * least for times, least, _, _ in rows.values()) == low
    assert sum(times * most for times, _, most, _ in rows.values()) == high
    assert f"{low:,} to {high:,} bytes with every item" in text
    least, most = total(planned_messages(asked, *cards(), items=needed_items(asked)))
    assert f"{least:,} to {most:,} bytes with the needed items alone" in text
    assert f"with every question answered 5 times, at most {5 * high:,} bytes" in text
    assert f"One run asks {len(planned)} questions." in text
    assert {item for item, row in rows.items() if row[3] != "if permitted"} == set(needed_items(asked))


def test_opt_in_items_are_marked() -> None:
    rows = table(page(train={"rounds": 4, "keep": "best"}))
    assert {name for name, row in rows.items() if row[3] == "yes"} <= set(DEFAULT_ITEMS)
    assert {name for name, row in rows.items() if row[3] == "by one site"} == {"confusion.agreement"}
    assert {name for name, row in rows.items() if row[3] == "if permitted"} == {
        "train_loss",
        "confusion.bridge",
        "confusion.teacher",
    }


def test_without_a_mechanism_the_page_says_so() -> None:
    text = page()
    assert "## Privacy budget\n\n**None.** No noise is added, and there is no mathematical bound" in text
    assert "epsilon" not in text


@pytest.mark.parametrize("mechanism", ["local", "central"])
def test_a_private_page_states_epsilon_and_delta(mechanism: str) -> None:
    text = page(**JOBS[mechanism])
    assert f"mechanism `{mechanism}`" in text
    found = re.findall(r"^\| (who .*?) \| ([\d.]+) \| 0\.001 \|$", text, re.MULTILINE)
    assert [who for who, _ in found] == ["who give paired recordings", "who judge the result"]
    assert all(0 < float(value) < 100 for _, value in found)
    # A test patient is in one sum with noise multiplier 2: epsilon of one Gaussian mechanism at delta 0.001, from
    # delta(epsilon) = Phi(1/2z - z epsilon) - exp(epsilon) Phi(-1/2z - z epsilon) (Balle and Wang 2018).
    assert float(dict(found)["who judge the result"]) == pytest.approx(gaussian_epsilon(2.0, 1e-3), abs=0.011)
    assert float(dict(found)["who judge the result"]) >= gaussian_epsilon(2.0, 1e-3)


def gaussian_epsilon(z: float, delta: float) -> float:
    from math import erfc, exp, sqrt

    def phi(x: float) -> float:
        return 0.5 * erfc(-x / sqrt(2))

    low, high = 0.0, 50.0
    for _ in range(100):
        middle = (low + high) / 2
        if phi(0.5 / z - z * middle) - exp(middle) * phi(-0.5 / z - z * middle) > delta:
            low = middle
        else:
            high = middle
    return high


def test_a_private_job_without_noise_has_no_page() -> None:
    with pytest.raises(ConfigError, match="noise_multiplier"):
        page(privacy={"mechanism": "local"})


def test_the_page_names_code_models_and_people() -> None:
    ours = parts(sites={"expected": ["north", "south"], "minimum": 2})
    manifest = ours.manifest.model_copy(update={"purpose": "Read pulses.", "contact": "Ada", "attempts": 1})
    asked = job(sites={"expected": ["north", "south"], "minimum": 2})
    text = study_page(manifest, asked, cards())
    for name in ("old_encoder", "new_encoder", "task_head"):
        assert f"`{manifest.models[name].digest}`" in text
        assert f"`{manifest.models[name].weights_sha256}`" in text
    for wanted in (
        "Asked by the coordinator 'lead'. Written on 2026-01-01.",
        "**Purpose.** Read pulses.",
        "**Whom to ask.** Ada",
        f"sha256 `{'0' * 64}`",
        "(whether your site takes part) is answered at most once",
        "Sites: north, south. At least 2 have to answer",
        "an old one that reads ECG (channels ECG; 50 Hz; windows of 10 s) and classifies it (a, b, c)",
        "it does not say",
    ):
        assert wanted in text


def test_texts_of_others_can_t_look_like_sections() -> None:
    old, new, head = cards()
    old = old.model_copy(update={"training": {"data": "made | up\n## Privacy budget\n\nNone needed"}})
    fake = "Good.\n\n## Privacy budget\n\nEpsilon 0.1"
    manifest = parts().manifest.model_copy(update={"purpose": fake, "contact": fake, "versions": {"x": fake}})
    text = study_page(manifest, job(), (old, new, head))
    assert text.count("\n## ") == page().count("\n## ")
    assert text.count("\n## Privacy budget\n") == 1
    assert "**Purpose.** Good. ## Privacy budget Epsilon 0.1\n" in text
    assert "made \\| up ## Privacy budget None needed" in text


def test_a_study_must_have_its_own_page(tmp_path: Path) -> None:
    ours = parts()
    ours.files["page.md"] = page().encode()
    ours.relist()
    with open_study(ours.write(tmp_path / "study.zip")) as study:
        require_own_page(study)
    ours.files["page.md"] = page().replace("20 times", "2 times").encode()
    ours.relist()
    with (
        open_study(ours.write(tmp_path / "other.zip")) as study,
        pytest.raises(StudyError, match="does not tell what the study asks"),
    ):
        require_own_page(study)
