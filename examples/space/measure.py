# Copyright 2026 The trl_diffusion authors.
# SPDX-License-Identifier: Apache-2.0

"""Score what the embedded models of the Space draw: the shares of whole shapes in scenes, and the negative qualities of paintings.

python examples/space/measure.py
"""

import torch
from painter import BASE, Painter
from worlds import embedded_worlds

from trl_diffusion.quickstart import cpo, iapo
from trl_diffusion.quickstart.sampling import generate
from trl_diffusion.quickstart.world import evaluation_prompts


NUM_PROMPTS, SEED = 200, 1


def main() -> None:
    torch.set_num_threads(1)
    for world, experiment in zip(embedded_worlds(), (iapo.EXPERIMENT, cpo.EXPERIMENT), strict=True):
        painter = Painter(world)
        prompts = evaluation_prompts(NUM_PROMPTS, SEED, experiment.sample_scene)
        for title in painter.titles:
            for npo in (False, True) if title != BASE else (False,):
                with painter.model(title, 1.0, npo):
                    scores = experiment.score(generate(painter.pipeline, prompts, SEED), prompts)
                print(f"{world.title}; {title}{', with NPO' if npo else ''}: {scores}", flush=True)


if __name__ == "__main__":
    main()
