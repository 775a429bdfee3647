"""The embedded world, a grammar of captioned pictures with two rewards, and the small Stable Diffusion made from it."""

from pathlib import Path

WEIGHTS = Path(__file__).resolve().parent / "weights"  # the pipeline, with its card
