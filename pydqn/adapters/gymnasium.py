"""The kernels of `pydqn.preprocess` as Gymnasium wrappers, for one Atari environment and for many.

`AtariPreprocessing` stands in for Gymnasium's wrapper of that name together with `FrameStackObservation`,
`AtariVectorFrames` for a `SyncVectorEnv` of such pairs, over `ale_py.vector_env.AtariVectorEnv` for example.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import OrderEnforcing, PassiveEnvChecker, RecordEpisodeStatistics, TimeLimit
from numpy.typing import NDArray

from pydqn._util.checks import integer
from pydqn.preprocess import KERNELS, SIZE, Frames

if TYPE_CHECKING:
    _Wrapper = gymnasium.Wrapper[Frames, Any, Any, Any]
    _VectorWrapper = VectorWrapper[Frames, Any, Any, Any, NDArray[Any]]
else:  # not every supported version of Gymnasium has the same type parameters
    _Wrapper, _VectorWrapper = gymnasium.Wrapper, VectorWrapper

_LOOK_AWAY = (PassiveEnvChecker, OrderEnforcing, RecordEpisodeStatistics, TimeLimit)  # never act on an image
_SPARE = 4  # stacks that fit into an environment's memory before it begins anew


class AtariPreprocessing(_Wrapper, RecordConstructorArgs):
    """`gymnasium.wrappers.AtariPreprocessing` and `FrameStackObservation` in one, faster.

    No-ops after a reset, frame skip, the pixel-wise maximum of the last two frames, gray, 84x84, and a stack of the
    last observations (Machado et al. 2018). Seeds, actions, rewards, flags, infos and observations are those of
    Gymnasium's pair, bit for bit, but for this:

    * Where an episode or a life ends inside a skip, Gymnasium takes no image: it returns the observation before, as
      it was or mixed with a newer frame, and what is bootstrapped from a truncated episode's end is the value of a
      wrong state. Here the last observation is the maximum of the last two frames, too; only where a game or a life
      is over at a frame of the skip that is neither the first nor the last, it is that one frame alone.
    * `game_over` is False after a reset. Gymnasium leaves it as it was until the next step.

    As with Gymnasium, a reset after a lost life starts a new game.

    It is faster because ALE draws no colours that nobody looks at, where the wrappers between this one and the game
    are those that `gymnasium.make` adds, `TimeLimit` and `RecordEpisodeStatistics`. Over any other wrapper, every frame
    is handed through in full, which is slower and gives the same.

    Args:
        env: one ALE environment, as `gymnasium.make("ALE/Pong-v5", frameskip=1)` makes it.
        noop_max: most no-ops after a reset (each reset draws from 1 to this); 0 for none.
        frame_skip: emulator frames per step. 1 skips and pools nothing, and takes an `env` with a skip of its own.
        screen_size: 84 or (84, 84), only.
        terminal_on_life_loss: a lost life is `terminated`.
        grayscale_obs, grayscale_newaxis, scale_obs: as they are, only.
        stack: how many successive observations make one, as of shape (stack, 84, 84); None for (84, 84).
        padding: what stands before an episode's first observation in its stack: copies of it ("reset"), or "zero".
        kernel: a name in `pydqn.preprocess.KERNELS`. "resize_area" is what Gymnasium does.

    Attributes:
        observation_space: Box of uint8. Each observation is memory of its own, which is never written again.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        env: gymnasium.Env[Any, Any],
        noop_max: int = 30,
        frame_skip: int = 4,
        screen_size: int | tuple[int, int] = SIZE,
        terminal_on_life_loss: bool = False,
        grayscale_obs: bool = True,
        grayscale_newaxis: bool = False,
        scale_obs: bool = False,
        *,
        stack: int | None = None,
        padding: str = "reset",
        kernel: str = "resize_area",
    ) -> None:
        RecordConstructorArgs.__init__(
            self,
            noop_max=noop_max,
            frame_skip=frame_skip,
            screen_size=screen_size,
            terminal_on_life_loss=terminal_on_life_loss,
            grayscale_obs=grayscale_obs,
            grayscale_newaxis=grayscale_newaxis,
            scale_obs=scale_obs,
            stack=stack,
            padding=padding,
            kernel=kernel,
        )
        super().__init__(env)
        self.noop_max = integer("noop_max", noop_max, 0)
        self.frame_skip = integer("frame_skip", frame_skip, 1)
        for name, value, known in (
            ("screen_size", screen_size, (SIZE, (SIZE, SIZE))),
            ("grayscale_obs", grayscale_obs, (True,)),
            ("grayscale_newaxis", grayscale_newaxis, (False,)),
            ("scale_obs", scale_obs, (False,)),
        ):
            if value not in known:
                raise ValueError(f"{name}: expected {known[0]}, as the kernels know nothing else, got {value!r}")
        self.screen_size = (SIZE, SIZE)
        self.terminal_on_life_loss = terminal_on_life_loss
        self.grayscale_obs, self.grayscale_newaxis, self.scale_obs = True, False, False
        game: Any = env.unwrapped
        if not hasattr(game, "ale"):
            raise ValueError(f"env: expected an Atari game of ALE, got {game}")
        skip = getattr(game, "_frameskip", None)
        if self.frame_skip > 1 and skip != 1:
            raise ValueError(f"env: expected one made with frameskip=1, as frame_skip is {frame_skip}, got {skip}")
        if self.noop_max > 0 and game.get_action_meanings()[0] != "NOOP":
            raise ValueError(f"env: expected NOOP as the first action, got {game.get_action_meanings()[0]}")
        self._game = game
        self._stack = _Stack(1, stack, padding)
        self._kernel = _kernel(kernel)
        self._gray = kernel == "resize_area"
        screen = game.ale.getScreenDims() if self._gray else (*game.ale.getScreenDims(), 3)
        self._newest, self._previous = np.zeros(screen, np.uint8), np.zeros(screen, np.uint8)
        self._limits = [wrapper for wrapper in _chain(env) if isinstance(wrapper, TimeLimit)]
        self._unseen = _unseen(env)
        self.lives, self.game_over = 0, False
        self.observation_space = Box(0, 255, self._stack.shape, np.uint8)

    @property
    def ale(self) -> Any:
        """The emulator, an `ale_py.ALEInterface`."""
        return self._game.ale

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frames, dict[str, Any]]:
        """Open an episode, and play its no-ops.

        Returns:
            The observation, and the info of the last no-op with the seeds of the reset.
        """
        with self._unseen:
            _, info = self.env.reset(seed=seed, options=options)
            noops = self._game.np_random.integers(1, self.noop_max + 1) if self.noop_max > 0 else 0
            for _ in range(noops):
                _, _, terminated, truncated, latest = self.env.step(0)
                info.update(latest)
                if terminated or truncated:
                    _, info = self.env.reset(seed=seed, options=options)
        self.lives, self.game_over = self.ale.lives(), False
        self._look(self._newest)
        self._shrink(pooled=False)
        self._stack.begin()
        return self._stack.observations()[0], info

    def step(self, action: Any) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        """Repeat an action for `frame_skip` frames, or until the episode ends.

        Returns:
            The observation, the sum of the rewards, terminated, truncated, and the info of the last frame.
        """
        total, terminated, truncated = 0.0, False, False
        info: dict[str, Any] = {}
        keep_from = min(self.frame_skip, self._frames_left()) - 2
        self._previous, self._newest = self._newest, self._previous
        kept, frame = -1, 0  # the frame in `_previous`: -1 is the one that the step before ended with
        with self._unseen:
            for frame in range(self.frame_skip):
                _, reward, terminated, truncated, info = self.env.step(action)
                total += float(reward)
                if self.terminal_on_life_loss:
                    lives = self.ale.lives()
                    terminated = terminated or lives < self.lives
                    self.lives = lives
                self.game_over = terminated
                if terminated or truncated:
                    break
                if keep_from <= frame < self.frame_skip - 1:
                    self._look(self._previous)
                    kept = frame
        self._look(self._newest)
        self._stack.advance()
        self._shrink(pooled=self.frame_skip > 1 and kept == frame - 1)
        return self._stack.observations()[0], total, terminated, truncated, info

    def _look(self, out: Frames) -> None:
        ale = self._game.ale
        (ale.getScreenGrayscale if self._gray else ale.getScreenRGB)(out)

    def _shrink(self, pooled: bool) -> None:
        out = self._stack.newest[0]
        if self._gray:
            self._kernel(self._newest, self._previous if pooled else None, out=out)
        else:
            self._kernel(np.maximum(self._newest, self._previous) if pooled else self._newest, out=out)

    def _frames_left(self) -> int:
        """Frames to the next limit: the one before the last is worth an image, and taking one costs time."""
        ale = self._game.ale
        cap = ale.getInt("max_num_frames_per_episode")
        left = [cap - ale.getEpisodeFrameNumber()] if cap > 0 else []
        left += [limit._max_episode_steps - (limit._elapsed_steps or 0) for limit in self._limits]
        return min(left, default=self.frame_skip)


