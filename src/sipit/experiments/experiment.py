"""What an experiment is: tasks that each give one record, so that a run can stop and go on between any two."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from sipit.corpora import Corpus, exact_prompts, special_start
from sipit.experiments.cuts import few_cuts
from sipit.experiments.paper import PaperTable
from sipit.models import LanguageModel
from sipit.observations import Cut

Scale = Literal["smoke", "small", "paper"]
SCALES: tuple[Scale, ...] = get_args(Scale)
Values = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Setting:
    """What an experiment is run on."""

    lm: LanguageModel
    scale: Scale
    folder: Path  # for what is too large for a record
    texts: Corpus
    seed: int = 0

    def of_scale(self, smoke: int, small: int, paper: int) -> int:
        """Return the number that belongs to this scale."""
        return {"smoke": smoke, "small": small, "paper": paper}[self.scale]

    def prompts(self, n_prompts: int, lengths: list[int]) -> list[Tensor]:
        """Return prompts of exact lengths from the texts."""
        return exact_prompts(
            self.lm.encode,
            self.texts.texts,
            n_prompts=n_prompts,
            lengths=lengths,
            seed=self.seed,
            start=special_start(self.lm.encode),
            per_text=256,
        )

    def cuts(self) -> list[Cut]:
        """Return layers 1, L/2 and L, as the paper's tables have them, and the states after the final norm."""
        return few_cuts(self.lm)


@dataclass(frozen=True, kw_only=True)
class Task:
    """One record's worth of work."""

    key: str  # no other task of the experiment has it
    make: Callable[[], Values]


@dataclass(frozen=True, kw_only=True)
class Experiment:
    """One table, figure or claim of the paper, on a model of one's own."""

    name: str
    answers: str  # the table or figure it answers, in arXiv 2510.15511
    claim: str  # what is claimed there, in a sentence
    paper: str  # the paper's numbers, in a sentence
    tasks: Callable[[Setting], Iterator[Task]]
    paper_table: PaperTable | None = None  # the numbers that ours are put beside
    caveat: str = ""  # what of the paper's numbers does not fit together, or is narrower than it reads
    paper_models: tuple[str, ...] = ()  # by their hub names
    paper_needs: str = ""  # memory and hours of scale "paper", about
    needs_tokenizer: bool = True
    uses_model: bool = True  # False: it builds tiny models of its own
