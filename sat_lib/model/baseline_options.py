"""What the attentions want of a model's configuration, `encoder.ModelConfig`: most of it is the baselines'."""

from ..attention.baselines import check_longformer, check_lsg
from ..attention.static_patterns import check_bigbird
from ..common.errors import require


def attention_options(config, layer: int) -> dict:
    """What the attention function of a layer (from 0) is given beside its inputs."""
    common = {"implementation": config.implementation}
    if config.attention == "longformer":
        sizes = {"window": config.window, "dilation": config.dilations[layer]}
        return common | sizes | {"global_token": config.global_token}
    if config.attention == "bigbird":
        random = {"random_blocks": config.random_blocks, "seed": config.pattern_seed, "layer": layer}
        return common | {"block": config.block} | random
    if config.attention == "lsg":
        return common | {"block": config.block, "factor": config.sparsity_factor}
    return {"pruned": config.pruned} if config.attention == "sat" else {}


def check_baseline(config) -> None:
    """Raise InputError for sizes of a baseline that its attention would refuse later."""
    require(
        len(config.dilations) == config.layers,
        f"dilation: wanted one number, or one for each of {config.layers} layers; got {config.dilation}",
    )
    if config.attention == "longformer":
        for dilation in config.dilations:
            check_longformer(config.length, config.window, dilation, config.global_token)
    elif config.attention == "bigbird":
        check_bigbird(config.length, config.block, config.random_blocks)
    elif config.attention == "lsg":
        check_lsg(config.length, config.block, config.sparsity_factor)
