"""Which tokens a noisy row may be of, and tokens replaced in a decoded prompt, against brute force and float64."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from sipit import LanguageModel, Observation
from sipit.inversion import NoiseModel
from sipit.inversion.inverses.kernel_regression import arc_cosine_kernel
from sipit.inversion.judging.meter import Meter
from sipit.inversion.noise.beam_search import Beams, BeamSearch, _Ahead, _Ranked
from sipit.inversion.noise.effort import Effort
from sipit.inversion.noise.kernel_errors import kernel_errors, standard_of
from sipit.inversion.noise.prior import TokenPrior, log_probabilities_along
from sipit.inversion.noise.revision import Revision
from sipit.inversion.noise.token_map import TokenMap
from sipit.inversion.noise.token_ranking import Shown, TokenRanking
from sipit.observations import Cut
from tests.tiny_models import random_ids, text_model

LAYER = 2
IDS = random_ids(8, seed=3, vocab_size=256)


@pytest.fixture(scope="module")
def lm() -> LanguageModel:
    return text_model()


def _noisy(lm: LanguageModel, sigma: float) -> Observation:
    seen = lm.capture(input_ids=IDS, layer=LAYER)
    noise = torch.randn(seen.states.shape, generator=torch.Generator().manual_seed(0))
    return replace(seen, states=seen.states + sigma * noise)


def test_what_is_left_out_is_what_the_others_do_not_predict() -> None:
    generator = torch.Generator().manual_seed(0)
    features, errors = torch.randn(12, 5, generator=generator), torch.randn(12, 5, generator=generator)
    found = kernel_errors(features, errors, strengths=[0.3])
    ridge = 0.3 * float(arc_cosine_kernel(features, features).diagonal().mean())
    for one in range(12):
        others = torch.arange(12) != one
        gram = arc_cosine_kernel(features[others], features[others]).double() + ridge * torch.eye(11).double()
        cross = arc_cosine_kernel(features[one : one + 1], features[others]).double()
        predicted = cross @ torch.linalg.solve(gram, errors[others].double())
        assert torch.allclose(found.left_out[one], (errors[one] - predicted[0]).float(), atol=1e-3)


def test_standard_rows_have_mean_zero_and_like_spread() -> None:
    rows = torch.randn(500, 4, generator=torch.Generator().manual_seed(0)) * torch.tensor([1.0, 5.0, 9.0, 2.0]) + 3
    got = standard_of(rows)(rows)
    assert torch.allclose(got.mean(dim=0), torch.zeros(4), atol=1e-4)
    assert torch.allclose(got.std(dim=0), torch.ones(4), atol=0.02)


def _map(n_tokens: int, width: int) -> TokenMap:
    generator = torch.Generator().manual_seed(1)
    table, spread = torch.randn(n_tokens, width, generator=generator), torch.randn(width, width, generator=generator)
    within = spread @ spread.T / width
    return TokenMap(
        table=table,
        mean=torch.randn(width, generator=generator),
        error=within + 0.5 * torch.eye(width),
        within=within,
        projection=None,
        centre=torch.zeros(width),
        covariance=torch.eye(width),
    )


def test_scores_behind_a_known_offset_are_normal_log_densities() -> None:
    mapped, variances = _map(9, 6), torch.tensor([0.3, 0.5, 1.0, 2.0, 0.1, 0.4])
    row, offset = torch.randn(6, generator=torch.Generator().manual_seed(2)), torch.linspace(-1, 1, 6)
    ids = torch.tensor([4, 4])
    states = (mapped.table[4] + mapped.mean + offset).expand(2, -1)  # of one beam: the offset is known exactly
    ranking = TokenRanking(mapped, variances)
    shown = Shown(token_ids=ids, beams=torch.zeros(2, dtype=torch.long), states=states, n_beams=1)
    got = ranking.by_map(row, shown, torch.ones(1))
    for token in range(9):
        centre = mapped.table[token] + mapped.mean + offset
        law = torch.distributions.MultivariateNormal(centre.double(), (mapped.within + variances.diag()).double())
        assert float(got[token]) == pytest.approx(float(law.log_prob(row.double())), abs=1e-3)


@pytest.mark.parametrize("are_alike", [True, False])
def test_errors_of_tokens_run_sharpen_those_of_others(*, are_alike: bool) -> None:
    """Where errors follow from what the map says, a token that was not run ranks higher; else as high."""
    generator, n, width = torch.Generator().manual_seed(4), 400, 6
    mapped = _map(n, width)
    turn = torch.randn(width, width, generator=generator)
    free = torch.randn(n, width, generator=generator)
    errors = (mapped.table @ turn).relu() if are_alike else free * mapped.within.diagonal().sqrt()
    states = mapped.table + mapped.mean + errors - errors.mean(dim=0)
    run, others = torch.arange(n)[::2], torch.arange(n)[1::2]
    ranking = TokenRanking(mapped, torch.full((width,), 0.01))
    known: dict[bool, float] = {}
    for learns in (False, True):
        shown = Shown(token_ids=run, beams=torch.zeros_like(run), states=states[run], n_beams=1)
        scores = [
            ranking.sharpened(states[token], shown, torch.arange(n))[0]
            if learns
            else ranking.by_map(states[token], shown, torch.ones(1))
            for token in others
        ]
        known[learns] = sum(float(s.log_softmax(dim=0)[token]) for s, token in zip(scores, others, strict=True)) / n
    if are_alike:
        assert known[True] > known[False] + 0.5
    else:
        assert known[True] > known[False] - 0.1


def _log_posterior(lm: LanguageModel, seen: Observation, ids: Tensor, sigma: float) -> float:
    logs = log_probabilities_along(lm, ids, 0, Meter())
    states = lm.cut(seen.cut).ordinary(ids).double()
    return float(logs[torch.arange(len(ids)), ids].sum() - 0.5 * ((states - seen.states) / sigma).square().sum())


def _beams(lm: LanguageModel, prompt: Tensor) -> Beams:
    flat = torch.full((len(prompt), lm.vocab_size), 1 / lm.vocab_size, dtype=torch.float64)
    return Beams(input_ids=prompt[None], posteriors=torch.ones(1), token_posteriors=flat, distances=[])


@pytest.mark.parametrize("wrong", [(0,), (4,), (7,), (0, 5)])
def test_wrong_tokens_are_replaced(lm: LanguageModel, wrong: tuple[int, ...]) -> None:
    sigma = 0.05
    seen, prompt = _noisy(lm, sigma), IDS.clone()
    beams = _beams(lm, prompt)
    for place in wrong:
        prompt[place] = (prompt[place] + 40) % lm.vocab_size
        beams.token_posteriors[place] *= 1e-3  # among many, what was right is likely enough to be tried
        beams.token_posteriors[place, IDS[place]] = 1e-2
    found = Revision(lm, seen, NoiseModel.gaussian(sigma), Meter()).likeliest(replace(beams, input_ids=prompt[None]))
    assert found.tolist() == IDS.tolist()


@pytest.mark.parametrize("is_thorough", [False, True])
def test_a_thorough_look_tries_tokens_that_the_search_gave_no_chance(lm: LanguageModel, *, is_thorough: bool) -> None:
    prompt = IDS.index_fill(0, torch.tensor([4]), int(IDS[4] + 40) % lm.vocab_size)
    beams = _beams(lm, prompt)
    beams.token_posteriors.zero_()
    revision = Revision(lm, _noisy(lm, 0.05), NoiseModel.gaussian(0.05), Meter())
    assert revision.likeliest(beams, is_thorough=is_thorough).tolist() == (IDS if is_thorough else prompt).tolist()


def test_a_replacement_is_one_that_makes_the_prompt_likelier(lm: LanguageModel) -> None:
    """Where noise hides tokens, what the revision gains is what ordinary passes of both prompts say."""
    sigma = 2.0
    seen = _noisy(lm, sigma)
    prompt = random_ids(8, seed=11, vocab_size=256)
    found = Revision(lm, seen, NoiseModel.gaussian(sigma), Meter()).likeliest(_beams(lm, prompt))
    assert found.tolist() != prompt.tolist()
    assert _log_posterior(lm, seen, found, sigma) > _log_posterior(lm, seen, prompt, sigma)


@pytest.mark.parametrize(("is_fast", "error"), [(False, 1e-3), (True, 0.1)])
def test_log_probabilities_along_a_prompt_are_those_of_its_beams(
    lm: LanguageModel, is_fast: bool, error: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("sipit.inversion.inverses.arithmetic.is_fast_in_bfloat16", lambda _: is_fast)
    along = log_probabilities_along(lm, IDS, 0, Meter())
    prior = TokenPrior(lm, torch.empty(0, dtype=torch.long), Meter(), max_batch=8, seq_len=len(IDS))
    for place, token in enumerate(IDS.tolist()):
        assert torch.allclose(along[place], prior.probabilities[0].double().log(), atol=error)
        prior.grow(torch.tensor([token]), torch.tensor([0]))
    behind = log_probabilities_along(lm, IDS, 3, Meter())
    assert torch.allclose(behind, along[3:], atol=1e-6)


def test_a_hint_is_followed_to_the_end(lm: LanguageModel) -> None:
    """A prompt that no beam would keep is among those left, at its own small share."""
    sigma, odd = 0.3, random_ids(8, seed=21, vocab_size=256)
    narrow = Effort(n_beams=1, n_shown=1, n_candidates=(1,), n_surprised=0)
    beams = BeamSearch(lm, _noisy(lm, sigma), NoiseModel.gaussian(sigma), Meter(), narrow).run(hint=odd)
    assert odd.tolist() in beams.input_ids.tolist()
    assert odd.tolist() != beams.input_ids[0].tolist()


def test_what_lies_beside_a_prompt_is_as_likely_as_ordinary_passes_say(lm: LanguageModel) -> None:
    sigma = 1.0
    seen, prompt = _noisy(lm, sigma), IDS.clone()
    beams, named = _beams(lm, prompt), [(0, 7), (3, 90), (6, 200), (6, 201)]
    beams.token_posteriors.zero_()
    for place, token in named:
        beams.token_posteriors[place, token] = 0.1
    ended = torch.stack([prompt, prompt.index_fill(0, torch.tensor([6]), 201)])  # the search ended with one of them
    own = _log_posterior(lm, seen, prompt, sigma)
    expected = 0.0
    for place, token in named[:3]:
        other = prompt.index_fill(0, torch.tensor([place]), token)
        expected += float(torch.tensor(_log_posterior(lm, seen, other, sigma) - own).double().exp())
    revision = Revision(lm, seen, NoiseModel.gaussian(sigma), Meter())
    assert revision.beside(replace(beams, input_ids=ended)) == pytest.approx(expected, rel=1e-2)


def test_nothing_to_replace_leaves_the_prompt(lm: LanguageModel) -> None:
    beams = _beams(lm, IDS)
    beams.token_posteriors.zero_()
    revision = Revision(lm, _noisy(lm, 0.1), NoiseModel.gaussian(0.1), Meter())
    assert revision.likeliest(beams).tolist() == IDS.tolist()
    assert revision.beside(beams) == 0.0


def test_a_missed_token_surprises_though_its_row_is_no_longer_than_noise_makes_it(lm: LanguageModel) -> None:
    """At this noise the nearest wrong states lengthen the whole residual by less than it varies by itself."""
    sigma, row = 4.0, 5
    prefix, states = IDS[:row], lm.capture(input_ids=IDS, layer=LAYER).states
    all_states = lm.cut(Cut(LAYER)).row(prefix).run(torch.arange(256), torch.full((256,), row)).float()
    gaps = (all_states - states[row]).square().sum(dim=1) / sigma**2  # (V,)
    lengthened = gaps / (2 * states.shape[1]) ** 0.5  # standard deviations of the whole residual
    hidden = ((lengthened > 2) & (lengthened < 4)).nonzero()[:, 0].tolist()
    n_right = n_missed = n_long = 0
    shown = Shown(token_ids=torch.arange(256), beams=torch.zeros(256, dtype=torch.long), states=all_states, n_beams=1)
    for seed in range(20):
        noise = sigma * torch.randn(states.shape, generator=torch.Generator().manual_seed(seed))
        seen = Observation(states=states + noise, layer=LAYER)
        search = BeamSearch(lm, seen, NoiseModel.gaussian(sigma), Meter())
        n_right += search._is_surprising(row, shown, int(IDS[row]))
        n_missed += sum(search._is_surprising(row, shown, token) for token in hidden)
        whole = ((all_states[hidden] - seen.states[row]) / sigma).square().sum(dim=1)
        n_long += int((whole > states.shape[1] + 4 * (2 * states.shape[1]) ** 0.5).sum())
    assert n_right <= 2
    assert n_missed > 0.5 * 20 * len(hidden)
    assert n_long < 0.6 * n_missed


def test_what_the_map_says_of_tokens_not_run_is_on_the_scale_of_those_that_were() -> None:
    """A map that is off by a constant, as behind an odd prefix, changes no share."""
    generator = torch.Generator().manual_seed(1)
    prior = torch.rand(2, 10, generator=generator).softmax(dim=1)
    scores, anywhere = torch.tensor([-3.0, -4.0], dtype=torch.float64), torch.full((10,), 0.1).double().log()
    ahead = _Ahead(prior=prior, scores=scores, tokens=torch.zeros(2, 0), unigram=anywhere)
    likely, by_map = torch.tensor([1, 4, 5, 8]), torch.randn(10, generator=generator).double()
    shown = Shown(token_ids=likely[:2], beams=torch.tensor([0, 1]), states=torch.empty(2, 0), n_beams=2)
    ranked = _Ranked(
        token_ids=likely,
        log_prior=ahead.behind(likely),
        likelihoods=by_map[likely].expand(2, -1),
        by_map=by_map,
    )
    exact = ahead.of(shown) + by_map[shown.token_ids]  # the map is right of what was run
    plain = ranked.unrun(ahead, shown, exact)
    off = replace(ranked, by_map=by_map + 150, likelihoods=ranked.likelihoods - 20).unrun(ahead, shown, exact)
    torch.testing.assert_close(off.log_elsewhere, plain.log_elsewhere)
    torch.testing.assert_close(off.log_scores, plain.log_scores)
    whole = torch.logaddexp(plain.log_mass, exact.logsumexp(dim=0))
    every = (ahead.behind(torch.arange(10)) + by_map).logsumexp(dim=(0, 1))  # of all tokens behind all beams
    torch.testing.assert_close(whole, every)
