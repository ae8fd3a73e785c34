#!/bin/sh
# Writes DIR/pip.conf, and DIR/ca.pem if pip is told of a certificate: what of this machine's pip configuration makes
# sense inside a build. Folders of this machine do not.
set -eu
"${PYTHON:-python3}" -m pip config list | "${PYTHON:-python3}" -c '
import ast, pathlib, shutil, sys

KEYS = {"index-url", "extra-index-url", "trusted-host", "proxy", "default-timeout", "timeout", "retries", "cert"}
RANKS = {"global": 0, ":env:": 2}  # the section of a command comes between them
folder, chosen = pathlib.Path(sys.argv[1]), {}
for line in sorted(sys.stdin, key=lambda line: RANKS.get(line.partition(".")[0], 1)):
    name, _, value = line.strip().partition("=")
    key = name.rpartition(".")[2]
    if key in KEYS and "file:" not in value:
        chosen[key] = ast.literal_eval(value)
if "cert" in chosen:
    shutil.copyfile(chosen["cert"], folder / "ca.pem")
    chosen["cert"] = "/run/secrets/ca.pem"
lines = [f"{key} = " + " ".join(value.split()) for key, value in chosen.items()]
(folder / "pip.conf").write_text("\n".join(["[global]", *lines, ""]))
' "$1"
