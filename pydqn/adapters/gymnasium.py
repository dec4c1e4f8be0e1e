"""The kernels of `pydqn.preprocess` as Gymnasium wrappers, for one Atari environment and for many.

`AtariPreprocessing` replaces Gymnasium's wrapper of that name together with `FrameStackObservation`.
`AtariVectorFrames` replaces a `SyncVectorEnv` of such pairs, for example over `ale_py.vector_env.AtariVectorEnv`.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import gymnasium
import numpy as np
from gymnasium.spaces import Box
from gymnasium.utils import RecordConstructorArgs
from gymnasium.vector import AutoresetMode, VectorEnv, VectorWrapper
from gymnasium.vector.utils import batch_space
from gymnasium.wrappers import TimeLimit
from numpy.typing import NDArray

from pydqn._util.checks import integer
from pydqn.preprocess import KERNELS, SIZE, Frames
from pydqn.replay.frames import FrameReplay

if TYPE_CHECKING:
    _Wrapper = gymnasium.Wrapper[Frames, Any, Any, Any]
    _VectorWrapper = VectorWrapper[Frames, Any, Any, Any, NDArray[Any]]
else:  # not every supported version of Gymnasium has the same type parameters
    _Wrapper, _VectorWrapper = gymnasium.Wrapper, VectorWrapper


class AtariPreprocessing(_Wrapper, RecordConstructorArgs):
    """`gymnasium.wrappers.AtariPreprocessing` and `FrameStackObservation` in one, faster.

    It applies no-ops after a reset, frame skip, the pixel-wise maximum of the last two frames, grayscale, 84x84, and a
    stack of the last observations (Machado et al. 2018). Seeds, actions, rewards, flags, infos and observations equal
    those of Gymnasium's pair, bit for bit, with two differences:

    * Where an episode or a life ends inside a skip, Gymnasium's pair reads no new frame. It returns the observation
      before, unchanged or mixed with a newer frame, so that the value bootstrapped at the end of a truncated episode is
      that of a wrong state. Here the last observation is the maximum of the last two frames, too. Only where a game or
      a life is over at a frame of the skip that is neither the first nor the last, it is that one frame alone.
    * `game_over` is False after a reset. Gymnasium leaves it unchanged until the next step.

    As with Gymnasium, a reset after a lost life starts a new game.

    This wrapper reads the screens from the emulator itself and ignores the observations of `env`. Make `env` with
    `obs_type="ram"`, so that ALE draws no colour images, which would not be used:

        env = gymnasium.make("ALE/Pong-v5", frameskip=1, obs_type="ram")
        env = AtariPreprocessing(env, stack=4)

    Args:
        env: one ALE environment, made with `frameskip=1` (any skip if `frame_skip` is 1), of any `obs_type`.
        noop_max: the largest number of no-ops after a reset (each reset draws from 1 to this); 0 for none.
        frame_skip: emulator frames per step. 1 neither skips nor pools, and accepts an `env` that skips by itself.
        screen_size: 84 or (84, 84), nothing else.
        terminal_on_life_loss: whether a lost life is `terminated`.
        grayscale_obs, grayscale_newaxis, scale_obs: True, False and False, nothing else.
        stack: how many successive observations are stacked, to shape (stack, 84, 84); None for (84, 84).
        padding: what stands before an episode's first observation in its stack: copies of it ("reset"), or "zero".
        kernel: a name in `pydqn.preprocess.KERNELS`. "resize_area" is what Gymnasium does.

    Attributes:
        observation_space: a Box of uint8. Each observation is a new array.

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
                raise ValueError(f"{name}: expected {known[0]}, as the kernels have no other, got {value!r}")
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
        shape, self._stacks = _stacks(1, stack, padding)
        self._kernel = _kernel(kernel)
        self._gray = kernel == "resize_area"
        screen = game.ale.getScreenDims() if self._gray else (*game.ale.getScreenDims(), 3)
        self._newest, self._previous = np.zeros(screen, np.uint8), np.zeros(screen, np.uint8)
        self._limits = []
        while isinstance(env, gymnasium.Wrapper):
            self._limits += [env] if isinstance(env, TimeLimit) else []
            env = env.env
        self.lives, self.game_over = 0, False
        self.observation_space = Box(0, 255, shape, np.uint8)

    @property
    def ale(self) -> Any:
        """The emulator, an `ale_py.ALEInterface`."""
        return self._game.ale

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Frames, dict[str, Any]]:
        """Start an episode and play its no-ops.

        Returns:
            The observation, and the info of the last no-op together with the seeds of the reset.
        """
        _, info = self.env.reset(seed=seed, options=options)
        noops = self._game.np_random.integers(1, self.noop_max + 1) if self.noop_max > 0 else 0
        for _ in range(noops):
            _, _, terminated, truncated, latest = self.env.step(0)
            info.update(latest)
            if terminated or truncated:
                _, info = self.env.reset(seed=seed, options=options)
        self.lives, self.game_over = self.ale.lives(), False
        self._read_screen(self._newest)
        return self._observation(pooled=False, first=True), info

    def step(self, action: Any) -> tuple[Frames, float, bool, bool, dict[str, Any]]:
        """Repeat an action for `frame_skip` frames, or until the episode ends.

        Returns:
            The observation, the sum of the rewards, terminated, truncated, and the info of the last frame.
        """
        total, terminated, truncated = 0.0, False, False
        info: dict[str, Any] = {}
        # The last two frames are needed. Reading one takes time, so reading begins with the last but one.
        read_from = min(self.frame_skip, self._frames_left()) - 2
        self._previous, self._newest = self._newest, self._previous
        read, frame = -1, 0  # the frame in `_previous`: -1 is the last one of the step before
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
            if read_from <= frame < self.frame_skip - 1:
                self._read_screen(self._previous)
                read = frame
        self._read_screen(self._newest)
        pooled = self.frame_skip > 1 and read == frame - 1
        return self._observation(pooled, first=False), total, terminated, truncated, info

    def _read_screen(self, out: Frames) -> None:
        ale = self._game.ale
        (ale.getScreenGrayscale if self._gray else ale.getScreenRGB)(out)

    def _observation(self, pooled: bool, first: bool) -> Frames:
        out = self._stacks.next_slot()[0]
        if self._gray:
            self._kernel(self._newest, self._previous if pooled else None, out=out)
        else:
            self._kernel(np.maximum(self._newest, self._previous) if pooled else self._newest, out=out)
        _append(self._stacks, out[None], np.array([first]))
        return self._stacks.latest().reshape(self.observation_space.shape or ())

    def _frames_left(self) -> int:
        """Return how many frames there are until a time limit ends the episode, or `frame_skip` without limits."""
        ale = self._game.ale
        cap = ale.getInt("max_num_frames_per_episode")
        left = [cap - ale.getEpisodeFrameNumber()] if cap > 0 else []
        left += [limit._max_episode_steps - (limit._elapsed_steps or 0) for limit in self._limits]
        return min(left, default=self.frame_skip)


