"""The loss law L(N, D) = E + A/N^α + B/D^β, fitted by two methods.

    vpnls   For given (α, β) the law is linear in (E, A, B), none of which is negative: variable projection by non-negative least
            squares leaves a search in two dimensions, well conditioned where the five parameters are not (arXiv 2603.22339). Its
            objective is the SUM of squared relative residuals (fit/measured − 1)².
    huber   The SUM over runs of Huber's function of ln fit − ln measured, with δ = 10⁻³, as in approach 3 of Hoffmann et al.
            (arXiv 2203.15556) and the re-fit of Besiroglu et al. (arXiv 2404.10102). Starts from vpnls and its neighbours.

Runs off the law pull vpnls more than huber, which is nearly the fit of smallest absolute residuals; on clean runs vpnls has the
narrower intervals. The two agreeing says something.

Runs on one line of (ln N, ln D) cannot tell the five parameters apart and are refused: one budget, or one ratio D/N.
"""

from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize, nnls

from train.scaling.errors import ScalingError
from train.scaling.estimate import Estimate
from train.scaling.fits.bootstrap import percentile_interval, residual_samples
from train.scaling.fits.least_squares import Residuals, huber, minimise
from train.scaling.fits.runs import Array
from train.scaling.law import LossLaw

Method = Literal["vpnls", "huber"]
Size = Literal["params", "active"]
Mask = NDArray[np.bool_]

DELTA = 1e-3  # of Huber's function (Hoffmann et al., approach 3)
COEFFICIENTS = ("E", "A", "B", "alpha", "beta")
FEWEST = len(COEFFICIENTS) + 3  # runs: three degrees of freedom to know the error from
EXPONENTS = np.geomspace(0.03, 2.0, 20)  # where the search begins; published laws lie between 0.05 and 0.6
NEIGHBOURS = (0.6, 1.0, 1.6)  # factors on vpnls's exponents from which huber starts
APART = 1.02  # sizes or tokens nearer than this are one
STEEPEST = 20.0  # exponent that a draw may have: such a term is a wall, and a greater one overflows
LINE = 0.05  # sd of ln D around a line in ln N below which the runs lie on it
FLAT = 1e-6  # share of the loss by which a term must change over the runs
TINY = 1e-3  # share of the loss below which a term of a start is lifted, so that its logarithm can move


@dataclass(frozen=True)
class LossFit:
    """A fitted law and how it came about.

    Attributes:
        objective: the SUM that the method minimises, as this file's docstring has it.
        residuals: [R] ln measured − ln fit.
    """

    law: LossLaw
    method: Method
    objective: float
    residuals: Array

    @property
    def intervals(self) -> dict[str, Estimate]:
        """E, A, B, alpha, beta and `a`, the exponent of N_opt in C, with the 95 % intervals of the law's draws."""
        law = self.law
        values = np.array([(law.E, law.A, law.B, law.alpha, law.beta), *law.draws])
        with np.errstate(divide="ignore"):  # a draw may have α = −β
            a = values[:, 4] / (values[:, 3] + values[:, 4])
        columns = dict(zip((*COEFFICIENTS, "a"), [*values.T, a], strict=True))
        if not law.draws:
            return {name: Estimate(float(column[0])) for name, column in columns.items()}
        return {name: percentile_interval(float(column[0]), column[1:]) for name, column in columns.items()}


def fit_loss(
    params: Array,
    tokens: Array,
    loss: Array,
    *,
    method: Method = "huber",
    start: LossLaw | None = None,
    size: Size = "params",
    draws: int = 0,
    seed: int = 0,
) -> LossFit:
    """Fit L(N, D) to R runs.

    Args:
        params: [R] N, whatever the law is to read as its size.
        tokens: [R] D.
        loss: [R] nats per token.
        start: a law to start from instead of the search over exponents. Its exponents are taken, and the best E, A and B for them.
        size: what N is, for the law to remember.
        draws: samples of the residual bootstrap that the law carries; intervals of 95 % want some hundreds.
        seed: of the draws.

    Raises:
        ScalingError: the runs cannot tell the law: too few, a loss that is no number, one size, one budget, a loss that does not
            fall with size or tokens.
    """
    columns = [np.asarray(column, float) for column in (params, tokens, loss)]
    _check(*columns)
    runs = _Table.of(*columns)
    exponents = _search(runs) if start is None else (start.alpha, start.beta)
    if method == "vpnls":
        theta, objective = _polish(runs, exponents)
    else:
        theta, objective = _fit_huber(runs, exponents, alone=start is not None)
    law = _law(runs.natural(theta), size)
    _check_falls(law, runs)
    _check_exponents(law)
    fitted = np.log(law(runs.params, runs.tokens))
    residuals = np.log(runs.loss) - fitted
    if draws:
        samples = residual_samples(fitted, residuals, len(COEFFICIENTS), draws, seed)
        form, delta = _form(runs, method)
        refitted = minimise(form, np.tile(theta, (draws, 1)), samples, delta, tolerance=1e-8).parameters
        law = law.model_copy(update={"draws": tuple(map(tuple, runs.natural(refitted).tolist()))})
    return LossFit(law, method, objective, residuals)