class AtariVectorFrames(_VectorWrapper):
    """Native frames of many environments to 84x84 with one call of a kernel, and to stacks of them.

    Over environments that skip and pool themselves, this is what `SyncVectorEnv` of `AtariPreprocessing` returns. ALE's own
    is told to leave its frames as they are (a few games have more rows: `gymnasium.make(...).observation_space`):

        env = gymnasium.make_vec(
            "ALE/Pong-v5", num_envs=8, vectorization_mode="vector_entry_point", img_height=210, img_width=160,
            stack_num=1, use_fire_reset=False, reward_clipping=False,
        )
        env = AtariVectorFrames(env, stack=4)

    ALE draws its no-ops from 0 to `noop_max - 1`, and hands out an old frame where an episode ends inside a skip.

    With next-step autoreset, the observation that opens an episode is its first frame with its padding. With
    same-step autoreset, so is that of the step in which the episode before ended, whose last observation is in
    `infos["final_obs"]`: an array of objects, or one of uint8 (zeros in environments that go on), whichever `env` gives.
    Without autoreset, `reset(options={"reset_mask": mask})` opens episodes and leaves the other environments' stacks.

    Args:
        env: a `gymnasium.vector.VectorEnv` of gray (H, W) or (1, H, W) uint8 frames. The kernels that crop take
            colours: (H, W, 3) or (1, H, W, 3).
        stack: how many successive observations make one, as of shape (stack, 84, 84); None for (84, 84).
        padding: what stands before an episode's first observation in its stack: copies of it ("reset"), or "zero".
            Gymnasium's `FrameStackObservation` does the former if not told otherwise, ALE's own stack the latter.
        kernel: a name in `pydqn.preprocess.KERNELS`.

    Raises:
        ValueError: an argument does not fit; the message names it.
    """

    def __init__(
        self,
        env: VectorEnv[Any, Any, NDArray[Any]],
        *,
        stack: int | None = None,
        padding: str = "reset",
        kernel: str = "resize_area",
    ) -> None:
        super().__init__(env)
        self._kernel = _kernel(kernel)
        channels: tuple[int, ...] = () if kernel == "resize_area" else (3,)
        single, batch = env.single_observation_space, env.observation_space
        shape = single.shape or ()
        self._screen = shape[1:] if len(shape) == 3 + len(channels) and shape[0] == 1 else shape
        if len(self._screen) != 2 + len(channels) or self._screen[2:] != channels or single.dtype != np.uint8:
            wanted = "(H, W) or (1, H, W)" if not channels else "(H, W, 3) or (1, H, W, 3)"
            raise ValueError(
                f"env: expected uint8 observations of shape {wanted} under kernel={kernel!r} (AtariVectorEnv gives "
                f"them with stack_num=1, grayscale={not channels}), got {single}"
            )
        if batch.shape != (env.num_envs, *shape):
            raise ValueError(f"env: expected observations of all {env.num_envs} environments in each step, got {batch}")
        # Of `metadata` alone one cannot know: AtariVectorEnv's are one dictionary, the latest instance's mode for all.
        mode = getattr(env.unwrapped, "autoreset_mode", None) or env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(f"env: expected an AutoresetMode in its metadata['autoreset_mode'], got {mode!r}")
        self._mode = mode
        self.metadata = {**env.metadata, "autoreset_mode": mode}
        self._stack = _Stack(env.num_envs, stack, padding)
        self._over = np.zeros(env.num_envs, np.bool_)
        self.single_observation_space = Box(0, 255, self._stack.shape, np.uint8)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Frames, dict[str, Any]]:
        """Open an episode in every environment, or in those of `options["reset_mask"]`.

        Returns:
            Observations of shape (num_envs, stack, 84, 84), and the environment's infos.
        """
        mask = None if options is None else options.get("reset_mask")  # SyncVectorEnv takes it out of `options`
        frames, infos = self.env.reset(seed=seed, options=options)
        env_indices = slice(None) if mask is None else mask
        self._stack.newest[env_indices] = self._shrunk(frames)[env_indices]
        self._stack.begin(env_indices)
        self._over[env_indices] = False
        return self._stack.observations(), infos

    def step(self, actions: Any) -> tuple[Frames, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take one step in every environment.

        Returns:
            Observations of shape (num_envs, stack, 84, 84), and all else as the environment returned it.
        """
        frames, rewards, terminated, truncated, infos = self.env.step(actions)
        over = np.logical_or(terminated, truncated)
        self._stack.advance()
        first = self._over if self._mode is AutoresetMode.NEXT_STEP else np.False_
        if self._mode is AutoresetMode.SAME_STEP and over.any():
            infos = {**infos, "final_obs": self._last(infos["final_obs"], np.flatnonzero(over))}
            first = over
        self._shrunk(frames, self._stack.newest)
        if first.any():
            self._stack.begin(first)
        self._over = over
        return self._stack.observations(), rewards, terminated, truncated, infos

    def _shrunk(self, frames: Any, out: Frames | None = None) -> Frames:
        small: Frames = self._kernel(np.asarray(frames).reshape(-1, *self._screen), out=out)
        return small

    def _last(self, frames: Any, env_indices: NDArray[np.int64]) -> NDArray[Any]:
        """Turn the last frames of episodes into last observations. The next frames may be written over them."""
        self._stack.newest[env_indices] = self._shrunk(np.stack([frames[env_index] for env_index in env_indices]))
        observations = self._stack.observations(env_indices)
        if frames.dtype != object:
            last = np.zeros((self.num_envs, *self._stack.shape), np.uint8)
            last[env_indices] = observations
            return last
        apart: NDArray[Any] = np.full(self.num_envs, None, object)
        for env_index, observation in zip(env_indices, observations, strict=True):
            apart[env_index] = observation
        return apart


class _Stack:
    """The latest images of some environments. Each is written once, into memory that is seen nowhere else."""

    def __init__(self, num_envs: int, stack: int | None, padding: str) -> None:
        depth = 1 if stack is None else integer("stack", stack, 1)
        if padding not in ("reset", "zero"):
            raise ValueError(f"padding: expected 'reset' or 'zero', got {padding!r}")
        self.shape = (SIZE, SIZE) if stack is None else (depth, SIZE, SIZE)  # of one environment's observation
        self._older = depth - 1
        self._repeat = padding == "reset"
        self._memory = np.zeros((num_envs, _SPARE * depth, SIZE, SIZE), np.uint8)
        self._at = self._older  # of the newest image

    @property
    def newest(self) -> Frames:
        """The memory of the newest images, (environments, 84, 84), to write into."""
        return self._memory[:, self._at]

    def advance(self) -> None:
        """Make place for an image in every environment."""
        self._at += 1
        if self._at == self._memory.shape[1]:
            self._memory[:, : self._older] = self._memory[:, self._at - self._older : self._at]
            self._at = self._older

    def begin(self, env_indices: Any = slice(None)) -> None:
        """Say that the newest images of these environments open an episode."""
        padding = self._memory[env_indices, self._at, None] if self._repeat else 0
        self._memory[env_indices, self._at - self._older : self._at] = padding

    def observations(self, env_indices: Any = slice(None)) -> Frames:
        """Return a copy of the stacks of these environments."""
        return np.array(self._memory[env_indices, self._at - self._older : self._at + 1]).reshape(-1, *self.shape)


class _Unseen:
    """While this is entered, a game's `step` and `reset` return unwritten memory in place of an image.

    To draw one takes a third as long as to emulate the frame. Should ALE's method one day have another name, then
    images are drawn again, and nothing else changes.
    """

    def __init__(self, game: Any) -> None:
        self._game = game
        self._shape = game.observation_space.shape

    def __enter__(self) -> None:
        self._game._get_obs = self._nothing

    def __exit__(self, *_: object) -> None:
        del self._game._get_obs

    def _nothing(self) -> Frames:
        return np.empty(self._shape, np.uint8)


def _unseen(env: Any) -> AbstractContextManager[None]:
    """Return an `_Unseen` where nothing on the way to the game looks at images."""
    *wrappers, game = _chain(env)
    known = all(type(wrapper) in _LOOK_AWAY for wrapper in wrappers)
    ours = (type(game).__module__, type(game).__name__) == ("ale_py.env", "AtariEnv")
    return _Unseen(game) if known and ours and isinstance(game.observation_space, Box) else nullcontext()


def _chain(env: Any) -> list[Any]:
    """Return an environment, what it wraps, and so on to the game."""
    links = [env]
    while isinstance(links[-1], gymnasium.Wrapper):
        links.append(links[-1].env)
    return links


def _kernel(name: str) -> Any:
    if name not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {name!r}")
    return KERNELS[name]
