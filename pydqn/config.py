"""`Config`: everything that defines a run, in one frozen and validated dataclass.

The names of fields end with their units: `_frames` are emulator frames (in `replay_capacity_frames`, those that the
replay buffer holds), `_steps` are agent steps over all environments, and `_episodes` are episodes.
"""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from typing import Any

from pydqn._util.fields import checked, field, json_object

_EPSILONS = ("epsilon_start", "epsilon_end", "epsilon_final", "evaluation_epsilon")
_MAX_ATARI = 2**30  # ALE counts in 32 bits


@dataclass(frozen=True)
class Config:
    """The settings of one run. Every field is also an option of `pydqn train`.

    Raises:
        ValueError: a field has the wrong type or is out of range; the message names it.
    """

    # The environment and the end of the run
    agent: str = field(
        "dqn",
        "The agent learns with a network and a replay buffer (dqn), or with a table (tabular).",
        choices=("dqn", "tabular"),
    )
    env_id: str = field(
        "ALE/Pong-v5", "The environment is an Atari game (a ROM name or an ALE/ id) or any Gymnasium id."
    )
    env_kwargs: str = field(  # a dictionary becomes text
        "{}", "The environment is made with these arguments, a JSON object.", bound_to="environment", metavar="JSON"
    )
    num_envs: int = field(8, "This many environments step together.", least=1, most=2**16)
    seed: int = field(0, "All random numbers of the run are drawn from this seed.")
    total_steps: int = field(
        1_000_000, "The run ends after this many agent steps, counted over all environments.", least=1
    )
    total_episodes: int = field(0, "The run ends after this many episodes; 0 means no limit.")
    max_episode_steps: int = field(
        0, "An episode is truncated after this many steps; 0 keeps the environment's limit.", bound_to="environment"
    )
    stop_return: float = field(
        math.inf, "The run ends when the mean return reaches this value.", least=-math.inf, bound_to="environment"
    )
    mean_episodes: int = field(30, "The mean return is taken over this many recent episodes.", least=1)
    stop_evaluation_return: float = field(
        math.inf,
        "The run ends when the mean return of an evaluation reaches this value.",
        least=-math.inf,
        bound_to="environment",
    )
    stop_successes: int = field(
        0, "The run ends after this many successes in a row (see success_steps); 0 means never.", bound_to="environment"
    )
    success_steps: int = field(
        0,
        "If above 0, the reward is 1 at the end of an episode of at least this many steps (a success), and else 0.",
        bound_to="environment",
    )
    clip_rewards: bool | str = field(
        "auto", "The learner gets only the signs of rewards (auto: in Atari games).", kind=bool, bound_to="environment"
    )

    # Atari
    frame_skip: int = field(
        4, "An action is repeated for this many emulator frames per step.", least=1, most=_MAX_ATARI, bound_to="Atari"
    )
    frame_skip_max: int = field(
        0,
        "If above frame_skip, each step lasts a random number of frames, from frame_skip to this.",
        most=64,
        bound_to="Atari",
    )
    max_pool: bool = field(True, "A frame is the pixel-wise maximum of the last two emulator frames.", bound_to="Atari")
    sticky_actions: float = field(
        0.0, "The emulator repeats the previous action with this probability.", bound_to="Atari"
    )
    noop_max_frames: int = field(
        30, "An episode starts with a random number of no-ops, at most this many.", most=_MAX_ATARI, bound_to="Atari"
    )
    fire_reset: bool = field(
        False, "An episode starts with FIRE and then action 2, in games that have FIRE.", bound_to="Atari"
    )
    terminal_on_life_loss: bool = field(
        False, "The loss of a life is terminal for the learner, while the episode goes on.", bound_to="Atari"
    )
    full_action_space: bool = field(
        False, "The agent has all 18 actions of the console instead of those that the game uses.", bound_to="Atari"
    )
    max_episode_frames: int = field(
        108_000, "An episode is truncated after this many emulator frames.", least=1, most=_MAX_ATARI, bound_to="Atari"
    )
    preprocess: str = field(
        "resize_area",
        "Frames become 84x84: resize_area shrinks the whole screen, crop_nearest and crop_area show a part of it.",
        choices=("resize_area", "crop_nearest", "crop_area"),
        bound_to="Atari",
    )

    # Observations and the replay buffer
    stack: int = field(4, "An observation consists of this many successive frames.", least=1, most=2**16)
    padding: str = field(
        "zero",
        "Before the first frame of an episode, stacks hold zeros or copies of that frame.",
        choices=("zero", "first"),
    )
    image_channels: str = field(
        "auto",
        "Images with three axes have their channels here; auto takes the first axis if it is shorter than the last.",
        choices=("auto", "first", "last"),
        bound_to="environment",
    )
    input_scaling: str = field(
        "auto",
        "Images and bytes are scaled from the bounds of their space to 0..1 (auto), or not at all (none).",
        choices=("auto", "none"),
        bound_to="environment",
    )
    replay_capacity_frames: int = field(
        100_000, "The replay buffer holds this many frames over all environments.", least=1
    )
    skip_first_steps: int = field(
        0, "This many steps at the start of each episode are not stored.", bound_to="environment"
    )
    prioritized: bool = field(False, "Transitions are sampled in proportion to their TD errors (Schaul et al. 2016).")
    priority_alpha: float = field(0.6, "Priorities are raised to this power, from 0 (uniform sampling) to 1.")
    priority_beta: float = field(
        0.4, "Importance weights are raised to this power at the start; it becomes priority_beta_end at total_steps."
    )
    priority_beta_end: float = field(1.0, "Importance weights are raised to this power at the end.")
    priority_epsilon: float = field(1e-6, "This is added to the error that a priority is made of.")
    priority_uniform_share: float = field(
        0.0, "This share of prioritized sampling is uniform, so that no transition is forgotten."
    )
    priority_error: str = field(
        "auto",
        "A priority is made of the absolute TD error (for scalar values auto is that), of the loss (for others auto is "
        "that) or of its square root.",
        choices=("auto", "td_error", "loss", "root_loss"),
    )

    # The network
    network: str = field(
        "nature",
        "The network has this convolutional torso; mlp has none, auto chooses one that fits, and custom is your own.",
        choices=("auto", "nature", "nature_7x7", "small", "grid", "minatar", "impala", "mlp", "custom"),
    )
    impala_width: int = field(1, "The torso impala has 16, 32 and 32 channels times this.", least=1, most=2**8)
    impala_spectral: bool = field(
        False, "The weights of impala's residual convolutions are divided by their largest singular value."
    )
    impala_pooled: int = field(
        0, "The last map of impala is pooled to this height and width; 0 leaves it as it is.", most=2**8
    )
    hidden_units: tuple[int, ...] = field(
        (512,),
        "The fully connected hidden layers have these numbers of units; without numbers there are none.",
        least=1,
        most=2**16,
    )
    init_weights: str = field(
        "",
        "The network starts with the weights of this run, or of this .safetensors file; what does not fit starts anew.",
        metavar="RUN",
    )
    dueling: bool = field(False, "The network has separate streams for values and advantages (Wang et al. 2016).")
    noisy_sigma: float = field(
        0.0,
        "Fully connected layers have noise of this initial size, which explores; 0 means none (Fortunato et al. 2018).",
    )
    layer_norm: str = field(
        "none",
        "Activations are normalized per sample before each ReLU of the head, the torso or both (Ba et al. 2016).",
        choices=("none", "head", "torso", "both"),
    )
    shared_bias: bool = field(
        False, "The last layer has one bias for all actions (van Hasselt et al. 2016) and not one for each."
    )
    pixel_mean: float = field(
        0.0, "This is subtracted from pixels after they are scaled.", least=-math.inf, bound_to="environment"
    )
    pixel_std: float = field(1.0, "Pixels are divided by this after pixel_mean is subtracted.", bound_to="environment")

    # The loss
    gamma: float = field(0.99, "Rewards are discounted by this factor per step.")
    n_step: int = field(1, "A target sums the rewards of this many steps before it bootstraps.", least=1, most=2**16)
    double: bool = field(
        False, "The online network chooses the next action, the target network values it (van Hasselt et al. 2016)."
    )
    loss: str = field(
        "huber",
        "The loss of scalar values is this function of the TD error; huber's gradient is the clipped error.",
        choices=("huber", "mse"),
    )

    # The value representation
    value: str = field(
        "scalar",
        "An action's value is one number, or the mean of a distribution that is learned: categorical is C51, quantile "
        "is QR-DQN, implicit_quantile is IQN, hl_gauss classifies the scalar target.",
        choices=("scalar", "categorical", "hl_gauss", "quantile", "implicit_quantile"),
    )
    num_atoms: int = field(51, "A categorical value has this many atoms, an hl_gauss value bins.", least=2, most=2**12)
    value_min: float = field(
        -10.0,
        "The lowest return that a categorical or hl_gauss value can represent.",
        least=-math.inf,
        bound_to="environment",
    )
    value_max: float = field(
        10.0,
        "The highest return that a categorical or hl_gauss value can represent.",
        least=-math.inf,
        bound_to="environment",
    )
    hl_gauss_sigma: float = field(
        0.75, "An hl_gauss target is a normal distribution with this standard deviation, in widths of a bin."
    )
    num_quantiles: int = field(200, "A quantile value has this many quantiles.", least=2, most=2**12)
    num_taus: int = field(64, "An update draws this many levels of implicit quantiles to learn.", least=1, most=2**12)
    num_target_taus: int = field(
        64, "An update draws this many levels of implicit quantiles for the target.", least=1, most=2**12
    )
    num_action_taus: int = field(
        32,
        "Actions are chosen by the mean of this many implicit quantiles, at evenly spaced levels.",
        least=1,
        most=2**12,
    )
    num_cosines: int = field(64, "A level of implicit quantiles is embedded by this many cosines.", least=1, most=2**12)
    first_cosine: int = field(1, "The first of these cosines has this frequency, in half periods.", most=1)
    quantile_kappa: float = field(
        1.0, "The quantile Huber loss becomes linear at this error; with 0 it is linear everywhere."
    )

    # Munchausen
    munchausen: bool = field(
        False, "Rewards get a share of the log-policy, and targets a softmax for the maximum (Vieillard et al. 2020)."
    )
    munchausen_alpha: float = field(0.9, "This is the log-policy's share in the reward.")
    munchausen_temperature: float = field(0.03, "The policy is the softmax of action values divided by this.")
    munchausen_least: float = field(
        -1.0, "The temperature times the log-policy is raised to this value if it is below.", least=-math.inf
    )
    munchausen_policy: str = field(
        "target", "The log-policy in the reward is this network's.", choices=("target", "online")
    )

    # The optimizer
    optimizer: str = field(
        "adam",
        "The optimizer is Adam, AdamW (with weight_decay), or RMSProp as in PyTorch, in TensorFlow or in Mnih et al. "
        "2015 (centered).",
        choices=("adam", "adamw", "rmsprop", "rmsprop_tf", "rmsprop_centered"),
    )
    learning_rate: float = field(1e-4, "The optimizer starts with this learning rate.")
    learning_rate_end: float = field(
        0.0, "The learning rate falls linearly to this value over learning_rate_decay_steps."
    )
    learning_rate_decay_steps: int = field(0, "The learning rate falls over this many steps; 0 keeps it constant.")
    optimizer_epsilon: float = field(1.5e-4, "The optimizer adds this to its denominator.")
    weight_decay: float = field(
        0.0, "An update of AdamW first shrinks all parameters by this share of the learning rate."
    )
    rmsprop_decay: float = field(0.95, "RMSProp averages squared gradients with this decay.")
    rmsprop_momentum: float = field(0.0, "RMSProp has this momentum.")
    max_grad_norm: float = field(10.0, "Gradients are scaled down to at most this norm; 0 leaves them as they are.")

    # The training loop
    batch_size: int = field(32, "An update learns from this many transitions.", least=1)
    learning_starts_steps: int = field(
        5_000, "The first update comes after this many steps, and not before the buffer holds a batch.", least=1
    )
    train_period_steps: float = field(
        4.0, "There is one update per this many steps; the replay ratio is batch_size / train_period_steps."
    )
    updates_in_a_row: int = field(
        1,
        "As soon as this many updates are due, they are made one after the other; until then the policy stays.",
        least=1,
    )
    target_update_period: int = field(
        500, "The online network is copied to the target network once per this many updates; 0 means never."
    )
    target_update_rate: float = field(
        1.0, "An update of the target network moves it this share of the way to the online network; 1 is a copy."
    )
    target_update_period_episodes: int = field(
        0, "The online network is copied to the target network once per this many episodes; 0 means never."
    )
    epsilon_schedule: str = field(
        "linear",
        "Epsilon falls along one line, along two (piecewise), or as end + (start - end) exp(-t / decay).",
        choices=("linear", "piecewise", "exponential"),
    )
    epsilon_hold_steps: int = field(0, "Epsilon begins to fall after this many steps.")
    epsilon_start: float = field(1.0, "Epsilon, the probability of a random action, starts with this value.")
    epsilon_end: float = field(0.01, "Epsilon falls to this value by the end of its decay.")
    epsilon_decay_steps: int = field(
        60_000, "Epsilon falls over this many steps; exponentially, 1/e of the way is left after them.", least=1
    )
    epsilon_final: float = field(0.01, "Epsilon reaches this value at total_steps in the piecewise schedule.")
    epsilon_off_steps: int = field(0, "Epsilon is 0 from this step on; 0 means that it stays on.")
    epsilon_ladder: float = field(
        0.0,
        "Environment i of N has epsilon to the power of 1 + this i / (N - 1), so that each explores in its own way (7 "
        "in Horgan et al. 2018); with 0 all have epsilon.",
    )
    boltzmann_temperature: float = field(
        0.0, "Actions are drawn with probabilities in proportion to exp(value / this); with 0 the best one is taken."
    )
    evaluation_every_steps: int = field(0, "There is one evaluation per this many steps; 0 means none while training.")
    evaluation_episodes: int = field(10, "An evaluation plays this many episodes.", least=1)
    evaluation_epsilon: float = field(0.001, "An action is random with this probability in evaluations.")
    evaluation_noise: bool = field(
        False, "In evaluations, noisy layers (see noisy_sigma) have their noise, and not only their means."
    )
    evaluation_max_episode_steps: int = field(
        100_000, "An evaluation truncates an episode without another limit after this many steps; 0 means never."
    )
    evaluation_protocol: str = field(
        "own",
        "Evaluations use the run's own settings or published ones.",
        choices=("own", "nature", "machado2018"),
        bound_to="Atari",
    )
    log_every_steps: int = field(5_000, "There is one row of progress.csv per this many steps.", least=1)
    log_every_episodes: int = field(
        0, "There is one more row of progress.csv, also printed, per this many episodes; 0 means none."
    )
    checkpoint_every_steps: int = field(50_000, "There is one checkpoint per this many steps; 0 means none.")
    checkpoint_every_episodes: int = field(0, "There is one more checkpoint per this many episodes; 0 means none.")
    checkpoint_replay: bool = field(
        True,
        "Checkpoints hold the replay buffer, and episodes start anew there: a resumed run is the uninterrupted one.",
    )
    video_every_episodes: int = field(0, "One episode in this many is recorded as a video; 0 means none.")
    video_format: str = field("mp4", "Videos have this format.", choices=("mp4", "gif", "html"))

    # The machine
    device: str = field("auto", "PyTorch computes on this device: auto, cpu, cuda or cuda:N.")
    precision: str = field(
        "auto",
        "The network computes in this precision; auto is float32 (on a GPU, matrix products of updates may round to "
        "TensorFloat-32), but bfloat16 for pydqn's own networks of pixels on processors with instructions for it.",
        choices=("auto", "float32", "bfloat16"),
    )
    update: str = field(
        "auto",
        "Updates and action values are computed in this form: plain is PyTorch's own, fused has fewer kernels. On a "
        "GPU, auto tries all when they are first needed, and keeps the fastest that agrees with plain; on a CPU it is "
        "plain.",
        choices=("auto", "plain", "fused"),
    )
    storage: str = field(
        "auto",
        "Frames are kept on the host or on the device; auto keeps them on a GPU if they fit.",
        choices=("auto", "host", "device"),
    )
    torch_threads: int = field(
        0, "PyTorch has this many threads on the CPU; 0 chooses at most 4, by network and cores.", most=2**10
    )
    emulator_threads: int = field(
        0, "The emulators have this many threads; 0 means one per available core.", most=2**10
    )
    env_workers: int | str = field(
        "auto",
        "Gymnasium environments step in this many processes; 0 means in this one, auto measures whether that pays.",
        most=2**10,
        kind=int,
    )
    restart_envs: bool = field(
        False, "Gymnasium environments step in processes, and one that fails is replaced; its episodes are lost."
    )

    def __post_init__(self) -> None:
        object.__setattr__(self, "env_kwargs", json_object("env_kwargs", self.env_kwargs))
        for each in dataclasses.fields(self):
            object.__setattr__(self, each.name, checked(each, getattr(self, each.name)))
        shares = (
            *(
                "sticky_actions",
                "gamma",
                "rmsprop_decay",
                "priority_alpha",
                "priority_beta",
                "priority_beta_end",
                "munchausen_alpha",
                "priority_uniform_share",
                "target_update_rate",
            ),
        )
        for name in (*shares, *_EPSILONS):
            if getattr(self, name) > 1:
                raise ValueError(f"{name}: expected a number from 0 to 1, got {getattr(self, name)!r}")
        positive = ("learning_rate", "train_period_steps", "pixel_std", "priority_epsilon")
        for name in (*positive, "hl_gauss_sigma", "munchausen_temperature"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"{name}: expected a positive number, got {getattr(self, name)!r}")
        if ":" in self.env_id:  # Gymnasium would import the module before the colon: a config must not run code
            module, _, name = self.env_id.partition(":")
            raise ValueError(
                f"env_id: expected an id without ':', got {self.env_id!r}: a config imports nothing. In Python, "
                f"import {module} and call pydqn.train(pydqn.preset(..., env_id={name!r}), logdir)"
            )
        if not -math.inf < self.value_min < self.value_max < math.inf:
            raise ValueError(
                f"value_max: expected a finite number above value_min = {self.value_min:g}, got {self.value_max:g}"
            )
        if self.weight_decay and self.optimizer != "adamw":
            raise ValueError(
                f"weight_decay: expected 0 with optimizer = {self.optimizer!r}, which is not adamw, "
                f"got {self.weight_decay:g}"
            )
        if not self.weight_decay * self.learning_rate < 1:
            raise ValueError(
                f"weight_decay: expected less than 1 / learning_rate = {1 / self.learning_rate:g}, which would leave "
                f"nothing of the parameters, got {self.weight_decay:g}"
            )
        if self.munchausen_least > 0:
            raise ValueError(f"munchausen_least: expected at most 0, got {self.munchausen_least:g}")
        if self.munchausen and (self.double or self.value == "categorical"):
            given = "double" if self.double else "value = 'categorical'"
            why = "takes no maximum" if self.double else "is not defined for masses at atoms (hl_gauss is possible)"
            raise ValueError(f"munchausen: expected False with {given}, got True: it {why}")
        if self.agent == "tabular" and self.value != "scalar":
            raise ValueError(f"value: expected scalar for an agent with a table, got {self.value!r}")
        if self.stop_successes and not self.success_steps:
            raise ValueError(
                f"stop_successes: expected 0 without success_steps, which defines a success, got {self.stop_successes}"
            )
        if 0 < self.frame_skip_max < self.frame_skip:
            raise ValueError(
                f"frame_skip_max: expected 0 or at least frame_skip = {self.frame_skip}, got {self.frame_skip_max}"
            )
        # Without room for one whole transition of every environment, nothing could ever be sampled.
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
        """Return all fields in the form that JSON can hold: infinity is a string."""
        plain = dataclasses.asdict(self)
        return {name: "inf" if value == math.inf else value for name, value in plain.items()}

    @classmethod
    def from_dict(cls, plain: dict[str, Any]) -> Config:
        """Build a Config from the result of `to_dict`. Fields may have their old names (see `RENAMED`).

        Raises:
            ValueError: a field is unknown or given twice, or its value is not valid.
        """
        known = {field.name for field in dataclasses.fields(cls)}
        fields: dict[str, Any] = {}
        for given, value in plain.items():
            name = RENAMED.get(given, given)
            if name not in known:
                raise ValueError(f"config: unknown field {given!r}")
            if name in fields:
                raise ValueError(f"config: {name!r} is given twice, also by its old name")
            fields[name] = math.inf if value == "inf" else value
        return cls(**fields)


# Old names of fields, which `Config.from_dict` still reads.
RENAMED = {
    "full_action_set": "full_action_space",
    "life_loss": "terminal_on_life_loss",
    "steps_per_update": "train_period_steps",
    "target_sync_episodes": "target_update_period_episodes",
    "target_sync_updates": "target_update_period",
}

# The fields that decide what transitions are. A run with other values must not go on with stored transitions. (The
# settings of the replay buffer itself, such as gamma, are compared when it is loaded.)
TRANSITIONS = (
    *("env_id", "env_kwargs", "clip_rewards", "success_steps", "terminal_on_life_loss", "full_action_space"),
    *("input_scaling", "preprocess", "max_pool", "frame_skip", "frame_skip_max", "sticky_actions"),
)
