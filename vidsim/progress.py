"""Progress that a person can follow: a bar on a terminal, otherwise a line a minute."""

import sys

import tqdm


def bar(
    iterable=None, *, total=None, desc: str = "", unit: str = "it", initial: int = 0
) -> tqdm.tqdm:
    """A `tqdm` bar on stderr with rate and time left; on no terminal it prints once a minute."""
    terminal = sys.stderr.isatty()
    return tqdm.tqdm(
        iterable,
        total=total,
        desc=desc,
        unit=unit,
        initial=initial,
        file=sys.stderr,
        dynamic_ncols=terminal,
        ncols=None if terminal else 120,
        mininterval=0.2 if terminal else 60.0,
        maxinterval=1.0 if terminal else 120.0,
    )