class Optimum(NamedTuple):
    """The best allocation of a budget: N, D and its loss."""

    params: float
    tokens: float
    loss: float


def optimum(law: LossLaw, flops: float, flops_per_parameter: float = 6) -> Optimum:
    """The least loss of C = 6·N·D, in closed form: N = G·(C/6)^a, a = β/(α+β), G = (αA/βB)^(1/(α+β)) (Hoffmann et al., eq. 4)."""
    product = flops / flops_per_parameter  # N·D
    g = (law.alpha * law.A / (law.beta * law.B)) ** (1 / (law.alpha + law.beta))
    n = g * product ** (law.beta / (law.alpha + law.beta))
    return Optimum(n, product / n, float(law(n, product / n)))


def drop_highest(loss: Array, n: int) -> Mask:
    """[R] all runs but the n of highest loss."""
    if not 0 <= n < len(loss):
        raise ScalingError(f"drop-highest = {n}: must be between 0 and {len(loss) - 1}, one less than there are runs")
    kept = np.ones(len(loss), dtype=bool)
    kept[np.argsort(loss, kind="stable")[len(loss) - n :]] = False
    return kept


def outliers(residuals: Array, deviations: float = 5.0) -> Mask:
    """[R] runs whose residual is more than 5 robust standard deviations (1.4826 · median of |r − median|) from the median."""
    distance = np.abs(residuals - np.median(residuals))
    return np.asarray(distance > deviations * 1.4826 * np.median(distance))


@dataclass(frozen=True)
class _Table:
    """Runs with logarithms around their means, so that the law's terms are of the order of the loss whatever its units."""

    params: Array
    tokens: Array
    loss: Array
    x: Array  # ln N − its mean
    y: Array  # ln D − its mean
    center: tuple[float, float]

    @classmethod
    def of(cls, params: Array, tokens: Array, loss: Array) -> "_Table":
        ln_n, ln_d = np.log(params), np.log(tokens)
        center = (float(ln_n.mean()), float(ln_d.mean()))
        return cls(params, tokens, loss, ln_n - center[0], ln_d - center[1], center)

    def natural(self, theta: Array) -> Array:
        """[…, 5] ln E, ln A/N₀^α, ln B/D₀^β, α, β → E, A, B, α, β."""
        powers = np.clip(theta[..., 3:], -STEEPEST, STEEPEST)
        return np.concatenate([np.exp(theta[..., :1]), np.exp(theta[..., 1:3] + powers * self.center), powers], axis=-1)


def _law(row: Array, size: Size) -> LossLaw:
    e, a, b, alpha, beta = row.tolist()
    return LossLaw(E=e, A=a, B=b, alpha=alpha, beta=beta, size=size)


def _project(runs: _Table, exponents: tuple[float, float]) -> tuple[Array, float]:
    """The best E, A/N₀^α and B/D₀^β ≥ 0 for two exponents, and the sum of squared relative residuals that they leave."""
    alpha, beta = exponents
    terms = np.stack([np.ones_like(runs.x), np.exp(-alpha * runs.x), np.exp(-beta * runs.y)], axis=1)  # [R, 3]
    coefficients, norm = nnls(terms / runs.loss[:, None], np.ones_like(runs.loss))
    return coefficients, float(norm) ** 2


def _search(runs: _Table) -> tuple[float, float]:
    """Exponents of the least projected sum: over a grid, then downhill from its best point (Nelder-Mead in their logarithms)."""
    best = min(product(EXPONENTS, EXPONENTS), key=lambda pair: _project(runs, pair)[1])

    def projected(logs: Array) -> float:
        alpha, beta = np.exp(np.minimum(logs, np.log(STEEPEST)))
        return _project(runs, (float(alpha), float(beta)))[1]

    found = minimize(
        projected, np.log(best), method="Nelder-Mead", options={"xatol": 1e-6, "fatol": 0.0, "maxiter": 400}
    )
    alpha, beta = np.exp(np.minimum(found.x, np.log(STEEPEST)))
    return float(alpha), float(beta)


def _start(runs: _Table, exponents: tuple[float, float]) -> Array:
    coefficients, _ = _project(runs, exponents)
    lifted = np.maximum(coefficients, TINY * runs.loss.min())
    return np.array([*np.log(lifted), *exponents])


def _polish(runs: _Table, exponents: tuple[float, float]) -> tuple[Array, float]:
    """The projected search's end to full precision, all five parameters at once."""
    form, delta = _form(runs, "vpnls")
    solution = minimise(form, _start(runs, exponents)[None], np.log(runs.loss)[None], delta)
    return solution.parameters[0], 2 * float(solution.objective[0])  # H has a half


