"""The pattern that a recipe asks for: scores of every block, and the layouts that the generator makes of them."""

import numpy as np
import torch
from torch import Tensor

from ..attention.layout import BlockLayout
from ..attention.patterns import generate_layout
from ..attention.static_patterns import nearness
from ..common import distributed
from ..datasets.batches import Examples
from ..model.encoder import Encoder
from .recipe import Recipe
from .saliency import block_saliency

PROBE_EXAMPLES = 256  # training examples on which a criterion of saliency is measured


def block_scores(model: Encoder, recipe: Recipe, examples: Examples, step: int) -> Tensor:
    """What the recipe's pattern gives to the generator: (layers, N, N), or (layers, H, N, N) of a saliency.

    Args:
        examples: of which some are drawn by the recipe's seed and the step; so are random scores.
    """
    config = model.config
    if recipe.pattern == "learned":
        return torch.stack([parameter().detach() for parameter in model.sparsity_parameters])
    if recipe.pattern == "near":
        return nearness(config.blocks).float().expand(config.layers, -1, -1)
    generator = np.random.default_rng([recipe.seed, step])
    if recipe.pattern == "random":
        return torch.from_numpy(generator.random((config.layers, config.blocks, config.blocks), np.float32))
    chosen = generator.choice(len(examples), min(PROBE_EXAMPLES, len(examples)), replace=False)
    return block_saliency(model, recipe.pattern, *examples.batch(chosen), seed=recipe.seed)


def generate_layouts(model: Encoder, recipe: Recipe, examples: Examples, step: int) -> tuple[Tensor, list[BlockLayout]]:
    """`block_scores`, and a layout for each layer. The same in all processes: process 0's scores decide."""
    config = model.config
    scores = block_scores(model, recipe, examples, step).to(examples.device).contiguous()
    distributed.copy_first([scores])
    used, by_head = scores, scores.dim() == 4
    if recipe.pattern_heads == "own" and not by_head:
        used = scores[:, None].expand(-1, config.heads, -1, -1)
    elif recipe.pattern_heads == "shared" and by_head:
        used = scores.mean(1)
    return scores, [generate_layout(of_layer, recipe.density, config.block, recipe.pattern_budget) for of_layer in used]
