"""Environments as lanes: `send` actions, work on something else, `recv` frames into the replay memory's own slot.

The only room that knows gymnasium and ale_py.
"""

from __future__ import annotations

import difflib
import re
from typing import Any, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pydqn.config import Config
from pydqn.preprocess import KERNELS, SIZE


class Episode(NamedTuple):
    """A whole game that has ended."""

    lane: int
    total: float  # the true return: unclipped, undiscounted, across lives
    steps: int


class Step(NamedTuple):
    """What the lanes returned, beside their frames: arrays of num_envs, as `FrameReplay.append` takes them."""

    reward: NDArray[np.float64]  # as the learner sees it (clipped, if so configured)
    terminated: NDArray[np.bool_]  # (a lost life counts, if so configured)
    truncated: NDArray[np.bool_]
    first: NDArray[np.bool_]
    episodes: list[Episode]  # games that ended with this step


class Lanes(Protocol):
    """Environments that step together. A lane whose episode ended opens the next one at the following step."""

    num_envs: int
    num_actions: int
    frame_shape: tuple[int, ...]
    dtype: np.dtype[Any]
    frames_per_step: int

    def reset(self, out: NDArray[Any]) -> None:
        """Open an episode in every lane; writes the first frames to `out`, (num_envs, *frame_shape)."""

    def send(self, action: NDArray[np.int64]) -> None:
        """Start one step in every lane."""

    def recv(self, out: NDArray[Any]) -> Step:
        """Wait for the step that `send` started; writes the frames to `out`."""

    def picture(self) -> NDArray[np.uint8]:
        """Return what a person would see of lane 0: (H, W, 3) uint8. Only when made with `render=True`."""

    def close(self) -> None:
        """Release the environments."""


def make_lanes(config: Config, num_envs: int, seed: int, *, render: bool = False) -> Lanes:
    """Make `num_envs` environments of `config.env_id`, each with its own seed derived from `seed`.

    Raises:
        ValueError: no such environment (near matches are named), or its spaces do not fit DQN.
    """
    rom = rom_of(config.env_id)
    if rom is not None:
        return AtariLanes(rom, config, num_envs, seed, render=render)
    return GymLanes(config, num_envs, seed, render=render)


def rom_of(env_id: str) -> str | None:
    """Return the ROM name of an Atari id, or None for any other Gymnasium id.

    Atari ids are "pong", "Pong", "ALE/Pong-v5", and Gym's old "Pong-v4" and "PongNoFrameskip-v4", whose differences are
    fields of `Config`.

    Raises:
        ValueError: the id has an Atari game's form, but ALE has no such game.
    """
    from ale_py import roms

    known: dict[str, str] = {
        name: rom for rom in roms.get_all_rom_ids() for name in (rom, rom.title().replace("_", ""))
    }
    old = re.fullmatch(r"([A-Za-z0-9]+?)(NoFrameskip|Deterministic)?-v[04]", env_id)
    if old and old[1] in known:
        return known[old[1]]
    if not env_id.startswith("ALE/") and ("/" in env_id or "-" in env_id):
        return None
    name = env_id.removeprefix("ALE/").split("-v")[0]
    if name not in known:
        near = difflib.get_close_matches(name, known, n=3, cutoff=0.5)
        hint = f"did you mean {' or '.join(near)}?" if near else "see ale_py.roms.get_all_rom_ids()"
        raise ValueError(f"env_id: there is no Atari game {env_id!r}; {hint}")
    return known[name]


class _Returns:
    """Adds up the true rewards of each lane's episode."""

    def __init__(self, num_envs: int) -> None:
        self._total = np.zeros(num_envs)
        self._steps = np.zeros(num_envs, np.int64)

    def add(self, reward: NDArray[Any], first: NDArray[np.bool_], done: NDArray[np.bool_]) -> list[Episode]:
        self._total = np.where(first, 0.0, self._total + reward)
        self._steps = np.where(first, 0, self._steps + 1)
        ended = np.flatnonzero(done & ~first)
        return [Episode(int(lane), float(self._total[lane]), int(self._steps[lane])) for lane in ended]


