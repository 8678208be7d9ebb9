"""Epsilon against independent computations, what a job releases, and noise found from an epsilon."""

from __future__ import annotations

import numpy as np
import pytest
from dp_accounting import NeighboringRelation, pld
from hypothesis import given, settings
from hypothesis import strategies as st
from opacus.accountants import PRVAccountant, RDPAccountant
from scipy import optimize, stats

from bridge.errors import ConfigError
from bridge.job import Job, parse_job
from bridge.messages import CLOSED_FORM, DESCRIBE, EVALUATE, PROBE, SIMILARITY, TRAIN
from bridge.privacy.accounting import (
    Release,
    coarse_epsilon,
    epsilon,
    event,
    message_releases,
    plan_releases,
    rdp_epsilon,
    releases_of,
    signal_to_noise,
    true_positive_rate,
)
from bridge.privacy.calibration import noise_for, resolved

MINIMAL = "name: study\nmodels: {old_encoder: a, new_encoder: b, task_head: c}\n"
CLOSED = "bridge: {kind: factored, whitening: public, frozen_prototypes: true, initialisation: directions}\n"

GRID = 2e-4

SAMPLED = [
    (1.0, 0.05, 50, 1e-3),
    (1.0, 0.25, 20, 1e-3),
    (1.3, 0.25, 80, 1e-3),
    (2.0, 0.25, 80, 1e-3),
    (4.0, 0.25, 80, 1e-3),
    (4.0, 0.25, 400, 1e-3),
    (2.0, 0.05, 400, 1e-4),
    (1.5, 0.9, 10, 1e-3),
    (1.5, 0.5, 20, 1e-5),
    (3.0, 0.5, 100, 1e-4),
    (8.0, 0.99, 200, 1e-3),
    (0.8, 0.01, 1, 1e-4),
    (0.8, 0.1, 16, 1e-3),
    (20.0, 0.5, 2000, 1e-3),
    (6.0, 0.125, 1000, 1e-5),
    (10.0, 0.3, 300, 1e-6),
]
UNSAMPLED = [
    (0.7, 1, 1e-3),
    (1.0, 1, 1e-3),
    (1.0, 1, 1e-6),
    (2.0, 2, 1e-3),
    (3.6, 2, 1e-3),
    (8.0, 1, 1e-4),
    (30.0, 50, 1e-3),
    (100.0, 3, 1e-6),
]
MIXED = [
    ([(3.6, 1.0, 2), (1.3, 0.25, 80)], 1e-3),
    ([(10.0, 1.0, 2), (2.0, 0.25, 80)], 1e-3),
    ([(10.0, 1.0, 2), (4.0, 1.0, 1), (2.0, 0.25, 80)], 1e-3),
    ([(5.0, 1.0, 2), (1.0, 1.0, 1)], 1e-4),
    ([(2.0, 0.1, 30), (3.0, 0.2, 30)], 1e-3),
    ([(2.0, 0.1, 30), (2.0, 0.1, 10), (2.0, 1.0, 1)], 1e-5),
    ([(4.0, 0.5, 10), (4.0, 0.25, 40), (12.0, 1.0, 4)], 1e-4),
]


def releases(terms: list[tuple[float, float, int]]) -> tuple[Release, ...]:
    return tuple(Release("training", "pair", z, q, n) for z, q, n in terms)


def composed(terms: list[tuple[float, float, int]], delta: float) -> float:
    """By dp-accounting's distributions, built and convolved here one after another on a grid five times as fine."""
    relation = NeighboringRelation.ADD_OR_REMOVE_ONE
    total = pld.privacy_loss_distribution.identity(value_discretization_interval=GRID)
    for z, q, n in terms:
        one = pld.privacy_loss_distribution.from_gaussian_mechanism(
            standard_deviation=2.5 * z,
            sensitivity=2.5,
            sampling_prob=q,
            neighboring_relation=relation,
            value_discretization_interval=GRID,
        )
        total = total.compose(one.self_compose(n))
    return float(total.get_epsilon_for_delta(delta))


