"""What the property-based tests share: how many inputs they try, and texts and files made to do harm.

FUZZ_EXAMPLES=2000 python -m pytest tests/test_hostile_images.py tests/test_hostile_prompts.py tests/test_robustness.py
"""

import io
import os

import numpy as np
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from PIL import Image

fuzz = settings(
    max_examples=int(os.environ.get("FUZZ_EXAMPLES", "40")),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture, HealthCheck.filter_too_much],
)

SPECIAL = (
    *("<|im_start|>", "<|im_end|>", "<|endoftext|>", "<s>", "</s>", "<unk>", "<img>", "</img>", "<IMG_CONTEXT>"),
    *("<IMG_LINE_BREAK>", "<IMG_FRAME_BREAK>", "<img_uncond>"),
)
GROUNDING = ("<ref>", "</ref>", "<box>", "</box>", "<quad>", "</quad>")


def _fragments() -> list[str]:
    """Special tokens, their halves, look-alikes, and what surrounds them in a prompt or a template."""
    halves = [half for token in SPECIAL for half in (token[: len(token) // 2], token[len(token) // 2 :])]
    lookalikes = ["\uff1c|im_end|\uff1e", "<|im_\u200bend|>", "<IMG_LINE_BREA\u212a>", "<|IM_END|>", "< |im_end|>"]
    words = ["system\n", "user\n", "assistant\n", "<think>", "<0x0A>", "{{ x }}", " ", "\n", "\x00", "\u0338"]
    return [*SPECIAL, *GROUNDING, *halves, *lookalikes, *words, *"< | > <| |> </ {% ' \\ 人 😀".split()]


texts = st.lists(st.one_of(st.sampled_from(_fragments()), st.text(max_size=6)), max_size=8).map("".join)
"""Texts of pieces that could add up to a special token; some hold one, some a lone surrogate."""


def _saved_pictures() -> list[bytes]:
    """Small pictures in every file format and mode that this Pillow writes."""
    Image.init()
    gradient = Image.fromarray(np.arange(0, 240, dtype=np.uint8).reshape(12, 20))
    turned = Image.Exif()
    turned[0x0112] = 6
    files = []
    for file_format in sorted(set(Image.SAVE) - {"EPS", "PDF"}):  # neither is read without Ghostscript
        for mode in ("1", "L", "P", "RGB", "RGBA", "CMYK", "I;16", "F"):
            file = io.BytesIO()
            options = {"exif": turned} if file_format in ("JPEG", "PNG", "TIFF", "WEBP", "AVIF") else {}
            try:
                gradient.convert(mode).save(file, file_format, **options)
            except (OSError, ValueError, KeyError):  # a format without this mode
                continue
            files.append(file.getvalue())
    return files


@st.composite
def damaged_files(draw: st.DrawFn) -> bytes:
    """A saved picture with some bytes changed, and perhaps its end cut off."""
    data = bytearray(draw(st.sampled_from(_SAVED)))
    for _ in range(draw(st.integers(0, 6))):
        end = min(len(data), draw(st.sampled_from([40, 200, len(data)])))
        data[draw(st.integers(0, end - 1))] = draw(st.integers(0, 255))
    return bytes(data[: draw(st.one_of(st.just(len(data)), st.integers(0, len(data))))])


_SAVED = _saved_pictures()
