"""Atari games as environments. The only room that knows ale_py."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util.machine import usable_cores
from pydqn.config import Config
from pydqn.envs.base import BYTE_RANGE, Returns, Step
from pydqn.preprocess import KERNELS, SIZE

_NO_CAP = 2**31 - 1  # ALE counts in 32 bits
_Answer = tuple[NDArray[np.uint8], NDArray[Any], NDArray[np.bool_], NDArray[np.bool_], dict[str, NDArray[Any]]]


def games() -> dict[str, str]:
    """Return the ROM of every game that ale_py has, by the names "space_invaders" and "SpaceInvaders"."""
    from ale_py import roms

    return {name: rom for rom in roms.get_all_rom_ids() for name in (rom, rom.title().replace("_", ""))}


class AtariEnvs:
    """ALE's own vector environment: C++ threads, no GIL, raw max-pooled frames, shrunk by one of our kernels.

    The caps are counted here, not by ALE: ALE stops in the middle of a skip then, before it takes the image, and
    returns a stale frame where a bootstrap needs the true one. Ours lets ALE run on for one frame more, which opens
    and closes an episode of its own and so is part of no transition.

    Where FIRE opens a game, an environment presses it and then action 2 for one step each (as the old Gym wrapper does); the
    frames before and between are marked `first`, too, and so are part of no transition.
    """

    def __init__(self, rom: str, config: Config, num_envs: int, seed: int, *, render: bool = False) -> None:
        import ale_py
        from ale_py import AtariVectorEnv, roms

        self._rom = rom
        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)
        console = ale_py.ALEInterface()
        console.loadROM(roms.get_rom_path(rom))
        actions = console.getLegalActionSet() if config.full_action_space else console.getMinimalActionSet()
        self.action_names = tuple(action.name for action in actions)
        self.num_actions = len(actions)
        self._height, self._width = console.getScreenDims()
        self.num_envs = num_envs
        self.frame_shape: tuple[int, ...] = (SIZE, SIZE)
        self.dtype = np.dtype(np.uint8)
        self.input_range = BYTE_RANGE
        self._kernel = KERNELS[config.preprocess]
        self._gray = config.preprocess == "resize_area"
        self._terminal_on_life_loss = config.terminal_on_life_loss
        self._clip = bool(config.clip_rewards)
        self._max_steps = config.max_episode_steps or config.max_episode_frames
        self._max_frames = config.max_episode_frames
        self._skip, self._most_skip = config.frame_skip, max(config.frame_skip, config.frame_skip_max)
        self._random_skip = self._most_skip > self._skip
        presses = config.fire_reset and "FIRE" in self.action_names and self.num_actions > 2
        self._opening = np.array([self.action_names.index("FIRE"), 2] if presses else [], np.int64)
        # One frame more than a whole game has, so that our cap comes first.
        most_steps = max(1, min(self._max_steps, self._max_frames // self._skip))
        most_frames = min((len(self._opening) + most_steps) * self._skip + 1, _NO_CAP)

        def vector(num_envs: int, grayscale: bool, frame_skip: int, max_pool: bool, cap: int) -> Any:
            return AtariVectorEnv(
                rom,
                num_envs,
                num_threads=min(num_envs, config.emulator_threads or usable_cores()),
                max_num_frames_per_episode=cap,
                repeat_action_probability=config.sticky_actions,
                full_action_space=config.full_action_space,
                img_height=self._height,
                img_width=self._width,
                grayscale=grayscale,
                stack_num=1,
                frameskip=frame_skip,
                maxpool=max_pool,
                noop_max=config.noop_max_frames + 1,  # ALE draws from 0 to one less
                reward_clipping=False,
                use_fire_reset=False,
            )

        def emulators(num_envs: int, grayscale: bool) -> Any:
            if not self._random_skip:
                return vector(num_envs, grayscale, self._skip, config.max_pool, most_frames)
            emulators_ = [vector(1, grayscale, 1, False, _NO_CAP) for _ in range(num_envs)]
            return _RandomSkip(emulators_, self._skip, self._most_skip, config.max_pool)

        self.fps = 30  # as ALE's own environment says
        self._emulators, self._render = emulators, render
        self._seed: int | None = None
        self._make(seed)

    def _make(self, seed: int) -> None:
        """Make the emulators: a seed does not take ALE's back to how they began."""
        num_envs = self.num_envs
        self._env = self._emulators(num_envs, self._gray)
        # A person wants colour where the learner wants gray: a second console that gets environment 0's seed and actions.
        self._camera = self._emulators(1, False) if self._render and self._gray else None
        self._seed = seed
        self._image = np.zeros((self._height, self._width, 3), np.uint8)
        self._seeds = np.random.SeedSequence(seed).generate_state(num_envs).astype(np.int64) % (2**31 - 1)
        self._lives = np.zeros(num_envs, np.int64)
        self._steps = np.zeros(num_envs, np.int64)
        self._frames = np.zeros(num_envs, np.int64)
        self._over = np.zeros(num_envs, np.bool_)  # the next step opens a game
        self._presses = np.zeros(num_envs, np.int64)  # of the opening, still to come
        self._returns = Returns(num_envs)

    def reset(self, out: NDArray[Any], seed: int | None = None) -> None:
        if seed is not None and seed != self._seed:
            self.close()
            self._make(seed)
        self._seed = None  # used from here on
        with self._reporting():
            frames, info = self._env.reset(seed=self._seeds)
        self._show(frames, self._camera.reset(seed=self._seeds[:1])[0] if self._camera is not None else None)
        self._lives = info["lives"]
        self._kernel(frames[:, 0], out=out)
        self._presses[:] = len(self._opening)
        for _ in self._opening:
            self.send(np.zeros(self.num_envs, np.int64))
            self.recv(out)

    def send(self, action: NDArray[np.int64]) -> None:
        if self._presses.any():
            action = np.where(self._presses > 0, self._opening[-self._presses], action)
        with self._reporting():
            for env in (self._env, self._camera):
                if isinstance(env, _RandomSkip):
                    env.send(action, self._over)
                elif env is not None:
                    env.send(action[: env.num_envs])

    def recv(self, out: NDArray[Any]) -> Step:
        with self._reporting():
            frames, reward, terminated, truncated, info = self._env.recv()
        if self._camera is not None:
            images, camera_reward, *_ = self._camera.recv()
            if camera_reward[0] != reward[0]:
                raise RuntimeError("render: the image has come apart from the game it shows")
            self._show(frames, images)
        else:
            self._show(frames, None)
        self._kernel(frames[:, 0], out=out)

        opened = self._over
        first = opened | (self._presses > 0)
        self._presses = np.where(opened, len(self._opening), np.maximum(self._presses - 1, 0))
        skips = info["skips"] if self._random_skip else self._skip
        self._steps = np.where(first, 0, self._steps + 1)
        self._frames = np.where(first, 0, self._frames + skips)
        full = (self._steps >= self._max_steps) | (self._frames + self._most_skip > self._max_frames)
        capped = ~first & ~terminated & full
        self._over = terminated | truncated | capped
        life_lost = (info["lives"] < self._lives) & ~first
        self._lives = info["lives"]
        reward = reward.astype(np.float64)
        terminated = terminated & ~first
        episodes = self._returns.add(reward, first, terminated | capped)
        return Step(
            reward=np.sign(reward) if self._clip else reward,
            terminated=terminated | (life_lost if self._terminal_on_life_loss else np.False_),
            truncated=capped,
            first=first,
            episodes=episodes,
            frames=int(np.sum(skips * ~first)),
        )

    def image(self) -> NDArray[np.uint8]:
        return self._image

    def close(self) -> None:
        self._env.close()
        if self._camera is not None:
            self._camera.close()

    @contextmanager
    def _reporting(self) -> Iterator[None]:
        """Say, when an emulator fails, which it may have been: ALE does not tell."""
        try:
            yield
        except RuntimeError as error:
            envs = ", ".join(f"{env_index} (seed {seed})" for env_index, seed in enumerate(self._seeds))
            raise RuntimeError(f"env_id: {self._rom} failed in one of the environments {envs}: {error}") from error

    def _show(self, frames: NDArray[np.uint8], images: NDArray[np.uint8] | None) -> None:
        """Keep environment 0's colours: the camera's, or those of the environment's own frame."""
        if images is not None:
            self._image = images[0, 0]
        elif not self._gray:
            self._image = frames[0, 0]


