"""The embedded world, a grammar of captioned pictures with two rewards, and the small Stable Diffusions made from it."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the pipeline, with its card
TURBO = WEIGHTS.with_name("turbo")  # the same distilled to one and two steps, with its own
FLOW = WEIGHTS.with_name("flow")  # the same world as a rectified flow, a small Stable Diffusion 3
PIPELINES = {"toy": WEIGHTS, "toy-turbo": TURBO, "toy-flow": FLOW}
