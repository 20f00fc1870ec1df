"""Vocabulary-sized work that keeps no ``[batch, vocabulary]`` row: sampling a token with its embedding or from a nucleus, the
log-probability of a given token, and the KL of two distributions."""

from megalens.ops.checks import OpError
from megalens.ops.gumbel import GumbelEmbed, gumbel_embed
from megalens.ops.kl import Divergences, vocab_divergences, vocab_kl
from megalens.ops.log_prob import LogProb, vocab_log_prob
from megalens.ops.noise import noise_keys
from megalens.ops.nucleus import NucleusDraw, nucleus_log_mass, sample_nucleus

__all__ = [
    "Divergences",
    "GumbelEmbed",
    "LogProb",
    "NucleusDraw",
    "OpError",
    "gumbel_embed",
    "noise_keys",
    "nucleus_log_mass",
    "sample_nucleus",
    "vocab_divergences",
    "vocab_kl",
    "vocab_log_prob",
]
