"""The embedded world, a grammar of captioned pictures with two rewards, and the small Stable Diffusion made from it."""
