"""Atari games as vectorised environments. No other module imports ale_py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util.machine import usable_cores
from pydqn.config import Config
from pydqn.envs.base import Returns, Step
from pydqn.envs.frames import BYTE_RANGE, FrameLayout, Part
from pydqn.preprocess import KERNELS, SIZE

_NO_LIMIT = 2**31 - 1  # ALE counts in 32 bits
_Received = tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, NDArray[Any]]]


def games() -> dict[str, str]:
    """Return the ROMs of ale_py by the names of their games: both "space_invaders" and "SpaceInvaders" are names."""
    from ale_py import roms

    return {name: rom for rom in roms.get_all_rom_ids() for name in (rom, rom.title().replace("_", ""))}


class AtariEnvs:
    """ALE's vector environment: emulators in C++ threads, without the GIL.

    The limits of an episode are counted here. ALE would stop within a frame skip, before it takes the image, and return
    an older frame where bootstrapping needs the last one. ALE's own limit is one frame higher: after a truncation it
    plays that frame and resets at the next step. The frames of both steps are marked `first`, so that they are part of
    no transition.

    With `fire_reset`, games that have FIRE start with FIRE and then action 2, for one step each, as in Gym's old
    wrapper. The frames before and between them are marked `first` as well.
    """

    def __init__(self, rom: str, config: Config, num_envs: int, seed: int, *, render: bool = False) -> None:
        import ale_py
        from ale_py import roms

        self._rom, self._config, self._render = rom, config, render
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        console = ale_py.ALEInterface()
        console.loadROM(roms.get_rom_path(rom))
        actions = console.getLegalActionSet() if config.full_action_space else console.getMinimalActionSet()
        self.action_names = tuple(action.name for action in actions)
        self.num_actions, self.actions_described = len(actions), ""
        self._screen = console.getScreenDims()
        self.num_envs = num_envs
        self.layout = FrameLayout((Part("", (SIZE, SIZE), np.dtype(np.uint8), BYTE_RANGE, "none"),))
        self.frame_shape, self.dtype = self.layout.frame_shape, self.layout.dtype
        self.stepping = ""
        self.fps = 30  # as ALE's own environment says
        self._gray = config.preprocess == "resize_area"
        self._max_steps = config.max_episode_steps or config.max_episode_frames
        self._max_frames = config.max_episode_frames
        self._skip, self._max_skip = config.frame_skip, max(config.frame_skip, config.frame_skip_max)
        self._random_skip = self._max_skip > self._skip
        # ALE's own 84x84 frames are those of our `resize_area`, bit for bit (tests compare them), and its threads make
        # them while the learner works. With random skips the maximum of two frames is ours, and so is what follows it.
        self._resized_by_ale = self._gray and not self._random_skip
        fire = config.fire_reset and "FIRE" in self.action_names and self.num_actions > 2
        self._start_actions = np.array([self.action_names.index("FIRE"), 2] if fire else [], np.int64)
        self._seed: int | None = None
        self._make(seed)

    def _make(self, seed: int) -> None:
        """Make the emulators: resetting used ones with a seed does not repeat their first episodes."""
        num_envs = self.num_envs
        self._env = self._emulators(num_envs, self._gray)
        # People want colours where the learner wants gray: a second emulator gets environment 0's seed and actions.
        self._colour_env = self._emulators(1, False) if self._render and self._gray else None
        self._seed = seed
        self._image = np.zeros((*self._screen, 3), np.uint8)
        self._seeds = np.random.SeedSequence(seed).generate_state(num_envs).astype(np.int64) % (2**31 - 1)
        self._lives = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._frames = np.zeros(num_envs, np.int64)
        self._ended = np.zeros(num_envs, np.bool_)  # the next step is a reset
        self._start_actions_left = np.zeros(num_envs, np.int64)
        self._returns = Returns(num_envs)

    def _emulators(self, num_envs: int, gray: bool) -> Any:
        config = self._config
        if self._random_skip:
            emulators = [self._vector_env(1, gray, 1, False, _NO_LIMIT) for _ in range(num_envs)]
            return _RandomSkip(emulators, self._skip, self._max_skip, config.max_pool)
        # One frame more than our own limit, which then comes first.
        max_steps = max(1, min(self._max_steps, self._max_frames // self._skip))
        max_frames = min((len(self._start_actions) + max_steps) * self._skip + 1, _NO_LIMIT)
        return self._vector_env(num_envs, gray, self._skip, config.max_pool, max_frames)

    def _vector_env(self, num_envs: int, gray: bool, frame_skip: int, max_pool: bool, max_frames: int) -> Any:
        from ale_py import AtariVectorEnv

        config = self._config
        height, width = (SIZE, SIZE) if gray and self._resized_by_ale else self._screen
        return AtariVectorEnv(
            self._rom,
            num_envs,
            num_threads=min(num_envs, config.emulator_threads or usable_cores()),
            max_num_frames_per_episode=max_frames,
            repeat_action_probability=config.sticky_actions,
            full_action_space=config.full_action_space,
            img_height=height,
            img_width=width,
            grayscale=gray,
            stack_num=1,
            frameskip=frame_skip,
            maxpool=max_pool,
            noop_max=config.noop_max_frames + 1,  # ALE draws from 0 to one less
            reward_clipping=False,
            use_fire_reset=False,
        )

    def reset(self, out: NDArray[Any], seed: int | None = None) -> None:
        if seed is not None and seed != self._seed:
            self.close()
            self._make(seed)
        self._seed = None  # from here on, the emulators have been used
        with self._named_errors():
            frames, info = self._env.reset(seed=self._seeds)
        if self._colour_env is not None:
            self._image = self._colour_env.reset(seed=self._seeds[:1])[0][0, 0]
        self._lives = info["lives"]
        self._write(frames, out)
        self._start_actions_left[:] = len(self._start_actions)
        for _ in self._start_actions:
            self.send(np.zeros(self.num_envs, np.int64))
            self.recv(out)

    def send(self, action: NDArray[np.int64]) -> None:
        if self._start_actions_left.any():
            action = np.where(self._start_actions_left > 0, self._start_actions[-self._start_actions_left], action)
        with self._named_errors():
            for env in (self._env, self._colour_env):
                if isinstance(env, _RandomSkip):
                    env.send(action, self._ended)
                elif env is not None:
                    env.send(action[: env.num_envs])

    def recv(self, out: NDArray[Any]) -> Step:
        with self._named_errors():
            frames, reward, terminated, truncated, info = self._env.recv()
        if self._colour_env is not None:
            images, colour_reward, *_ = self._colour_env.recv()
            if colour_reward[0] != reward[0]:
                raise RuntimeError("render: the emulator that makes the images no longer follows environment 0")
            self._image = images[0, 0]
        self._write(frames, out)

        reset = self._ended
        first = reset | (self._start_actions_left > 0)
        left = np.maximum(self._start_actions_left - 1, 0)
        self._start_actions_left = np.where(reset, len(self._start_actions), left)
        skips = info["skips"] if self._random_skip else self._skip
        self._steps = np.where(first, 0, self._steps + 1)
        self._frames = np.where(first, 0, self._frames + skips)
        full = (self._steps >= self._max_steps) | (self._frames + self._max_skip > self._max_frames)
        at_limit = ~first & ~terminated & full
        self._ended = terminated | truncated | at_limit
        life_lost = (info["lives"] < self._lives) & ~first
        self._lives = info["lives"]
        reward = reward.astype(np.float64)
        terminated = terminated & ~first
        episodes = self._returns.add(reward, first, terminated | at_limit)
        return Step(
            reward=reward,
            terminated=terminated | (life_lost if self._config.terminal_on_life_loss else np.False_),
            truncated=at_limit,
            first=first,
            episodes=episodes,
            frames=int(np.sum(skips * ~first)),
        )

    def image(self) -> NDArray[np.uint8]:
        return self._image

    def close(self) -> None:
        self._env.close()
        if self._colour_env is not None:
            self._colour_env.close()

    @contextmanager
    def _named_errors(self) -> Iterator[None]:
        """Name the environments and their seeds when an emulator fails: ALE does not say which one did."""
        try:
            yield
        except RuntimeError as error:
            envs = ", ".join(f"{env_index} (seed {seed})" for env_index, seed in enumerate(self._seeds))
            raise RuntimeError(f"env_id: {self._rom} failed in one of the environments {envs}: {error}") from error

    def _write(self, frames: NDArray[np.uint8], out: NDArray[Any]) -> None:
        """Write the preprocessed frames to `out`; keep the first one as the image where it has colours."""
        if self._resized_by_ale:
            np.copyto(out, frames[:, 0])
            return
        KERNELS[self._config.preprocess](frames[:, 0], out=out)
        if not self._gray:
            self._image = frames[0, 0]


class _RandomSkip:
    """Steps of a random number of frames: an `AtariVectorEnv` for each environment, stepped frame by frame."""

    def __init__(self, emulators: list[Any], min_skip: int, max_skip: int, max_pool: bool) -> None:
        self._emulators = emulators
        self._min_skip, self._max_skip = min_skip, max_skip
        self._max_pool = max_pool
        self._generators: list[np.random.Generator] = []
        self._action: NDArray[np.int64] = np.zeros(len(emulators), np.int64)
        self._after_reset: dict[int, _Received] = {}
        self._skips = np.zeros(len(emulators), np.int64)

    def reset(self, seed: NDArray[np.int64]) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
        self._generators = [np.random.default_rng(int(env_seed)) for env_seed in seed]
        received = [emulator.reset(seed=seed[i : i + 1]) for i, emulator in enumerate(self._emulators)]
        lives = np.concatenate([info["lives"] for _, info in received])
        return np.concatenate([frames for frames, _ in received]), {"lives": lives}

    def send(self, action: NDArray[np.int64], ended: NDArray[np.bool_]) -> None:
        """Reset the environments that have `ended`, and start the first frame of a step in the others."""
        self._action = action
        self._after_reset = {}
        for i, emulator in enumerate(self._emulators):
            self._skips[i] = self._generators[i].integers(self._min_skip, self._max_skip + 1)
            if ended[i]:
                frames, info = emulator.reset()
                nothing = np.zeros(1, np.bool_)
                self._after_reset[i] = (frames, np.zeros(1), nothing, nothing, info)
            else:
                emulator.send(action[i : i + 1])

    def recv(self) -> _Received:
        received = [self._after_reset.get(i) or self._finish(i) for i in range(len(self._emulators))]
        frames, reward, terminated, truncated = (
            np.concatenate([results[part] for results in received]) for part in range(4)
        )
        lives = np.concatenate([info["lives"] for *_, info in received])
        return frames, reward, terminated, truncated, {"lives": lives, "skips": self._skips.copy()}

    def _finish(self, env_index: int) -> _Received:
        """Run the remaining frames of an environment's step, and add up their rewards."""
        emulator, total = self._emulators[env_index], np.zeros(1)
        before = None
        for frame in range(self._skips[env_index]):
            if frame:
                emulator.send(self._action[env_index : env_index + 1])
            frames, reward, terminated, truncated, info = emulator.recv()
            total += reward
            if terminated[0]:
                self._skips[env_index] = frame + 1
                break
            if self._max_pool and frame + 2 == self._skips[env_index]:
                before = frames.copy()
        if before is not None:
            frames = np.maximum(frames, before)
        return frames, total, terminated, truncated, info

    def close(self) -> None:
        for emulator in self._emulators:
            emulator.close()
