# SPDX-License-Identifier: Apache-2.0
"""Find faces in a photograph with pretrained weights, through jaxwin and through jax.lax.

    python examples/detect_faces.py               # the astronaut photograph of scikit-image
    python examples/detect_faces.py family.jpg    # a picture of yours

Prints each face, draws it into a PNG, checks that both ways agree, and says which kernel ran each
convolution. Exit codes: 0 done, 1 the check failed or a package is missing, 2 unusable input.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from pathlib import Path
from typing import Any

MISSING = "`make demo` has everything that the examples need, as has pip install '.[demo]'"
try:
    import jax
    import numpy as np
    import skimage.data
    from jax import Array, lax
    from mtcnn_jax import (
        LANDMARKS,
        O_BATCH,
        R_BATCH,
        Detector,
        Face,
        Weights,
        load_weights,
        onet,
        pnet,
        rnet,
    )
    from PIL import Image, ImageDraw, ImageOps, UnidentifiedImageError

    import jaxwin
except ModuleNotFoundError as error:
    sys.exit(f"detect_faces: {error}; {MISSING}")

OUT = Path(__file__).resolve().parent / "out"
RUNS = 7
BOX_TOLERANCE = 0.05  # pixels
SCORE_TOLERANCE = 1e-4
CONVOLUTIONS = {"jaxwin": jaxwin.conv_general_dilated, "lax": lax.conv_general_dilated}

Pixels = np.ndarray[Any, Any]


class InputError(Exception):
    """A picture that cannot be used; the text is for the user."""


def read_image(path: Path) -> Pixels:
    """RGB bytes, turned upright as the camera's orientation mark says."""
    try:
        with Image.open(path) as image:
            return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))
    except FileNotFoundError:
        raise InputError(f"{path}: no such file") from None
    except UnidentifiedImageError:
        raise InputError(f"{path}: not an image that Pillow can read") from None
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: {getattr(error, 'strerror', None) or error}") from None


def draw(pixels: Pixels, faces: list[Face], path: Path) -> None:
    image = Image.fromarray(pixels)
    canvas = ImageDraw.Draw(image)
    line = max(2, max(image.size) // 300)
    for face in faces:
        canvas.rectangle(face.box, outline=(255, 220, 0), width=line)
        canvas.text((face.box[0], face.box[1] - 12), f"{face.score:.4f}", fill=(255, 220, 0))
        for x, y in face.landmarks:
            canvas.ellipse((x - line, y - line, x + line, y + line), fill=(0, 255, 120))
    path.parent.mkdir(parents=True, exist_ok=True)
    image.save(path)


def describe(face: Face) -> str:
    left, top, right, bottom = face.box
    lines = [
        f"face  score {face.score:.6f}  box ({left:.1f}, {top:.1f}) to ({right:.1f}, {bottom:.1f})"
    ]
    lines += [
        f"      {name:<12} ({x:.1f}, {y:.1f})"
        for name, (x, y) in zip(LANDMARKS, face.landmarks, strict=True)
    ]
    return "\n".join(lines)


def differences(ours: list[Face], theirs: list[Face]) -> tuple[float, float]:
    """The largest difference of a coordinate in pixels, and of a score."""
    pixels, scores = [0.0], [0.0]
    for a, b in zip(ours, theirs, strict=True):
        pixels += np.abs(np.subtract(a.box, b.box)).tolist()
        pixels += np.abs(np.subtract(a.landmarks, b.landmarks)).ravel().tolist()
        scores.append(abs(a.score - b.score))
    return max(pixels), max(scores)


def median_times(detectors: dict[str, Detector], pixels: Pixels) -> dict[str, float]:
    """Seconds of a whole detection; the ways take turns, so that other load hits both."""
    times: dict[str, list[float]] = {name: [] for name in detectors}
    for _ in range(RUNS):
        for name, detector in detectors.items():
            start = time.perf_counter()
            detector(pixels)
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(t) for name, t in times.items()}


