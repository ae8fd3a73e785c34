"""The readiness gate, offline: `python -m model.verify DIR`. Exit 0, or the server's own error line and exit code."""

import argparse
import logging
import sys
from pathlib import Path

from app.errors import StartupError
from app.runtime.loading import load_model


def main() -> None:
    """Command line of `python -m model.verify`."""
    parser = argparse.ArgumentParser(
        prog="python -m model.verify",
        description=__doc__,
        epilog="example: python -m model.verify my-model --provider cuda",
    )
    parser.add_argument("folder", type=Path, help="artifact folder")
    parser.add_argument("--digest", default="", help="sha256 that manifest.json must have")
    parser.add_argument("--public-key", type=Path, metavar="PEM", help="public keys, one of which must have signed it")
    parser.add_argument("--provider", choices=("auto", "cpu", "cuda"), default="cpu")
    args = parser.parse_args()
    # What libraries warn of is for their authors; standard error has one line.
    logging.captureWarnings(True)
    try:
        model = load_model(args.folder, digest=args.digest, public_key=args.public_key, provider=args.provider)
    except StartupError as error:
        print(f"model.verify: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    manifest = model.artifact.manifest
    stages = ", ".join(f"{stage} {seconds:.2f} s" for stage, seconds in model.stage_seconds.items())
    print(f"{args.folder}: {manifest.name} {manifest.version} passes on {model.provider} ({stages})")
    print(f"digest {model.artifact.digest}")
    print(f"golden outputs within {model.golden_error:.2g} of a tolerance of {manifest.golden.tolerance:g}")


if __name__ == "__main__":
    main()