def _fit_huber(runs: _Table, exponents: tuple[float, float], *, alone: bool) -> tuple[Array, float]:
    """From one start, or from it and its neighbours; least squares of the logarithms first, whose valley is smooth."""
    factors = (1.0,) if alone else NEIGHBOURS
    pairs = [(exponents[0] * f, exponents[1] * g) for f, g in product(factors, factors)]
    starts = np.array([_start(runs, pair) for pair in pairs])
    measured = np.tile(np.log(runs.loss), (len(starts), 1))
    form, delta = _form(runs, "huber")
    smooth = minimise(form, starts, measured).parameters
    solution = minimise(form, smooth, measured, delta, tolerance=1e-13)
    best = int(np.argmin(solution.objective))
    return solution.parameters[best], float(
        huber(form(solution.parameters[best : best + 1], measured[:1])[0][0], delta)
    )


def _form(runs: _Table, method: Method) -> tuple[Residuals, float]:
    """The residuals of a method, and its δ."""
    if method == "vpnls":
        return partial(_relative, runs.x, runs.y), np.inf
    return partial(_logarithmic, runs.x, runs.y), DELTA


def _logarithmic(x: Array, y: Array, theta: Array, measured: Array) -> tuple[Array, Array]:
    """ln fit − ln measured, [R, n], and its derivatives [R, n, 5] by ln E, ln A/N₀^α, ln B/D₀^β, α and β."""
    e, a, b, alpha, beta = theta.T[:, :, None]  # [R, 1] each
    terms = np.exp(np.stack(np.broadcast_arrays(e, a - alpha * x, b - beta * y), axis=-1))  # [R, n, 3]
    value = terms.sum(axis=-1)
    shares = terms / value[..., None]
    slopes = -shares[..., 1:] * np.stack([x, y], axis=-1)
    return np.log(value) - measured, np.concatenate([shares, slopes], axis=-1)


def _relative(x: Array, y: Array, theta: Array, measured: Array) -> tuple[Array, Array]:
    """fit/measured − 1, where `measured` is a logarithm too."""
    logs, derivatives = _logarithmic(x, y, theta, measured)
    ratio = np.exp(logs)
    return ratio - 1, derivatives * ratio[..., None]


def _check(params: Array, tokens: Array, loss: Array) -> None:
    """Refuse runs that cannot tell the five parameters."""
    for name, column in (("loss", loss), ("params", params), ("tokens", tokens)):
        bad = np.flatnonzero(~(np.isfinite(column) & (column > 0)))
        if len(bad):
            raise ScalingError(
                f"{name} of run {bad[0] + 1} = {column[bad[0]]:g}: must be a positive number in all {len(loss)} runs "
                f"({len(bad)} are not); leave diverged runs out, or run them again"
            )
    if len(loss) < FEWEST:
        raise ScalingError(
            f"runs = {len(loss)}: L(N, D) has 5 parameters and needs {FEWEST} runs to know their error; "
            f"add {FEWEST - len(loss)} of other sizes and tokens"
        )
    for name, column in (("params", params), ("tokens", tokens)):
        found = int(np.sum(np.diff(np.sort(column), prepend=0) > (1 - 1 / APART) * np.sort(column)))
        if found < 3:
            raise ScalingError(
                f"{name} = {found} different value{'s' * (found > 1)} in {len(loss)} runs: its exponent needs 3; "
                f"add runs with other {name}"
            )
    _check_plane(np.log(params), np.log(tokens))


def _check_plane(ln_n: Array, ln_d: Array) -> None:
    slope, offset = np.polyfit(ln_n, ln_d, 1)
    if np.std(ln_d - slope * ln_n - offset) >= LINE:
        return
    if abs(slope + 1) < LINE:
        raise ScalingError(
            f"budgets = 1: N·D is {np.exp(np.mean(ln_n + ln_d)):.3g} in all {len(ln_n)} runs, and L(N, D) needs 2 at least; "
            f"add runs of another budget, for example four times as much"
        )
    raise ScalingError(
        f"D = {np.exp(offset):.3g}·N^{slope:.2f} in all {len(ln_n)} runs: L(N, D) needs N and D that differ apart; "
        f"add runs of the same sizes with other tokens"
    )


def _check_exponents(law: LossLaw) -> None:
    """An exponent outside of the search is a wall or a constant: the runs do not say how the loss goes with that quantity."""
    for name, quantity, value in (("alpha", "sizes", law.alpha), ("beta", "numbers of tokens", law.beta)):
        if not EXPONENTS[0] <= value <= EXPONENTS[-1]:
            raise ScalingError(
                f"{name} = {value:.3g}: is outside of {EXPONENTS[0]:g} to {EXPONENTS[-1]:g}, so that the runs do not tell the law; "
                f"add runs with {quantity} that are farther apart, or repeat runs to lower the noise"
            )


def _check_falls(law: LossLaw, runs: _Table) -> None:
    """Refuse a law in which the loss does not fall with N or with D: nothing that is asked of it has an answer then."""
    terms = (
        ("params", law.alpha, law.A * runs.params**-law.alpha),
        ("tokens", law.beta, law.B * runs.tokens**-law.beta),
    )
    for name, exponent, term in terms:
        if exponent <= 0 or np.ptp(term) < FLAT * np.median(runs.loss):
            raise ScalingError(
                f"loss = no lower with more {name}: it must fall with {name} for L(N, D) to have an exponent of it; "
                f"add runs with {name} farther apart, and look whether the largest were trained well"
            )
