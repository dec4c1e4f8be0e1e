"""pydqn's replay buffers and Atari preprocessing behind the interfaces of other libraries, one module for each."""
