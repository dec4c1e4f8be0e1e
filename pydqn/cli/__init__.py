"""The `pydqn` command."""
