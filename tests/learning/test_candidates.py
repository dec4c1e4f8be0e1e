"""Choosing a form of the update: stand-ins that are slow, wrong or raise, and what a learner does with them."""

from __future__ import annotations

import re
import time

import numpy as np
import pytest
import torch

from pydqn import LearnerSettings
from pydqn.learning import learner as learner_module
from pydqn.learning import policy as policy_module
from pydqn.learning.candidates import Disagreement, Trial, choose, described, require_agreement
from pydqn.learning.forms import forms_of
from pydqn.learning.fused import FusedGradients
from pydqn.learning.gradients import Autograd
from pydqn.learning.objectives import Transitions
from pydqn.learning.optimizers import TorchOptimizer
from pydqn.learning.policy import Actor
from tests.helpers.learners import assert_equal_learners, make, make_custom, needs_cuda, replay_on_the_cpu


def named(*names):
    return dict.fromkeys(names)


def test_the_fastest_that_works_is_taken():
    wrong = Disagreement("gradient 2 is off")
    seconds = {"plain": 3e-4, "wrong": wrong, "fast": 1e-4, "broken": RuntimeError("no\nno")}

    def attempt(name, form):
        found = seconds[name]
        if isinstance(found, Exception):
            raise found
        return found

    chosen, trials = choose(named(*seconds), attempt)
    assert chosen == "fast"
    dropped = ["Disagreement: gradient 2 is off", "RuntimeError: no"]
    assert [trial.reason for trial in trials] == ["", dropped[0], "", dropped[1]]
    text = "fast (plain 300 us; wrong Disagreement: gradient 2 is off; fast 100 us; broken RuntimeError: no)"
    assert described(chosen, trials) == text


def test_if_none_works_the_first_is_taken():
    def attempt(name, form):
        raise RuntimeError

    chosen, trials = choose(named("plain", "fused"), attempt)
    assert (chosen, [trial.seconds for trial in trials]) == ("plain", [None, None])


def test_trials_end_after_a_while():
    now = [0.0]

    def attempt(name, form):
        now[0] += 10
        return 1 / now[0]

    chosen, trials = choose(named("plain", "fused", "third"), attempt, lambda: now[0])
    assert chosen == "fused"
    assert trials[2] == Trial("third", None, "not tried after 15 seconds")


def test_agreement():
    exact = {"errors": torch.ones(3), "gradient": torch.zeros(2), "none": None}
    require_agreement({**exact, "errors": torch.full((3,), 1.04)}, exact)
    for wrong in (torch.full((3,), 1.06), torch.full((3,), torch.nan)):
        with pytest.raises(Disagreement, match="^errors is off by"):
            require_agreement({**exact, "errors": wrong}, exact)
    with pytest.raises(Disagreement, match="^gradient is off by"):
        require_agreement({**exact, "gradient": torch.ones(2)}, exact)
    for name, other in (("gradient", None), ("none", torch.ones(1))):
        with pytest.raises(Disagreement, match=f"^{name} is missing$"):
            require_agreement({**exact, name: other}, exact)


def test_one_wrong_sample_of_many_is_noticed():
    exact = torch.ones(10_000)
    wrong = exact.clone()
    wrong[17] = 1.1
    assert (wrong - exact).norm() < 0.01 * exact.norm()
    with pytest.raises(Disagreement, match="^errors is off by 0.1 of its size$"):
        require_agreement({"errors": wrong}, {"errors": exact})


def stand_in(gradients, change, seconds=0.0):
    """Return a form of the update that changes the first parameter's gradient, and takes longer."""

    def changed(batch, weight):
        time.sleep(seconds)
        found = gradients(batch, weight)
        change(gradients._online._convs[0].weight)
        return found

    return changed


def half(parameter):
    parameter.grad = parameter.grad / 2


def refuse(parameter):
    raise RuntimeError("CUDNN_STATUS_NOT_SUPPORTED")


@pytest.mark.parametrize("optimizer", ["adam", "rmsprop_tf"])
@pytest.mark.parametrize("storage", ["host", "device"])
def test_a_learner_tries_and_undoes_it(monkeypatch, optimizer, storage):
    """All but the capture. Afterwards the learner is as if it had been made with the chosen form."""
    monkeypatch.setattr(learner_module, "make_optimizer", TorchOptimizer)
    monkeypatch.setattr(learner_module, "REPLAYS", 2)
    variant = {"double": True, "optimizer": optimizer, "storage": storage}
    other, replay, _ = make(**variant, update="fused")
    replay_on_the_cpu(learner_module, monkeypatch)
    learner, same_replay, config = make(**variant)
    learner._stream, learner._chooses = "a stream", True
    frames = getattr(same_replay, "frames", None)
    settings = LearnerSettings.from_config(config)
    fused = FusedGradients(learner.online, learner.target, settings, frames)
    plain = learner._forms["plain"]
    learner._forms = {
        "plain": lambda *given: time.sleep(0.05) or plain(*given),
        "fused": fused,
        "wrong": stand_in(fused, half),
        "refused": stand_in(fused, refuse),
        "slower": stand_in(fused, lambda parameter: None, 0.05),
    }
    assert (learner.form, learner.choice) == ("plain", "")
    for _ in range(20):
        other.update(replay.sample(32))
        learner.update(same_replay.sample(32))
    assert learner.form == "fused", learner.choice
    pattern = r"fused \(plain [\d,]+ us; fused [\d,]+ us; wrong Disagreement: the gradient of "
    pattern += r"torso.convs.0.weight is off by 0.5 of its size; "
    pattern += r"refused RuntimeError: CUDNN_STATUS_NOT_SUPPORTED; slower [\d,]+ us\)"
    assert re.fullmatch(pattern, learner.choice)
    assert_equal_learners(learner, other, rtol=0, atol=0)


