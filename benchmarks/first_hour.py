"""The transcript of docs/first-hour.md: run its commands in order, and put what they print below them.

    python benchmarks/first_hour.py                       # about five minutes; writes the page anew
    python benchmarks/first_hour.py --folder /tmp/hour    # and keeps the runs there

The commands and the sentences are the page's own. A block of `bash` that is followed by a block of `text` is run, in
one folder for all, and the text becomes its output, with standard error, abridged by the rules of SHOWN: what is left
out stands as `...`, and long lines are folded. The command that `judge` advises is the next one that is typed; where it
advises another one now, the script says so and stops. The verdict of the study goes into the README as well.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import textwrap
from pathlib import Path

from summary import machine

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "first-hour.md"
STEP = re.compile(r"^```bash\n(pyro-vae [^\n]*)\n```\n\n```text\n(.*?)^```$", re.DOTALL | re.MULTILINE)
WIDTH = 116
# Of which command which lines are shown, the first rule that fits it; None: all.
SHOWN = (
    (r"fit --epochs", None),
    (r"fit ", r"going on|new weights|from  |test |run  |next:"),
    (r"judge ", r"verdict|.*(had not ended|can be relied upon)|report|  type .*--epochs|ELBO and|training  |"
                r"remedies tried|next:"),
    (r"compare .*--dry-run", r"diagonal, elbo  seed 0|full, iwae  .*seed 1|budget|\d+ fits"),
    (r"compare --vary", r"study |1 done|8 done|(?!\d+ done)"),
)  # fmt: skip
PICTURES = ("reconstructions.png", "latent_space.png")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="an empty one for the runs, which is kept")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = given.folder or Path(scratch)
        folder.mkdir(parents=True, exist_ok=True)
        advised, printed = None, {}
        for command, _ in steps(PAGE.read_text(encoding="utf-8")):
            if advised is not None and command != advised:
                raise SystemExit(f"judge advises now: {advised}\nthe page has: {command}\nWrite that into the page.")
            print(command, flush=True)
            lines = typed(command, folder)
            advised = lines[-1].removeprefix("next: ") if command.startswith("pyro-vae judge") else None
            printed[command] = "\n".join(abridged(command, lines))
        text = PAGE.read_text(encoding="utf-8")
        for command, output in printed.items():
            text = with_output(text, command, output)
        about = machine(1, "cpu")
        versions = ", ".join(
            f"{name} {about['versions'][name]}" for name in ("python", "torch", "pyro-ppl", "pyro-vae")
        )
        text = between(text, "machine", f"{about['cpu']}, {about['cores']} cores, {versions}")
        for name in PICTURES:
            shutil.copy(folder / "runs" / "first" / "figures" / name, ROOT / "docs" / "images" / f"first-{name}")
        PAGE.write_text(text, encoding="utf-8")
        front()


def front() -> None:
    """Put the study's verdict into the README, as it stands in the page."""
    (shown,) = [lines for command, lines in steps(PAGE.read_text(encoding="utf-8")) if "--vary" in command
                and "--dry-run" not in command]  # fmt: skip
    first = next(i for i, line in enumerate(shown) if "nats of log p(x) [" in line)
    readme, verdict = ROOT / "README.md", "\n".join(shown[first : shown.index("", first)])
    readme.write_text(between(readme.read_text("utf-8"), "study", f"\n```text\n{verdict}\n```\n"), encoding="utf-8")


def steps(text: str) -> list[tuple[str, list[str]]]:
    """The commands of the page, each with the lines that stand below it."""
    return [(command, shown.splitlines()) for command, shown in STEP.findall(text)]


def typed(command: str, folder: Path) -> list[str]:
    """What a command prints."""
    run = [sys.executable, "-m", "pyro_vae", *command.split()[1:]]
    done = subprocess.run(run, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    if done.returncode:
        raise SystemExit(f"{command} ended with {done.returncode}:\n{done.stdout}")
    return done.stdout.rstrip().splitlines()


def abridged(command: str, lines: list[str]) -> list[str]:
    """The lines that the page shows."""
    rule = next((kept for pattern, kept in SHOWN if re.match(f"pyro-vae {pattern}", command)), None)
    found: list[str] = []
    for line in lines:
        if rule is None or re.match(rule, line):
            found.extend(folded(line.rstrip()))
        elif found[-1:] != ["..."]:
            found.append("...")
    return found


def folded(line: str) -> list[str]:
    """A long line as a terminal has it, but indented to where its text begins; no word is broken."""
    label = re.match(r" {4,}|( *\S+(?: \S+)* {2,})?", line)
    indent = " " * (len(label[0]) if label is not None and 0 < len(label[0]) < 40 else 2)
    return textwrap.wrap(line, WIDTH, subsequent_indent=indent, break_on_hyphens=False, break_long_words=False) or [""]


def with_output(text: str, command: str, output: str) -> str:
    """The page with the output of one command."""
    start = f"```bash\n{command}\n```\n\n```text\n"
    before, _, after = text.partition(start)
    return before + start + output + "\n" + after[after.index("```\n") :]


def between(text: str, name: str, words: str) -> str:
    """The page with other words between `<!-- name -->` and `<!-- /name -->`."""
    found, times = re.subn(
        rf"(<!-- {name} -->).*?(<!-- /{name} -->)", lambda m: m[1] + words + m[2], text, flags=re.DOTALL
    )
    if times != 1:
        raise SystemExit(f"the page has {times} places <!-- {name} -->, wanted one.")
    return found


if __name__ == "__main__":
    main()
