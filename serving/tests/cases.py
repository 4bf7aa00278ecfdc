"""Requests that vLLM and the package must answer alike: pictures of all sizes and kinds, one or more, and histories."""

import base64
import io
from functools import cache
from itertools import count

import numpy as np
from PIL import Image

SIZES = [  # (width, height)
    *[(1, 1), (16, 16), (31, 33), (64, 64), (100, 100), (224, 224), (512, 512), (1000, 1000), (2000, 2000)],
    *[(640, 480), (480, 640), (1280, 720), (1999, 1201), (333, 77), (77, 333), (1000, 50), (50, 1000)],
    *[(2000, 10), (10, 2000), (200, 1), (1, 200), (1600, 90), (97, 1511)],
]
QUESTIONS = ("What is in this picture?", "Read the text.", "Which bar is the highest?", "How many circles are there?")


def picture(width: int, height: int, seed: int) -> Image.Image:
    """Waves and a few rectangles."""
    random = np.random.default_rng(seed)
    x, y = np.arange(width)[None], np.arange(height)[:, None]
    pixels = np.stack([127 * (1 + np.sin(x / 9 + seed + k) * np.cos(y / 7 - k)) for k in range(3)], axis=-1)
    for _ in range(4):
        left, top = random.integers(width), random.integers(height)
        pixels[top : top + 1 + height // 4, left : left + 1 + width // 5] = random.integers(256, size=3)
    return Image.fromarray(pixels.astype(np.uint8))


def data_uri(image: Image.Image, file_format: str = "PNG", **options) -> str:
    file = io.BytesIO()
    image.save(file, file_format, **options)
    return f"data:image/{file_format.lower()};base64,{base64.b64encode(file.getvalue()).decode()}"


def message(question: str, *images: Image.Image | str) -> dict:
    uris = [image if isinstance(image, str) else data_uri(image) for image in images]
    parts = [{"type": "image_url", "image_url": {"url": uri}} for uri in uris]
    return {"role": "user", "content": [*parts, {"type": "text", "text": question}]}


def special_files() -> dict[str, str]:
    """Files whose pixels depend on how they are read, as data URIs."""
    image = picture(300, 200, 77)
    gradient = Image.fromarray(np.linspace(0, 255, 300).astype(np.uint8)[None].repeat(200, axis=0))
    transparent = image.copy()
    transparent.putalpha(gradient)
    rotated = Image.Exif()
    rotated[0x0112] = 6  # orientation: turned by 90 degrees
    return {
        "alpha": data_uri(transparent),
        "gray and alpha": data_uri(transparent.convert("LA")),
        "palette": data_uri(image.convert("P"), transparency=0),
        "16 bits": data_uri(Image.fromarray((np.asarray(gradient).astype(np.uint16) * 257).copy())),
        "EXIF": data_uri(image, "JPEG", exif=rotated),
        "large JPEG": data_uri(picture(3600, 2400, 78), "JPEG"),
        "WebP": data_uri(image, "WEBP"),
    }


@cache
def conversations() -> dict[str, list[dict]]:
    """50 conversations by name."""
    seeds = count()
    cases = {}
    for index, (width, height) in enumerate(SIZES):
        cases[f"{width} x {height}"] = [message(QUESTIONS[index % 4], picture(width, height, next(seeds)))]
    for name, uri in special_files().items():
        cases[name] = [message(QUESTIONS[0], uri)]
    for number in (2, 3):
        for sizes in ([(200, 100), (100, 300), (64, 64)], [(640, 480), (1, 1), (900, 60)], [(32, 32)] * 3):
            images = [picture(*size, next(seeds)) for size in sizes[:number]]
            cases[f"{number} pictures {sizes[:number]}"] = [message("What differs?", *images)]
    cases["a picture between texts"] = [
        {
            "role": "user",
            "content": [
                {"type": "text", "text": "Look: "},
                *message("What is it?", picture(150, 150, 50))["content"],
                *message("And this>", picture(90, 250, 51))["content"],
            ],
        }
    ]
    first = message(QUESTIONS[0], picture(320, 240, 40))
    answer = {"role": "assistant", "content": "a circle"}
    cases["history"] = [first, answer, {"role": "user", "content": "And its color?"}]
    cases["history with a second picture"] = [first, answer, message("And here?", picture(240, 320, 41))]
    cases["history of three turns"] = [*cases["history"], answer, message("And here?", picture(60, 70, 42))]
    cases["text, then a picture"] = [
        {"role": "user", "content": "Hello!"},
        answer,
        message("This?", picture(96, 96, 43)),
    ]
    system = {"role": "system", "content": "You answer in one word."}
    cases["system message"] = [system, message(QUESTIONS[1], picture(111, 222, 44))]
    for question in ("Hello!", "What is 2 + 2?", "你好", "A <image> in a text", "one\n\ntwo > three", "<ref>a</ref> x"):
        cases[f"text: {question}"] = [{"role": "user", "content": question}]
    cases["text: history"] = [{"role": "user", "content": "Hi"}, answer, {"role": "user", "content": "Again"}]
    cases["text: long"] = [{"role": "user", "content": "a few words and " * 60}]
    return cases
