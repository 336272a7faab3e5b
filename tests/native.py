# SPDX-License-Identifier: Apache-2.0
"""The native build as CMake left it: its kernel objects, and a library of plain symbols.

The folder is $JAXWIN_BUILD, else the one below build/ in the checkout whose extension was built
last, without sanitizers. A test that needs one and finds none is skipped, unless
JAXWIN_REQUIRE_BUILD is set (as .ci/run does): then it fails.
"""

from __future__ import annotations

import functools
import json
import os
import shlex
import subprocess
from pathlib import Path

import pytest

_ROOT = Path(__file__).resolve().parent.parent


def build_folder() -> Path:
    """The folder of the build; skips the test, or fails it, where there is none."""
    named = os.environ.get("JAXWIN_BUILD")
    candidates = [Path(named)] if named else [_ROOT / "build", *(_ROOT / "build").glob("*")]
    built = {path: time for path in candidates if (time := _built_at(path)) is not None}
    if not built:
        missing("no finished CMake build of ffi/ here: pip install -e . makes one")
    return max(built, key=lambda path: built[path])


def _built_at(folder: Path) -> float | None:
    """When the extension in a build folder was made; None where it is no build that counts."""
    commands, extensions = folder / "compile_commands.json", list(folder.glob("_ffi*.so"))
    if not commands.is_file() or not extensions or "-fsanitize=" in commands.read_text():
        return None
    return max(path.stat().st_mtime for path in extensions)


def missing(reason: str) -> None:
    """Skips a test for want of something, or fails it where nothing may be wanting."""
    if os.environ.get("JAXWIN_REQUIRE_BUILD"):
        pytest.fail(reason)
    pytest.skip(reason)


@functools.cache
def _kernel_commands(folder: Path) -> dict[str, tuple[list[str], Path]]:
    """For every target (instruction set): the compiler's command line, and the object."""
    commands = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        target = [word.split("=")[1] for word in words if word.startswith("-DJAXWIN_TARGET=")]
        if target and "-DJAXWIN_TEST_KERNELS" not in words:
            output = folder / words[words.index("-o") + 1]
            commands[target[0]] = (words, output)
    return commands


def kernel_objects() -> dict[str, Path]:
    """The object file of the micro-kernels for every instruction set."""
    objects = {target: path for target, (_, path) in _kernel_commands(build_folder()).items()}
    for path in objects.values():
        if not path.is_file():
            missing(f"{path} was not built")
    return objects


def plain_library(folder: Path) -> Path:
    """Compiles the micro-kernels, with the build's own flags, to a library of plain symbols."""
    build = build_folder()
    running, objects = [], []
    for target, (words, _) in _kernel_commands(build).items():
        words = list(words)
        objects.append(str(folder / f"{target}.o"))
        words[words.index("-o") + 1] = objects[-1]
        running.append(subprocess.Popen([*words, "-DJAXWIN_TEST_KERNELS"], cwd=build))
    assert running, "the build has no micro-kernels"
    assert all(process.wait() == 0 for process in running)
    library = folder / "kernels.so"
    # -z now: the emulated code must find its calls resolved
    link = [words[0], "-shared", "-Wl,-z,now", "-Wl,-z,defs", "-o", str(library), *objects, "-lm"]
    subprocess.run(link, check=True)
    return library


def plain_symbols(library: str, target: str) -> set[str]:
    """The names of the kernels that a plain library has for an instruction set."""
    command = ["nm", "-D", "--defined-only", library]
    listing = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    names = (line.split()[-1] for line in listing.splitlines())
    prefix, suffix = "jaxwin_test_", f"_{target}"
    return {
        n[len(prefix) : -len(suffix)] for n in names if n.startswith(prefix) and n.endswith(suffix)
    }
