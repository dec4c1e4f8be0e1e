"""Which environment an id names: one registered with Gymnasium, or an Atari ROM. The registry comes first."""

from __future__ import annotations

import difflib
import functools
import re
import warnings
from typing import Any

FOR_TWO = {"combat", "joust", "maze_craze", "warlords"}  # to load one of them ends the process
_NEAR = 0.75  # how alike two names must be for one to be a hint at the other
_OLD = re.compile(r"([A-Za-z0-9]+?)(NoFrameskip|Deterministic)?-v[04]")  # Gym's ids of Atari games


def rom_of(env_id: str) -> str | None:
    """Return the ROM that an id names, or None for an id of Gymnasium's.

    Whatever is registered with Gymnasium is Gymnasium's, but for what ale_py itself registers. Of the other ids,
    "ALE/Pong-v5", "PongNoFrameskip-v4", "PongDeterministic-v4" and the bare names "Pong" and "pong" are Atari games
    (what Gym's old ids differ in are fields of `Config`).

    Raises:
        ValueError: the id may mean two environments; or it has the form of an Atari game's, but ALE has no such game,
            or none for one player.
    """
    import gymnasium

    spec = gymnasium.registry.get(env_id)
    if spec is not None and not _is_ale(spec):
        return None
    games = _games()
    old = _OLD.fullmatch(env_id)
    if env_id.startswith("ALE/"):
        name = env_id.removeprefix("ALE/").split("-v")[0]
    elif old is not None and old[1] in games and (old[2] or env_id in gymnasium.registry):
        name = old[1]
    elif old is not None and old[1] in games:
        raise ValueError(
            f"env_id: Gymnasium knows no {env_id!r}: if it is your own, register it first (import its module); "
            f"the Atari game is {_ale_id(games[old[1]])!r}"
        )
    elif "/" in env_id or "-" in env_id:
        return None
    else:
        name = env_id
        _refuse_if_ambiguous(name, games)
    if name not in games:
        raise ValueError(f"env_id: there is no Atari game {env_id!r}; {_hint_at_game(env_id, games)}")
    if games[name] in FOR_TWO:
        raise ValueError(f"env_id: {env_id} needs two players; ALE plays it for nobody alone")
    return games[name]


def spec_of(env_id: str) -> Any:
    """Return the `EnvSpec` with which Gymnasium makes an environment.

    Raises:
        ValueError: there is none; the message names near ones.
    """
    import gymnasium

    spec = gymnasium.registry.get(env_id)
    if spec is None:
        near = _near_ids(env_id)
        hint = f"; did you mean {' or '.join(near)}?" if near else ""
        raise ValueError(
            f"env_id: Gymnasium knows no {env_id!r}{hint} (to use an environment of your own, import the module that "
            "registers it in Python and call pydqn.train, resume or evaluate there; Atari games are 'ALE/Name-v5')"
        )
    return spec


@functools.cache
def _games() -> dict[str, str]:
    """Return the ROM of every name of an Atari game.

    The first import of ale_py registers its games with Gymnasium. What was registered by then stays what it was.
    """
    import gymnasium

    from pydqn.envs import atari

    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*already in registry")
        games = atari.games()
    gymnasium.registry.update(before)
    return games


def _is_ale(spec: Any) -> bool:
    return isinstance(spec.entry_point, str) and spec.entry_point.startswith("ale_py.")


def _ale_id(rom: str) -> str:
    return f"ALE/{rom.title().replace('_', '')}-v5"


def _refuse_if_ambiguous(name: str, games: dict[str, str]) -> None:
    """Refuse a game's bare name where somebody has registered an environment of that name in some version."""
    registered = [env_id for env_id in _own_ids() if _plain(env_id) == _plain(name)]
    if name in games and registered:
        raise ValueError(
            f"env_id: {name!r} may be Gymnasium's {registered[-1]!r} or the Atari game {_ale_id(games[name])!r}; "
            "give the one that you mean"
        )


def _own_ids() -> list[str]:
    """Return what is registered with Gymnasium, without ale_py's own."""
    import gymnasium

    return [env_id for env_id, spec in gymnasium.registry.items() if not _is_ale(spec)]


def _plain(env_id: str) -> str:
    """Return an id without its version, capitals and underscores."""
    return re.sub(r"-v\d+$", "", env_id).lower().replace("_", "")


def _hint_at_game(env_id: str, games: dict[str, str]) -> str:
    roms = {_plain(rom): rom for rom in games.values()}
    near = difflib.get_close_matches(_plain(env_id.removeprefix("ALE/")), roms, n=3, cutoff=_NEAR)
    names = [_ale_id(roms[name]) if env_id.startswith("ALE/") else roms[name] for name in near] or _near_ids(env_id)
    return f"did you mean {' or '.join(names)}?" if names else "ale_py.roms.get_all_rom_ids() lists them"


def _near_ids(env_id: str) -> list[str]:
    """Return registered ids with nearly the same name; no Atari games, which are other tasks with similar names."""
    names: dict[str, list[str]] = {}
    for own in _own_ids():
        names.setdefault(_plain(own), []).append(own)
    near = difflib.get_close_matches(_plain(env_id), names, n=2, cutoff=_NEAR)
    return [own for name in near for own in names[name]][:4]
