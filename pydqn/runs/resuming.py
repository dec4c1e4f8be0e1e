"""Whether a run can resume from a checkpoint, and advice where it cannot."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from pydqn._util.files import Damaged, read_json
from pydqn.config import RENAMED, TRANSITIONS, Config
from pydqn.envs.ids import rom_of
from pydqn.replay.saving import verify_saved
from pydqn.runs.checkpoint import checkpoints, load_checkpoint

WITHOUT_REPLAY = "--no-checkpoint-replay (in Python checkpoint_replay=False) resumes with an empty replay buffer"


def transition_settings(config: Config) -> dict[str, Any]:
    """Return the fields on which the transitions in a replay buffer depend, as JSON can hold them."""
    plain = config.to_dict()
    return {name: plain[name] for name in TRANSITIONS}


def changes(before: dict[str, Any], config: Config, names: Collection[str] = TRANSITIONS) -> dict[str, tuple[Any, Any]]:
    """Return the fields whose values have changed, by name: the old value and the new one.

    Args:
        before: what `transition_settings` returned. Fields that are missing there were added later; they had their
            default values.
        config: with the new values.
        names: the fields to compare.
    """
    old = {**transition_settings(Config()), **before}
    now = transition_settings(config)
    return {name: (old[name], now[name]) for name in names if not _same(name, old[name], now[name])}


def _same(name: str, old: Any, new: Any) -> bool:
    if old == new or name != "env_id":
        return bool(old == new)
    with suppress(ValueError):  # a game has several ids
        return rom_of(old) is not None and rom_of(old) == rom_of(new)
    return False


def warn_of_renamed(config: Path) -> None:
    """Warn, in one line, if the file has old names of settings: a resumed run writes it anew, with the new ones."""
    if renamed := ", ".join(f"{old} is now {RENAMED[old]}" for old in read_json(config) if old in RENAMED):
        warnings.warn(f"run: settings have been renamed: {renamed}", stacklevel=2)


def require_unchanged(state: dict[str, Any], changed: dict[str, tuple[Any, Any]]) -> None:
    """Raise a ValueError if a checkpoint's transitions were made with other settings than the resumed run has."""
    if "transitions" not in state:  # an older checkpoint; the run's config may have changed since then
        raise ValueError(f"checkpoint: it does not say with which settings its transitions were made; {WITHOUT_REPLAY}")
    for name, (old, new) in changed.items():
        raise ValueError(
            f"{name}: the checkpoint's replay buffer holds transitions of {name} {old!r}, got {new!r}; {WITHOUT_REPLAY}"
        )


@contextmanager
def suggest_empty_replay() -> Iterator[None]:
    """Add to an error of loading a replay buffer how to resume without it."""
    try:
        yield
    except Damaged:
        raise  # an older checkpoint may be whole: see `advice_for_damaged`
    except ValueError as error:
        raise ValueError(f"{error}; {WITHOUT_REPLAY}") from None


def advice_for_damaged(damaged: Path) -> str:
    """Say how to resume a run whose checkpoint is damaged."""
    for path in reversed(checkpoints(damaged.parents[1])):
        if path.name < damaged.name:
            try:
                checkpoint = load_checkpoint(path)
                if checkpoint.replay is not None:
                    verify_saved(checkpoint.replay)
            except Damaged:
                continue
            return f"resume {path} instead, which is whole"
    return f"no older checkpoint is whole (if only its replay buffer is damaged, {WITHOUT_REPLAY})"