def explain_networks(weights: Weights, size: tuple[int, int]) -> object:
    """What jaxwin says of every convolution, P-Net on the first level of the pyramid only."""
    conv = jaxwin.conv_general_dilated

    def networks(level: Array, small: Array, large: Array) -> tuple[Any, ...]:
        return (
            pnet(conv, weights.pnet, level),
            rnet(conv, weights.rnet, small),
            onet(conv, weights.onet, large),
        )

    shapes = ((1, *size, 3), (R_BATCH, 24, 24, 3), (O_BATCH, 48, 48, 3))
    return jaxwin.explain(networks, *(jax.numpy.zeros(shape) for shape in shapes))


def run(path: Path | None, out: Path | None, min_face: int) -> int:
    if path is None:
        pixels, name = skimage.data.astronaut(), "astronaut"
    else:
        pixels, name = read_image(path), path.stem
    height, width = pixels.shape[:2]
    if min(height, width) < min_face:
        raise InputError(
            f"{path or name}: {width} x {height} pixels is too small, "
            f"the smallest face looked for is {min_face} x {min_face}"
        )

    weights = load_weights()
    detectors, found = {}, {}
    print(f"{name}: {width} x {height} pixels", flush=True)
    for way, conv in CONVOLUTIONS.items():
        detectors[way] = Detector(weights, conv, height, width, min_face)
        print(f"compiling and running through {way} ...", flush=True)
        found[way] = detectors[way](pixels)

    faces = found["jaxwin"]
    print("\n" + ("\n".join(map(describe, faces)) or "no face found"))
    out = out or OUT / f"{name}_faces.png"
    try:
        draw(pixels, faces, out)
    except (OSError, ValueError) as error:
        raise InputError(f"{out}: cannot write the picture: {error}") from None
    print(f"picture: {out}\n", flush=True)

    times = median_times(detectors, pixels)
    print(f"whole detection, warm, median of {RUNS} runs:")
    for way, seconds in times.items():
        print(f"  {way:<8} {1e3 * seconds:8.1f} ms")

    print("\nconvolutions (P-Net on the first level of the pyramid, R-Net, O-Net):")
    print(explain_networks(weights, detectors["jaxwin"].sizes[0]))

    if len(faces) != len(found["lax"]):
        print(f"\nFAILED: {len(faces)} faces through jaxwin, {len(found['lax'])} through lax")
        return 1
    pixel_error, score_error = differences(faces, found["lax"])
    agree = pixel_error <= BOX_TOLERANCE and score_error <= SCORE_TOLERANCE
    print(
        f"\n{'OK' if agree else 'FAILED'}: jaxwin against lax, {len(faces)} face(s), coordinates "
        f"differ by at most {pixel_error:.2g} pixels, scores by at most {score_error:.2g}"
    )
    if path is None and (len(faces) != 1 or faces[0].score < 0.99):
        print("FAILED: the astronaut picture has one face with a score above 0.99")
        return 1
    return 0 if agree else 1


def main() -> int:
    parser = argparse.ArgumentParser(description="Find faces in a photograph through jaxwin.")
    parser.add_argument(
        "image", nargs="?", type=Path, help="an image file (default: scikit-image's astronaut)"
    )
    parser.add_argument(
        "--out", type=Path, help="the PNG to write (default: examples/out/NAME_faces.png)"
    )
    parser.add_argument(
        "--min-face", type=int, default=20, help="the smallest face, in pixels (default: 20)"
    )
    arguments = parser.parse_args()
    if arguments.min_face < 12:
        parser.error("--min-face: 12 pixels at least")
    try:
        return run(arguments.image, arguments.out, arguments.min_face)
    except InputError as error:
        print(f"detect_faces: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:  # the package that has the weights
        sys.exit(f"detect_faces: {error}; {MISSING}")


if __name__ == "__main__":
    sys.exit(main())
