"""Batches of many steps for a `TransitionReplay`: which environment each goes to, and a slot for what else belongs to it."""

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
from pydqn.replay.frames import FrameReplay
from pydqn.replay.saving import saved_settings
from pydqn.replay.transitions import TransitionReplay

if TYPE_CHECKING:
    import torch

_MANIFEST, _KIND, _SLOTS = "streams.json", "pydqn-streams", "slots"
_SAVED = re.compile(r"\.?(?:memory-(\d+)|columns-(\d+)\.safetensors(?:\.part)?)")
_MOST = 1 << 62
_MOST_LEFT = 1000  # episodes that were left in the middle, remembered in case that they are gone on with


class Streams:
    """Feeds a `TransitionReplay` with rows, each a step of one of several environments, however they are ordered.

    A run of rows that follow one another goes to the environment whose last observation it begins with, or else to one whose
    episode has ended. So environments may come in blocks of T steps, step by step, or one at a time, and episodes go
    on from one batch to the next. What cannot be told is stored right all the same: an episode that is taken up anew
    costs some frames more, and n-step windows end where it was left. (Only names tell environments apart that have the
    same observations.)

    Args:
        transitions: where the frames go.

    Attributes:
        columns: what else belongs to each transition, by name: tensors, made for what comes with the first batch.
    """

    columns: dict[tuple[str, ...], torch.Tensor]

    def __init__(self, transitions: TransitionReplay) -> None:
        num_envs = transitions.num_envs
        self.transitions = transitions
        self.columns = {}
        self._each = (
            transitions.capacity // num_envs + transitions.frame_replay.n_step - 1
        )  # of the newest, windows may be open
        self._counts = np.zeros(num_envs, np.int64)  # steps that each environment has got
        self._slot_of = np.zeros(0, np.int64)  # of the step that was taken at each frame
        self._last = np.zeros(
            (num_envs, *transitions.shape), transitions.frame_replay.dtype
        )  # observation that each environment has come to
        self._goes_on = np.zeros(num_envs, bool)
        self._name: list[Any] = [None] * num_envs
        self._written = np.zeros(num_envs, np.int64)
        self._left: dict[Any, None] = {}
        self._warned: set[str] = set()

    def extend(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        reward: NDArray[Any],
        terminated: NDArray[np.bool_],
        done: NDArray[np.bool_],
        opens: NDArray[np.bool_],
        names: NDArray[Any] | None,
        others: Mapping[tuple[str, ...], torch.Tensor],
    ) -> NDArray[np.int64]:
        """Store n rows.

        Args:
            obs: (n, *shape).
            next_obs: (n, *shape).
            reward: (n,) finite real numbers.
            terminated: (n,) bool: no value lies beyond `next_obs`.
            done: (n,) bool: the episode is over there.
            opens: (n,) bool: see `openings`.
            names: (n,) of the episodes, or of the environments; None where they have none.
            others: (n, ...): what goes into the columns; the same names each time.

        Returns:
            (n,) int64: the transitions' indices.

        Raises:
            ValueError: a row does not fit (see `TransitionReplay.add`). Those of earlier steps are stored then.
        """
        if not self.columns:
            most = len(self._counts) * self._each
            self.columns = {name: _zeros((most, *other.shape[1:]), other.dtype) for name, other in others.items()}
        env_index = self._assign(obs, next_obs, done, opens, names)
        count = np.bincount(env_index, minlength=len(self._counts))
        turn = np.empty_like(env_index)  # within its environment, from 0 on
        turn[np.argsort(env_index, kind="stable")] = np.arange(len(env_index)) - np.repeat(
            np.cumsum(count) - count, count
        )
        slot = env_index * self._each + (self._counts[env_index] + turn) % self._each
        order = np.lexsort((env_index, turn))  # one step of every environment at a time
        cut, nothing = done & ~terminated, np.zeros(len(env_index), np.int64)
        index, stored = nothing.copy(), 0
        try:
            for rows in np.split(order, np.flatnonzero(np.diff(turn[order])) + 1):
                some: Any = slice(rows[0], rows[0] + 1) if len(rows) == 1 else rows
                env_indices = None if len(rows) == len(self._counts) else env_index[some]
                index[some] = self.transitions.add(
                    obs[some], next_obs[some], nothing[some], reward[some], terminated[some], cut[some], env_indices
                )
                stored += len(rows)
        finally:  # what the memory holds has its columns, even if a later row was refused
            rows = np.sort(order[:stored])
            count = np.bincount(env_index[rows], minlength=len(self._counts))
            rows = rows[turn[rows] + self._each >= count[env_index[rows]]]  # the others have lost their slots to these
            if not len(self._slot_of):  # (the first row may have settled how large the memory is)
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
        """Return, (B,), the slots of held transitions, or of those that come so many steps later in their environments."""
        slots: NDArray[np.int64] = self._slot_of[(index + steps * len(self._counts)) % len(self._slot_of)]
        return slots

    def save(self, path: Path, notes: dict[str, Any]) -> None:
        """Write everything to a folder, without pickle, and notes of the caller's, as JSON can hold them.

        Saving there again writes only frames that are new. What was saved before counts until all is written: the
        manifest, which names both files, takes its slot last.
        """
        import torch

        path = path.absolute()
        path.mkdir(parents=True, exist_ok=True)
        transitions, replay = self.transitions, self.transitions.frame_replay
        columns = {json.dumps(name): column for name, column in self.columns.items()}
        columns[_SLOTS] = torch.from_numpy(self._slot_of)
        made = {"shape": transitions.shape, "dtype": replay.dtype.name, "num_envs": replay.num_envs}
        made |= {"stack": replay.stack, "padding": replay.padding}
        state = {"time_steps": replay.env_time_steps, "counts": self._counts.tolist(), "notes": notes}
        number = 1 + max((each for each, _ in _saved(path)), default=0)
        try:
            replay.save(path / f"memory-{number}")
            checksum = save_weights(path / f"columns-{number}.safetensors", columns, {**made, **state})
            write_index(path / _MANIFEST, _KIND, {"number": number, "columns": checksum})
        finally:
            _sweep(path)

    @classmethod
    def load(cls, path: Path, capacity: int, **settings: Any) -> tuple[Streams, dict[str, Any]]:
        """Read what `save` wrote; returns it with the notes.

        Episodes that were going on end there: environments are not saved with it. The exponents of prioritized
        sampling, alpha and beta, are those that were saved.

        Args:
            path: the folder.
            capacity: that of the `TransitionReplay`.
            settings: all others that it was made with, but for shape and dtype.

        Raises:
            ValueError: the folder is damaged, or was made with other arguments.
            MemoryError: what is saved needs more memory than there is.
        """
        number, checksum = _manifest(path)
        file, folder = path / f"columns-{number}.safetensors", path / f"memory-{number}"
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
            streams = cls(TransitionReplay(capacity, made["shape"], made["dtype"], **settings))
            expected = streams.transitions.frame_replay.settings
            del expected["alpha"]
            memory = FrameReplay.load(folder, expected)
        except MemoryError as error:
            raise MemoryError(f"{path}: {error}") from None
        except TypeError as error:  # a dtype that this machine has not
            raise Damaged(f"{file}: {error}") from None
        if memory.env_time_steps != time_steps:
            raise Damaged(f"{path}: {folder.name} and {file.name} were not saved together")
        streams.transitions.frame_replay = memory
        streams._restore(file, columns, counts)
        return streams, notes

    def _restore(self, file: Path, columns: dict[str, torch.Tensor], counts: list[int]) -> None:
        """Take over what belongs to the transitions."""
        import torch

        most, slots = len(self._counts) * self._each, columns.pop(_SLOTS, torch.zeros(0))
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
            raise Damaged(f"{file}: what it holds are no columns ({error})") from None
        self._counts[:], self._slot_of = counts, slots.numpy()

    def state(self, notes: dict[str, Any]) -> dict[str, torch.Tensor]:
        """Return the files of `save`, by name: (bytes,) uint8 each."""
        import torch

        with TemporaryDirectory() as folder:
            self.save(Path(folder), notes)
            files = [path for path in Path(folder).rglob("*") if path.is_file()]
            return {str(path.relative_to(folder)): torch.from_numpy(np.fromfile(path, np.uint8)) for path in files}

    @classmethod
    def from_state(cls, state: dict[str, torch.Tensor], capacity: int, **settings: Any) -> tuple[Streams, Any]:
        """Undo `state`; see `load`."""
        with TemporaryDirectory() as folder:
            for name, content in state.items():
                path = Path(folder, name)
                if Path(name).is_absolute() or ".." in path.parts:
                    raise ValueError(f"state: expected the names of its files, got {name!r}")
                path.parent.mkdir(parents=True, exist_ok=True)
                content.cpu().numpy().tofile(path)
            return cls.load(Path(folder), capacity, **settings)

    def _assign(
        self,
        obs: NDArray[Any],
        next_obs: NDArray[Any],
        done: NDArray[np.bool_],
        opens: NDArray[np.bool_],
        names: NDArray[Any] | None,
    ) -> NDArray[np.int64]:
        env_indices = np.zeros(len(obs), np.int64)
        env_index = -1
        for start, stop in pairwise([*np.flatnonzero(opens).tolist(), len(obs)]):
            name = None if names is None else names[start]
            env_index = self._env_of(obs[start], name, env_index + 1)
            env_indices[start:stop] = env_index
            self._last[env_index], self._goes_on[env_index], self._name[env_index] = (
                next_obs[stop - 1],
                not done[stop - 1],
                name,
            )
            self._written[env_index] = self._written.max() + 1
        return env_indices

    def _env_of(self, obs: NDArray[Any], name: Any, guess: int) -> int:
        """Return the environment of a run that begins with `obs`."""
        count = len(self._counts)
        for env_index in ((guess + number) % count for number in range(count)):
            same = name is None or self._name[env_index] is None or self._name[env_index] == name
            if self._goes_on[env_index] and same and np.array_equal(self._last[env_index], obs):
                return env_index
        if _sign(obs, name) in self._left:
            self._warn(
                f"num_envs: the buffer was made for {count} environments, or its first batch came from so many, but "
                "there are more: episodes stop and go on later. Some frames are stored twice, and n-step windows end "
                "where episodes stop. Make the buffer with num_envs=..."
            )
        ended = np.flatnonzero(~self._goes_on)
        if len(ended):
            return int(ended[self._counts[ended].argmin()])
        env_index = int(self._written.argmin())
        self._left[_sign(self._last[env_index], self._name[env_index])] = None
        if len(self._left) > _MOST_LEFT:
            del self._left[next(iter(self._left))]
        return env_index

    def _warn_if_idle(self) -> None:
        """Warn where the buffer should be full, and is not, as some environments get little or nothing."""
        each = self.transitions.capacity // len(self._counts)
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


