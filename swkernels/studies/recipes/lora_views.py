"""What the studies of LoRA say alike: whether it helps, and whether a mask makes a difference."""

from __future__ import annotations

from collections.abc import Mapping

from ..recipe import Found, Verdict
from .comparing import Accuracy, Difference
from .settings import PUBLISHED_STEPS, baseline
from .training_views import accuracies, few_steps, untrained

# Two accuracies count as the same where their difference lies within this by its 95 % interval.
# The published ones of one model differ by 0.4 and by 1.6 points (Table 4).
MARGIN = 0.02
LEVEL = 0.05
DROPOUT = "The paper does not say whether LoRA had dropout; here it has none."
INDICES = (
    "A super weight (row, column) of a down projection counts for an attention projection of its "
    "layer where both indices lie inside it; the others are passed over. The paper says only that "
    "24 to 100 % of the positions are affected, depending on the bounds."
)


def gain(found: Found, label: str, figures: dict | None, claim: str) -> list[Verdict]:
    """Whether a run is more accurate than no training."""
    base = untrained(found)
    if base is None or figures is None:
        return []
    change = Accuracy.of(figures["choices"]).less(base)
    runs = {label: figures}
    holds = True if change.is_gain else False if change.is_loss else None
    return [Verdict(claim, holds, f"{accuracies(found, runs)}{few_steps(found, runs)}.")]


def same(found: Found, vanilla: dict | None, differences: Mapping[str, Difference]) -> bool | None:
    """Whether no masked run differs from LoRA without a mask.

    False: one does, by the exact test at the level over the number of runs. True: the interval of
    every difference lies within the margin, and LoRA itself has an effect that a mask could undo.

    Args:
        vanilla: figures of LoRA without a mask.
        differences: of masked runs, less that one.
    """
    if any(d.p_value * len(differences) < LEVEL for d in differences.values()):
        return False
    near = all(
        d.gains_less_than(MARGIN) and d.loses_less_than(MARGIN) for d in differences.values()
    )
    return True if near and has_effect(found, vanilla) else None


def has_effect(found: Found, vanilla: dict | None) -> bool:
    """Whether LoRA without a mask differs from no training."""
    base = untrained(found)
    return bool(base and vanilla) and Accuracy.of(vanilla["choices"]).less(base).is_clear


def why_same(found: Found, vanilla: dict, differences: Mapping[str, Difference]) -> str:
    """The figures of ``same``, in words."""
    each = "; ".join(f"{label} {difference}" for label, difference in differences.items())
    text = f"minus LoRA without a mask, on the same questions: {each}. The margin is "
    text += f"{100 * MARGIN:g} points{few_steps(found, {'': vanilla})}."
    if not has_effect(found, vanilla):
        text += " The accuracy of LoRA itself does not differ clearly from that of no training, so "
        text += "a mask has nothing to undo that the accuracy could show."
    return text


def lost_gain(found: Found, vanilla: dict, masked: dict) -> str:
    """How much of what LoRA gains in held-out loss a masked run does not."""
    (before,) = found(baseline(found.plan))["held_out"].values()
    after, other = (figures["curve"][-1]["held_out"] for figures in (vanilla, masked))
    if not after < before:
        return " LoRA gains nothing in held-out loss."
    share = 100 * (other - after) / (before - after)
    return (
        f" In held-out loss LoRA goes from {before:.4g} to {after:.4g}; with the mask at 0 "
        f"{share:.3g} % of that is missing (of few questions, without an interval)."
    )


def agreement(a: dict, b: dict) -> float:
    """Share of the questions on which two runs predict the same."""
    pairs = list(zip(a["choices"]["predictions"], b["choices"]["predictions"], strict=True))
    return sum(p == q for p, q in pairs) / len(pairs)


def short(found: Found, vanilla: dict) -> list[str]:
    """What fewer steps than were published mean for a comparison of masks."""
    steps, whole = vanilla["steps"], PUBLISHED_STEPS[found.plan.task]
    if steps >= whole:
        return []
    return [
        f"{steps} steps where {whole} were published: a masked run is compared with a LoRA of as "
        "many steps, and only where that one has an effect does a mask without effect say anything."
    ]