@pytest.mark.parametrize(
    ("terms", "delta"),
    [([(z, q, n)], delta) for z, q, n, delta in SAMPLED]
    + [([(z, 1.0, n)], delta) for z, n, delta in UNSAMPLED]
    + MIXED,
)
def test_epsilon_agrees_with_an_independent_composition(terms: list[tuple[float, float, int]], delta: float) -> None:
    assert epsilon(releases(terms), delta) == pytest.approx(composed(terms, delta), abs=1e-3)


def test_at_least_thirty_settings_are_compared() -> None:
    assert len(SAMPLED) + len(UNSAMPLED) + len(MIXED) >= 30


@pytest.mark.parametrize(("z", "n", "delta"), UNSAMPLED)
def test_unsampled_noise_costs_what_the_gaussian_mechanism_does(z: float, n: int, delta: float) -> None:
    """Balle and Wang 2018, theorem 8, with n sums as one Gaussian of sensitivity sqrt(n)."""
    s = z / np.sqrt(n)

    def excess(e: float) -> float:
        tail = np.exp(e + stats.norm.logcdf(-1 / (2 * s) - e * s))
        return float(stats.norm.cdf(1 / (2 * s) - e * s) - tail - delta)

    exact = 0.0 if excess(0.0) <= 0 else optimize.brentq(excess, 0, 100)
    assert epsilon(releases([(z, 1.0, n)]), delta) == pytest.approx(exact, abs=1e-3)


@pytest.mark.parametrize(("z", "q", "n", "delta"), SAMPLED[:12])
def test_opacus_accountants_agree_within_what_they_allow(z: float, q: float, n: int, delta: float) -> None:
    """PRV says how far it may be above; Renyi's composition is an upper bound, and the same by both packages."""
    ours, renyi = epsilon(releases([(z, q, n)]), delta), rdp_epsilon([releases([(z, q, n)])], delta)
    prv, rdp = PRVAccountant(), RDPAccountant()
    prv.history = rdp.history = [(z, q, n)]
    error = 0.01
    assert ours - 1e-3 <= prv.get_epsilon(delta, eps_error=error) <= ours + 2.5 * error
    assert renyi >= ours - 1e-3
    orders = [1.5, *np.arange(2, 11, 0.25), *range(11, 65), 128, 256, 512, 1024]
    assert renyi == pytest.approx(rdp.get_epsilon(delta, alphas=orders), rel=2e-2)


def test_renyi_adds_plans_up_however_they_are_cut() -> None:
    whole = releases([(4.0, 1.0, 2), (2.0, 0.25, 80)])
    parts = [whole[:1], releases([(2.0, 0.25, 30)]), releases([(2.0, 0.25, 50)])]
    assert rdp_epsilon(parts, 1e-3) == pytest.approx(rdp_epsilon([whole], 1e-3), rel=1e-9)
    assert rdp_epsilon([whole, whole], 1e-3) > rdp_epsilon([whole], 1e-3) > epsilon(whole, 1e-3)
    assert rdp_epsilon([], 1e-3) == rdp_epsilon([()], 1e-3) == epsilon((), 1e-3) == 0.0


@settings(max_examples=10, deadline=None)
@given(
    terms=st.lists(
        st.tuples(st.floats(2, 20), st.sampled_from([0.1, 0.5, 1.0]), st.integers(1, 20)), min_size=1, max_size=3
    ),
    more=st.tuples(st.floats(2, 20), st.sampled_from([0.1, 0.5, 1.0]), st.integers(1, 20)),
)
def test_more_releases_or_less_noise_cost_more(
    terms: list[tuple[float, float, int]], more: tuple[float, float, int]
) -> None:
    base = epsilon(releases(terms), 1e-3)
    assert epsilon(releases(terms[::-1]), 1e-3) == base
    assert epsilon(releases([*terms, more]), 1e-3) >= base - 1e-9
    assert epsilon(releases([(1.3 * z, q, n) for z, q, n in terms]), 1e-3) <= base
    # The coarse grid may be too high, and must not be too low.
    assert base - 1e-4 <= coarse_epsilon(releases(terms), 1e-3) <= base + 0.1


def test_phase_and_cohort_do_not_change_the_price() -> None:
    one = (Release("probe", "pair", 3.0), Release("similarity", "pair", 3.0))
    assert epsilon(one, 1e-3) == epsilon((Release("metrics", "test", 3.0, count=2),), 1e-3)


