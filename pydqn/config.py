"""`Config`: everything that defines a run, in one frozen and validated dataclass.

Field names carry their units: `_frames` are emulator frames, `_steps` are agent steps over all environments, `_updates`
are gradient steps, `_episodes` whole games.
"""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from typing import Any, TypeVar, cast

T = TypeVar("T")


_EPSILONS = ("epsilon_start", "epsilon_end", "epsilon_final", "evaluation_epsilon")
_MOST = 2**53  # beyond it, JSON readers and floats lose count
_MOST_ATARI = 2**30  # ALE counts in 32 bits


def _field(
    default: T,
    help: str,
    *,
    choices: tuple[str, ...] = (),
    least: float = -math.inf,
    most: int = _MOST,
    kind: type | None = None,
    bound_to: str = "",
) -> T:
    """Declare a field with its help text and the values that it may take (`most` binds integers).

    Its type is that of the default, or `kind` where the default is "auto". A value that is `bound_to` its
    "environment", or to "Atari" games, does not follow to another one: see `pydqn.presets.preset`.
    """
    limits = {"help": help, "choices": choices, "least": least, "most": most}
    metadata = {**limits, "kind": kind or type(default), "bound_to": bound_to}
    value: Any = dataclasses.field(default=default, metadata=metadata)
    return cast(T, value)


