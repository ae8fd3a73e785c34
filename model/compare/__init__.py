"""Whether a candidate may take a champion's place, over one labelled data set: `python -m model.compare`. Needs only
the serving dependencies."""

from model.compare.comparison import Comparison, compare
from model.compare.rows import Row, read_rows
from model.compare.verdict import Thresholds, add_thresholds, thresholds_of
from model.compare.write import write

__all__ = ["Comparison", "Row", "Thresholds", "add_thresholds", "compare", "read_rows", "thresholds_of", "write"]
