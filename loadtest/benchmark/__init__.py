"""This server beside its ceiling, its floor and a plain script: `python -m loadtest.benchmark`; `budget` says where the
CPU time of one request goes. Knows the server's commands and settings; only `ceiling` and `gpu_sections` run its code.
"""
