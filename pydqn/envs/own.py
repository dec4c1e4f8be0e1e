"""Environments that a function of the user's makes, registered with Gymnasium for as long as they are used."""

from __future__ import annotations

import inspect
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

MakeEnv = Callable[..., Any]
_PREFIX = "own/"
_lock = threading.Lock()
_users: dict[str, int] = {}  # how many runs and evaluations use an id now


@contextmanager
def registered(make_env: MakeEnv | None, env_id: str) -> Iterator[dict[str, Any]]:
    """Register the user's environment until the block ends, and yield the fields of `Config` that name it.

    Args:
        make_env: returns a new Gymnasium environment at each call; it may be a class. It gets the config's `env_kwargs`
            and, if it takes that argument, `render_mode="rgb_array"` where images are needed. None changes nothing.
        env_id: the id so far. One that such a function already had is kept; else it becomes "own/" and the function's
            name.

    Raises:
        ValueError: `make_env` cannot be called, or another function has that id in a run of this process.
    """
    if make_env is None:
        yield {}
        return
    if not callable(make_env):
        raise ValueError(f"make_env: expected a function that returns a Gymnasium environment, got {make_env!r}")
    name = env_id if is_own(env_id) else _PREFIX + _name(make_env)
    _register(name, make_env)
    try:
        yield {"env_id": name}
    finally:
        _release(name)


def is_own(env_id: str) -> bool:
    """Return whether an id is that of an environment which a function of the user's made."""
    return env_id.startswith(_PREFIX)


class _Maker:
    """Calls the user's function with the arguments that it takes."""

    def __init__(self, make_env: MakeEnv) -> None:
        self.make_env = make_env
        self.__module__ = str(getattr(make_env, "__module__", "__main__"))
        try:
            parameters = inspect.signature(make_env).parameters.values()
        except (TypeError, ValueError):  # some functions of extensions tell nothing
            self._renders = True
        else:
            self._renders = any(p.name == "render_mode" or p.kind == p.VAR_KEYWORD for p in parameters)

    def __call__(self, **kwargs: Any) -> Any:
        if not self._renders:
            kwargs.pop("render_mode", None)
        return self.make_env(**kwargs)


def _name(make_env: MakeEnv) -> str:
    function = getattr(make_env, "func", make_env)  # of a functools.partial
    name = re.sub(r"\W", "", str(getattr(function, "__name__", type(function).__name__)))
    return name or "env"


def _register(env_id: str, make_env: MakeEnv) -> None:
    import gymnasium

    with _lock:
        spec = gymnasium.registry.get(env_id)
        if spec is not None and getattr(spec.entry_point, "make_env", None) != make_env:  # bound methods are made anew
            raise ValueError(
                f"make_env: another function has the id {env_id!r} in a run that is not over; give yours another name, "
                "or close that run"
            )
        if spec is None:
            gymnasium.register(env_id, entry_point=_Maker(make_env))
        _users[env_id] = _users.get(env_id, 0) + 1


def _release(env_id: str) -> None:
    import gymnasium

    with _lock:
        _users[env_id] -= 1
        if not _users[env_id]:
            del _users[env_id]
            gymnasium.registry.pop(env_id, None)
