"""A law: what a fit found, as a file that a schedule and a forecast read.

    lr = k · C^a                        or of (N, D): k · N^a · D^b
    batch = k · C^a                     tokens
    M = k · C^a,   D = C / M            allocation: FLOPs per token and tokens of the best loss
    L(N, D) = E + A/N^α + B/D^β         nats per token, on the law's own data and tokenizer

A law knows where it was measured. It answers outside too, and says how far outside that is. Intervals come from `draws`:
parameters of refitted bootstrap samples, which keep what the parameters of one form have to do with each other.
"""

from typing import Literal

import numpy as np
from numpy.typing import ArrayLike
from pydantic import BaseModel, ConfigDict

from train.scaling.estimate import Estimate
from train.scaling.runs import Array

Variable = Literal["flops", "params", "active", "tokens"]  # C = M·D; N, all experts counted; N of one token; D


class PowerLaw(BaseModel):
    """k · Π variable^exponent.

    Attributes:
        draws: rows (ln k, exponents in their order) of a bootstrap; none where nothing is known of the error.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    coefficient: float
    exponents: dict[Variable, float]
    draws: tuple[tuple[float, ...], ...] = ()

    def __call__(self, **variables: ArrayLike) -> Array:
        """Its value; every variable of `exponents` must be given, others are ignored."""
        logs = sum(exponent * np.log(np.asarray(variables[name], float)) for name, exponent in self.exponents.items())
        return np.asarray(self.coefficient * np.exp(logs))

    def estimate(self, **variables: float) -> Estimate:
        """Its value at one point with the draws' 95 % interval."""
        value = float(self(**variables))
        if not self.draws:
            return Estimate(value)
        rows = np.array([1.0, *(np.log(variables[name]) for name in self.exponents)])
        low, high = np.percentile(np.array(self.draws) @ rows, [2.5, 97.5])
        return Estimate(value, float(np.exp(low)), float(np.exp(high)))


class LossLaw(BaseModel):
    """L(N, D) = E + A/N^α + B/D^β (Hoffmann et al., arXiv 2203.15556, approach 3).

    Attributes:
        size: what N is.
        draws: rows (E, A, B, alpha, beta) of a bootstrap.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    E: float
    A: float
    B: float
    alpha: float
    beta: float
    size: Literal["params", "active"] = "params"
    draws: tuple[tuple[float, float, float, float, float], ...] = ()

    def __call__(self, size: ArrayLike, tokens: ArrayLike) -> Array:
        """Nats per token of N parameters trained on D tokens."""
        n, d = np.asarray(size, float), np.asarray(tokens, float)
        return np.asarray(self.E + self.A * n**-self.alpha + self.B * d**-self.beta)

    def estimate(self, size: float, tokens: float) -> Estimate:
        """Its value at one point with the draws' 95 % interval."""
        value = float(self(size, tokens))
        if not self.draws:
            return Estimate(value)
        e, a, b, alpha, beta = np.array(self.draws).T
        low, high = np.percentile(e + a * size**-alpha + b * tokens**-beta, [2.5, 97.5])
        return Estimate(value, float(low), float(high))
