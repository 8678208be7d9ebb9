"""The job: its text travels unchanged, and what can't be run is refused before anything starts."""

from __future__ import annotations

import pytest
import yaml

from bridge.errors import ConfigError
from bridge.job import Job, Models, SitesJob, job_text, parse_job

MINIMAL = "name: study\nmodels: {old_encoder: a, new_encoder: b, task_head: c}\n"


def test_a_minimal_job_has_the_documented_defaults() -> None:
    job = parse_job(MINIMAL)
    assert (job.selection.mode, job.alignment.loss, job.alignment.layer) == ("scores", "cosine", "final")
    assert (job.strategy.name, job.train.keep, job.privacy.mechanism, job.seed) == ("FedAvg", "last", "none", 0)


def test_the_text_gives_the_job_back() -> None:
    job = parse_job(
        MINIMAL
        + """
seed: 7
selection: {mode: fixed, input_position: 3, output_position: 0}
bridge: {rank: 4, initialisation: public}
alignment: {loss: infonce, negatives: patient, temperature: 0.2}
strategy: {name: FedAdam, server_learning_rate: 0.05}
sites: {expected: [ä, b], weights: {ä: 0.5, b: 1.0}}
"""
    )
    text = job_text(job)
    assert parse_job(text) == job
    assert job_text(parse_job(text)) == text
    written = yaml.safe_load(text)
    assert written["schema"] == "fedbridge.job/1"
    assert set(written) == {f.alias or name for name, f in Job.model_fields.items()}, "every key is written out"


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ("sead: 1", "unknown key 'sead', did you mean 'seed'?"),
        ("train: {round: 3}", "unknown key 'train.round', did you mean 'rounds'?"),
        ("selection: {windows: 3}", "did you mean 'windows_per_patient'?"),
        ("seed: -1", "key 'seed'"),
        ("seed: 2147483648", "key 'seed'"),
        ("train: {rounds: 0}", "key 'train.rounds'"),
        ("train: {learning_rate: 0}", "key 'train.learning_rate'"),
        ("selection: {folds: 1}", "key 'selection.folds'"),
        ("selection: {mode: fixed}", "mode 'fixed' needs input_position and output_position"),
        ("selection: {mode: fixed, input_position: 1}", "mode 'fixed' needs input_position and output_position"),
        ("selection: {input_position: 1}", "are chosen by mode 'scores': leave them out"),
        ("strategy: {name: FedMagic}", "key 'strategy.name'"),
        ("strategy: {trim: 0.5}", "key 'strategy.trim'"),
        ("privacy: {mechanism: distributed}", "key 'privacy.mechanism'"),
        ("privacy: {mechanism: local, delta: 0.002}", "delta 0.002 is too large for patients_bound 100"),
        ("privacy: {training: {epsilon: 1, noise_multiplier: 1}}", "give noise_multiplier or epsilon, not both"),
        ("privacy: {mechanism: local}\nselection: {mode: moments}", "does not go with selection.mode 'moments'"),
        ("privacy: {mechanism: central}", "train.local_steps 20: a message is ONE gradient evaluation"),
        ("privacy: {mechanism: local}\nstrategy: {name: FedMedian}", "its step is not a bounded sum"),
        ("privacy: {mechanism: local}\nstrategy: {name: Krum}", "its step is not a bounded sum"),
        ("privacy: {mechanism: local}\nalignment: {loss: infonce}", "a patient's loss would depend on others"),
        ("privacy: {mechanism: local}\ntrain: {keep: best, criterion: train_loss}", "the loss is not released"),
        ("train: closed_form", "the closed form needs bridge.kind factored"),
        ("train: {start: closed_form}", "the closed form needs bridge.kind factored"),
        ("sites: {weights: {a: 2}}", "weights must lie in (0, 1]"),
        ("sites: {weights: {a: 0}}", "weights must lie in (0, 1]"),
        ("sites: {expected: [a], weights: {b: 1}}", "weights and expected must name the same sites"),
        ("schema: fedbridge.job/2", "key 'schema'"),
    ],
)
def test_a_job_that_cannot_be_run_is_refused(more: str, says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_job(MINIMAL + more)
    assert says in caught.value.what


@pytest.mark.parametrize("name", ["", "two words", "../x", "-a", "a" * 65])
def test_a_name_is_one_plain_word(name: str) -> None:
    with pytest.raises(ConfigError, match="key 'name'"):
        parse_job(yaml.safe_dump({"name": name, "models": {"old_encoder": "a", "new_encoder": "b", "task_head": "c"}}))


def test_models_must_be_named_and_nothing_else() -> None:
    with pytest.raises(ConfigError, match="key 'models' is missing"):
        parse_job("name: a")
    with pytest.raises(ConfigError, match=r"key 'models\.task_head' is missing"):
        parse_job("name: a\nmodels: {old_encoder: a, new_encoder: b}")
    with pytest.raises(ConfigError, match="did you mean 'old_encoder'"):
        parse_job("name: a\nmodels: {old_encodr: a, new_encoder: b, task_head: c}")


def test_weights_are_public_numbers_by_site_and_equal_where_none_are_given() -> None:
    assert SitesJob().weight("any") == 1.0
    sites = SitesJob(weights={"a": 0.25})
    assert (sites.weight("a"), sites.weight("b")) == (0.25, 1.0)
    assert Models(old_encoder="a", new_encoder="b", task_head="c") == parse_job(MINIMAL).models


@pytest.mark.parametrize(
    ("more", "validation", "test"),
    [
        ("", [], [5]),
        ("evaluate: {final: false}", [], []),
        ("evaluate: {every: 2}", [2, 4, 5], [5]),
        ("evaluate: {every: 9}", [5], [5]),
        ("train: {keep: best}", [1, 2, 3, 4, 5], [1, 2, 3, 4, 5]),
        ("train: {keep: best}\nevaluate: {every: 2}", [2, 4, 5], [2, 4, 5]),
        ("train: {keep: best, criterion: train_loss}", [], [1, 2, 3, 4, 5]),
        ("train: {criterion: train_loss}\nevaluate: {every: 2}", [], [5]),
    ],
)
def test_the_rounds_that_a_job_evaluates(more: str, validation: list[int], test: list[int]) -> None:
    job = parse_job(MINIMAL + more)
    job = job.model_copy(update={"train": job.train.model_copy(update={"rounds": 5})})
    assert [n for n in range(1, 6) if job.evaluates("validation", n)] == validation
    assert [n for n in range(1, 6) if job.evaluates("test", n)] == test
