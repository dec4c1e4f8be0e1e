"""Environments and networks that functions of the user's make, and runs that are followed report by report."""

from __future__ import annotations

import dataclasses
import functools
import json

import gymnasium
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import pydqn
from pydqn.cli.main import main
from pydqn.envs.own import registered
from pydqn.plotting.action_values import beside
from tests.helpers.own import QUICK, own_ids, short_poles


def silent_poles():
    """Make one that does not take `render_mode`."""
    return gymnasium.make("CartPole-v1")


class Pair(gymnasium.Env):
    """An image and two numbers, with masks."""

    observation_space = spaces.Dict(image=spaces.Box(0, 255, (12, 12), np.uint8), numbers=spaces.Box(-1, 1, (2,)))
    action_space = spaces.Discrete(3)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self._steps = 0
        return self._seen(), {"action_mask": [1, 0, 1]}

    def _seen(self):
        image = self.np_random.integers(0, 256, (12, 12), np.uint8)
        return {"image": image, "numbers": self.np_random.random(2, np.float32)}

    def step(self, action):
        assert action != 1
        self._steps += 1
        return self._seen(), 1.0, self._steps == 7, False, {"action_mask": [1, 0, 1]}


class Plain(nn.Module):
    """A network for observations that are one array."""

    def __init__(self, space, num_actions):
        super().__init__()
        self.space = space
        self.layers = nn.Sequential(nn.Flatten(), nn.Linear(int(np.prod(space.shape)), 8), nn.Tanh())
        self.head = nn.Linear(8, num_actions)

    def forward(self, obs):
        return self.head(self.layers(obs.float()))


class Parts(nn.Module):
    """A network for the observations of `Pair`."""

    def __init__(self, space, num_actions):
        super().__init__()
        assert set(space.spaces) == {"image", "vector"}
        self.head = nn.Linear(2 * 144 + 2 * 2, num_actions)

    def forward(self, obs):
        return self.head(torch.cat([obs["image"].flatten(1) / 255, obs["vector"].flatten(1)], dim=1))


def test_everything_takes_the_function(tmp_path):
    config = pydqn.Config(**{**vars(QUICK), "env_kwargs": {"length": 13}})
    result = pydqn.train(config, tmp_path, make_env=short_poles)
    assert max(result.returns) <= 13
    recorded = json.loads((tmp_path / "environment.json").read_text())
    assert recorded["environment"] == 'own/short_poles with {"length": 13} (Gymnasium)'
    assert recorded["episodes"].startswith("as the environment ends them (in evaluation")
    assert "registered_by" not in recorded
    assert own_ids() == []
    resumed = pydqn.resume(tmp_path, make_env=short_poles, total_steps=300)
    assert resumed.steps == 300
    assert max(pydqn.evaluate(tmp_path, 3, make_env=short_poles)) <= 13
    *steps, episode = pydqn.play_episode(tmp_path, make_env=short_poles)
    assert len(steps) == episode.steps == episode.total <= 13
    assert steps[0].image.shape == (400, 600, 3)
    policy = pydqn.load_policy(tmp_path, make_env=short_poles)
    assert policy.env().reset(seed=0)[0].shape == (2, 4)
    assert own_ids() == []


def test_a_run_that_a_function_made_needs_it_again(tmp_path, capsys):
    pydqn.train(QUICK, tmp_path, make_env=short_poles)
    message = "env_id: 'own/short_poles' was made by a function of yours; give it again, in Python make_env="
    for call in (pydqn.resume, pydqn.load_policy, lambda run: pydqn.evaluate(run, 1)):
        with pytest.raises(ValueError, match=message):
            call(tmp_path)
    assert main(["evaluate", str(tmp_path)]) == 2
    assert message in capsys.readouterr().err
    assert len(pydqn.evaluate(tmp_path, 1, make_env=silent_poles)) == 1  # another function may take its place


def test_another_environment_resets_what_belongs_to_the_presets(tmp_path):
    config = pydqn.preset("cartpole", total_steps=60, device="cpu")
    with pytest.warns(UserWarning, match="^make_env: own/short_poles is another environment than the config's"):
        result = pydqn.train(config, tmp_path, make_env=short_poles)
    assert result.returns[0] > 1  # not the shaped reward of the preset
    with pytest.warns(UserWarning, match=r"\(to keep them, make the config with env_id='own/short_poles'\)$"):
        pydqn.train(config, tmp_path / "warned", make_env=short_poles)
    kept = pydqn.preset("dqn", env_id="own/short_poles", max_episode_steps=7, total_steps=30, device="cpu")
    assert max(pydqn.train(kept, tmp_path / "kept", make_env=short_poles).returns) == 7


