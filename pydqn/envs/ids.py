"""Which environment an id names: one registered with Gymnasium, or an Atari ROM. The registry comes first."""

from __future__ import annotations

import functools
import importlib
import re
import warnings
from typing import Any

from pydqn._util.hints import did_you_mean
from pydqn.envs.own import is_own

FOR_TWO = {"combat", "joust", "maze_craze", "warlords"}  # loading one of them ends the process
_MINATAR = "MinAtar/"
_MODULE = re.compile(r"\w+(\.\w+)*")
_registered_by: dict[str, str] = {}  # the modules that `import_environments` has imported, by the ids they registered
_OLD = re.compile(r"([A-Za-z0-9]+?)(NoFrameskip|Deterministic)?-v[04]")  # Gym's ids of Atari games


def rom_of(env_id: str) -> str | None:
    """Return the ROM that an id names, or None for an id of Gymnasium's.

    Every id that is registered with Gymnasium is Gymnasium's, except those that ale_py itself registers. Of the other
    ids, "ALE/Pong-v5", "PongNoFrameskip-v4", "PongDeterministic-v4" and the bare names "Pong" and "pong" name Atari
    games. (The options in which Gym's old ids differ are fields of `Config`.)

    Raises:
        ValueError: the id is ambiguous, or it has the form of an Atari game's and ALE has no such game for one player.
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
        raise ValueError(f"env_id: {env_id} needs two players; pydqn plays games for one player")
    return games[name]


def spec_of(env_id: str) -> Any:
    """Return the `EnvSpec` from which Gymnasium makes an environment.

    Raises:
        ValueError: no environment is registered by that id; the message names similar ids.
    """
    import gymnasium

    if env_id.startswith(_MINATAR):
        _register_minatar()
    spec = gymnasium.registry.get(env_id)
    if spec is None and is_own(env_id):
        raise ValueError(f"env_id: {env_id!r} was made by a function of yours; give it again, in Python make_env=...")
    if spec is None:
        hint = _hint_at_registered(env_id)
        hint = f"; {hint}" if hint else ""
        raise ValueError(
            f"env_id: Gymnasium knows no {env_id!r}{hint} (if it is your own, import the module that registers it: "
            "on the command line with --import MODULE; Atari games are 'ALE/Name-v5')"
        )
    return spec


def import_environments(module: str) -> None:
    """Import a module that registers environments with Gymnasium. Only ever called because the user named it.

    Raises:
        ValueError: it cannot be imported.
    """
    import gymnasium

    if not _MODULE.fullmatch(module):
        raise ValueError(f"import: expected the name of a module, such as my_package.my_module, got {module!r}")
    before = set(gymnasium.registry)
    try:
        importlib.import_module(module)
    except (Exception, SystemExit) as error:
        reason = " ".join(f"{type(error).__name__}: {error}".split())
        raise ValueError(f"import: {module} cannot be imported ({reason})") from error
    _registered_by.update(dict.fromkeys(gymnasium.registry.keys() - before, module))


def registered_by(env_id: str) -> str | None:
    """Return the module to import before `env_id` is known: the one that the user has named, or that of its class.

    None for an environment of Gymnasium itself or of ALE, or for one that is registered in a script or a notebook.
    """
    import gymnasium

    spec = gymnasium.registry.get(env_id)
    if spec is None or _is_ale(spec) or is_own(env_id) or env_id.startswith(_MINATAR):
        return None
    module = _module_of(spec)
    return _registered_by.get(env_id) or (None if module.partition(".")[0] in ("gymnasium", "__main__") else module)


def package_of(env_id: str) -> str | None:
    """Return the top-level package that an environment's class is in; None for an id that is not registered."""
    import gymnasium

    spec = gymnasium.registry.get(env_id)
    return None if spec is None else _module_of(spec).partition(".")[0]


def _module_of(spec: Any) -> str:
    made_by = spec.entry_point
    return made_by.partition(":")[0] if isinstance(made_by, str) else str(getattr(made_by, "__module__", "__main__"))


def require_registered(env_id: str, module: object) -> None:
    """Raise a ValueError unless `env_id` is registered; it names the `module` that `registered_by` returned before."""
    import gymnasium

    if env_id not in gymnasium.registry and isinstance(module, str) and _MODULE.fullmatch(module):
        raise ValueError(
            f"env_id: Gymnasium knows no {env_id!r}, which it knew when the run was made; import its module first, as "
            f"far as the run says {module}: on the command line with --import {module}"
        )


@functools.cache
def _games() -> dict[str, str]:
    """Return a dictionary from the names of Atari games to their ROMs.

    The first import of ale_py registers its games with Gymnasium. Ids that were registered before keep their meaning.
    """
    import gymnasium

    from pydqn.envs import atari

    before = dict(gymnasium.registry)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*already in registry")
        games = atari.games()
    gymnasium.registry.update(before)
    return games


def _register_minatar() -> None:
    """Register MinAtar's games, which its package does not do by itself.

    Raises:
        ValueError: MinAtar is not installed.
    """
    import gymnasium

    if any(env_id.startswith(_MINATAR) for env_id in gymnasium.registry):
        return
    try:
        from minatar.gym import register_envs
    except ImportError as error:
        raise ValueError(f"env_id: MinAtar is not installed: pip install 'pydqn[minatar]' ({error})") from None
    register_envs()


def _is_ale(spec: Any) -> bool:
    return isinstance(spec.entry_point, str) and spec.entry_point.startswith("ale_py.")


def _ale_id(rom: str) -> str:
    return f"ALE/{rom.title().replace('_', '')}-v5"


def _refuse_if_ambiguous(name: str, games: dict[str, str]) -> None:
    """Refuse the bare name of a game if a registered environment has that name, in any version."""
    registered = [env_id for env_id in _own_ids() if _plain(env_id) == _plain(name)]
    if name in games and registered:
        raise ValueError(
            f"env_id: {name!r} may be Gymnasium's {registered[-1]!r} or the Atari game {_ale_id(games[name])!r}; "
            "give the full id of one of them"
        )


def _own_ids() -> list[str]:
    """Return the ids that are registered with Gymnasium, except ale_py's."""
    import gymnasium

    return [env_id for env_id, spec in gymnasium.registry.items() if not _is_ale(spec)]


def _plain(env_id: str) -> str:
    """Return an id in lower case, without its version and underscores."""
    return re.sub(r"-v\d+$", "", env_id).lower().replace("_", "")


def _hint_at_game(env_id: str, games: dict[str, str]) -> str:
    roms = {_plain(rom): [_ale_id(rom) if env_id.startswith("ALE/") else rom] for rom in games.values()}
    hint = did_you_mean(_plain(env_id.removeprefix("ALE/")), roms)
    return hint or _hint_at_registered(env_id) or "ale_py.roms.get_all_rom_ids() lists them"


def _hint_at_registered(env_id: str) -> str:
    """Name registered ids that are similar. Atari games are left out: they are other tasks with similar names."""
    ids: dict[str, list[str]] = {}
    for registered in _own_ids():
        ids.setdefault(_plain(registered), []).append(registered)
    return did_you_mean(_plain(env_id), ids, most=2)
