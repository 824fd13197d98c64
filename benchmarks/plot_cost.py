"""Draw cost against layer, prompt length and vocabulary from several records of `sipit bench`, of any models.

python -m benchmarks.plot_cost --out docs/cost.svg RECORD.json …   (needs the "report" extra)
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

from sipit.report.cost import draw_cost


def main() -> None:
    """Read the records and write the figure."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("records", nargs="+", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    draw_cost([json.loads(path.read_text("utf-8")) for path in options.records], options.out)


if __name__ == "__main__":
    main()
