"""Boxes of an answer: which are found, their pixels, and what is drawn."""

import numpy as np
import pytest
from conftest import ROOT, recorded_image, refused
from fuzzing import fuzz, texts
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image, ImageColor, ImageFont

from navil import LabeledBox, draw_boxes
from navil.processing_navil import BOX_COLORS

BLANK = Image.new("RGB", (400, 200), "white")
CAT = ("cat", 40, 50, 80, 160)  # of [100, 250, 200, 800] on BLANK


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("<ref>cat</ref><box>[[100, 250, 200, 800]]</box>", [CAT]),
        ("<ref> cat </ref>\n<box> [ [100,250, 200 ,800] ] </box> and more", [CAT]),
        ("<ref>cat</ref><box>[[100, 250, 200, 800], [0, 0, 1000, 1000]]</box>", [CAT, ("cat", 0, 0, 400, 200)]),
        ("<ref>cat</ref><box>[[100.2, 250.0, 199.8, 799.9]]</box>", [CAT]),
        ("<ref>cat</ref><box>[100, 250, 200, 800]</box>", [CAT]),
        ("A <ref>cat</ref><box>[[100, 250, 200, 800]]</box>, <ref>猫 <3</ref><box>[[0, 0, 500, 500]]</box>.",
         [CAT, ("猫 <3", 0, 0, 200, 100)]),
        # Without tags, as `chat` gives answers of released models.
        ("cat[[100, 250, 200, 800]]", [CAT]),
        ("Two are here.\ncat: [[100, 250, 200, 800]], 2 dogs [[0, 0, 500, 500]]", [CAT, ("2 dogs", 0, 0, 200, 100)]),
        ("<box>[[100, 250, 200, 800]]</box><box>[[0, 0, 500, 500]]</box>", [("", *CAT[1:]), ("", 0, 0, 200, 100)]),
        # The edges, and boxes without an area: at least a pixel.
        ("cat[[1000, 1000, 1000, 1000]]", [("cat", 399, 199, 400, 200)]),
        ("cat[[0, 500, 0, 500]]", [("cat", 0, 100, 1, 101)]),
        # What is not a complete box is ignored.
        ("<ref>cat</ref><box>[[100, 250, 200, 800], [100, 250, 2", [CAT]),
        ("<ref>cat</ref><box>[[100, 250, 200, 800", []),
        ("<ref>cat</ref><box>[[1, 2], [100, 250, 200, 800], [1, 2, 3, 4, 5]]</box>", [CAT]),
        ("<ref>cat</ref><box>[[-1, 2, 3, 4], [1, 2, 3, 1001], [5, 2, 3, 4], [1, 5, 3, 4]]</box>", []),
        ("<ref>cat<box>[[100, 250, 200, 800]]</box>", [CAT]),
        ("The list [1, 2, 3, 4] is no box, nor is [[a, b, c, d]].", []),
        ("<box></box><ref></ref>[[[[]]]]" + "9" * 5000, []),
        ("", []),
    ],
)  # fmt: skip
def test_boxes_that_are_found(answer, expected):
    boxes, picture = draw_boxes(BLANK, answer)
    assert boxes == expected and all(isinstance(box, LabeledBox) for box in boxes)
    assert (picture.tobytes() == BLANK.tobytes()) == (not expected)


PIECES = ("<ref>", "</ref>", "<box>", "</box>", "[", "]", "[[", "]]", ", ", "-", ".5", "\n", "cat", "1e9")
ANSWERS = st.lists(st.one_of(st.sampled_from(PIECES), st.integers(0, 1100).map(str), texts), max_size=30).map("".join)
QUADRUPLES = st.lists(st.integers(-50, 1050), min_size=4, max_size=4).map(lambda numbers: f"[{numbers}]")


@fuzz
@given(
    answer=st.lists(st.one_of(ANSWERS, QUADRUPLES), max_size=4).map("".join),
    size=st.tuples(st.integers(1, 300), st.integers(1, 300)),
)
def test_any_answer_gives_boxes_inside_the_picture(answer, size):
    boxes, picture = draw_boxes(Image.new("RGB", size), answer)
    assert picture.size == size
    assert all(0 <= box.left < box.right <= size[0] and 0 <= box.upper < box.lower <= size[1] for box in boxes)


