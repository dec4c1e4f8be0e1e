"""Atari observations for any agent: one environment, then eight at once. Run: python examples/atari_wrapper.py."""

import time

import ale_py
import gymnasium

from pydqn.adapters.gymnasium import AtariPreprocessing, AtariVectorFrames

gymnasium.register_envs(ale_py)

# One environment. The wrapper replaces Gymnasium's AtariPreprocessing and FrameStackObservation: it returns the last
# four images of 84x84. It skips frames by itself (frameskip=1) and reads the screen from the emulator
# (obs_type="ram": ALE need not draw an image of every frame).
env = AtariPreprocessing(gymnasium.make("ALE/Pong-v5", frameskip=1, obs_type="ram"), stack=4)
observation, info = env.reset(seed=0)
env.step(0)  # the first call compiles the kernel
started = time.perf_counter()
for _ in range(200):
    observation, reward, terminated, truncated, info = env.step(env.action_space.sample())
    if terminated or truncated:
        observation, info = env.reset()
print(f"one:   {observation.shape} {observation.dtype}, {200 / (time.perf_counter() - started):,.0f} steps/s")

# Eight at once, in ALE's own threads, which skip frames by themselves. They have to return single frames in native size
# (210 x 160 in most games). Episodes restart by themselves.
native = {"img_height": 210, "img_width": 160, "stack_num": 1, "use_fire_reset": False, "reward_clipping": False}
envs = gymnasium.make_vec("ALE/Pong-v5", 8, "vector_entry_point", **native)
envs = AtariVectorFrames(envs, stack=4)
observations, infos = envs.reset(seed=0)
envs.step(envs.action_space.sample())  # the first call compiles the kernel
started = time.perf_counter()
for _ in range(50):
    observations, rewards, terminated, truncated, infos = envs.step(envs.action_space.sample())
print(f"eight: {observations.shape} {observations.dtype}, {8 * 50 / (time.perf_counter() - started):,.0f} steps/s")