def _sign(obs: NDArray[Any], name: Any) -> Any:
    """What an episode can be told by: its name, or where it has come to."""
    return hash(obs.tobytes()) if name is None else ("name", name)


def _manifest(path: Path) -> tuple[int, Checksum]:
    """Return which of the files in a folder count, and what that of the columns has to be."""
    content = read_index(path / _MANIFEST, _KIND)
    try:
        return integer("number", content["number"], 0, _MOST), Checksum.parse(content["columns"])
    except (KeyError, ValueError) as error:
        raise Damaged(f"{path / _MANIFEST}: does not name its files ({error})") from None


def _made(state: dict[str, Any], header: dict[str, Any]) -> dict[str, Any]:
    """Return what the streams were made with; as it fits the frames' own header, it asks for no more memory."""
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
    """Return what `save` has left in a folder, whole or not, with the number of the save."""
    found = [(_SAVED.fullmatch(file.name), file) for file in path.iterdir()]
    return [(int(match[1] or match[2]), file) for match, file in found if match]


def _sweep(path: Path) -> None:
    """Remove what the manifest does not name: earlier saves, and those that were broken off."""
    with suppress(OSError, ValueError):  # no manifest, or one that says nothing: then nothing is known to be old
        number = _manifest(path)[0] if (path / _MANIFEST).exists() else 0
        for other, file in _saved(path):
            if other != number and file.is_dir():
                shutil.rmtree(file, ignore_errors=True)
            elif other != number or file.suffix == ".part":
                file.unlink(missing_ok=True)


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    """Return zeros that take memory only when they are written to."""
    import torch

    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)
