"""GPT-NeoX: parts and the blocks' cache argument under names of its own."""

from megalens.families.protocol import Family
from megalens.families.registry import register


@register("gpt_neox")
class GPTNeoX(Family):
    """GPT-NeoX and Pythia."""

    embedding_name, norm_name = "embed_in", "final_layer_norm"
    cache_argument = "layer_past"