def test_the_outline_lies_on_the_box_and_inside_stays():
    image = recorded_image(640, 480, 0)
    before = image.tobytes()
    [box], picture = draw_boxes(image, "<box>[[250, 250, 750, 750]]</box>")
    assert box == ("", 160, 120, 480, 360)
    pixels, color = np.asarray(picture), ImageColor.getrgb(BOX_COLORS[0])
    changed = (pixels != np.asarray(image)).any(-1)
    expected = np.zeros((480, 640), bool)
    expected[120:360, 160:480] = True
    expected[123:357, 163:477] = False  # 3 pixels wide
    assert image.tobytes() == before and (pixels[expected] == color).all()
    assert not changed[~expected].any()


@pytest.mark.parametrize("size", [(24, 24), (640, 480), (100, 3000), (4000, 3000)])
@pytest.mark.parametrize("corners", ["[0, 0, 300, 300]", "[400, 600, 999, 999]"])
def test_labels_are_drawn_inside_the_picture_at_every_size(size, corners):
    image = Image.new("RGB", size, "white")
    _, plain = draw_boxes(image, f"<box>[{corners}]</box>")
    _, labeled = draw_boxes(image, f"<ref>cat</ref><box>[{corners}]</box>")
    label = (np.asarray(labeled) != np.asarray(plain)).any(-1)
    rows, columns = np.nonzero(label)
    height = rows.max() - rows.min() + 1
    area = (size[0] * size[1]) ** 0.5
    assert height >= min(8, size[1]) and area / 60 < height < max(20, area / 10)
    letters = np.asarray(labeled)[rows, columns].min(-1)
    assert letters.max() > 150  # nearly white, on a color without blue


def test_equal_labels_have_equal_colors():
    boxes, picture = draw_boxes(BLANK, "a[[0, 0, 200, 900]] b[[300, 0, 500, 900]] a[[600, 0, 800, 900]]")
    corners = [picture.getpixel((box.right - 1, box.lower - 1)) for box in boxes]
    assert corners == [ImageColor.getrgb(BOX_COLORS[number]) for number in (0, 1, 0)]


def test_another_font():
    answer = "<ref>cat</ref><box>[[100, 250, 200, 800]]</box>"
    pictures = [draw_boxes(BLANK, answer, font)[1].tobytes() for font in (None, ImageFont.load_default(40))]
    assert pictures[0] != pictures[1]


def test_the_picture_is_read_as_the_model_saw_it(tmp_path):
    image = recorded_image(60, 40, 0)
    exif = Image.Exif()
    exif[274] = 6  # to be turned by 90 degrees
    image.save(tmp_path / "turned.png", exif=exif)
    for form in (tmp_path / "turned.png", (tmp_path / "turned.png").read_bytes()):
        [box], picture = draw_boxes(form, "[[0, 0, 500, 500]]")
        assert box == ("", 0, 0, 20, 30) and picture.size == (40, 60)
    gray = np.zeros((30, 20), np.uint8)
    boxes, picture = draw_boxes(gray, "nothing")
    assert boxes == [] and (picture.mode, picture.size) == ("RGB", (20, 30))


def test_what_cannot_be_drawn_on():
    with refused("cannot read an image from 'none.png'"):
        draw_boxes("none.png", "cat[[1, 2, 3, 4]]")
    with pytest.raises(TypeError, match="answer must be a text, got None"):
        draw_boxes(BLANK, None)


def test_boxes_of_tiny_and_of_a_released_tokenizer(tiny, recordings):
    path = ROOT / "examples" / "box.png"
    answer = tiny.model.chat(tiny.tokenizer, path, "Where is the green circle?")
    [box], picture = tiny.model.draw_boxes(path, answer)
    assert box == ("green circle", 17, 13, 65, 62)
    pixels = np.asarray(Image.open(path).convert("RGB")).astype(int)
    rows, columns = np.nonzero(pixels[..., 1] > pixels[..., 0] + 64)  # of the circle
    circle = columns.min(), rows.min(), columns.max() + 1, rows.max() + 1
    assert np.abs(np.subtract(circle, box[1:])).max() <= 1
    assert picture.getpixel((17, 40)) == ImageColor.getrgb(BOX_COLORS[0])
    for recording in recordings.values():
        ids = recording.tokenizer("<ref>a cat</ref><box>[[100, 250, 200, 800]]</box>").input_ids
        text = recording.tokenizer.decode(ids, skip_special_tokens=True)
        assert "<box>" not in text
        assert draw_boxes(BLANK, text)[0] == [("a cat", *CAT[1:])]
