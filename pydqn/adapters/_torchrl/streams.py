"""Batches of steps of several environments, in any order, for a `TransitionReplay`; with their other entries."""

from __future__ import annotations

import json
import math
import re
import shutil
import warnings
from collections.abc import Mapping
from contextlib import suppress
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pydqn._util.checks import dtype_name, integer
from pydqn._util.files import Checksum, Damaged, read_index, verify_checksum, write_index
from pydqn._util.weights import load_weights, save_weights
from pydqn.replay.saving import saved_settings
from pydqn.replay.transitions import TransitionReplay

if TYPE_CHECKING:
    import torch

_MANIFEST, _KIND, _SLOTS = "streams.json", "pydqn-streams", "slots"
_SAVED = re.compile(r"\.?(?:replay-(\d+)|columns-(\d+)\.safetensors(?:\.part)?)")
_MOST = 1 << 62
_MOST_ABANDONED = 1000  # episodes that are remembered in case that they continue


class EpisodeStreams:
    """Feeds a `TransitionReplay` with rows, each of which is one step of one of several environments, in any order.

    Successive rows of one episode go to the environment whose last observation they continue, or else to an environment
    whose episode has ended. So batches may hold the environments one after another, step by step, or one at a time, and
    episodes continue from one batch to the next. Where that cannot be seen, rows are still stored correctly, but some
    frames are stored twice, and n-step windows end where the episode was interrupted. Environments with equal
    observations can only be told apart by ids.

    Args:
        transitions: stores observations, rewards and ends.

    Attributes:
        columns: the other entries of the transitions, by name: tensors with one row, called slot, per transition. They
            are made for the entries of the first batch.
    """

    columns: dict[tuple[str, ...], torch.Tensor]

    def __init__(self, transitions: TransitionReplay) -> None:
        num_envs, replay = transitions.num_envs, transitions.frame_replay
        self.transitions = transitions
        self.columns = {}
        # The newest n_step - 1 transitions of an environment cannot be sampled yet, but their entries are needed.
        self._slots_per_env = transitions.max_transitions // num_envs + replay.n_step - 1
        self._counts = np.zeros(num_envs, np.int64)  # transitions that each environment has got
        self._slot_of = np.zeros(0, np.int64)  # slots by index, modulo the replay buffer's capacity
        self._last_obs = np.zeros((num_envs, *transitions.obs_shape), replay.dtype)
        self._running = np.zeros(num_envs, bool)  # the environment's episode has not ended
        self._id: list[Any] = [None] * num_envs
        self._last_used = np.zeros(num_envs, np.int64)  # the larger, the later
        self._abandoned: dict[Any, None] = {}
        self._warned: set[str] = set()

    def extend(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        reward: NDArray[Any],
        terminated: NDArray[np.bool_],
        done: NDArray[np.bool_],
        starts: NDArray[np.bool_],
        ids: NDArray[Any] | None,
        others: Mapping[tuple[str, ...], torch.Tensor],
    ) -> NDArray[np.int64]:
        """Store n rows.

        Args:
            obs: (n, *obs_shape).
            next_obs: (n, *obs_shape).
            reward: (n,) finite real numbers.
            terminated: (n,) bool: no value lies beyond `next_obs`.
            done: (n,) bool: the episode is over there.
            starts: (n,) bool: see `episode_starts`.
            ids: (n,) of the episodes or of the environments; None where they have none.
            others: (n, ...): the other entries, with the same names each time.

        Returns:
            (n,) int64: the transitions' indices.

        Raises:
            ValueError: a row does not fit (see `TransitionReplay.append`). Rows of earlier steps are stored then.
        """
        if not self.columns:
            most = len(self._counts) * self._slots_per_env
            self.columns = {name: _zeros((most, *other.shape[1:]), other.dtype) for name, other in others.items()}
        env_index = self._assign(obs, next_obs, done, starts, ids)
        count = np.bincount(env_index, minlength=len(self._counts))
        step = np.empty_like(env_index)  # of each row within its environment, from 0 on
        step[np.argsort(env_index, kind="stable")] = np.arange(len(env_index)) - np.repeat(
            np.cumsum(count) - count, count
        )
        slot = env_index * self._slots_per_env + (self._counts[env_index] + step) % self._slots_per_env
        order = np.lexsort((env_index, step))  # one step of every environment at a time
        cut, nothing = done & ~terminated, np.zeros(len(env_index), np.int64)
        index, stored = nothing.copy(), 0
        try:
            for rows in np.split(order, np.flatnonzero(np.diff(step[order])) + 1):
                some: Any = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
                env_indices = None if len(rows) == len(self._counts) else env_index[some]
                index[some] = self.transitions.append(
                    obs[some], next_obs[some], nothing[some], reward[some], terminated[some], cut[some], env_indices
                )
                stored += len(rows)
        finally:  # even if a row was refused, the rows before it need their other entries
            rows = np.sort(order[:stored])
            count = np.bincount(env_index[rows], minlength=len(self._counts))
            rows = rows[step[rows] + self._slots_per_env >= count[env_index[rows]]]  # later rows overwrite the others
            if not len(self._slot_of):  # the capacity is known once the first row has shown what a frame is
                self._slot_of = np.zeros(self.transitions.frame_replay.capacity, np.int64)
            self._slot_of[index[rows] % len(self._slot_of)] = slot[rows]
            for name, column in self.columns.items():
                column[slot[rows]] = others[name] if len(rows) == len(env_index) else others[name][rows]
            self._counts += count
        self._warn_if_idle()
        return index

    @property
    def stored(self) -> int:
        """How many rows have been stored, those that were overwritten included."""
        return int(self._counts.sum())

    @property
    def nbytes(self) -> int:
        """Bytes held when full."""
        return (
            self.transitions.nbytes + self._slot_of.nbytes + sum(int(column.nbytes) for column in self.columns.values())
        )

    def slots_at(self, index: NDArray[np.int64], steps: int | NDArray[np.int64] = 0) -> NDArray[np.int64]:
        """Return the slots of held transitions, or of those that came `steps` later in the same environment, (B,)."""
        slots: NDArray[np.int64] = self._slot_of[(index + steps * len(self._counts)) % len(self._slot_of)]
        return slots

    def save(self, path: Path, notes: dict[str, Any]) -> None:
        """Write everything to a folder, without pickle, together with notes of the caller's, which JSON can hold.

        Saving there again writes only new frames. The manifest, which names the other files, is replaced last, so that
        the earlier save stays valid until the new one is complete.
        """
        import torch

        path = path.absolute()
        path.mkdir(parents=True, exist_ok=True)
        transitions, replay = self.transitions, self.transitions.frame_replay
        columns = {json.dumps(name): column for name, column in self.columns.items()}
        columns[_SLOTS] = torch.from_numpy(self._slot_of)
        made = {"shape": transitions.obs_shape, "dtype": replay.dtype.name, "num_envs": replay.num_envs}
        made |= {"stack": replay.stack, "padding": replay.padding}
        state = {"time_steps": replay.env_time_steps, "counts": self._counts.tolist(), "notes": notes}
        number = 1 + max((each for each, _ in _saved(path)), default=0)
        try:
            transitions.save(path / f"replay-{number}")
            checksum = save_weights(path / f"columns-{number}.safetensors", columns, {**made, **state})
            write_index(path / _MANIFEST, _KIND, {"number": number, "columns": checksum})
        finally:
            _sweep(path)

    @classmethod
    def load(cls, path: Path, max_transitions: int, **settings: Any) -> tuple[EpisodeStreams, dict[str, Any]]:
        """Read what `save` wrote; return it with the notes.

        Episodes that had not ended end there, as environments are not saved. The exponents alpha and beta are those
        that were saved.

        Args:
            path: the folder.
            max_transitions: as of the `TransitionReplay` that was saved.
            settings: all its other arguments, except shape and dtype.

        Raises:
            ValueError: the folder is damaged, or was saved with other arguments.
            MemoryError: there is too little memory for it.
        """
        number, checksum = _manifest(path)
        file, folder = path / f"columns-{number}.safetensors", path / f"replay-{number}"
        verify_checksum(file, checksum)
        columns, state = load_weights(file)
        header = saved_settings(folder)
        try:
            made = _made(state, header)
            notes, time_steps = state["notes"], state["time_steps"]
            counts = [integer("counts", count, 0, _MOST) for count in state["counts"]]
        except (KeyError, TypeError, ValueError) as error:
            raise Damaged(f"{file}: what it says does not fit {folder.name} ({error})") from None
        settings = {"num_envs": made["num_envs"], **settings, "padding": made["padding"]}
        settings["stack"] = settings.get("stack") or made["stack"]
        try:
            streams = cls(TransitionReplay(max_transitions, made["shape"], made["dtype"], **settings))
            streams.transitions.restore(folder)
        except MemoryError as error:
            raise MemoryError(f"{path}: {error}") from None
        except TypeError as error:  # this machine does not have the dtype
            raise Damaged(f"{file}: {error}") from None
        if streams.transitions.frame_replay.env_time_steps != time_steps:
            raise Damaged(f"{path}: {folder.name} and {file.name} were not saved together")
        streams._restore(file, columns, counts)
        return streams, notes

    def _restore(self, file: Path, columns: dict[str, torch.Tensor], counts: list[int]) -> None:
        """Take over the other entries of the transitions."""
        import torch

        most, slots = len(self._counts) * self._slots_per_env, columns.pop(_SLOTS, torch.zeros(0))
        try:
            if len(counts) != len(self._counts):
                raise ValueError(f"counts: expected {len(self._counts)}, got {len(counts)}")
            if slots.dtype != torch.int64 or slots.shape != (self.transitions.frame_replay.capacity,):
                raise ValueError(f"{_SLOTS}: got {slots.dtype} of shape {tuple(slots.shape)}")
            if not ((slots >= 0) & (slots < most)).all():
                raise ValueError(f"{_SLOTS}: expected numbers from 0 to {most - 1}")
            for text, column in columns.items():
                name = json.loads(text)
                if not isinstance(name, list) or not all(isinstance(part, str) for part in name):
                    raise ValueError(f"expected the name of an entry, got {text}")
                if column.shape[:1] != (most,):
                    raise ValueError(f"{name}: expected {most} rows, got shape {tuple(column.shape)}")
                self.columns[tuple(name)] = column
        except (ValueError, RecursionError) as error:
            raise Damaged(f"{file}: expected the entries of the transitions ({error})") from None
        self._counts[:], self._slot_of = counts, slots.numpy()

    def state(self, notes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the files that `save` writes, by name: (bytes,) uint8 each."""
        import torch

        with TemporaryDirectory() as folder:
            self.save(Path(folder), notes)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): torch.from_numpy(np.fromfile(path, np.uint8)) for path in files}

    @classmethod
    def from_state(
        cls, state: dict[str, torch.Tensor], max_transitions: int, **settings: Any
    ) -> tuple[EpisodeStreams, Any]:
        """Return what `state` was called on, with its notes; see `load`."""
        with TemporaryDirectory() as folder:
            for name, content in state.items():
                path = Path(folder, name)
                if Path(name).is_absolute() or ".." in path.parts:
                    raise ValueError(f"state: expected the names of its files, got {name!r}")
                path.parent.mkdir(parents=True, exist_ok=True)
                content.cpu().numpy().tofile(path)
            return cls.load(Path(folder), max_transitions, **settings)

    def _assign(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        done: NDArray[np.bool_],
        starts: NDArray[np.bool_],
        ids: NDArray[Any] | None,
    ) -> NDArray[np.int64]:
        """Return the environment of each row, (n,)."""
        env_indices = np.zeros(len(obs), np.int64)
        env_index = -1
        for start, stop in pairwise([*np.flatnonzero(starts).tolist(), len(obs)]):
            episode_id = None if ids is None else ids[start]
            env_index = self._env_of(obs[start], episode_id, env_index + 1)
            env_indices[start:stop] = env_index
            self._last_obs[env_index], self._running[env_index] = next_obs[stop - 1], not done[stop - 1]
            self._id[env_index] = episode_id
            self._last_used[env_index] = self._last_used.max() + 1
        return env_indices

    def _env_of(self, obs: NDArray[Any], episode_id: Any, guess: int) -> int:
        """Return the environment of rows that begin with `obs`."""
        count = len(self._counts)
        for env_index in ((guess + number) % count for number in range(count)):
            same = episode_id is None or self._id[env_index] is None or self._id[env_index] == episode_id
            if self._running[env_index] and same and np.array_equal(self._last_obs[env_index], obs):
                return env_index
        if _episode_key(obs, episode_id) in self._abandoned:
            self._warn(
                f"num_envs: the buffer was made for {count} environments, or its first batch came from so many, but "
                "there are more: episodes stop and continue later. Some frames are stored twice, and n-step windows "
                "end where episodes stop. Make the buffer with num_envs=..."
            )
        ended = np.flatnonzero(~self._running)
        if len(ended):
            return int(ended[self._counts[ended].argmin()])
        env_index = int(self._last_used.argmin())
        self._abandoned[_episode_key(self._last_obs[env_index], self._id[env_index])] = None
        if len(self._abandoned) > _MOST_ABANDONED:
            del self._abandoned[next(iter(self._abandoned))]
        return env_index

    def _warn_if_idle(self) -> None:
        """Warn if the buffer should be full but is not, because some environments get few transitions or none."""
        each = self.transitions.max_transitions // len(self._counts)
        held, capacity = int(np.minimum(self._counts, each).sum()), each * len(self._counts)
        if self._counts.sum() >= 2 * capacity and held < 0.75 * capacity:
            self._warn(
                f"num_envs: the buffer keeps only {held} of the newest {capacity} transitions, as each of its "
                f"{len(self._counts)} environments keeps {each}, and {int((self._counts < each).sum())} of them have "
                "fewer. Make the buffer with num_envs=..."
            )

    def _warn(self, message: str) -> None:
        """Warn once."""
        if message[:60] not in self._warned:
            self._warned.add(message[:60])
            warnings.warn(message, stacklevel=2)


def _episode_key(obs: NDArray[Any], episode_id: Any) -> Any:
    """Return what identifies an episode: its id, or its last observation."""
    return hash(obs.tobytes()) if episode_id is None else ("id", episode_id)


def _manifest(path: Path) -> tuple[int, Checksum]:
    """Return the number of the valid save in a folder, and the checksum of its columns."""
    content = read_index(path / _MANIFEST, _KIND)
    try:
        return integer("number", content["number"], 0, _MOST), Checksum.parse(content["columns"])
    except (KeyError, ValueError) as error:
        raise Damaged(f"{path / _MANIFEST}: does not name its files ({error})") from None


def _made(state: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Return the saved arguments. They have to agree with the frames' own header, so that they take no more memory."""
    shape = tuple(integer("shape", axis, 1) for axis in state["shape"])
    made = {"dtype": dtype_name("dtype", state["dtype"])}
    made |= {name: state[name] for name in ("num_envs", "stack", "padding")}
    for name, value in made.items():
        if header.get(name) != value or isinstance(value, bool):
            raise ValueError(f"{name}: expected {header.get(name)!r}, got {value!r}")
    if math.prod(shape) != made["stack"] * math.prod(header["frame_shape"]):
        raise ValueError(f"shape: expected {made['stack']} frames of {header['frame_shape']}, got {shape}")
    return {**made, "shape": shape}


def _saved(path: Path) -> list[tuple[int, Path]]:
    """Return all files of saves in a folder, complete or not, with the number of the save."""
    found = [(_SAVED.fullmatch(file.name), file) for file in path.iterdir()]
    return [(int(match[1] or match[2]), file) for match, file in found if match]


def _sweep(path: Path) -> None:
    """Remove earlier saves, and saves that were interrupted."""
    with suppress(OSError, ValueError):  # without a readable manifest, nothing is known to be old
        number = _manifest(path)[0] if (path / _MANIFEST).exists() else 0
        for other, file in _saved(path):
            if other != number and file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            elif other != number or file.suffix == ".part":
                file.unlink(missing_ok=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take physical memory only when they are written to."""
    import torch

    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
