"""Attention to look at: a page to explore every head of a text, pictures for papers.

    attention_html(tokens, weights_LNTS, "attention.html")
    plot_heads(weights_LNTS, "heads.png", heads=[(0, 3), (5, 1)], tokens=tokens)
    plot_statistic_over_training({"steps": steps, "entropy": entropy}, "entropy.png")

Layers, heads and positions are counted from 0 everywhere, as in `weights_LNTS[layer, head]`.
"""

from jax_attn.view.curves import plot_curves
from jax_attn.view.head_figure import plot_heads
from jax_attn.view.page import attention_html
from jax_attn.view.training_figure import plot_statistic_over_training

__all__ = ["attention_html", "plot_curves", "plot_heads", "plot_statistic_over_training"]
