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
def _kernel_commands(folder: Path) -> dict[str, list[tuple[list[str], Path]]]:
    """For every target (instruction set): the compiler's command lines, and the objects."""
    commands: dict[str, list[tuple[list[str], Path]]] = {}
    for entry in json.loads((folder / "compile_commands.json").read_text()):
        words = shlex.split(entry["command"])
        target = [word.split("=")[1] for word in words if word.startswith("-DJAXWIN_TARGET=")]
        if target and "-DJAXWIN_PLAIN_SYMBOLS" not in words:
            output = folder / words[words.index("-o") + 1]
            commands.setdefault(target[0], []).append((words, output))
    return commands


def kernel_objects() -> dict[str, list[Path]]:
    """The object files of the micro-kernels for every instruction set."""
    found = {
        target: [path for _, path in commands]
        for target, commands in _kernel_commands(build_folder()).items()
    }
    for path in (path for paths in found.values() for path in paths):
        if not path.is_file():
            missing(f"{path} was not built")
    return found


def plain_library(folder: Path) -> Path:
    """Links the build's micro-kernels, as they are, to a library of plain symbols."""
    build, objects = build_folder(), kernel_objects()
    assert objects, "the build has no micro-kernels"
    source = _ROOT / "ffi" / "kernels" / "plain_symbols.cc"
    parts = [str(path) for paths in objects.values() for path in paths]
    for target, commands in _kernel_commands(build).items():
        # For any CPU: what an instruction set needs is in its objects.
        words = [word for word in commands[0][0] if not word.startswith("-m")]
        parts.append(str(folder / f"{target}.o"))
        words[words.index("-o") + 1] = parts[-1]
        words[words.index("-c") + 1] = str(source)
        subprocess.run(words, cwd=build, check=True)
    library = folder / "kernels.so"
    # -z now: the emulated code must find its calls resolved
    link = [words[0], "-shared", "-Wl,-z,now", "-Wl,-z,defs", "-o", str(library), *parts, "-lm"]
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
