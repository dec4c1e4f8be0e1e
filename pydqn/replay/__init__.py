"""Replay buffers: of frames on the host or on a device, and of whole transitions."""
