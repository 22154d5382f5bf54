"""From the command to the chat's prompt, in a terminal of its own: the first time, when the built-in model is put together,
and after it.

    python benchmarks/startup.py [--repeats 5]
"""

import argparse
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "paddlemix" / "examples" / "llava" / "run_predict_multiround.py")]
COMMAND += ["--image-file", str(ROOT / "paddlemix" / "examples" / "llava" / "images" / "scene.png")]
PROMPT = b"USER: "


def seconds_to_prompt(home: str) -> float:
    """Starts the chat, waits for its prompt, and ends it."""
    ours, theirs = pty.openpty()
    began = time.perf_counter()
    variables = dict(os.environ, PPMIX_HOME=home)
    process = subprocess.Popen(COMMAND, stdin=theirs, stdout=theirs, stderr=theirs, env=variables)
    os.close(theirs)
    shown = b""
    try:
        while PROMPT not in shown:
            shown += os.read(ours, 4096)
        return time.perf_counter() - began
    except OSError:  # the program has ended
        raise SystemExit(f"the chat ended before its prompt:\n{shown.decode(errors='replace')}") from None
    finally:
        process.kill()
        process.wait()
        os.close(ours)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=5)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as home:
        print(f"first time: {seconds_to_prompt(home):.1f} s")
        again = [seconds_to_prompt(home) for _ in range(arguments.repeats)]
    listed = ", ".join(f"{seconds:.1f}" for seconds in sorted(again))
    print(f"after it: median {statistics.median(again):.1f} s ({listed})")


if __name__ == "__main__":
    main()
