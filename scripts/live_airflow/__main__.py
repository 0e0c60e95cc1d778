"""The watchdog of a `ProcessFamily`: `python -m scripts.live_airflow MARK`."""

from __future__ import annotations

import sys

from scripts.live_airflow.processes import kill_marked


def main() -> None:
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    # End of input: the process that started us has ended, one way or another.
    sys.stdin.buffer.read()
    kill_marked(sys.argv[1])


if __name__ == "__main__":
    main()
