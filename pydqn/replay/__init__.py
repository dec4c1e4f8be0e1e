"""Replay buffers: frames on the host or a device, whole transitions, saving."""
