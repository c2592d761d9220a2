"""How much text a model of a size is worth, beside how much a run gives it.

The figure is that of arXiv 2605.01188, as the project's notes give it: about 60 bytes of training text for each
parameter that computes where a given number of FLOPs is spent best. It is a fit over byte-level models that were far
smaller than an 8B, on English web text; it says nothing of hash tables, and nothing of a model that will be used so
much that a smaller one trained longer is cheaper in the end, as most released ones are.
"""

from dataclasses import dataclass

BYTES_PER_PARAMETER = 60.0


@dataclass(frozen=True)
class TextForSize:
    """A run's text beside the fit."""

    text_bytes: float
    parameters: int
    """That compute: hash tables left out."""

    @property
    def bytes_per_parameter(self) -> float:
        """Return what the run reads for each parameter."""
        return self.text_bytes / self.parameters

    @property
    def times_the_fit(self) -> float:
        """Return how many times the fitted figure that is."""
        return self.bytes_per_parameter / BYTES_PER_PARAMETER

    def sentence(self) -> str:
        """Return what there is to say of it."""
        said = (
            f"{_count(self.text_bytes)} bytes of text are {self.bytes_per_parameter:,.0f} for each of "
            f"{_count(self.parameters)} parameters that compute"
        )
        times = self.times_the_fit
        if times >= 1.5:
            return (
                f"{said}: {times:.3g} times what spends a training budget best, which pays where a model is used a lot"
            )
        if times <= 1 / 1.5:
            return f"{said}: {times:.2g} of what spends a training budget best; a smaller model would learn more"
        return f"{said}: about what spends a training budget best"


def _count(number: float) -> str:
    for size, name in ((1e12, "T"), (1e9, "B"), (1e6, "M")):
        if number >= size:
            return f"{number / size:.3g}{name}"
    return f"{number:.0f}"