def test_the_event_names_every_release() -> None:
    text = str(event(releases([(2.0, 0.25, 80), (3.0, 1.0, 2)])))
    assert "PoissonSampledDpEvent(sampling_probability=0.25" in text
    assert "noise_multiplier=2.0" in text
    assert "count=80" in text
    assert "noise_multiplier=3.0" in text


@pytest.mark.parametrize("wrong", [{"noise_multiplier": 0.0}, {"noise_multiplier": float("nan")}])
@pytest.mark.parametrize("more", [{}, {"sampling_rate": 0.0}, {"sampling_rate": 1.01}, {"count": 0}])
def test_a_release_without_a_price_is_refused(wrong: dict[str, float], more: dict[str, float]) -> None:
    values = more or wrong
    with pytest.raises(ConfigError, match="no finite price"):
        Release("training", "pair", **{"noise_multiplier": 1.0, **values})  # type: ignore[arg-type]


@pytest.mark.parametrize("delta", [0.0, 1.0, -1e-3])
def test_a_delta_that_is_no_probability_is_refused(delta: float) -> None:
    for price in (epsilon, coarse_epsilon):
        with pytest.raises(ConfigError, match="not a probability"):
            price(releases([(1.0, 1.0, 1)]), delta)
    with pytest.raises(ConfigError, match="not a probability"):
        rdp_epsilon([releases([(1.0, 1.0, 1)])], delta)


# What a job releases.

NOISED = (
    "selection: {noise_multiplier: 5}, training: {noise_multiplier: 2, sampling_rate: 0.5}, "
    "metrics: {noise_multiplier: 3}, closed_form: {noise_multiplier: 4}"
)


def job(mechanism: str, more: str = "", privacy: str = NOISED, rounds: int = 6, steps: int = 1) -> Job:
    train = f"train: {{rounds: {rounds}, local_steps: {steps}}}\n" if "train:" not in more else ""
    return parse_job(f"{MINIMAL}{train}{more}\nprivacy: {{mechanism: {mechanism}, {privacy}}}")


PROBED, COMPARED = Release("probe", "pair", 5.0), Release("similarity", "pair", 5.0)
SOLVED, TESTED = Release("closed_form", "pair", 4.0), Release("metrics", "test", 3.0)


@pytest.mark.parametrize(
    ("of", "expected"),
    [
        (job("none"), ()),
        (job("central"), (PROBED, COMPARED, Release("training", "pair", 2.0, 0.5, 6), TESTED)),
        (job("local", steps=5), (PROBED, COMPARED, Release("training", "pair", 2.0, 0.5, 30), TESTED)),
        (
            job("central", "selection: {mode: fixed, input_position: 1, output_position: 1}\nevaluate: {final: false}"),
            (Release("training", "pair", 2.0, 0.5, 6),),
        ),
        (job("local", CLOSED + "train: closed_form"), (PROBED, COMPARED, SOLVED, TESTED)),
        (
            job("central", CLOSED + "train: {start: closed_form, rounds: 3, local_steps: 1}"),
            (PROBED, COMPARED, SOLVED, Release("training", "pair", 2.0, 0.5, 3), TESTED),
        ),
        (
            job("central", "evaluate: {every: 4}"),
            (
                PROBED,
                COMPARED,
                Release("training", "pair", 2.0, 0.5, 6),
                Release("metrics", "validation", 3.0, count=2),
                TESTED,
            ),
        ),
        (
            job("central", "train: {keep: best, rounds: 6, local_steps: 1}"),
            (
                PROBED,
                COMPARED,
                Release("training", "pair", 2.0, 0.5, 6),
                Release("metrics", "validation", 3.0, count=6),
                TESTED,
            ),
        ),
    ],
)
def test_the_releases_of_a_plan(of: Job, expected: tuple[Release, ...]) -> None:
    assert plan_releases(of) == expected
    for cohort in ("pair", "validation", "test"):
        assert releases_of(of, cohort) == tuple(r for r in expected if r.cohort == cohort)


