"""What noise did to the rows: observed = scale · state + shift + error, on the coordinates that were not dropped.

A declared model says how likely the observed rows are for given states; `refitted` gives the model of the same kind
under which they are likeliest. Shapes: T rows, N candidates, D = width of a row.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor

from sipit.errors import OptionError, ShapeError
from sipit.float64 import as_float64

Law = Literal["gaussian", "uniform"]

_EDGE = 0.02  # of the half width of a uniform error: how softly it ends, for the width is estimated
_PRIOR_ROWS = 8.0  # rows that the common variance counts as beside the rows of one coordinate
_IMMENSE = 1e6  # times the variance of what is seen
_LEAST_SPREAD = 1e-6  # of the rows' root mean square: below it, arithmetic is what is seen


@dataclass(frozen=True, kw_only=True, eq=False)
class NoiseModel:
    """How the observed rows came from the states.

    Raises:
        OptionError: a number is out of range.
    """

    spread: Tensor  # (1,) or (D,): the standard deviation of an error; of a uniform one its half width
    law: Law = "gaussian"
    scale: float = 1.0
    shift: Tensor | None = None  # (D,) added to every row
    drops: bool = False  # whether coordinates that are exactly 0 were dropped and say nothing
    longest: float | None = None  # L2 that rows were cut down to before the noise was added
    unseen: Tensor | None = None  # (D,) bool: coordinates that are not looked at

    def __post_init__(self) -> None:
        if self.law not in ("gaussian", "uniform"):
            raise OptionError(f"noise law {self.law!r} is unknown; choose gaussian or uniform")
        spread = self.spread
        if spread.ndim != 1 or not bool((spread > 0).all() & spread.isfinite().all()):
            raise OptionError("the spread of the noise must be one number a coordinate, or one for all, above 0")
        if not 0 < abs(self.scale) < math.inf:
            raise OptionError(f"the scale of the noise model is {self.scale}; it must be finite and not 0")
        if self.shift is not None and not (self.shift.ndim == 1 and bool(self.shift.isfinite().all())):
            raise OptionError("the shift of the noise model must be one finite number a coordinate")
        if self.longest is not None and not 0 < self.longest < math.inf:
            raise OptionError(f"the length that rows are cut down to is {self.longest}; it must be finite and above 0")

    @classmethod
    def gaussian(cls, sigma: float | Tensor) -> NoiseModel:
        """Return independent normal errors of one standard deviation, or of one a coordinate (D,)."""
        return cls(spread=torch.as_tensor(sigma, dtype=torch.float64).reshape(-1))

    @classmethod
    def uniform(cls, half_width: float) -> NoiseModel:
        """Return errors drawn evenly from -half_width to half_width, as rounding to a step of twice that makes."""
        return cls(law="uniform", spread=torch.tensor([half_width], dtype=torch.float64))

    @property
    def n_parameters(self) -> int:
        """Numbers that a record of this model can be made to fit rows with."""
        return len(self.spread) + (0 if self.shift is None else len(self.shift)) + (self.scale != 1.0)

    def require_width(self, width: int) -> None:
        """Refuse a model of rows of another width.

        Raises:
            ShapeError: the spread or the shift is of another width.
        """
        for name, values in (("spread", self.spread), ("shift", self.shift)):
            if values is not None and len(values) not in ((1, width) if name == "spread" else (width,)):
                raise ShapeError(f"the {name} of the noise model is {len(values)} wide, the rows are {width} wide")

    @property
    def sigma(self) -> float:
        """Root mean square of the errors over the coordinates."""
        size = float(self.spread.double().square().mean().sqrt())
        return size / math.sqrt(3) if self.law == "uniform" else size

    def expected(self, states: Tensor) -> Tensor:
        """Return the rows that states give without any error. (N, D) → (N, D)."""
        rows = states if self.scale == 1.0 else self.scale * states
        if self.longest is not None:
            rows = rows * (self.longest / rows.norm(dim=1, keepdim=True).clamp(min=1e-30)).clamp(max=1)
        return rows if self.shift is None else rows + self.shift.to(rows)

    def unexpected(self, observed: Tensor) -> Tensor:
        """Return the states that rows would be without any error. (T, D) → (T, D)."""
        rows = observed if self.shift is None else observed - self.shift.to(observed)
        return rows / self.scale

    def kept(self, observed: Tensor) -> Tensor:
        """Return which coordinates of observed rows say something. (T, D) → (T, D) bool."""
        kept = observed != 0 if self.drops else torch.ones_like(observed, dtype=torch.bool)
        return kept if self.unseen is None else kept & ~self.unseen.to(kept.device)

    def log_likelihood(self, observed: Tensor, states: Tensor) -> Tensor:
        """Return the log-density of observed rows for given states, row by row. (N, D), (N, D) → (N,) float64."""
        return self._log_density(observed - self.expected(states), self.kept(observed)).sum(dim=1)

    def variances(self, width: int) -> Tensor:
        """Return the variance of the error of each coordinate of a state; immense where it is not looked at. (D,)."""
        own = (self.spread.double() / self.scale).square() / (3 if self.law == "uniform" else 1)
        own = own.expand(width) if len(own) == 1 else own
        return own if self.unseen is None else torch.where(self.unseen, _IMMENSE * own, own)

    def _log_density(self, errors: Tensor, kept: Tensor) -> Tensor:
        spread = self.spread.to(errors)
        z = errors / spread
        if self.law == "uniform":
            beyond = ((z.abs() - 1).clamp_(min=0) / _EDGE).square_()
            mass = 2 + _EDGE * math.sqrt(2 * math.pi)  # of the softened density, in half widths
            density = -0.5 * beyond - torch.log(mass * spread)
        else:
            density = -0.5 * z.square() - torch.log(spread) - 0.5 * math.log(2 * math.pi)
        return as_float64(density if not self.drops and self.unseen is None else density * kept)

    def refitted(self, observed: Tensor, states: Tensor) -> NoiseModel:
        """Return the model of this kind under which the rows are likeliest, given their states. (T, D), (T, D).

        Rows whose errors stand out from the others' do not count: their tokens are most likely wrong.
        """
        observed, states = as_float64(observed), as_float64(states)
        kept = self.kept(observed)
        errors = (observed - self.expected(states)) * kept
        energy = errors.square().sum(dim=1) / kept.sum(dim=1).clamp(min=1)  # (T,)
        fair = energy <= _fair_energy(energy, observed.shape[1])
        observed, states, kept = observed[fair], states[fair], kept[fair]
        scale, shift = self._placed(observed, states, kept)
        errors = (observed - replace(self, scale=scale, shift=shift).expected(states)) * kept
        floor = _LEAST_SPREAD * float(observed.square().mean().sqrt())
        n_free = (shift is not None) * kept.shape[1] + (scale != 1.0)
        variance = errors.square().sum() / (kept.sum() - n_free).clamp(min=1)
        if self.law == "uniform":
            spread = torch.maximum(errors.abs().max(), (3 * variance).sqrt())[None]
        elif len(self.spread) == 1:
            spread = variance.sqrt()[None]
        else:  # each coordinate's own variance, drawn towards the common one: it has few rows
            own, n_rows = errors.square().sum(dim=0), kept.sum(dim=0)
            spread = ((own + _PRIOR_ROWS * variance) / (n_rows + _PRIOR_ROWS)).sqrt()
        return replace(self, spread=spread.clamp(min=floor), scale=scale, shift=shift)

    def _placed(self, observed: Tensor, states: Tensor, kept: Tensor) -> tuple[float, Tensor | None]:
        """Return the scale and shift of least squares, where this model has them."""
        scale, shift = self.scale, self.shift
        if scale != 1.0:
            centre = 0.0 if shift is None else (states * kept).sum(dim=0) / kept.sum(dim=0).clamp(min=1)
            moved = (states - centre) * kept
            scale = float((moved * observed).sum() / moved.square().sum().clamp(min=1e-30)) or 1.0
        if shift is not None:
            shift = ((observed - scale * states) * kept).sum(dim=0) / kept.sum(dim=0).clamp(min=1)
        return scale, shift

    def parameters(self) -> dict[str, Any]:
        """Return the model as JSON values."""
        spread = self.spread.tolist()
        return {
            "law": self.law,
            "sigma": self.sigma,
            "spread": spread[0] if len(spread) == 1 else spread,
            "scale": self.scale,
            "shift": None if self.shift is None else self.shift.tolist(),
            "drops": self.drops,
            "longest": self.longest,
        }

    def says(self) -> str:
        """Return the model in words."""
        each = "" if len(self.spread) == 1 else ", each coordinate its own"
        text = f"{self.law} noise of standard deviation {self.sigma:.3g} a coordinate{each}"
        if self.scale != 1.0:
            text += f", states times {self.scale:.4g}"
        if self.shift is not None:
            text += f", one vector of length {float(self.shift.norm()):.3g} added to every row"
        if self.longest is not None:
            text += f", on rows cut down to length {self.longest:.4g}"
        return text + (", coordinates that are 0 dropped" if self.drops else "")


def noise_model(record: dict[str, Any]) -> NoiseModel:
    """Return the model that `NoiseModel.parameters` gave.

    Raises:
        OptionError: the values are not a noise model's.
    """
    try:
        spread, shift, longest = record["spread"], record["shift"], record["longest"]
        if type(record["drops"]) is not bool:
            raise TypeError("drops is neither true nor false")
        return NoiseModel(
            law=record["law"],
            spread=_numbers(spread if isinstance(spread, list) else [spread]),
            scale=float(_numbers([record["scale"]])),
            shift=None if shift is None else _numbers(shift),
            drops=record["drops"],
            longest=None if longest is None else float(_numbers([longest])),
        )
    except (KeyError, TypeError, ValueError, OverflowError, RuntimeError) as error:
        raise OptionError(f"the noise model of the record cannot be read ({str(error)[:120]}); invert again") from error


def _numbers(values: list[Any]) -> Tensor:
    """Return a list of a record as float64; a text or a truth value that torch would take for a number is none."""
    if not all(type(value) in (int, float) for value in values):
        raise TypeError("a value is no number")
    return torch.tensor(values, dtype=torch.float64)


def _fair_energy(energy: Tensor, width: int) -> float:
    """Return the most energy a coordinate of a row that the median row's noise explains. (T,)."""
    middle = float(energy.median())
    return middle * (1 + 6 * math.sqrt(2 / width))
