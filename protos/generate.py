"""Generates the Python stubs of every .proto file below this folder.

- The stubs stand beside their .proto, so that proto package == folder == import path.
- `--out DIR` writes the same tree elsewhere: the drift test compares the two.
- Needs grpcio-tools and mypy-protobuf at the locked versions: other versions write other bytes.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

import grpc_tools
from grpc_tools import protoc

HERE = Path(__file__).resolve().parent


def generate(out: Path) -> None:
    """Writes the stubs of all .proto files below `out`.

    Raises:
        SystemExit: protoc refused a file; its own message is on stderr.
    """
    sources = sorted(str(path.relative_to(HERE)) for path in HERE.glob("identity_api/**/*.proto"))
    well_known = Path(grpc_tools.__file__).parent / "_proto"
    # protoc finds the mypy plugins on PATH: beside this interpreter.
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    code = protoc.main(
        [
            "protoc",
            f"--proto_path={HERE}",
            f"--proto_path={well_known}",
            f"--python_out={out}",
            f"--grpc_python_out={out}",
            f"--mypy_out={out}",
            f"--mypy_grpc_out={out}",
            *sources,
        ]
    )
    if code:
        sys.exit(code)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=HERE, help="where to write (default: in place)")
    generate(parser.parse_args().out)