@pytest.mark.parametrize("mechanism", ["local", "central"])
def test_the_messages_of_a_run_draw_down_exactly_its_plan(mechanism: str) -> None:
    steps = 4 if mechanism == "local" else 1
    train = f"train: {{start: closed_form, rounds: 6, local_steps: {steps}, keep: best}}\n"
    of = job(mechanism, CLOSED + train + "evaluate: {every: 2}")
    messages: list[tuple[str, str | None]] = [(DESCRIBE, None), (PROBE, None), (SIMILARITY, None), (CLOSED_FORM, None)]
    for round_ in range(1, 7):
        messages.append((TRAIN, None))
        if of.evaluates("validation", round_):
            messages.append((EVALUATE, "validation"))
    messages.append((EVALUATE, "test"))
    drawn: dict[tuple[object, ...], int] = {}
    for message, split in messages:
        for r in message_releases(of, message, split):
            key = (r.phase, r.cohort, r.noise_multiplier, r.sampling_rate)
            drawn[key] = drawn.get(key, 0) + r.count
    planned = {(r.phase, r.cohort, r.noise_multiplier, r.sampling_rate): r.count for r in plan_releases(of)}
    assert drawn == planned
    assert planned["training", "pair", 2.0, 0.5] == 6 * steps


def test_without_a_mechanism_no_message_has_a_price() -> None:
    assert all(message_releases(job("none"), m, "test") == () for m in (PROBE, SIMILARITY, TRAIN, EVALUATE))


def test_an_evaluation_without_a_split_is_refused() -> None:
    with pytest.raises(ConfigError, match="no price on 'None'"):
        message_releases(job("central"), EVALUATE)


@pytest.mark.parametrize("phase", ["selection", "training", "metrics"])
def test_a_missing_noise_multiplier_is_named(phase: str) -> None:
    given = {"selection": 5, "training": 2, "metrics": 3}
    privacy = ", ".join(f"{name}: {{noise_multiplier: {z}}}" for name, z in given.items() if name != phase)
    with pytest.raises(ConfigError, match=rf"no privacy\.{phase}\.noise_multiplier"):
        plan_releases(job("central", privacy=privacy))


# Noise from epsilon.


@pytest.mark.parametrize(
    ("target", "delta", "fixed", "template"),
    [
        (8.0, 1e-3, (), Release("training", "pair", 1.0, 0.25, 80)),
        (2.0, 1e-3, (PROBED, COMPARED), Release("training", "pair", 1.0, 0.25, 80)),
        (0.5, 1e-3, (), Release("training", "pair", 1.0, 0.25, 20)),
        (1.0, 1e-5, (), Release("metrics", "test", 1.0, count=3)),
        (0.05, 1e-4, (), Release("closed_form", "pair", 1.0)),
        (1.0, 1e-3, (), Release("training", "pair", 1.0, 0.1, 2000)),
    ],
)
def test_noise_meets_its_target_and_hardly_more(
    target: float, delta: float, fixed: tuple[Release, ...], template: Release
) -> None:
    def cost(z: float) -> float:
        terms = [(r.noise_multiplier, r.sampling_rate, r.count) for r in fixed]
        return composed([*terms, (z, template.sampling_rate, template.count)], delta)

    noise = noise_for(target, delta, fixed, template)
    assert cost(noise) <= target
    assert cost(noise * (1 - 1e-3)) > target
    assert float(f"{noise:.5g}") == noise


def test_a_target_that_is_spent_already_is_refused_and_a_lavish_one_gets_the_least_noise() -> None:
    with pytest.raises(ConfigError, match="can't be met by any noise") as caught:
        noise_for(0.1, 1e-3, (Release("probe", "pair", 1.0),), Release("training", "pair", 1.0))
    assert f"{composed([(1.0, 1.0, 1)], 1e-3):.4g}" in caught.value.why
    assert noise_for(100.0, 1e-3, (), Release("metrics", "test", 1.0)) == 0.2


def test_resolving_fills_each_phase_and_meets_the_total() -> None:
    asked = "epsilon: 8, selection: {epsilon: 1}, metrics: {epsilon: 4}"
    found = resolved(job("central", "evaluate: {every: 2}", asked, rounds=40))
    privacy = found.privacy
    z = privacy.selection.noise_multiplier
    assert z is not None
    assert 0.999 < composed([(z, 1.0, 2)], 1e-3) <= 1.0
    assert 7.995 < epsilon(releases_of(found, "pair"), 1e-3) <= 8.0
    assert 3.995 < epsilon(releases_of(found, "validation"), 1e-3) <= 4.0
    assert epsilon(releases_of(found, "test"), 1e-3) < 1.0
    assert privacy.closed_form.noise_multiplier is None
    assert (privacy.selection.epsilon, privacy.metrics.epsilon, privacy.epsilon) == (None, None, 8.0)
    assert resolved(found) == found


