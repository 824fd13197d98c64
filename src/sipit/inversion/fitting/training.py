"""Train an inverse network to tell the true token from sampled others.

Cross-entropy over the true tokens of the batch and uniformly drawn ones, each logit corrected by
how often its token is in the sample, so that the softmax over the whole vocabulary is calibrated.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sipit.inversion.fitting.checkpoint import resumed, save_checkpoint
from sipit.inversion.fitting.memory import release_free_memory
from sipit.inversion.fitting.states import CapturedStates, OnStep
from sipit.inversion.inverses.arithmetic import fast_arithmetic
from sipit.inversion.inverses.network import KEY_LENGTH, InverseNetwork, beside
from sipit.inversion.inverses.token_keys import TokenKeys
from sipit.inversion.inverses.whitening import whitening

_RIDGE_ROWS = 60_000
_PART = 8192  # of them held at once
_RIDGE = 0.01
_RIDGE_GAIN = 4.0  # a sane scale of the logits to start from
_WHITENING_FLOOR = 1e-3  # of the mean eigenvalue
_EARLY, _EARLY_REPEATS = 4, 3  # positions below 4 are trained on three times more often
_SAVE_EVERY = 40  # steps between checkpoints
_RELEASE_EVERY = 10  # steps: each leaves holes of many megabytes among what is in use


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How an inverse is trained; the defaults are the measured ones."""

    n_windows: int = 3584
    length: int = 128  # tokens a window
    d_hidden: int = 2048
    batch_size: int = 2048
    epochs: int = 1  # a second one makes it surer than it is right
    n_negatives: int = 2048
    learning_rate: float = 1e-3  # of the hidden layer
    output_rate: float = 0.2  # of the layers that feed the logits, relative to it
    weight_decay: float = 0.01
    seed: int = 0


