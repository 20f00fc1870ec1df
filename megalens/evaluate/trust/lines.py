"""What each figure must reach, drawn before any lens was looked at, and what it means and does not mean."""

from __future__ import annotations

from megalens.evaluate.trust.judged import Line

LINES: dict[str, tuple[Line, str]] = {
    "choice10_hard": (
        Line(0.1),
        "share of rows whose rebuild is nearest to their own activation among ten of the same token, by chance 0.1; it does not say that "
        "the words are true",
    ),
    "choice10_over_token": (
        Line(0.0),
        "the same, less what the mean activation of the token at P scores; above 0 the text holds more than that token",
    ),
    "nll_gap": (
        Line(0.10, fails=0.05),
        "nats per token by which the context's tail is easier to say with its own activation than with another's; below 0.05 the "
        "verbalizer speaks from habit",
    ),
    "above_chance": (
        Line(0.05),
        "share of rows whose text scores above the 95th percentile of other rows' texts, by chance 0.05",
    ),
    "retest": (Line(0.0), "does a row that one sample explains well come out well in another; 0: luck alone"),
    "echo_lift": (Line(0.0), "share of the text's words that stand in the context, less the same beside another context"),
    "ahead_lift": (
        Line(0.0),
        "share of words that only the text behind P holds, less the same beside another; above echo_lift it predicts more than it reads",
    ),
    "unseen_lift": (
        Line(0.0),
        "share of words true of the document and not in its context yet, less what a text of the same topic says; no copy scores",
    ),
    "remembered_lift": (Line(0.0), "the same of words that the context holds, but not in its last tokens"),
    "agreement_lift": (Line(0.0), "overlap of eight samples' words, less that with another row's samples"),
    "planted_lift@0.5": (
        Line(0.0),
        "share of planted concepts that are named, less that of random directions; void where fluent@0.5 is low",
    ),
}
"""By the figure's name."""