def test_functions_classes_partials_and_lambdas(tmp_path):
    made = {
        "partial": functools.partial(short_poles, 5),
        "class": Pair,
        "lambda": lambda: gymnasium.make("CartPole-v1"),
        "silent": silent_poles,
    }
    for name, make_env in made.items():
        assert pydqn.train(QUICK, tmp_path / name, make_env=make_env).updates > 0
    recorded = json.loads((tmp_path / "lambda" / "environment.json").read_text())
    assert recorded["environment"] == "own/lambda (Gymnasium)"


def test_images_of_a_function_that_takes_no_render_mode(tmp_path):
    pydqn.train(QUICK, tmp_path, make_env=silent_poles)
    with pytest.raises(RuntimeError, match=r"own/silent_poles.*render\(\).*need no images"):
        list(pydqn.play_episode(tmp_path, make_env=silent_poles))
    assert list(pydqn.play_episode(tmp_path, make_env=silent_poles, images=False))


@pytest.mark.parametrize("make_env", ["CartPole-v1", 3])
def test_what_is_no_function(tmp_path, make_env):
    with pytest.raises(ValueError, match="^make_env: expected a function"):
        pydqn.train(QUICK, tmp_path, make_env=make_env)
    with pytest.raises(RuntimeError, match="could not be made: .*no environment"):
        pydqn.train(QUICK, tmp_path, make_env=lambda: _raise("no environment"))


def _raise(text):
    raise RuntimeError(text)


def test_two_functions_of_one_name_at_the_same_time():
    first, second = (lambda: None for _ in range(2))
    with registered(first, "x") as one, registered(first, "x") as again:
        assert one == again == {"env_id": "own/lambda"}
        with (
            pytest.raises(ValueError, match="^make_env: another function has the id 'own/lambda'"),
            registered(second, "x"),
        ):
            pass
    with registered(second, "x"):
        assert own_ids() == ["own/lambda"]
    assert own_ids() == []


# --- networks ---


@pytest.mark.parametrize(("make_env", "network"), [(short_poles, Plain), (Pair, Parts)])
def test_a_network_of_the_users(tmp_path, make_env, network):
    def arguments():
        return {"make_env": make_env, "network": network}

    pydqn.train(QUICK, tmp_path / "whole", **arguments())
    assert pydqn.preset("dqn").network == "auto"
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["network"] == "custom"
    pydqn.resume(tmp_path / "whole", total_steps=260, **arguments())
    for call in (pydqn.resume, pydqn.load_policy):
        with pytest.raises(ValueError, match="^network: expected the function that makes the network"):
            call(tmp_path / "whole", make_env=make_env)
    policy = pydqn.load_policy(tmp_path / "whole", **arguments())
    obs, _ = policy.env().reset(seed=1)
    values = policy.values(obs)
    if make_env is Pair:
        assert np.isneginf(values).tolist() == [False, True, False]
        with torch.no_grad():
            inner = policy.network.network
            parts = {
                "image": torch.from_numpy(obs[:, :144].reshape(1, 2, 12, 12)),
                "vector": torch.from_numpy(obs[:, 144:152].copy().view(np.float32)[None]),
            }
            np.testing.assert_allclose(values[[0, 2]], inner(parts)[0, [0, 2]], rtol=1e-6)
    else:
        with torch.no_grad():
            np.testing.assert_allclose(values, policy.network(torch.from_numpy(obs[None]))[0], rtol=1e-6)
    assert len(pydqn.evaluate(tmp_path / "whole", 2, **arguments())) == 2


@pytest.mark.parametrize(("make_env", "network"), [(short_poles, Plain), (Pair, Parts)])
def test_a_network_of_the_users_in_bfloat16(tmp_path, make_env, network):
    own = {"make_env": make_env, "network": network}
    result = pydqn.train(dataclasses.replace(QUICK, precision="bfloat16"), tmp_path, **own)
    assert result.updates > 0
    assert len(pydqn.evaluate(tmp_path, 1, **own)) == 1
    policy = pydqn.load_policy(tmp_path, **own)
    assert policy.values(policy.env().reset(seed=1)[0]).dtype == np.float32


