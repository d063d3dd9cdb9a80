"""Kill a sweep again and again, then let it finish: nothing may be lost, left or wrong.

    python benchmarks/kill.py            # 20 kills, about 5 minutes on two cores
    python benchmarks/kill.py --kills 3
    python benchmarks/kill.py --kills 10 --fill

`promptkit run coop --workers 2`, or with --fill `promptkit evidence fill --workers 2`
for a chapter that asks for such runs, is killed at random moments, by SIGKILL, SIGTERM
and SIGINT in turn. After each kill no process of it may live for longer than 10
seconds; a signal that can be answered must be answered within 5 seconds, by exit code
143 or 130 and one sentence. In the end the sweep finishes: its numbers must be those of
a sweep that nobody disturbed, bit for bit, and no temporary file may be left.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import nbformat
import pandas as pd

MARK = "PROMPTKIT_KILL"  # in the environment of every process of a sweep
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
LEAVE = 10  # seconds for every process to be gone
ANSWER = 5  # seconds for a signal to be answered


CHAPTER = """
chapter = Chapter("01_kill", datasets=["sat"], seeds="1-{seeds}", shots=1)
chapter.sweep("few-shot", [("coop", {{"epochs": 1}})])
"""


def write_chapter(folder: Path, seeds: int):
    """A chapter that asks for short trainings."""
    folder.mkdir()
    new = nbformat.v4
    cells = [
        new.new_code_cell("profile = 'mini'", metadata={"tags": ["parameters"]}),
        new.new_code_cell("from promptkit.chapter import Chapter"),
        new.new_code_cell(CHAPTER.format(seeds=seeds)),
    ]
    nbformat.write(new.new_notebook(cells=cells), folder / "01_kill.ipynb")


def command(results: Path, seeds: int, chapters: Path | None) -> list[str]:
    """A sweep of short trainings."""
    if chapters is not None:
        words = ("evidence", "fill", "--notebooks", str(chapters), "--chapters", "01")
        return [sys.executable, "-m", "promptkit", *words, "--workers", "2"]
    return [
        *(sys.executable, "-m", "promptkit", "run", "coop", "--data", "sat"),
        *("--shots", "1", "--epochs", "1", "--profile", "smoke", "--workers", "2"),
        *("--seeds", f"1-{seeds}", "--results", str(results)),
    ]


def start(results: Path, mark: str, seeds: int, cache: Path, chapters=None):
    """Start a sweep whose processes bear a mark."""
    environment = os.environ | {MARK: mark, "PROMPTKIT_CACHE": str(cache)}
    environment["PROMPTKIT_RESULTS"] = str(results)
    environment["PROMPTKIT_EVIDENCE"] = str(results / "evidence")
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, map(str, sys.path)))
    return subprocess.Popen(
        command(results, seeds, chapters),
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
    """Run -> its rows and losses; of evidence all but how long it took and how much
    memory, which no two runs share.
    """
    if (table := results / "evidence" / "few-shot.csv").exists():
        rows = pd.read_csv(table, dtype=str).drop(columns=["seconds", "memory"])
        return dict(zip(rows["asked"], rows.values.tolist(), strict=True))
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
    parser.add_argument("--fill", action="store_true", help="of evidence")
    parser.add_argument("--random", type=int, default=0, help="seed of the moments")
    options = parser.parse_args()
    chance = random.Random(options.random)
    # A process that was started in the background ignores Ctrl-C, and so would its own.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    problems = []
    with tempfile.TemporaryDirectory() as folder:
        folder, cache = Path(folder), Path(folder) / "cache"
        began = time.monotonic()
        chapters = folder / "notebooks" if options.fill else None
        if chapters:
            write_chapter(chapters, options.seeds)
        more = options.seeds, cache, chapters
        start(folder / "first", "first", *more).communicate()  # caches
        since = time.monotonic()
        whole = start(folder / "whole", "whole", *more)
        whole.communicate()
        undisturbed = time.monotonic() - since
        print(f"undisturbed: {undisturbed:.1f} s, exit code {whole.returncode}")
        disturbed, killed, tried = folder / "disturbed", 0, 0
        while killed < options.kills:
            mark, tried = f"kill{tried}", tried + 1
            number = SIGNALS[killed % len(SIGNALS)]
            wait = chance.uniform(0.4, 1.0) * undisturbed
            process = start(disturbed, mark, *more)
            try:
                process.wait(wait)
            except subprocess.TimeoutExpired:
                problem, killed = kill(process, mark, number), killed + 1
                stored = len(list(disturbed.rglob("few-shot/*.json")))
                print(f"{killed:3} {number.name} {wait:.1f} s: {stored} runs {problem}")
                problems += [problem] if problem else []
            else:  # it was faster; once more, from the beginning
                process.communicate()
                shutil.rmtree(disturbed)
        last = start(disturbed, "last", *more)
        said = last.communicate()[1]
        if last.returncode:
            problems.append(f"the last sweep failed: {said[-300:]}")
        if numbers(disturbed) != numbers(folder / "whole"):
            problems.append("the numbers differ from those of the undisturbed sweep")
        left = temporaries(disturbed, cache)
        if left:  # too young to be swept: another process might be writing them
            print(f"{len(left)} temporary files, to be swept after a minute")
            time.sleep(65)
            start(disturbed, "swept", *more).communicate()
            left = temporaries(disturbed, cache)
        problems += [f"left: {path}" for path in left]
        print(f"{len(numbers(disturbed))} runs, in {time.monotonic() - began:.0f} s")
    print("\n".join(problems) or "nothing was lost, left or wrong")
    sys.exit(bool(problems))


if __name__ == "__main__":
    main()
