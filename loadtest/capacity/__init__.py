"""Finds what one replica carries within an objective and derives autoscaling targets: `python -m loadtest.capacity`.

run → measure (one step) · explore (which steps) → analysis (knee, objective) · openloop (Poisson arrivals) → derive
(targets, as arithmetic; sizes) → report, component. `schema` has the records that all of them share.
"""