def train(
    states: CapturedStates,
    windows: Tensor,
    keys: TokenKeys,
    *,
    recipe: Recipe,
    checkpoint: Path,
    on_step: OnStep,
) -> InverseNetwork:
    """Return a network trained on captured states; goes on from the checkpoint if there is one.

    Args:
        states: of the windows.
        windows: their token ids, (N, L). Position 0 is no target, but a neighbour of position 1.
        keys: of the model.
        recipe: sizes and rates.
        checkpoint: where to keep the state of the training.
        on_step: told the steps done.
    """
    ids, length = windows.reshape(-1), states.length
    rows = torch.arange(len(ids))
    places = rows % length
    early = rows[(places > 0) & (places < _EARLY)].repeat(_EARLY_REPEATS)  # a window has few of these
    rows = torch.cat([rows[places > 0], early])
    generator = torch.Generator().manual_seed(recipe.seed)
    device = keys.whitening.device
    network = InverseNetwork(states.width, keys.width, keys.vocab_size, recipe.d_hidden).to(device)
    network.reset(generator)
    sample = rows[torch.randperm(len(rows), generator=generator)[:_RIDGE_ROWS]]
    network.mean, network.whitener = (t.to(device) for t in _whitening(states, sample))
    table = torch.cat([keys.keys(part) for part in torch.arange(keys.vocab_size).split(8192)])
    table = (table * KEY_LENGTH).bfloat16()  # (V, K), while training only
    _start_at_ridge(network, states, ids, sample, table)
    optimizer = _optimizer(network, recipe)
    n_steps = recipe.epochs * max(1, len(rows) // recipe.batch_size)
    log_in = _log_inclusion(ids, recipe, keys.vocab_size).to(device)  # (V,)
    first = resumed(checkpoint, network, optimizer)
    for step in range(first, n_steps):
        batch = _batch(rows, step, recipe)
        generator.manual_seed(recipe.seed * 1_000_003 + step)  # a resumed run draws what an unbroken one would
        rate = recipe.learning_rate * min(1.0, (step + 1) / 50)
        rate *= 0.02 + 0.49 * (1 + math.cos(math.pi * step / n_steps))
        for group in optimizer.param_groups:
            group["lr"] = rate * group["scale"]
        x = _inputs(network, states, batch)  # (B, 3 D)
        drawn = torch.randint(keys.vocab_size, (recipe.n_negatives,), generator=generator).to(device)
        loss = _sampled_loss(network, x, ids[batch].to(device), table=table, log_in=log_in, drawn=drawn)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(network.parameters(), 1.0)
        optimizer.step()
        if (step + 1) % _RELEASE_EVERY == 0:
            release_free_memory()
        on_step(step + 1, n_steps)
        if (step + 1) % _SAVE_EVERY == 0:
            save_checkpoint(checkpoint, step + 1, network, optimizer)
    return network.eval()


@lru_cache(maxsize=1)
def _shuffled(n_rows: int, seed: int) -> Tensor:
    return torch.randperm(n_rows, generator=torch.Generator().manual_seed(seed))


def _batch(rows: Tensor, step: int, recipe: Recipe) -> Tensor:
    """Return the rows of one step; each epoch goes through all of them in an order of its own."""
    per_epoch = max(1, len(rows) // recipe.batch_size)
    epoch, place = divmod(step, per_epoch)
    order = _shuffled(len(rows), recipe.seed * 7919 + epoch)
    return rows[order[place * recipe.batch_size : (place + 1) * recipe.batch_size]]


def _inputs(network: InverseNetwork, states: CapturedStates, rows: Tensor) -> Tensor:
    """Return the network's inputs at some rows of the captured states. (B,) → (B, 3 D)."""
    device = network.mean.device
    before, here, after = network.white(torch.cat(states.around(rows)).to(device)).chunk(3)
    return beside(before, here, after, (rows % states.length).to(device), states.length)


def _sampled_loss(
    network: InverseNetwork, x: Tensor, targets: Tensor, *, table: Tensor, log_in: Tensor, drawn: Tensor
) -> Tensor:
    tokens, place = torch.unique(torch.cat([drawn, targets]), return_inverse=True)  # (M,)
    place = place[len(drawn) :]  # (B,)
    with fast_arithmetic(x.device, torch.float32):
        query = network(x)
        logits = query @ table[tokens].to(query).T  # (B, M)
    logits = logits.float() + (network.bias[tokens] - log_in[tokens])
    logits = logits.scatter_add(1, place[:, None], log_in[targets][:, None])
    return F.cross_entropy(logits, place)


def _log_inclusion(ids: Tensor, recipe: Recipe, vocab_size: int) -> Tensor:
    """Return log P(token is among the drawn or the batch's targets) at a step. (V,)."""
    share = torch.bincount(ids, minlength=vocab_size).double() / ids.numel()
    absent = recipe.batch_size * torch.log1p(-share) + recipe.n_negatives * math.log1p(-1 / vocab_size)
    return torch.log(-torch.expm1(absent)).float()


def _whitening(states: CapturedStates, sample: Tensor) -> tuple[Tensor, Tensor]:
    """Return mean (D,) and symmetric W (D, D) that make (rows - mean) @ W white."""
    total = torch.zeros(states.width, dtype=torch.float64)
    gram = torch.zeros(states.width, states.width, dtype=torch.float64)
    for part in sample.split(_PART):
        rows = states.around(part)[1].double()  # (N, D)
        total += rows.sum(dim=0)
        gram += rows.T @ rows
    mean = total / len(sample)
    return mean.float(), whitening(gram / len(sample) - mean.outer(mean), _WHITENING_FLOOR)


def _start_at_ridge(
    network: InverseNetwork, states: CapturedStates, ids: Tensor, sample: Tensor, table: Tensor
) -> None:
    """Set the linear part to the ridge regression of unit keys."""
    device = table.device
    n_inputs = network.linear.in_features
    gram = torch.zeros(n_inputs, n_inputs, device=device)
    cross = torch.zeros(n_inputs, table.shape[1], device=device)
    for part in sample.split(_PART):
        x = _inputs(network, states, part)
        gram += x.T @ x
        cross += x.T @ (table[ids[part].to(device)].float() / KEY_LENGTH)
    gram.diagonal().add_(_RIDGE * len(sample))
    with torch.no_grad():
        network.linear.weight.copy_(_RIDGE_GAIN * torch.linalg.solve(gram, cross).T)


def _optimizer(network: InverseNetwork, recipe: Recipe) -> torch.optim.Optimizer:
    decay = recipe.weight_decay
    outputs = [network.linear.weight, network.down.weight]
    biases = [network.bias, network.linear.bias, network.up.bias]
    groups = [
        {"params": [network.up.weight], "scale": 1.0, "weight_decay": decay},
        {"params": outputs, "scale": recipe.output_rate, "weight_decay": decay},
        {"params": biases, "scale": 1.0, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=recipe.learning_rate, betas=(0.9, 0.98), fused=True)
