"""A small click log with something to learn in it, and folders made from it."""

from __future__ import annotations

import csv
import math
import random
from pathlib import Path

from autoint_fast.clicklog.prepare import prepare

CATEGORICAL, NUMERIC = ("site", "ad", "device"), ("age", "visits")
COLUMNS = ("click", *CATEGORICAL, *NUMERIC)


def write_log(path: Path, rows: int, seed: int = 0) -> Path:
    """CSV with a header; clicks follow site and ad together, device and age; some values are missing."""
    effects = random.Random("effects")
    sites, ads = ([effects.gauss(0, 1.5) for _ in range(n)] for n in (12, 20))
    draw = random.Random(seed)
    with path.open("w", newline="", encoding="utf-8") as file:
        log = csv.writer(file)
        log.writerow(COLUMNS)
        for _ in range(rows):
            site, ad, device = draw.randrange(12), draw.randrange(20), draw.choice(("phone", "pc", ""))
            age, visits = draw.choice(("", draw.randint(10, 80))), draw.randint(0, 100)
            logit = sites[site] * ads[ad] + (device == "phone") + (int(age) / 40 if age else 0.5) - 1
            click = int(draw.random() < 1 / (1 + math.exp(-logit)))
            log.writerow([click, f"site {site}", f"ad {ad}", device, age, visits])
    return path


def prepared(folder: Path, rows: int = 2000) -> Path:
    """A prepared log of so many rows, 8:1:1."""
    log = write_log(folder / "log.csv", rows)
    out = folder / "data"
    prepare([log], out, label="click", categorical=CATEGORICAL, numeric=NUMERIC)
    return out