def test_a_learner_goes_on_with_a_form_that_was_chosen_before():
    learner, *_ = make()
    learner._forms["fused"] = "another form"
    learner._chooses = True
    learner.use_form("fused, two streams", "text")  # of another version: it is chosen anew
    assert learner._chooses
    learner.use_form("fused", "text")
    assert (learner.form, learner.choice, learner._chooses) == ("fused", "text", False)


def test_gradients_stay_autograds_over_a_thousand_updates():
    """Compared at each update, since trajectories part: Adam divides small differences by small numbers."""
    learner, replay, config = make(double=True, dueling=True, n_step=3, pixel_mean=0.0, update="fused")
    plain = Autograd(learner.policy, learner.target, LearnerSettings.from_config(config))
    parameters = list(learner.online.parameters())
    worst = 0.0
    for _ in range(1000):
        batch = replay.sample(32)
        tensors = [torch.from_numpy(part) for part in batch]
        plain(Transitions(*tensors[:5]), tensors[6])
        expected = [parameter.grad.clone() for parameter in parameters]
        learner.update(batch)
        errors = [(p.grad - g).norm() / g.norm() for p, g in zip(parameters, expected, strict=True)]
        worst = max(worst, float(torch.stack(errors).max()))
    assert worst < 5e-3


def test_what_can_be_chosen():
    def forms(device="cpu", loss=None, **settings):
        learner, _, config = make(**settings)
        learner.policy.device = torch.device(device)
        settings = LearnerSettings.from_config(config)
        return list(forms_of(learner._plain, learner.policy, learner.target, settings, loss))

    assert forms() == forms(update="plain") == ["plain"]
    assert forms(update="fused") == ["fused"]
    assert forms("cuda", value="quantile", precision="float32") == ["plain"]
    assert forms("cuda", value="quantile", precision="auto") == ["plain", "plain, TF32"]
    assert forms("cuda", loss=lambda *_: None, precision="auto") == ["plain"]
    assert forms("cuda", update="plain", precision="auto") == ["plain"]


def test_a_form_that_does_not_fit_is_refused():
    with pytest.raises(ValueError, match="^update: expected auto or plain, since values are not scalar, got 'fused'$"):
        make(value="quantile", update="fused")
    with pytest.raises(ValueError, match="^update: expected auto or plain, since the loss is not pydqn's"):
        make_custom(update="fused")


def prepared(monkeypatch, **variant):
    """Return a learner that will choose at its next update, with stand-ins for CUDA, and a batch."""
    monkeypatch.setattr(learner_module, "make_optimizer", TorchOptimizer)
    monkeypatch.setattr(learner_module, "REPLAYS", 2)
    replay_on_the_cpu(learner_module, monkeypatch)
    learner, replay, _ = make(**variant)
    learner._stream, learner._chooses = "a stream", True
    return learner, replay.sample(32)


def test_a_fused_form_that_was_asked_for_is_compared_with_plain(monkeypatch):
    learner, batch = prepared(monkeypatch, update="fused")
    learner._forms = {"fused": stand_in(learner._forms["fused"], half)}
    before = {name: value.clone() for name, value in learner.state_dict().items() if not name.startswith("optimizer")}
    with pytest.raises(
        ValueError, match="^update: expected auto or plain, since no fused form works on cpu: fused .fused D"
    ):
        learner.update(batch)
    after = learner.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_interrupted_choice_leaves_the_first_form(monkeypatch):
    learner, batch = prepared(monkeypatch)
    plain = learner._forms["plain"]

    def interrupted(*given):
        raise KeyboardInterrupt

    learner._forms = {"plain": plain, "fused": interrupted}
    with pytest.raises(KeyboardInterrupt):
        learner.update(batch)
    assert (learner.form, learner._chooses) == ("plain", True)
    learner._forms = {"plain": plain, "refused": stand_in(plain, refuse)}
    learner.update(batch)
    assert (learner.form, learner._chooses) == ("plain", False)


@needs_cuda
def test_a_gpu_chooses():
    learner, replay, _ = make(torch.device("cuda"), storage="device", precision="auto")
    learner.update(replay.sample(32))
    assert "plain " in learner.choice
    assert "fused " in learner.choice
    assert "off by" not in learner.choice


def test_an_actor_chooses_too(monkeypatch):
    """All but the capture: a form that is wrong is dropped, the fastest of the others acts."""
    replay_on_the_cpu(policy_module, monkeypatch)
    monkeypatch.setattr(torch.cuda, "Stream", lambda device: "a stream")
    monkeypatch.setattr(policy_module, "REPLAYS", 2)
    learner, replay, _ = make()
    obs = replay.sample(8).obs
    expected = learner.policy.values(obs)
    actor = Actor(learner.policy, obs)
    assert list(actor._forms) == ["plain", "fused"]
    fused, calls = actor._forms["fused"], []

    def counted():
        calls.append(1)
        return fused()

    plain = actor._forms["plain"]
    actor._forms = {
        "plain": lambda: time.sleep(0.05) or plain(),
        "wrong": lambda: plain() + 1,
        "fused": counted,
    }
    actor._captures = True
    np.testing.assert_allclose(actor.values(obs), expected, rtol=1e-4, atol=1e-5)
    before = len(calls)
    actor.values(obs)
    assert len(calls) == before + 1
    assert list(Actor(learner.policy, obs, form="plain")._forms) == ["plain"]