class AtariLanes:
    """ALE's own vector environment: C++ threads, no GIL, raw max-pooled frames, shrunk by one of our kernels.

    The frame cap is counted here, not by ALE: ALE stops in the middle of a skip then, before it takes the picture, and
    returns a stale frame where a bootstrap needs the true one. Ours lets ALE run on for one frame more, which opens
    and closes an episode of its own and so is part of no transition.
    """

    def __init__(self, rom: str, config: Config, num_envs: int, seed: int, *, render: bool = False) -> None:
        import ale_py
        from ale_py import AtariVectorEnv, roms

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        console = ale_py.ALEInterface()
        console.loadROM(roms.get_rom_path(rom))
        self._height, self._width = console.getScreenDims()
        self.num_envs = num_envs
        self.frame_shape: tuple[int, ...] = (SIZE, SIZE)
        self.dtype = np.dtype(np.uint8)
        self.frames_per_step = config.frame_skip
        self._kernel = KERNELS[config.preprocess]
        self._gray = config.preprocess == "resize_area"
        self._life_loss = config.life_loss
        self._clip = config.clip_rewards
        skip = config.frame_skip
        self._most_steps = max(1, config.max_episode_frames // skip)

        def vector(grayscale: bool) -> Any:
            return AtariVectorEnv(
                rom,
                num_envs,
                num_threads=config.emulator_threads,
                max_num_frames_per_episode=self._most_steps * skip + 1,
                repeat_action_probability=config.sticky_actions,
                full_action_space=config.full_action_set,
                img_height=self._height,
                img_width=self._width,
                grayscale=grayscale,
                stack_num=1,
                frameskip=skip,
                maxpool=True,
                noop_max=config.noop_max_frames + 1,  # ALE draws from 0 to one less
                reward_clipping=False,
                use_fire_reset=config.fire_reset,
            )

        self._env = vector(self._gray)
        # A person wants colour where the learner wants gray: a second console that gets the same seeds and actions.
        self._camera = vector(False) if render else None
        self._picture = np.zeros((self._height, self._width, 3), np.uint8)
        self.num_actions = int(self._env.single_action_space.n)
        self._seeds = np.random.SeedSequence(seed).generate_state(num_envs).astype(np.int64) % (2**31 - 1)
        self._lives = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._done = np.zeros(num_envs, np.bool_)
        self._capped = np.zeros(num_envs, np.bool_)
        self._returns = _Returns(num_envs)

    def reset(self, out: NDArray[Any]) -> None:
        frames, info = self._env.reset(seed=self._seeds)
        if self._camera is not None:
            self._picture = self._camera.reset(seed=self._seeds)[0][0, 0]
        self._lives = info["lives"]
        self._kernel(frames[:, 0], out=out)

    def send(self, action: NDArray[np.int64]) -> None:
        self._env.send(action)
        if self._camera is not None:
            self._camera.send(action)

    def recv(self, out: NDArray[Any]) -> Step:
        frames, reward, terminated, truncated, info = self._env.recv()
        if self._camera is not None:
            pictures, camera_reward, *_ = self._camera.recv()
            if not np.array_equal(camera_reward, reward):
                raise RuntimeError("render: the picture has come apart from the game it shows")
            self._picture = pictures[0, 0]
        self._kernel(frames[:, 0], out=out)

        # The step after a capped game is that one frame more; the step after any ended game is a reset.
        first = self._done | self._capped
        self._done = terminated | truncated
        self._steps = np.where(first, 0, self._steps + 1)
        capped = ~first & ~terminated & (self._steps >= self._most_steps)
        self._capped = capped
        life_lost = (info["lives"] < self._lives) & ~first
        self._lives = info["lives"]
        reward = reward.astype(np.float64)
        terminated = terminated & ~first
        episodes = self._returns.add(reward, first, terminated | capped)
        return Step(
            reward=np.sign(reward) if self._clip else reward,
            terminated=terminated | (life_lost if self._life_loss else np.False_),
            truncated=capped,
            first=first,
            episodes=episodes,
        )

    def picture(self) -> NDArray[np.uint8]:
        return self._picture

    def close(self) -> None:
        self._env.close()
        if self._camera is not None:
            self._camera.close()


class GymLanes:
    """Any Gymnasium environment with Discrete actions and Box or Discrete observations (one-hot), through `make_vec`.

    Steps run inside `recv`: such environments hold the GIL, so there is nothing to overlap.
    """

    def __init__(self, config: Config, num_envs: int, seed: int, *, render: bool = False) -> None:
        import gymnasium
        from gymnasium import spaces

        env_id = config.env_id
        self._clip = config.clip_rewards
        options: dict[str, Any] = {"render_mode": "rgb_array"} if render else {}
        try:
            self._env = gymnasium.make_vec(env_id, num_envs, vectorization_mode="sync", **options)
        except (gymnasium.error.Error, ImportError) as error:
            near = difflib.get_close_matches(env_id, list(gymnasium.registry), n=3, cutoff=0.5)
            hint = f"; did you mean {' or '.join(near)}?" if near else ""
            raise ValueError(f"env_id: Gymnasium cannot make {env_id!r} ({str(error).splitlines()[0]}){hint}") from None
        action, observation = self._env.single_action_space, self._env.single_observation_space
        if not isinstance(action, spaces.Discrete):
            raise ValueError(f"env_id: {env_id} has {action} actions; DQN needs Discrete ones")
        self._action_start = int(action.start)
        self._one_hot = isinstance(observation, spaces.Discrete)
        if isinstance(observation, spaces.Discrete):
            self.frame_shape: tuple[int, ...] = (int(observation.n),)
            self._observation_start = int(observation.start)
            self.dtype: np.dtype[Any] = np.dtype(np.float32)
        elif isinstance(observation, spaces.Box) and observation.shape:
            self.frame_shape = observation.shape
            is_pixels = observation.dtype == np.uint8
            self.dtype = np.dtype(np.uint8 if is_pixels else np.float32)
        else:
            raise ValueError(f"env_id: {env_id} has {observation} observations; expected Box or Discrete ones")
        self.num_envs = num_envs
        self.num_actions = int(action.n)
        self.frames_per_step = 1
        self._seeds: Any = [int(seed) for seed in np.random.SeedSequence(seed).generate_state(num_envs)]
        self._action: NDArray[np.int64] = np.zeros(num_envs, np.int64)
        self._done = np.zeros(num_envs, np.bool_)
        self._returns = _Returns(num_envs)

    def reset(self, out: NDArray[Any]) -> None:
        observation, _ = self._env.reset(seed=self._seeds)
        self._write(observation, out)

    def send(self, action: NDArray[np.int64]) -> None:
        self._action = action + self._action_start

    def recv(self, out: NDArray[Any]) -> Step:
        observation, reward, terminated, truncated, _ = self._env.step(self._action)
        first, self._done = self._done, terminated | truncated
        self._write(observation, out)
        reward = np.where(first, 0.0, reward)
        episodes = self._returns.add(reward, first, self._done)
        return Step(np.sign(reward) if self._clip else reward, terminated, truncated, first, episodes)

    def _write(self, observation: NDArray[Any], out: NDArray[Any]) -> None:
        if self._one_hot:
            out[...] = np.eye(*self.frame_shape, dtype=np.float32)[observation - self._observation_start]
        else:
            out[...] = observation

    def picture(self) -> NDArray[np.uint8]:
        from gymnasium.error import DependencyNotInstalled

        try:
            pictures = self._env.render()
        except DependencyNotInstalled as error:
            raise RuntimeError(f"render: {error}") from None  # names the pip command
        assert pictures is not None
        return np.asarray(pictures[0], np.uint8)

    def close(self) -> None:
        self._env.close()
