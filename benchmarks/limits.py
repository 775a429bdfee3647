"""What scores to expect on the miniature: of drawn pictures, of what its autoencoder can show, and by chance.

python -m benchmarks.limits > results/toy-limits.json
"""

import json
import random
from pathlib import Path

import torch
from diffusers import AutoencoderTiny

from miniature import build, world
from plumbing.provenance import provenance


@torch.no_grad()
def limits(folder: Path) -> dict[str, float]:
    """Mean alignment on the held-out prompts of drawn pictures: as they are, through the autoencoder, and of other prompts."""
    vae = AutoencoderTiny.from_pretrained(folder, subfolder="vae")
    prompts = world.PROMPT_SETS["toy-heldout"]()
    drawn = world.draw(prompts, random.Random(0))
    decoded = (vae(drawn * 2 - 1).sample / 2 + 0.5).clamp(0, 1)
    others = [
        decoded[torch.randperm(len(prompts) // 2, generator=torch.Generator().manual_seed(0)) * 2 + kind] for kind in (0, 1)
    ]
    return {
        "drawn": world.alignment(drawn, prompts).mean().item(),
        "autoencoder": world.alignment(decoded, prompts).mean().item(),
        "chance": world.alignment(torch.stack(others, 1).flatten(0, 1), prompts).mean().item(),
    }


if __name__ == "__main__":
    print(json.dumps(provenance("-m benchmarks.limits", []) | {"heldout_alignment": limits(build.ensure())}, indent=1))