class _RandomSkip:
    """Decisions that last a random number of frames: `AtariVectorEnv` for one environment each, stepped frame by frame."""

    def __init__(self, emulators: list[Any], least: int, most: int, max_pool: bool) -> None:
        self._emulators = emulators
        self._least, self._most = least, most
        self._max_pool = max_pool
        self._generators: list[np.random.Generator] = []
        self._action: NDArray[np.int64] = np.zeros(len(emulators), np.int64)
        self._opening: dict[int, _Answer] = {}
        self._skips = np.zeros(len(emulators), np.int64)

    def reset(self, seed: NDArray[np.int64]) -> tuple[NDArray[np.uint8], dict[str, NDArray[Any]]]:
        self._generators = [np.random.default_rng(int(own)) for own in seed]
        answers = [emulator.reset(seed=seed[number : number + 1]) for number, emulator in enumerate(self._emulators)]
        lives = np.concatenate([info["lives"] for _, info in answers])
        return np.concatenate([frames for frames, _ in answers]), {"lives": lives}

    def send(self, action: NDArray[np.int64], over: NDArray[np.bool_]) -> None:
        """Open a game in environments that are `over`, and start the first frame of a step in the others."""
        self._action = action
        self._opening = {}
        for number, emulator in enumerate(self._emulators):
            self._skips[number] = self._generators[number].integers(self._least, self._most + 1)
            if over[number]:
                frames, info = emulator.reset()
                nothing = np.zeros(1, np.bool_)
                self._opening[number] = (frames, np.zeros(1), nothing, nothing, info)
            else:
                emulator.send(action[number : number + 1])

    def recv(self) -> _Answer:
        answers = [self._opening.get(number) or self._finish(number) for number in range(len(self._emulators))]
        frames, reward, terminated, truncated = (
            np.concatenate([answer[part] for answer in answers]) for part in range(4)
        )
        lives = np.concatenate([answer[4]["lives"] for answer in answers])
        return frames, reward, terminated, truncated, {"lives": lives, "skips": self._skips.copy()}

    def _finish(self, number: int) -> _Answer:
        """Run the frames that are left of an environment's step, and add up their rewards."""
        emulator, total = self._emulators[number], np.zeros(1)
        before = None
        for frame in range(self._skips[number]):
            if frame:
                emulator.send(self._action[number : number + 1])
            frames, reward, terminated, truncated, info = emulator.recv()
            total += reward
            if terminated[0]:
                self._skips[number] = frame + 1
                break
            if self._max_pool and frame + 2 == self._skips[number]:
                before = frames.copy()
        if before is not None:
            frames = np.maximum(frames, before)
        return frames, total, terminated, truncated, info

    def close(self) -> None:
        for emulator in self._emulators:
            emulator.close()
