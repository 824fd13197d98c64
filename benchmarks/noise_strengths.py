"""How much Gaussian noise nearest-candidate search bears: the strengths at which it finds 90, 50 and 10 % of tokens.

The true prefix is given and the whole vocabulary is run behind it, so this is the best that nearest search can do.
A token is lost to noise n, of strength s a coordinate, where a wrong one lies nearer: where s exceeds the least of
d^2 / (2 n·D) over all wrong tokens, with D the difference of the two states and d its length. One pass of the
vocabulary gives that critical strength for any number of draws.

python -m benchmarks.noise_strengths --text-file F --layers 5,15,30 --out strengths.json
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

import sipit
from sipit.corpora import exact_prompts
from sipit.observations import Cut
from sipit.storage import write_json

N_TOKENS = 20
SHARES = (0.9, 0.5, 0.1)
_POSITIONS = (0, 1, 2, 4, 6, 8, 10, 12, 14, 16, 18, 19)
_BATCH = 512


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text-file", type=Path, required=True)
    parser.add_argument("--layers", default="5,15,30")
    parser.add_argument("--draws", type=int, default=64, help="of noise, for each position")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lm = sipit.load(options.model)
    prompts = held_out(lm, options.text_file, len(_POSITIONS))
    found: dict[str, dict[str, float]] = {}
    for layer in map(int, options.layers.split(",")):
        critical, weights = [], []
        for prompt, position in zip(prompts, _POSITIONS, strict=True):
            critical.append(critical_strengths(lm, Cut(layer), prompt, position, options.draws))
            share = 1 / N_TOKENS if position == 0 else (1 - 1 / N_TOKENS) / (len(_POSITIONS) - 1)
            weights.append(torch.full_like(critical[-1], share / options.draws))
        found[str(layer)] = {
            str(share): strength_at(share, torch.cat(critical), torch.cat(weights)) for share in SHARES
        }
        print(layer, found[str(layer)], flush=True)
        write_json(options.out, found)


def held_out(lm: sipit.LanguageModel, text_file: Path, n_prompts: int, *, seed: int = 7) -> list[Tensor]:
    """Return prompts of 20 tokens cut at random out of a text. (20,) each."""
    text = text_file.read_text("utf-8")
    pieces = [text[i : i + 4000] for i in range(0, len(text), 4000)]
    return exact_prompts(lm.encode, pieces, n_prompts=n_prompts, lengths=[N_TOKENS], seed=seed, per_text=4)


def critical_strengths(lm: sipit.LanguageModel, cut: Cut, prompt: Tensor, position: int, n_draws: int) -> Tensor:
    """Return the strength beyond which some wrong token lies nearer, for each draw of noise. (n_draws,) float64."""
    model = lm.cut(cut)
    generator = torch.Generator().manual_seed(1000 * cut.layer + position)
    noise = torch.randn(n_draws, lm.width(cut), generator=generator)  # (N, D)
    row = model.row(prompt[:position])
    truth = row.run(prompt[position : position + 1], torch.tensor([position]))[0].float()  # (D,)
    least = torch.full((n_draws,), torch.inf)
    for ids in torch.arange(lm.vocab_size).split(_BATCH):
        gaps = row.run(ids, torch.full_like(ids, position)).float() - truth  # (V', D)
        along = noise @ gaps.T  # (N, V')
        needed = gaps.square().sum(dim=1) / (2 * along)
        needed[(along <= 0) | (ids == prompt[position])] = torch.inf
        least = torch.minimum(least, needed.amin(dim=1))
    return least.double()


def strength_at(share: float, critical: Tensor, weights: Tensor) -> float:
    """Return the strength that leaves this share of the tokens, by weight, to nearest search. (N,), (N,)."""
    order = critical.argsort()
    lost = weights[order].cumsum(dim=0) / weights.sum()
    return float(critical[order][int((lost < 1 - share).sum().clamp(max=len(order) - 1))])


if __name__ == "__main__":
    main()