def test_a_network_starts_from_the_runs_seed(tmp_path):
    found = []
    for folder, seed in (("a", 0), ("b", 0), ("c", 1)):
        with torch.random.fork_rng():
            torch.manual_seed(len(found))  # the global generator does not matter
            pydqn.train(pydqn.Config(**{**vars(QUICK), "seed": seed}), tmp_path / folder, network=Plain)
        found.append((tmp_path / folder / "weights" / "last.safetensors").read_bytes())
    assert found[0] == found[1] != found[2]


class Wrong(Plain):
    def forward(self, obs):
        return super().forward(obs)[:, :1]


@pytest.mark.parametrize(
    ("network", "message"),
    [
        (lambda space, count: 3, "expected a function that returns a torch.nn.Module, got int"),
        (Wrong, r"expected \(2, 2\) values for two observations, got shape \(2, 1\)"),
        (lambda space, count: nn.Linear(3, count), r"failed for two observations of Box.*shapes cannot be multiplied"),
        ("nature", "expected a function, got 'nature'"),
    ],
)
def test_networks_that_do_not_fit(tmp_path, network, message):
    with pytest.raises(ValueError, match=f"^network: {message}"):
        pydqn.train(QUICK, tmp_path, network=network)
    with pytest.raises(ValueError, match="^network: expected no function for an agent with a table"):
        pydqn.train(pydqn.preset("frozenlake"), tmp_path / "table", network=Plain)
    with pytest.raises(ValueError, match="^network: expected the function"):
        pydqn.train(pydqn.Config(**{**vars(QUICK), "network": "custom"}), tmp_path / "none")


# --- following a run ---


def test_a_run_can_be_followed_left_and_resumed(tmp_path):
    config = pydqn.Config(**{**vars(QUICK), "log_every_steps": 50, "total_steps": 400})
    for report in pydqn.run(config, tmp_path / "left"):
        if report.steps >= 150:
            break
    assert report.steps < 170
    rest = list(pydqn.run(config, tmp_path / "left", resume=True))
    assert len(rest) in (5, 6)
    assert rest[0].steps > report.steps
    assert rest[-1].steps >= 400
    reports = pydqn.run(config, tmp_path / "whole", make_env=short_poles)
    while True:
        try:
            next(reports)
        except StopIteration as stop:
            result = stop.value
            break
    assert result.steps == 400
    assert own_ids() == []


# --- policies ---


def test_a_policy_plays_like_its_evaluation(tmp_path):
    """In `policy.env()`, greedy episodes have the returns that `evaluate` finds for the same seed."""
    pydqn.train(QUICK, tmp_path, make_env=short_poles)
    expected = pydqn.evaluate(tmp_path, 1, seed=5, make_env=short_poles, evaluation_epsilon=0.0)
    policy = pydqn.load_policy(tmp_path, make_env=short_poles)
    env = policy.env()
    obs, _ = env.reset(seed=5)
    total, batch = 0.0, [obs]
    while True:
        obs, reward, terminated, truncated, _ = env.step(policy(obs))
        total, batch = total + reward, [*batch, obs]
        if terminated or truncated:
            break
    with pytest.raises(RuntimeError, match="^step: the episode is over"):
        env.step(0)
    env.close()
    assert total == expected[0]
    np.testing.assert_allclose(
        policy.values(np.stack(batch)), [policy.values(one) for one in batch], rtol=1e-5, atol=1e-6
    )
    assert policy(np.stack(batch)).tolist() == [policy(one) for one in batch]
    assert {policy(obs, epsilon=1.0) for _ in range(50)} == {0, 1}
    for bad in (obs[0], obs.astype(np.float64), np.zeros((2, 2, 5), np.float32)):
        with pytest.raises(ValueError, match=r"^obs: expected float32 of shape \(2, 4\)"):
            policy(bad)


def test_a_policy_of_an_atari_game(tmp_path):
    config = pydqn.preset("pong", total_steps=64, replay_capacity_frames=1_000, device="cpu", torch_threads=1)
    pydqn.train(config, tmp_path)
    policy = pydqn.load_policy(tmp_path)
    env = policy.env(render=True)
    obs, _ = env.reset(seed=1)
    assert obs.shape == (4, 84, 84)
    assert obs.any(axis=(1, 2)).tolist() == [False, False, False, True]
    for _ in range(4):
        after, *_ = env.step(policy(obs))
        np.testing.assert_array_equal(after[:3], obs[1:])
        obs = after
    assert env.render().shape == (210, 160, 3)
    env.close()