def test_the_closed_form_is_the_main_phase_where_there_are_no_rounds() -> None:
    asked = "epsilon: 4, selection: {epsilon: 0.5}, metrics: {noise_multiplier: 2}"
    alone = resolved(job("local", CLOSED + "train: closed_form", asked))
    assert 3.995 < epsilon(releases_of(alone, "pair"), 1e-3) <= 4.0
    assert alone.privacy.training.noise_multiplier is None
    assert alone.privacy.metrics.noise_multiplier == 2.0
    both = CLOSED + "train: {start: closed_form, rounds: 10, local_steps: 1}"
    with pytest.raises(ConfigError, match=r"privacy\.closed_form\.noise_multiplier nor privacy\.closed_form\.epsilon"):
        resolved(job("central", both, asked))
    found = resolved(job("central", both, asked + ", closed_form: {epsilon: 1}"))
    assert 3.995 < epsilon(releases_of(found, "pair"), 1e-3) <= 4.0
    assert len(releases_of(found, "pair")) == 4


def test_what_is_missing_or_contradicts_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"privacy\.selection\.noise_multiplier nor privacy\.selection\.epsilon"):
        resolved(job("central", privacy="epsilon: 8, metrics: {epsilon: 1}"))
    with pytest.raises(ConfigError, match=r"privacy\.training\.epsilon is given, or privacy\.epsilon"):
        resolved(job("central", privacy="selection: {epsilon: 1}, metrics: {epsilon: 1}"))
    with pytest.raises(ConfigError, match=r"privacy\.metrics\.noise_multiplier"):
        resolved(job("central", privacy="epsilon: 8, selection: {epsilon: 1}"))
    with pytest.raises(ConfigError, match=r"more than privacy\.epsilon 2"):
        resolved(job("central", privacy="epsilon: 2, " + NOISED))


def test_a_job_without_privacy_is_left_alone() -> None:
    plain = job("none", privacy="epsilon: 1")
    assert resolved(plain) is plain


# What a number means.


@pytest.mark.parametrize("z", [0.5, 1.0, 3.0])
def test_the_best_true_positive_rate_bounds_the_best_test_of_one_gaussian(z: float) -> None:
    """Neyman and Pearson's test between N(0, z) and N(1, z) is the best attack; all (epsilon, delta) together
    allow just that."""
    best = stats.norm.sf(stats.norm.isf(0.01) - 1 / z)
    allowed = min(true_positive_rate(epsilon(releases([(z, 1.0, 1)]), d), d) for d in np.geomspace(0.002, 0.5, 16))
    assert best - 1e-6 <= allowed < best + 0.01


def test_true_positive_rates_by_hand() -> None:
    assert true_positive_rate(0.0, 0.0) == pytest.approx(0.01)
    assert true_positive_rate(0.5, 1e-3) == pytest.approx(np.exp(0.5) * 0.01 + 1e-3)
    assert true_positive_rate(8.0, 1e-3) == pytest.approx(1 - np.exp(-8) * (1 - 1e-3 - 0.01))
    assert true_positive_rate(1.0, 0.0, false_positives=0.5) == pytest.approx(1 - np.exp(-1) * 0.5)
    assert 0.999 < true_positive_rate(1e9, 1e-3) <= 1.0


def test_the_signal_to_noise_ratio_is_that_of_a_simulation() -> None:
    rng = np.random.default_rng(0)
    signal = 40 * 0.5 * np.eye(300)[0]
    noise = rng.normal(scale=2.0 * 0.5, size=(200, 6, 300)).sum(axis=1)
    measured = np.linalg.norm(signal) / np.linalg.norm(noise, axis=1).mean()
    assert signal_to_noise(40, 300, 2.0, noises=6) == pytest.approx(measured, rel=0.02)
