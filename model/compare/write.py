"""A comparison as files: comparison.json, and a page for people that needs nothing from another host."""

from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path

import msgspec

from model.compare.comparison import Comparison, Side
from model.compare.rows import Row
from model.compare.statistics import Interval

SHOWN_ROWS = 200
STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:60rem;margin:2rem auto;padding:0 1rem;color:#222}
table{border-collapse:collapse;margin:.5rem 0 1.5rem}th,td{padding:.25rem .75rem;border-bottom:1px solid #ddd;
text-align:left}
.no{color:#a40000;font-weight:600}.yes{color:#1a7f37;font-weight:600}code{font-size:13px}"""


def write(comparison: Comparison, folder: Path, rows: Sequence[Row] = ()) -> None:
    """comparison.json and comparison.html. rows: those of the data set, if the page shows the texts that the two answer
    differently."""
    folder.mkdir(parents=True, exist_ok=True)
    content = msgspec.json.format(msgspec.json.encode(comparison), indent=2) + b"\n"
    for name, data in (("comparison.json", content), ("comparison.html", page(comparison, rows).encode())):
        aside = folder / f".{name}.tmp"
        aside.write_bytes(data)
        aside.replace(folder / name)


def page(comparison: Comparison, rows: Sequence[Row]) -> str:
    """Everything in it is escaped: names and texts come from files."""
    word, kind = ("Promote", "yes") if comparison.promote else ("Do not promote", "no")
    champion, candidate = comparison.champion, comparison.candidate
    sides = (("champion", champion), ("candidate", candidate))
    differ = comparison.disagreements
    parts = [
        f"<h1>{escape(candidate.name)} {escape(candidate.version)}: <span class={kind}>{word}</span></h1>",
        f"<p>{comparison.data['rows']} rows, sha256 <code>{escape(str(comparison.data['sha256']))}</code></p>",
        "<h2>Thresholds</h2>",
        _table(
            ("", "found", "held to", ""),
            [(each.name, f"{each.found:g}", f"{each.limit:g}", "holds" if each.passed else "fails")
             for each in comparison.checks],
        ),
        "<h2>The two</h2>",
        _table(("", "artifact", "digest", "accuracy", "mean score", "seconds", "MB"), [_side(*each) for each in sides]),
        f"<p>Difference {_percent(comparison.difference)}, McNemar's exact p {comparison.mcnemar_p:g}; time ratio "
        f"{comparison.time_ratio:g}, size ratio {comparison.size_ratio:g}. Intervals at "
        f"{comparison.thresholds['confidence']:.0%}: Wilson's; of differences Bonett and Price's for paired rows.</p>",
        "<h2>Slices</h2>",
        _table(
            ("slice", "rows", "champion", "candidate", "difference"),
            [(name, f"{each.rows}", f"{each.champion:.2%}", f"{each.candidate:.2%}", _percent(each.difference))
             for name, each in comparison.slices.items()],
        ),
        "<h2>Predictions</h2>",
        _table(
            ("label", "in the data", "champion", "candidate"),
            [(label, *(f"{counts.get(label, 0)}" for counts in
                       (comparison.labels, champion.predicted, candidate.predicted)))
             for label in champion.predicted],
        ),
        "<h2>Disagreements</h2>",
        f"<p>{differ.count} rows: {differ.only_candidate_right} only the candidate gets right, "
        f"{differ.only_champion_right} only the champion, {differ.both_wrong} neither. comparison.json has their "
        "numbers.</p>",
        _texts(differ.rows, rows),
    ]  # fmt: skip
    title = escape(f"{champion.name} {champion.version} and {candidate.version}")
    return (
        f'<!doctype html>\n<html lang="en"><meta charset="utf-8"><title>{title}</title>'
        f"<style>{STYLE}</style>\n" + "\n".join(parts) + "\n</html>\n"
    )


def _side(word: str, side: Side) -> tuple[str, ...]:
    numbers = _percent(side.accuracy), f"{side.mean_score:g}", f"{side.seconds:.3f}", f"{side.bytes / 1e6:.1f}"
    return (word, f"{side.name} {side.version}", side.digest[:16], *numbers)


def _texts(numbers: Sequence[int], rows: Sequence[Row]) -> str:
    wanted = set(numbers)
    shown = [(f"{row.number}", row.label, row.text) for row in rows if row.number in wanted][:SHOWN_ROWS]
    return _table(("row", "label", "text"), shown) if shown else ""


def _percent(found: Interval) -> str:
    return f"{found.estimate:.2%} ({found.low:.2%} to {found.high:.2%})"


def _table(head: Iterable[str], body: Iterable[Iterable[str]]) -> str:
    rows = "\n".join("<tr>" + "".join(f"<td>{escape(cell)}</td>" for cell in row) + "</tr>" for row in body)
    return f"<table><tr>{''.join(f'<th>{escape(cell)}</th>' for cell in head)}</tr>\n{rows}</table>"
