"""Private parts of `pydqn.adapters.torchrl`; none of them imports TorchRL."""