@dataclass(frozen=True)
class Config:
    """The settings of one run. Every field is also an option of `pydqn train`.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names it.
    """

    # The task
    agent: str = _field("dqn", "a network and a replay buffer, or a table", choices=("dqn", "tabular"))
    env_id: str = _field("ALE/Pong-v5", "an Atari game (a ROM name or an ALE/ id) or any Gymnasium id")
    num_envs: int = _field(8, "environments that step together (environments)", least=1, most=2**16)
    seed: int = _field(0, "seed of everything random in the run", least=0)
    total_steps: int = _field(1_000_000, "agent steps, over all environments, after which the run ends", least=1)
    total_episodes: int = _field(0, "whole games after which the run ends; 0 for no limit", least=0)
    max_episode_steps: int = _field(
        0,
        "a game is truncated after so many steps; 0 for the task's own limit, if any",
        least=0,
        bound_to="environment",
    )
    stop_return: float = _field(math.inf, "end the run when the mean return reaches this", bound_to="environment")
    mean_episodes: int = _field(30, "episodes in the reported mean return", least=1)
    stop_evaluation_return: float = _field(
        math.inf, "end the run when an evaluation's mean return reaches this", bound_to="environment"
    )
    stop_successes: int = _field(
        0, "end the run after so many successes in a row; 0 for never", least=0, bound_to="environment"
    )
    success_steps: int = _field(
        0,
        "replace rewards: 1 at the end of a game of so many steps (a success), else 0; 0 leaves them",
        least=0,
        bound_to="environment",
    )
    clip_rewards: bool | str = _field(
        "auto", "the learner sees only the sign of a reward (auto: in Atari games)", kind=bool, bound_to="environment"
    )

    # Atari
    frame_skip: int = _field(4, "emulator frames per step", least=1, most=_MOST_ATARI, bound_to="Atari")
    frame_skip_max: int = _field(
        0,
        "if above frame_skip, each step lasts a random number of frames up to this",
        least=0,
        most=64,
        bound_to="Atari",
    )
    max_pool: bool = _field(True, "a frame is the pixel-wise maximum of the last two", bound_to="Atari")
    sticky_actions: float = _field(
        0.0, "probability that the emulator repeats the previous action", least=0, bound_to="Atari"
    )
    noop_max_frames: int = _field(
        30, "up to this many no-ops at the start of a game", least=0, most=_MOST_ATARI, bound_to="Atari"
    )
    fire_reset: bool = _field(False, "FIRE, then action 2 open a game, where the game has FIRE", bound_to="Atari")
    terminal_on_life_loss: bool = _field(
        False, "a lost life is terminal for the learner (the game goes on)", bound_to="Atari"
    )
    full_action_space: bool = _field(False, "all 18 actions instead of the game's own", bound_to="Atari")
    max_episode_frames: int = _field(
        108_000, "a game is truncated after this many frames", least=1, most=_MOST_ATARI, bound_to="Atari"
    )
    preprocess: str = _field(
        "resize_area", "how frames become 84x84", choices=("resize_area", "crop_nearest", "crop_area"), bound_to="Atari"
    )

    # Observations and the replay buffer
    stack: int = _field(4, "successive frames in an observation", least=1, most=2**16)
    padding: str = _field("zero", "what stands before an episode's first frame", choices=("zero", "first"))
    replay_capacity_frames: int = _field(100_000, "frames held by the replay buffer, over all environments", least=1)
    skip_first_steps: int = _field(
        0, "steps at the start of an episode that are not stored", least=0, bound_to="environment"
    )
    prioritized: bool = _field(False, "transitions are drawn by their TD errors (proportional, Schaul et al. 2016)")
    priority_alpha: float = _field(0.6, "how much priorities count: 0 (uniform) to 1", least=0)
    priority_beta: float = _field(
        0.4, "how much importance weights undo that, at the start; rises to 1 at total_steps", least=0
    )
    priority_epsilon: float = _field(1e-6, "added to the size of a TD error for its priority")

    # The network
    network: str = _field(
        "nature", "convolutional torso (or none: mlp)", choices=("nature", "nature_7x7", "small", "mlp")
    )
    hidden_units: tuple[int, ...] = _field(
        (512,), "units of the fully connected hidden layers, if any", least=1, most=2**16
    )
    dueling: bool = _field(False, "separate value and advantage streams (Wang et al. 2016)")
    pixel_mean: float = _field(0.0, "subtracted from pixels after they are scaled", bound_to="environment")
    pixel_std: float = _field(1.0, "what pixels are divided by after that", least=0, bound_to="environment")

    # The loss
    gamma: float = _field(0.99, "discount per step", least=0)
    n_step: int = _field(1, "steps in a return", least=1, most=2**16)
    double: bool = _field(False, "the online network chooses, the target network values (van Hasselt et al. 2016)")
    loss: str = _field("huber", "of the TD error (huber: its gradient is the clipped error)", choices=("huber", "mse"))

    # The optimizer
    optimizer: str = _field(
        "adam",
        "Adam, or RMSProp as PyTorch, TensorFlow or Mnih et al. 2015 (centered) define it",
        choices=("adam", "rmsprop", "rmsprop_tf", "rmsprop_centered"),
    )
    learning_rate: float = _field(1e-4, "step size of the optimizer", least=0)
    learning_rate_end: float = _field(0.0, "the same at the end of its linear decay", least=0)
    learning_rate_decay_steps: int = _field(0, "steps over which it falls; 0 for a constant rate", least=0)
    optimizer_epsilon: float = _field(1.5e-4, "added to the denominator of the optimizer", least=0)
    rmsprop_decay: float = _field(0.95, "of the squared gradient's running mean (RMSProp)", least=0)
    rmsprop_momentum: float = _field(0.0, "of RMSProp", least=0)
    max_grad_norm: float = _field(10.0, "gradients are scaled down to this norm; 0 leaves them", least=0)

    # The loop
    batch_size: int = _field(32, "transitions per update", least=1)
    learning_starts_steps: int = _field(
        5_000, "steps before the first update (and not before a batch is stored)", least=1
    )
    train_period_steps: float = _field(4.0, "steps per update (replay ratio = batch_size / train_period_steps)")
    target_update_period: int = _field(
        500, "updates between copies of the online network to the target; 0 for none", least=0
    )
    target_update_period_episodes: int = _field(0, "whole games between such copies; 0 for none", least=0)
    epsilon_schedule: str = _field(
        "linear",
        "a line, two lines (the second to epsilon_final at total_steps), or end + (start - end) exp(-t / decay)",
        choices=("linear", "piecewise", "exponential"),
    )
    epsilon_hold_steps: int = _field(0, "steps before epsilon begins to fall", least=0)
    epsilon_start: float = _field(1.0, "probability of a random action at the start", least=0)
    epsilon_end: float = _field(0.01, "the same at the end of its decay", least=0)
    epsilon_decay_steps: int = _field(60_000, "steps over which epsilon falls (exponential: by 1/e)", least=1)
    epsilon_final: float = _field(0.01, "piecewise: the same at total_steps", least=0)
    evaluation_every_steps: int = _field(0, "steps between evaluations; 0 for none while training", least=0)
    evaluation_episodes: int = _field(10, "whole games per evaluation", least=1)
    evaluation_epsilon: float = _field(0.001, "probability of a random action in evaluation", least=0)
    evaluation_max_episode_steps: int = _field(
        100_000,
        "evaluation cuts a game after so many steps where nothing else limits it (with a warning); 0 for never",
        least=0,
    )
    evaluation_protocol: str = _field(
        "own",
        "published settings that replace the run's own in evaluation",
        choices=("own", "nature", "machado2018"),
        bound_to="Atari",
    )
    log_every_steps: int = _field(5_000, "steps between rows of progress.csv", least=1)
    log_every_episodes: int = _field(0, "whole games between further rows, printed as lines; 0 for none", least=0)
    checkpoint_every_steps: int = _field(50_000, "steps between checkpoints; 0 for none", least=0)
    checkpoint_every_episodes: int = _field(0, "whole games between further checkpoints; 0 for none", least=0)
    checkpoint_replay: bool = _field(
        True, "checkpoints hold the replay buffer, too; games begin anew there, for a resumed run to be the same"
    )
    video_every_episodes: int = _field(0, "whole games between recorded ones; 0 for no videos", least=0)
    video_format: str = _field("mp4", "of recorded games", choices=("mp4", "gif", "html"))

    # The machine
    device: str = _field("auto", "auto, cpu, cuda or cuda:N")
    precision: str = _field(
        "auto", "of the network's arithmetic; weights stay float32", choices=("auto", "float32", "bfloat16")
    )
    storage: str = _field(
        "auto", "where frames are kept (auto: on a GPU if they fit)", choices=("auto", "host", "device")
    )
    torch_threads: int = _field(
        0,
        "threads of PyTorch on the CPU; 0 for as many as suit the network and the cores (4 at most)",
        least=0,
        most=2**10,
    )
    emulator_threads: int = _field(
        0, "threads of the emulators; 0 for one per core that may be used", least=0, most=2**10
    )

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            object.__setattr__(self, field.name, _checked(field, getattr(self, field.name)))
        for name in ("sticky_actions", "gamma", "rmsprop_decay", "priority_alpha", "priority_beta", *_EPSILONS):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)!r}")
        for name in ("learning_rate", "train_period_steps", "pixel_std", "priority_epsilon"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if ":" in self.env_id:  # Gymnasium would import what stands before it: a config must not run code
            module, _, name = self.env_id.partition(":")
            raise ValueError(
                f"env_id: expected an id without ':', got {self.env_id!r}: an id imports nothing. In Python, "
                f"import {module} and call pydqn.train(pydqn.preset(..., env_id={name!r}), logdir)"
            )
        if self.stop_successes and not self.success_steps:
            raise ValueError(
                f"stop_successes: expected 0 without success_steps, which says what a success is, "
                f"got {self.stop_successes}"
            )
        if 0 < self.frame_skip_max < self.frame_skip:
            raise ValueError(
                f"frame_skip_max: expected 0 or at least frame_skip = {self.frame_skip}, got {self.frame_skip_max}"
            )
        # Every environment needs room for one whole transition, or nothing could ever be sampled.
        least = self.num_envs * (self.stack + self.n_step)
        if self.replay_capacity_frames < least:
            raise ValueError(
                f"replay_capacity_frames: expected at least num_envs * (stack + n_step) = {least}, "
                f"got {self.replay_capacity_frames}"
            )
        if self.replay_capacity_frames < self.batch_size:
            raise ValueError(
                f"replay_capacity_frames: expected at least batch_size = {self.batch_size}, "
                f"got {self.replay_capacity_frames}"
            )

    def to_dict(self) -> dict[str, Any]:
        """Return all fields as JSON can hold them (infinity as a string)."""
        plain = dataclasses.asdict(self)
        return {name: "inf" if value == math.inf else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Config:
        """Build a Config from what `to_dict` gave.

        Raises:
            ValueError: an unknown field, or a value that does not fit one.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        unknown = sorted(set(plain) - known)
        if unknown:
            raise ValueError(f"config: unknown field {unknown[0]!r}")
        fields: dict[str, Any] = {name: math.inf if value == "inf" else value for name, value in plain.items()}
        return cls(**fields)


def _checked(field: dataclasses.Field[Any], value: Any) -> Any:
    """Return `value` as the field's own type, or raise a ValueError that names the field."""
    kind: Any = field.metadata["kind"]
    if value == field.default == "auto":
        return value
    least, choices = field.metadata["least"], field.metadata["choices"]
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if kind is float and number and (abs(value) <= sys.float_info.max or abs(value) == math.inf):
        value = float(value)
    elif kind is int and isinstance(value, float) and value.is_integer():
        value = int(value)
    elif kind is tuple and isinstance(value, list):
        value = tuple(value)
    if type(value) is not kind:
        raise ValueError(f"{field.name}: expected {_KINDS[kind]}, got {value!r}")
    if choices and value not in choices:
        raise ValueError(f"{field.name}: expected one of {', '.join(choices)}, got {value!r}")
    parts = value if kind is tuple else (value,)
    if kind is tuple and not all(type(part) is int for part in parts):
        raise ValueError(f"{field.name}: expected {_KINDS[kind]}, got {value!r}")
    if kind in (int, float, tuple) and not all(part >= least for part in parts):  # also catches NaN
        raise ValueError(f"{field.name}: expected at least {least:g}, got {value!r}")
    if kind in (int, tuple) and any(part > field.metadata["most"] for part in parts):
        raise ValueError(f"{field.name}: expected at most {field.metadata['most']}, got {value!r}")
    return value


# Where each part begins, for help pages.
SECTIONS = {
    "agent": "the task",
    "frame_skip": "Atari only",
    "stack": "observations and the replay buffer",
    "network": "the network",
    "gamma": "the loss",
    "optimizer": "the optimizer",
    "batch_size": "the loop",
    "evaluation_every_steps": "evaluation",
    "log_every_steps": "what a run leaves",
    "device": "the machine",
}

# What the transitions in a replay buffer depend on: under another value they are of another task, or seen or counted in
# another way. (What a replay buffer is made with, such as gamma, is among its own settings, which are compared anyway.)
TRANSITIONS = (
    *(
        "env_id",
        "clip_rewards",
        "success_steps",
        "terminal_on_life_loss",
        "full_action_space",
        "preprocess",
        "max_pool",
    ),
    *("frame_skip", "frame_skip_max", "sticky_actions"),
)

_KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a string", tuple: "positive integers"}
