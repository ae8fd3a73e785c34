"""A fleet of replicas under a HPA, on paper: `python -m loadtest.simulate report.json`.

hpa (the algorithm) → replica (what one does with a load) → fleet (all of them over time) → sweep (which target is
cheapest) → report, plots.
"""