def test_the_environment_of_a_policy_has_a_seed(tmp_path):
    pydqn.train(QUICK, tmp_path, make_env=short_poles)
    policy = pydqn.load_policy(tmp_path, make_env=short_poles)
    seen = []
    for seed in (3, 3, 4):
        env = policy.env(seed=seed)
        seen.append([env.reset()[0].tolist() for _ in range(3)])
        env.close()
    assert seen[0] == seen[1] != seen[2]
    assert len({str(obs) for obs in seen[0]}) == 3
    assert own_ids() == []


def test_a_function_may_be_defined_anew(tmp_path):
    """As by running a cell of a notebook again, while the policy that it made before is still there."""
    for _ in range(2):

        def mine():
            return gymnasium.make("CartPole-v1")

        if not (tmp_path / "config.json").exists():
            pydqn.train(QUICK, tmp_path, make_env=mine)
        policy = pydqn.load_policy(tmp_path, make_env=mine)
        assert policy.env().reset()[0].shape == (2, 4)


def test_a_method_makes_environments():
    class Makers:
        def make(self):
            return gymnasium.make("CartPole-v1")

    makers = Makers()
    with registered(makers.make, "x") as one, registered(makers.make, "x") as again:
        assert one == again == {"env_id": "own/make"}


def test_parts_have_names_of_their_own(tmp_path):
    image = spaces.Box(0, 255, (12, 12), np.uint8)

    class Names(Pair):
        observation_space = spaces.Dict(
            {"vector": image, "action_mask": image, "a.b": image, "a_b": image, "numbers": spaces.Box(-1, 1, (2,))}
        )

        def _seen(self):
            return {name: space.sample() for name, space in self.observation_space.items()}

    pydqn.train(QUICK, tmp_path, make_env=Names)
    policy = pydqn.load_policy(tmp_path, make_env=Names)
    parts = policy.parts(policy.env().reset()[0])
    assert list(parts) == ["a_b", "a_b_", "action_mask_", "vector", "vector_", "action_mask"]
    assert parts["vector_"].shape == (1, 2, 2)


def test_masked_actions_are_shown_without_a_value(tmp_path):
    pydqn.train(QUICK, tmp_path, make_env=Pair)
    *steps, _ = pydqn.play_episode(tmp_path, make_env=Pair, images=False)
    assert all(step.values[1] == -np.inf for step in steps)
    image = beside(np.zeros((210, 160, 3), np.uint8), steps[0].action_names, steps[0].values, steps[0].action)
    assert image.shape[0] == 210


# --- weights of others ---


def test_starting_from_other_weights(tmp_path):
    first = pydqn.train(pydqn.Config(**{**vars(QUICK), "total_steps": 400}), tmp_path / "first").logdir
    config = pydqn.Config(**{**vars(QUICK), "init_weights": str(first), "total_steps": 2})
    pydqn.train(config, tmp_path / "second")
    before = pydqn.load_policy(first).network.state_dict()
    after = pydqn.load_policy(tmp_path / "second", weights="checkpoint").network.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    other = pydqn.Config(**{**vars(config), "env_id": "Acrobot-v1"})
    with pytest.warns(UserWarning, match=r"^init_weights: 1 of 4 .*advantage\.0\.weight \(here \(16, 12\)"):
        pydqn.train(other, tmp_path / "third")
    path = str(first / "weights" / "last.safetensors")
    pydqn.train(pydqn.Config(**{**vars(config), "init_weights": path}), tmp_path / "fourth")
    assert pydqn.resume(tmp_path / "fourth", total_steps=100, init_weights="gone").steps >= 100
    for wrong, message in (
        (str(tmp_path / "nothing"), "no such file"),
        (str(tmp_path), "has no weights yet"),
        (str(first / "config.json"), "not a readable safetensors file"),
    ):
        with pytest.raises(ValueError, match=f"^init_weights: .*{message}"):
            pydqn.train(pydqn.Config(**{**vars(config), "init_weights": wrong}), tmp_path / "fifth")
    wide = pydqn.Config(**{**vars(config), "hidden_units": (17, 17, 17), "network": "mlp", "env_id": "Acrobot-v1"})
    with pytest.raises(ValueError, match="^init_weights: none of the weights in"):
        pydqn.train(wide, tmp_path / "sixth")
