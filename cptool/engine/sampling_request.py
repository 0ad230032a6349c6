"""The sampling that a caller requests, and how the model's author completes it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from cptool.engine.sampling import Sampling
from cptool.errors import OptionError
from cptool.units import some

if TYPE_CHECKING:
    from cptool.checkpoint import Checkpoint


@dataclass(frozen=True, kw_only=True)
class SamplingRequest:
    """The values of a `Sampling`; None where that is left to the model's author."""

    temperature: float | None = None
    top_p: float | None = None
    seed: int = 0
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: tuple[tuple[int, float], ...] = ()

    def resolve(self, checkpoint: Checkpoint) -> Sampling:
        """Return the sampling; the author's values count where none was given.

        Greedy where the author gives no temperature either. Raises OptionError for a value out of
        range and for a bias on a token that the model does not have.
        """
        values = {
            name: getattr(checkpoint.sampling, name, None) if value is None else value
            for name, value in vars(self).items()
            if name in Sampling.__dataclass_fields__
        }
        sampling = Sampling(**{n: value for n, value in values.items() if value is not None})
        vocabulary = checkpoint.config.vocab_size
        for token, value in sampling.logit_bias:
            if token >= vocabulary:
                raise OptionError(
                    "logit_bias",
                    f"{token}={value:g}",
                    f"the model's vocabulary has the ids 0 to {vocabulary - 1}",
                )
        return sampling

    def describe(self, sampling: Sampling) -> str:
        """Return one line with the values of `sampling`, the result of `resolve`, and who chose."""
        given: list[str] = []
        authors: list[str] = []
        for name, text in _shown(sampling).items():
            # A value that nobody gave changes nothing, and goes with the temperature.
            chosen = name if getattr(sampling, name) != getattr(Sampling(), name) else "temperature"
            (authors if getattr(self, chosen) is None else given).append(text)
        whose = "the model author's"
        if sampling.temperature and self.temperature is None:
            whose += "; --temperature 0 is greedy"
        groups = [", ".join(given)]
        if authors == ["greedy"]:  # what any model does by default
            groups.insert(0, "greedy")
        elif authors:
            groups.insert(0 if self.temperature is None else 1, f"{', '.join(authors)} ({whose})")
        return "; ".join(filter(None, groups))


def _shown(sampling: Sampling) -> dict[str, str]:
    """Return the values worth showing, by their names."""
    shown = {"temperature": "greedy"}
    if sampling.temperature:
        shown = {
            "temperature": f"temperature {sampling.temperature:g}",
            "top_p": f"top-p {sampling.top_p:g}",
        }
        if sampling.top_k:
            shown["top_k"] = f"top-k {sampling.top_k}"
        if sampling.min_p:
            shown["min_p"] = f"min-p {sampling.min_p:g}"
    for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
        value = getattr(sampling, name)
        if value != getattr(Sampling(), name):
            shown[name] = f"{name.replace('_', ' ')} {value:g}"
    if sampling.logit_bias:
        shown["logit_bias"] = f"a bias on {some(len(sampling.logit_bias), 'token')}"
    return shown
