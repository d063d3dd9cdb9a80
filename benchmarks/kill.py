"""Kill a sweep again and again, then let it finish: nothing may be lost, left or wrong.

    python benchmarks/kill.py            # 20 kills, about 5 minutes on two cores
    python benchmarks/kill.py --kills 3

`promptkit run coop --workers 2` is killed at random moments, by SIGKILL, SIGTERM and
SIGINT in turn. After each kill no process of it may live for longer than 10 seconds; a
signal that can be answered must be answered within 5 seconds, by exit code 143 or 130
and one sentence. In the end the sweep finishes: its numbers must be those of a sweep
that nobody disturbed, bit for bit, and no temporary file may be left.
"""

import argparse
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

MARK = "PROMPTKIT_KILL"  # in the environment of every process of a sweep
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LEAVE = 10  # seconds for every process to be gone
ANSWER = 5  # seconds for a signal to be answered


def command(results: Path, seeds: int) -> list[str]:
    """A sweep of short trainings."""
    return [
        *(sys.executable, "-m", "promptkit", "run", "coop", "--data", "sat"),
        *("--shots", "1", "--epochs", "1", "--profile", "smoke", "--workers", "2"),
        *("--seeds", f"1-{seeds}", "--results", str(results)),
    ]


def start(results: Path, mark: str, seeds: int, cache: Path) -> subprocess.Popen:
    """Start a sweep whose processes bear a mark."""
    environment = os.environ | {MARK: mark, "PROMPTKIT_CACHE": str(cache)}
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(str, sys.path)))
    return subprocess.Popen(
        command(results, seeds),
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def alive(mark: str) -> list[int]:
    """Processes whose environment bears a mark."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if f"{MARK}={mark}".encode() in (folder / "environ").read_bytes():
                found.append(int(folder.name))
        except OSError:  # ended meanwhile, or not ours
            continue
    return found


def kill(process, mark, number) -> str:
    """End a sweep by a signal; returns what is wrong, if anything."""
    began = time.monotonic()
    process.send_signal(number)
    said = process.communicate(timeout=60)[1]
    took = time.monotonic() - began
    while alive(mark) and time.monotonic() - began < LEAVE:
        time.sleep(0.2)
    problems = []
    if left := alive(mark):
        problems.append(f"{len(left)} processes live on")
    if number == signal.SIGKILL or process.returncode == 0:  # it was just finished
        return "; ".join(problems)
    if took > ANSWER:
        problems.append(f"{number.name} was answered after {took:.1f} s")
    if process.returncode != 128 + number:
        problems.append(f"exit code {process.returncode} after {number.name}")
    if said.count("Interrupted") != 1 or "Traceback" in said:
        problems.append(f"said {said[-300:]!r}")
    return "; ".join(problems)


def numbers(results: Path) -> dict:
    """Run -> its rows and losses."""
    records = [json.loads(path.read_text()) for path in results.glob("few-shot/*.json")]
    return {r["hash"]: (r["rows"], r["training"]["losses"]) for r in records}


def temporaries(*folders) -> list[Path]:
    """Files that somebody began to write."""
    return [
        path
        for folder in folders
        for path in folder.rglob(".*")
        if path.is_file() and "-" in path.suffix
    ]


def main():
    """Kill, finish, compare; exit code 1 if anything is wrong."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seeds", type=int, default=24)
    parser.add_argument("--random", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    chance = random.Random(options.random)
    # A process that was started in the background ignores Ctrl-C, and so would its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        folder, cache = Path(folder), Path(folder) / "cache"
        began = time.monotonic()
        start(folder / "first", "first", options.seeds, cache).communicate()  # caches
        since = time.monotonic()
        whole = start(folder / "whole", "whole", options.seeds, cache)
        whole.communicate()
        undisturbed = time.monotonic() - since
        print(f"undisturbed: {undisturbed:.1f} s, exit code {whole.returncode}")
        disturbed, killed, tried = folder / "disturbed", 0, 0
        while killed < options.kills:
            mark, tried = f"kill{tried}", tried + 1
            number = SIGNALS[killed % len(SIGNALS)]
            wait = chance.uniform(0.4, 1.0) * undisturbed
            process = start(disturbed, mark, options.seeds, cache)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                problem, killed = kill(process, mark, number), killed + 1
                stored = len(numbers(disturbed))
                print(f"{killed:3} {number.name} {wait:.1f} s: {stored} runs {problem}")
                problems += [problem] if problem else []
            else:  # it was faster; once more, from the beginning
                process.communicate()
                for path in disturbed.glob("few-shot/*.json"):
                    path.unlink()
        last = start(disturbed, "last", options.seeds, cache)
        said = last.communicate()[1]
        if last.returncode:
            problems.append(f"the last sweep failed: {said[-300:]}")
        if numbers(disturbed) != numbers(folder / "whole"):
            problems.append("the numbers differ from those of the undisturbed sweep")
        left = temporaries(disturbed, cache)
        if left:  # too young to be swept: another process might be writing them
            print(f"{len(left)} temporary files, to be swept after a minute")
            time.sleep(65)
            start(disturbed, "swept", options.seeds, cache).communicate()
            left = temporaries(disturbed, cache)
        problems += [f"left: {path}" for path in left]
        print(f"{len(numbers(disturbed))} runs, in {time.monotonic() - began:.0f} s")
    print("\n".join(problems) or "nothing was lost, left or wrong")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
