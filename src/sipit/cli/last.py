"""`sipit invert` where the states of the last tokens alone are held, and `sipit fit --last`."""

from __future__ import annotations

from argparse import Namespace
from collections.abc import Sequence
from typing import TYPE_CHECKING

from sipit.cli.messages import say, say_verdict
from sipit.errors import OptionError, StorageError

if TYPE_CHECKING:
    from sipit.inversion import Inversion, LastOptions
    from sipit.models import LanguageModel
    from sipit.observations import Cut, Observation

_OPTIONS = ("max_tokens", "length", "seconds")


def is_last_asked(options: Namespace) -> bool:
    """Whether the user says that the rows are those of the last tokens of a prompt."""
    return any(getattr(options, name) is not None for name in _OPTIONS)


def last_options(options: Namespace) -> LastOptions:
    """Return which prompts are sought behind last rows, and for how long.

    Raises:
        OptionError: one of them is out of range.
    """
    from sipit.inversion import LastOptions

    return LastOptions(**{name: getattr(options, name) for name in _OPTIONS if getattr(options, name) is not None})


def inverted_last(lm: LanguageModel, seen: Observation, options: Namespace) -> Inversion:
    """Search for the whole prompt under the live display; on Ctrl-C say what came nearest."""
    from sipit.cli.display import LastDisplay
    from sipit.inversion import invert_last

    beside = {
        "--policy": options.policy != "auto",
        "--noise": options.noise != 0.0,
        "--exhaustive": options.exhaustive,
        "--resume": options.resume is not None,
        "--shuffled": options.shuffled,
        "--permuted": options.permuted,
    }
    for name in (name for name, is_given in beside.items() if is_given):
        raise OptionError(f"{name} has no meaning where the states of the last tokens alone are held; leave it out")
    chosen: LastOptions = last_options(options)
    with LastDisplay(lm) as display:
        try:
            found = invert_last(
                lm,
                seen,
                max_tokens=chosen.max_tokens,
                length=chosen.length,
                seconds=chosen.seconds,
                use_fit=not options.no_fit,
                on_progress=display.update,
            )
        except KeyboardInterrupt:
            display.close()
            say(f"stopped; {display.line or 'nothing was tried'}")
            raise
    say_verdict(found)
    return found


def fit_last(lm: LanguageModel, cuts: Sequence[Cut], options: Namespace, texts: Sequence[str]) -> int:
    """Train the prompt networks of some cuts, one after the other."""
    from sipit.cli.display import CountDisplay
    from sipit.inversion.fitting.prompts import fit_prompts
    from sipit.inversion.inverses.prompt_store import load_prompt_fit, prompt_fit_path
    from sipit.storage import write_json

    reports = []
    for cut in cuts:
        made = None if options.again else load_prompt_fit(lm, cut)
        if made is not None:
            say(f"{prompt_fit_path(lm, cut)} is there already; pass --again to train anew")
        else:
            with CountDisplay(0) as display:
                path = fit_prompts(lm, cut, texts=texts, on_progress=display.fitting)
            made = load_prompt_fit(lm, cut)
            if made is None:
                raise StorageError(f"{path} was written but cannot be read back; train again")
            say(f"{path}: {made.report['seconds']:.0f} s")
        reports.append({"layer": cut.layer, "site": cut.site, **made.report})
        print(f"layer {cut.layer}, site {cut.site}: {made.report['nats']:.2f} nats a token in training")
    if options.json is not None:
        write_json(options.json, {"model": lm.name, "fingerprint": lm.fingerprint, "fits": reports})
    return 0