class AtariVectorFrames(_VectorWrapper):
    """Turns the native frames of many environments into stacks of 84x84, with one call of a kernel per step.

    Over environments that skip and pool frames by themselves, it returns what `SyncVectorEnv` of `AtariPreprocessing`
    returns. ALE's own vector environment has to be told to leave its frames as they are. (A few games have more rows:
    see `gymnasium.make(...).observation_space`.)

        env = gymnasium.make_vec(
            "ALE/Pong-v5", num_envs=8, vectorization_mode="vector_entry_point", img_height=210, img_width=160,
            stack_num=1, use_fire_reset=False, reward_clipping=False,
        )
        env = AtariVectorFrames(env, stack=4)

    ALE draws its no-ops from 0 to `noop_max - 1`, and returns an old frame where an episode ends inside a skip.

    All three autoreset modes work. With next-step autoreset, the first observation of an episode is its first frame
    with its padding. With same-step autoreset, the step that ends an episode returns the first observation of the next
    one, and `infos["final_obs"]` holds the last observation of the ended one. It is an array of objects or of uint8
    (zeros for environments whose episodes go on), as `env` returns it. With autoreset disabled,
    `reset(options={"reset_mask": mask})` starts episodes in some environments and leaves the stacks of the others.

    Args:
        env: a `gymnasium.vector.VectorEnv` of grayscale (H, W) or (1, H, W) uint8 frames. The kernels that crop take
            colours: (H, W, 3) or (1, H, W, 3).
        stack: how many successive observations are stacked, to shape (stack, 84, 84); None for (84, 84).
        padding: what stands before an episode's first observation in its stack: copies of it ("reset"), or "zero".
            Gymnasium's `FrameStackObservation` defaults to the former; ALE's own stack uses the latter.
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
        # AtariVectorEnv's instances share one `metadata`, which holds the latest instance's mode.
        mode = getattr(env.unwrapped, "autoreset_mode", None) or env.metadata.get("autoreset_mode")
        if not isinstance(mode, AutoresetMode):
            raise ValueError(f"env: expected an AutoresetMode in its metadata['autoreset_mode'], got {mode!r}")
        self._mode = mode
        self.metadata = {**env.metadata, "autoreset_mode": mode}
        shape, self._stacks = _stacks(env.num_envs, stack, padding)
        self._over = np.zeros(env.num_envs, np.bool_)
        self.single_observation_space = Box(0, 255, shape, np.uint8)
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    def reset(self, *, seed: Any = None, options: dict[str, Any] | None = None) -> tuple[Frames, dict[str, Any]]:
        """Start an episode in every environment, or in those of `options["reset_mask"]`.

        Returns:
            Observations of shape (num_envs, stack, 84, 84), and the environment's infos.
        """
        mask = None if options is None else options.get("reset_mask")  # SyncVectorEnv removes it from `options`
        frames, infos = self.env.reset(seed=seed, options=options)
        started = np.ones(self.num_envs, np.bool_) if mask is None else np.asarray(mask)
        _append(self._stacks, self._kernel_of(frames)[started], started[started], np.flatnonzero(started))
        self._over[started] = False
        return self._observations(), infos

    def step(self, actions: Any) -> tuple[Frames, NDArray[Any], NDArray[Any], NDArray[Any], dict[str, Any]]:
        """Take one step in every environment.

        Returns:
            Observations of shape (num_envs, stack, 84, 84), and all else as the environment returned it.
        """
        frames, rewards, terminated, truncated, infos = self.env.step(actions)
        over = np.logical_or(terminated, truncated)
        first = self._over if self._mode is AutoresetMode.NEXT_STEP else np.zeros_like(over)
        if self._mode is AutoresetMode.SAME_STEP and over.any():
            infos = {**infos, "final_obs": self._final_observations(infos["final_obs"], np.flatnonzero(over))}
            first = over
        _append(self._stacks, self._kernel_of(frames), first)
        self._over = over
        return self._observations(), rewards, terminated, truncated, infos

    def _kernel_of(self, frames: Any) -> Frames:
        small: Frames = self._kernel(np.asarray(frames).reshape(-1, *self._screen))
        return small

    def _observations(self) -> Frames:
        return self._stacks.latest().reshape(self.observation_space.shape or ())

    def _final_observations(self, frames: Any, env_indices: NDArray[np.int64]) -> NDArray[Any]:
        """Return the last observations of episodes, from their last frames, in the form of `frames`."""
        last = self._kernel_of(np.stack([frames[env_index] for env_index in env_indices]))
        _append(self._stacks, last, np.zeros(len(last), np.bool_), env_indices)
        observations = self._observations()
        if frames.dtype != object:
            found = np.zeros_like(observations)
            found[env_indices] = observations[env_indices]
            return found
        objects: NDArray[Any] = np.full(self.num_envs, None, object)
        for env_index in env_indices:
            objects[env_index] = observations[env_index]
        return objects


def _stacks(num_envs: int, stack: int | None, padding: str) -> tuple[tuple[int, ...], FrameReplay]:
    """Return the shape of one environment's observation, and a buffer of the newest frames that stacks them."""
    depth = 1 if stack is None else integer("stack", stack, 1)
    if padding not in ("reset", "zero"):
        raise ValueError(f"padding: expected 'reset' or 'zero', got {padding!r}")
    pad = "first" if padding == "reset" else "zero"
    stacks = FrameReplay((depth + 1) * num_envs, (SIZE, SIZE), stack=depth, num_envs=num_envs, padding=pad)
    return (SIZE, SIZE) if stack is None else (depth, SIZE, SIZE), stacks


def _append(
    stacks: FrameReplay, frames: Frames, first: NDArray[np.bool_], env_indices: NDArray[np.int64] | None = None
) -> None:
    """Append frames, (n, 84, 84), of all environments or of some; actions, rewards and ends do not matter to stacks."""
    zeros, no = np.zeros(len(frames), np.int64), np.zeros(len(frames), np.bool_)
    if env_indices is None:
        stacks.append(frames, zeros, zeros, no, no, first)
    else:
        stacks.append_to(env_indices, frames, zeros, zeros, no, no, first)


def _kernel(name: str) -> Any:
    if name not in KERNELS:
        raise ValueError(f"kernel: expected one of {', '.join(KERNELS)}, got {name!r}")
    return KERNELS[name]
